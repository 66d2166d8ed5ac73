"""How much one token counts: baselines, bounded rewards, and weights by its place in the row.

All are constants but `step_mean`, which spreads a loss.

`over` `[B, T]` is the boolean population; positions outside it enter no statistic and get 0.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.advantages import group_mean
from sdjax.kernels.distributions import NEVER
from sdjax.kernels.reductions import masked_sum

# ---- of one position -------------------------------------------------------------------------------------------------


def optimal_baseline(student: Array, teacher: Array) -> Array:
    """The baseline of least variance for the reward `r = log q - log p`: `[..., V] x2 -> [...]`.

    `b* = E_p[r |s|^2] / E_p[|s|^2]`, where `s_v = e_v - p` is the score with respect to the logits and
    `|s_v|^2 = 1 - 2 p_v + sum p^2`.  It depends on the position alone, so the expected gradient stays the same.  0 where
    the student is certain: there is no score to weigh with.

    Source: the optimum named in the appendix of Oh et al. 2026 (vOPD), arXiv:2605.07865; closed form ours.
    """
    chex.assert_equal_shape([student, teacher])
    student, teacher = (jax.lax.stop_gradient(jnp.maximum(x, NEVER)) for x in (student, teacher))
    chance = jnp.exp(student)
    weight = chance * (1.0 - 2.0 * chance + jnp.sum(chance**2, axis=-1, keepdims=True))
    return jnp.sum(weight * (teacher - student), axis=-1) / jnp.maximum(jnp.sum(weight, axis=-1), 1e-12)


def power_difference(student: Array, teacher: Array, alpha: float) -> Array:
    """`q^alpha - p^alpha` of two probabilities given as logarithms, within [-1, 1]: any shape.

    Its sign is that of `q - p`; divided by `alpha` it tends to `log q - log p` as alpha -> 0.
    Source: PowerOPD, arXiv:2606.17199.
    """
    chex.assert_equal_shape([student, teacher])
    # From the larger power down: exact at equality, and nothing overflows.
    larger, gap = jnp.maximum(student, teacher), jnp.abs(teacher - student)
    size = -jnp.exp(alpha * larger) * jnp.expm1(-alpha * gap)
    return jax.lax.stop_gradient(jnp.sign(teacher - student) * size)


# ---- of a row --------------------------------------------------------------------------------------------------------


def position_weight(over: Array, *, lowest: float, centre: float, width: float) -> Array:
    """`lowest + (1 - lowest) * sigmoid((r - centre) / width)`, `r = (t - 1/2) / length`: `[B, T]` bool `-> [B, T]`.

    `t` counts a row's tokens in `over` from 1.  It rises along the row; with a negative `width` it falls.  Its mean is
    below 1 (0.77 over a long row at the published values).  Source: PW-OPSD, arXiv:2605.21606.
    """
    chex.assert_type(over, bool)
    length = jnp.maximum(jnp.sum(over, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    place = (jnp.cumsum(over, axis=-1) - 0.5) / length
    return jnp.where(over, lowest + (1.0 - lowest) * jax.nn.sigmoid((place - centre) / width), 0.0)


def remaining_share(value: Array, over: Array) -> Array:
    """The share of a row's sum of magnitudes that lies at or after a token, `[B, T] -> [B, T]`: 1 at the first token.

    1 everywhere in a row of zeros.  Source: IW-OPD, arXiv:2606.22600, whose weight is `1 + gamma * share`.
    """
    chex.assert_equal_shape([value, over])
    size = jnp.where(over, jnp.abs(value.astype(jnp.float32)), 0.0)
    total = jnp.sum(size, axis=-1, keepdims=True)
    before = jnp.cumsum(size, axis=-1) - size
    share = 1.0 - before / jnp.where(total > 0.0, total, 1.0)
    return jax.lax.stop_gradient(jnp.where(over, share, 0.0))


def compounded_weight(factor: Array, over: Array) -> Array:
    """`c_1 = 1`, `c_k = 1 + factor_{k-1} c_{k-1}` along a row's tokens in `over`: `[B, T] x2 -> [B, T]`.

    The weights of the recursion `A_t = r_t + factor_t A_{t+1}`: `sum_t A_t = sum_t c_t r_t`.  Factors of 0 give ones.
    Source: DASH, arXiv:2608.06243.
    """
    chex.assert_equal_shape([factor, over])
    # What flows into token k is factor_{k-1} c_{k-1}; tokens outside pass on what flowed into them.
    ahead = lambda x, fill: jnp.concatenate([jnp.full_like(x[:, :1], fill), x[:, :-1]], axis=1)
    slope = ahead(jnp.where(over, factor.astype(jnp.float32), 1.0), 0.0)

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, weight = jax.lax.associative_scan(then, (slope, over.astype(jnp.float32)), axis=1)
    return jax.lax.stop_gradient(jnp.where(over, weight, 0.0))


def step_mean(value: Array, step: Array, over: Array) -> Array:
    """Every token's mean over the tokens in `over` of its step: `[B, T]`, int `[B, T]` < T, bool `-> [B, T]`.

    Sums over whole steps stay what they were.  Differentiable.  Source: Yu et al. 2026 (MOPD), arXiv:2605.12652, code.
    """
    chex.assert_equal_shape([value, step, over])
    rows, length = value.shape
    place = step + length * jnp.arange(rows)[:, None]
    total = lambda x: jnp.zeros(rows * length, jnp.float32).at[place].add(jnp.where(over, x, 0.0))[place]
    return jnp.where(over, total(value) / jnp.maximum(total(jnp.ones(over.shape)), 1.0), 0.0)


# ---- of a group ------------------------------------------------------------------------------------------------------


def group_whiten(value: Array, over: Array, group: Array, valid: Array, *, eps: float = 1e-8) -> Array:
    """Tokens shifted and scaled to mean 0 and deviation 1 over all tokens of their group: `[B, T] x2, [B] x2 -> [B, T]`.

    `(x - mean) / sqrt(variance + eps)`, each token counting once.  Source: token-level normalisation of TOP-D,
    arXiv:2607.04751; divisor n and eps are ours.
    """
    over = over & valid[:, None]
    count = group_mean(jnp.sum(over, axis=-1, dtype=jnp.float32), group, valid)
    of_group = lambda x: (group_mean(masked_sum(x, over, axis=-1), group, valid) / jnp.maximum(count, 1e-6))[:, None]
    centred = jnp.where(over, value - of_group(value), 0.0)
    return jax.lax.stop_gradient(centred * jax.lax.rsqrt(of_group(centred**2) + eps))
