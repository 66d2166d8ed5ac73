"""Weights of tokens and rows: floats without gradient, made from what student and teacher say.

`over` is the boolean population; positions outside it never enter a statistic, and get 0.  Weights do not normalise
themselves: `mean_one` does, where a method wants it.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.distributions import entropy, logprob, normalise
from sdjax.kernels.reductions import masked_mean
from sdjax.kernels.top_k import top_k

# ---- from log-probabilities of the sampled token ---------------------------------------------------------------------


def likelihood_ratio(above: Array, below: Array, *, eps: float | None = None, sign: Array | float = 1.0) -> Array:
    """`clip(exp(sign * (above - below)), 1 - eps, 1 + eps)` of two log-probabilities: any shape; unclipped for None.

    `sign` turns the ratio round, usually `sign(advantage)` (`[B, 1]` beside `[B, T]`); where it is 0 the ratio is 1.
    Sources: student over teacher on correct rows, Kim et al. 2026 (RLRT), arXiv:2605.10781; teacher over student to the
    advantage's sign, Ke et al. 2026 (EGRSD), arXiv:2605.13255 (eps 0.2).  Neither paper renormalises.
    """
    chex.assert_equal_shape([above, below])
    ratio = jnp.exp(jnp.clip(sign * (above - below), -20.0, 20.0))
    ratio = ratio if eps is None else jnp.clip(ratio, 1.0 - eps, 1.0 + eps)
    return jax.lax.stop_gradient(ratio)


def geometric_mean(first: Array, second: Array, rate: float = 0.5) -> Array:
    """`first^(1-rate) * second^rate` of two probabilities given as logarithms: any shape.

    `rate` 0 with the trained policy first is dynamic fine-tuning.
    Source: SORT's weight of a reference token by its probability without and with a plan; a reconstruction.
    """
    chex.assert_equal_shape([first, second])
    return jax.lax.stop_gradient(jnp.exp((1.0 - rate) * first + rate * second))


# ---- from distributions ----------------------------------------------------------------------------------------------


def confidence(dist: Array, k: int) -> Array:
    """How peaked a distribution is among its `k` likeliest entries, `1 - H(renormalised) / log k`: `[..., V] -> [...]`.

    0 for k equal entries, 1 for one entry.  Raises ValueError for `k < 2`: one entry has no entropy to compare.
    Source: teacher factor of Qin et al. 2026 (MSD), arXiv:2605.02971.
    """
    if k < 2:
        raise ValueError(f"confidence needs k >= 2, got {k}")
    kept = normalise(top_k(dist, k)[0])
    return jax.lax.stop_gradient(1.0 - entropy(kept) / jnp.log(jnp.float32(k)))


def disagreement(student: Array, token: Array) -> Array:
    """`1 - p(token)`: how far the student is from giving this token, `[..., V]`, `[...]` int `-> [...]`.

    MSD's student factor with `token` the teacher's likeliest one (`argmax`); the sampled token is the other reading.
    """
    return jax.lax.stop_gradient(-jnp.expm1(logprob(student, token)))


# ---- from entropies --------------------------------------------------------------------------------------------------


def window_minimum(value: Array, over: Array, window: int) -> Array:
    """Smallest of a token's value and those of the next `window` tokens of its row: `[B, T] -> [B, T]`."""
    chex.assert_equal_shape([value, over])
    hidden = jnp.where(over, value.astype(jnp.float32), jnp.inf)
    ahead = ((0, 0), (0, window))
    smallest = jax.lax.reduce_window(hidden, jnp.inf, jax.lax.min, (1, window + 1), (1, 1), ahead)
    return jax.lax.stop_gradient(jnp.where(over, smallest, 0.0))


def entropy_gate(entropy: Array, over: Array, *, strength: float = 0.3, window: int = 0, floor: float = 0.1) -> Array:
    """A weight that falls with the teacher's entropy: `clip(1 - strength * h / max(h_max, 1), floor, 1)`, `[B, T]`.

    `h` is the entropy in nats, or with `window` > 0 its `window_minimum` ("causal lookahead", CL-EGRSD); `h_max` is
    the largest *raw* entropy of the population.  So a longer window never lowers a weight.

    Source: Ke et al. 2026 (EGRSD), arXiv:2605.13255, Eq. 8 and Proposition 1.  Its Algorithm 1 takes the maximum after
    the windowed minimum, which differs and breaks that property; Eq. 8 is implemented.
    """
    chex.assert_equal_shape([entropy, over])
    highest = jnp.max(jnp.where(over, entropy.astype(jnp.float32), 0.0))
    relative = window_minimum(entropy, over, window) / jnp.maximum(highest, 1.0)
    return jax.lax.stop_gradient(jnp.where(over, jnp.clip(1.0 - strength * relative, floor, 1.0), 0.0))


def row_quantile(value: Array, over: Array, level: float) -> Array:
    """Quantile of every row's population, linearly interpolated: `[B, T] -> [B]`, 0 for an empty row."""
    chex.assert_equal_shape([value, over])
    count = jnp.sum(over, axis=-1)
    ordered = jnp.sort(jnp.where(over, value.astype(jnp.float32), jnp.inf), axis=-1)
    place = level * jnp.maximum(count - 1, 0).astype(jnp.float32)
    lower = jnp.floor(place).astype(jnp.int32)
    upper = jnp.minimum(lower + 1, jnp.maximum(count - 1, 0))
    low, high = (jnp.take_along_axis(ordered, i[:, None], axis=-1)[:, 0] for i in (lower, upper))
    quantile = low + (place - lower) * (high - low)
    return jax.lax.stop_gradient(jnp.where(count > 0, quantile, 0.0))


def entropy_router(
    entropy: Array,
    over: Array,
    *,
    fraction: float = 0.2,
    about: Literal["mean", "threshold"] = "mean",
    eps: float = 1e-6,
) -> Array:
    """Toward the teacher (> 0) at low entropy, away from it (< 0) at high: `tanh((threshold - H) / spread)`, `[B, T]`.

    Per row: the threshold is exceeded by the top `fraction` of its tokens, the spread is the mean absolute deviation
    from the row's mean, or from the threshold, plus `eps`.
    Source: DASD, arXiv:2605.22263; the side of the quantile and the centre of the spread are a reconstruction.
    """
    threshold = row_quantile(entropy, over, 1.0 - fraction)[:, None]
    centre = masked_mean(entropy, over, axis=-1)[:, None] if about == "mean" else threshold
    spread = masked_mean(jnp.abs(entropy - centre), over, axis=-1)[:, None]
    return jax.lax.stop_gradient(jnp.where(over, jnp.tanh((threshold - entropy) / (spread + eps)), 0.0))


def unit_magnitude(value: Array, over: Array, *, eps: float = 1e-6) -> Array:
    """A signed value in units of its row's mean magnitude, `x / (mean |x| + eps)`: `[B, T] -> [B, T]`.

    DASD's normalised evidence gap; its reliability gate is `sigmoid(|result| - 1)`.
    """
    scale = masked_mean(jnp.abs(value), over, axis=-1)[:, None] + eps
    return jax.lax.stop_gradient(jnp.where(over, value / scale, 0.0))


def unit_deviation(value: Array, over: Array, *, eps: float = 1e-6) -> Array:
    """A signed value in units of its row's standard deviation, `x / (std x + eps)`, not centred: `[B, T] -> [B, T]`.

    The other reading of DASD's normalised evidence gap.
    """
    centred = value - masked_mean(value, over, axis=-1)[:, None]
    scale = jnp.sqrt(masked_mean(centred**2, over, axis=-1))[:, None] + eps
    return jax.lax.stop_gradient(jnp.where(over, value / scale, 0.0))


def hysteresis(gate: Array, value: Array, low: float, high: float) -> Array:
    """A Schmitt trigger: 1 when `value >= high`, 0 when `value < low`, otherwise as it was: any shape.

    Source: entropy gate of Shen et al. 2026 (AntiSD), arXiv:2605.11609: `high` the teacher's median entropy in the
    warm-up, `low` 0.93 of it.
    """
    return jnp.where(value >= high, 1.0, jnp.where(value < low, 0.0, gate))


# ---- over populations ------------------------------------------------------------------------------------------------


def mean_one(weight: Array, over: Array, axis: int | None = None) -> Array:
    """Weights rescaled to mean 1 over a population, or over each row's with `axis=-1`; all-zero weights stay 0.

    So `sequence_mean` of value times `mean_one(w, over, axis=-1)` is each row's weighted mean `sum w x / sum w`.
    """
    chex.assert_equal_shape([weight, over])
    mean = masked_mean(weight, over, axis)
    mean = mean if axis is None else jnp.expand_dims(mean, axis)
    return jax.lax.stop_gradient(jnp.where(over, weight / jnp.where(mean > 0.0, mean, 1.0), 0.0))


def success_balance(success: Array, valid: Array, *, power: tuple[float, float] = (1.0, 1.0)) -> Array:
    """Weights that keep the rarer outcome from drowning: `[B]` bool x2 `-> [B]`, mean 1 over the valid rows.

    `(1-s)^a` for successes and `s^b` for failures, `power = (a, b)`, divided by their mean; `s` is the share of
    successes, within `[1/n, 1 - 1/n]`.  With powers of 1 each outcome has half of the weight.
    Source: RESD, arXiv:2605.12741, in its code (powers 1).
    """
    chex.assert_equal_shape([success, valid])
    least = 1.0 / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 2.0)
    share = jnp.clip(masked_mean(success, valid), least, 1.0 - least)
    return mean_one(jnp.where(success, (1.0 - share) ** power[0], share ** power[1]), valid)


def keep_earliest(chosen: Array, over: Array, fraction: float) -> Array:
    """The earliest chosen tokens, at most `floor(fraction * length)` of a row: `[B, T]` bool x2 `-> [B, T]` bool.

    TRACE caps its spans (arXiv:2605.10194, fraction 0.25) without saying which tokens stay; we keep the earliest.
    """
    chex.assert_equal_shape([chosen, over])
    chosen = chosen & over
    limit = jnp.floor(fraction * jnp.sum(over, axis=-1, keepdims=True))
    return chosen & (jnp.cumsum(chosen, axis=-1) <= limit)
