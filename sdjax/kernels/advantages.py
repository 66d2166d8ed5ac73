"""Advantages: how much better a row, or the rest of a row, did than expected.  All results are constants.

A group is the rows that share an integer id, in any order; rows that are not `valid` belong to none and get 0.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.reductions import masked_mean, masked_sum


def _members(group: Array, valid: Array) -> Array:
    """`[B, B]` bool: row i's group has row j among its valid rows."""
    chex.assert_rank([group, valid], 1)
    chex.assert_equal_shape([group, valid])
    return (group[:, None] == group[None, :]) & valid[None, :]


def group_count(group: Array, valid: Array) -> Array:
    """Number of valid rows in every row's group: `[B] -> [B]` float32."""
    return jnp.sum(_members(group, valid), axis=-1, dtype=jnp.float32)


def group_maximum(value: Array, group: Array, valid: Array) -> Array:
    """Largest value among the valid rows of every row's group: `[B] x3 -> [B]`, -inf where there is none."""
    return jnp.max(jnp.where(_members(group, valid), value.astype(jnp.float32)[None, :], -jnp.inf), axis=-1)


def group_mean(value: Array, group: Array, valid: Array) -> Array:
    """Mean over the valid rows of every row's group: `[B] x3 -> [B]`, 0 where there is none.  Differentiable.

    Every row gets its group's mean, so with `valid & chosen` it tells other rows of a group about the chosen ones.
    """
    members = _members(group, valid)
    # Measured from the group's maximum, so that a group of equal values has exactly this mean and no advantage.
    shift = jax.lax.stop_gradient(jnp.where(jnp.any(members, axis=-1), group_maximum(value, group, valid), 0.0))
    value = value.astype(jnp.float32)[None, :] - shift[:, None]
    # A sum of elements, not a matrix product: accelerators would multiply in reduced precision.
    return shift + masked_mean(value, members, axis=-1)


def group_advantage(reward: Array, group: Array, valid: Array, *, normalised: bool = True, eps: float = 1e-6) -> Array:
    """GRPO's advantage, `(R - mean) / (std + eps)` or, not `normalised`, `R - mean`: `[B] x3 -> [B]`.

    The deviation is the unbiased one (divisor n - 1), as in verl (eps 1e-6) and TRL (eps 1e-4).  A group whose rewards
    are all equal gets 0.  A group of one has nothing to compare with: `normalised`, mean 0 and deviation 1 are assumed, so
    that its advantage is its reward, plain REINFORCE, as in verl; otherwise it is `R - R`, 0, as in Tinker.

    Sources: Shao et al. 2024 (GRPO), arXiv:2402.03300; without deviation, Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783.
    """
    count = group_count(group, valid)
    centred = jnp.where(valid, reward.astype(jnp.float32) - group_mean(reward, group, valid), 0.0)
    if normalised:
        squares = masked_sum(jnp.broadcast_to(centred**2, (count.size,) * 2), _members(group, valid), axis=-1)
        scaled = centred / (jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)) + eps)
        centred = jnp.where(count < 2.0, reward, scaled)
    return jax.lax.stop_gradient(jnp.where(valid, centred, 0.0))


def leave_one_out(reward: Array, group: Array, valid: Array) -> Array:
    """A reward minus the mean reward of the *other* rows of its group, `n/(n-1) (R - mean)`: `[B] x3 -> [B]`.

    Unlike the group's mean, this baseline does not depend on the row itself.  A group of one has baseline 0.
    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """
    count = group_count(group, valid)
    centred = reward - group_mean(reward, group, valid)
    advantage = jnp.where(count < 2.0, reward, centred * count / jnp.maximum(count - 1.0, 1.0))
    return jax.lax.stop_gradient(jnp.where(valid, advantage, 0.0))


def whiten(value: Array, over: Array, *, eps: float = 1e-8) -> Array:
    """Shifted and scaled to mean 0 and deviation 1 over a population, `(x - mean) / sqrt(variance + eps)`: any shape.

    The variance is unbiased (divisor n - 1), as in TRL and verl.  0 outside `over`.
    """
    centred = jnp.where(over, value.astype(jnp.float32) - masked_mean(value, over), 0.0)
    variance = jnp.sum(centred**2) / jnp.maximum(jnp.sum(over, dtype=jnp.float32) - 1.0, 1.0)
    return jax.lax.stop_gradient(centred * jax.lax.rsqrt(variance + eps))


def reward_to_go(reward: Array, over: Array, discount: float = 1.0, *, normalised: bool = False) -> Array:
    """Discounted sum of rewards from each token on, `G_t = sum_{i >= 0} discount^i r_{t+i}`: `[B, T] -> [B, T]`.

    Tokens outside `over` give no reward but do count as steps.  `normalised` divides by the same sum of ones: the
    discounted mean of what is to come.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, whose normalisation excludes the present token.  TRL's code
    weighs by `discount^i` counted from the row's start, which shrinks late tokens once more; with normalisation the
    factor cancels.  `discount` 0 is the immediate reward of on-policy distillation.
    """
    chex.assert_equal_shape([reward, over])

    def then(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    def to_go(x: Array) -> Array:
        decay = jnp.full_like(x, discount)
        return jax.lax.associative_scan(then, (decay, x), reverse=True, axis=x.ndim - 1)[1]

    total = to_go(jnp.where(over, reward.astype(jnp.float32), 0.0))
    if normalised:
        total = total / jnp.maximum(to_go(over.astype(jnp.float32)), 1e-6)
    return jax.lax.stop_gradient(jnp.where(over, total, 0.0))


def reward_after(reward: Array, over: Array, discount: float = 1.0, *, normalised: bool = False) -> Array:
    """`reward_to_go` without the token itself, `sum_{i >= 1} discount^i r_{t+i}`: `[B, T] -> [B, T]`.

    Defined at every position, also before one that is not in `over`.  `normalised`: the discounted mean of what is to
    come; 0 where nothing is, and for `discount` 0.
    Source: the return beside the single step of Gu et al. 2024 (MiniLLM), arXiv:2306.08543.
    """
    after = lambda x: jnp.pad(jnp.where(over, x.astype(jnp.float32), 0.0)[:, 1:], ((0, 0), (0, 1)))
    to_go = lambda x: reward_to_go(after(x), jnp.ones_like(over), discount)
    if normalised and discount:
        return to_go(reward) / jnp.maximum(to_go(jnp.ones_like(reward)), 1e-6)
    return discount * to_go(reward)
