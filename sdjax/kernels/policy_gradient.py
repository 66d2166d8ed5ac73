"""Losses whose gradient is a policy gradient.  Everything is per token, `[B, T]`; a loss is to be minimised.

Advantages, behaviour log-probabilities and importance weights are constants here: their gradient is stopped.  An
advantage has the rank of the log-probabilities: `[B, T]`, or `[B, 1]` where a row has one for all its tokens.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.advantages import group_maximum
from sdjax.kernels.reductions import masked_mean, masked_sum

LOG_RATIO_LIMIT = 7.0
"""A token that the policy finds e^7 times as likely as whoever wrote it says nothing: its ratio is 0.

Under its writer a ratio of at least `c` has a probability of at most `1/c`: a larger one tells of a wrong
log-probability, and one such token would decide the batch.  (verl clamps the logarithm to +-20, a weight of 5e8.)
"""


def _constant(advantage: Array, like: Array) -> Array:
    chex.assert_rank(advantage, like.ndim)
    return jax.lax.stop_gradient(advantage)


def token_ratio(logprobs: Array, behavior_logprobs: Array) -> Array:
    """Likelihood ratio of every token, `p/b`: `[B, T] x2 -> [B, T]`.

    0, without a gradient, where it is not a number or exceeds `LOG_RATIO_LIMIT`: the token then counts for nothing.
    """
    chex.assert_equal_shape([logprobs, behavior_logprobs])
    difference = logprobs - jax.lax.stop_gradient(behavior_logprobs)
    ignored = ignored_ratio(logprobs, behavior_logprobs)
    return jnp.where(ignored, 0.0, jnp.exp(jnp.where(ignored, 0.0, difference)))


def ignored_ratio(logprobs: Array, behavior_logprobs: Array) -> Array:
    """True where `token_ratio` counts a token for nothing: `[B, T] x2 -> [B, T]` bool.  More than a few tell of an error."""
    difference = logprobs - behavior_logprobs
    return ~(jnp.isfinite(difference) & (difference < LOG_RATIO_LIMIT))


def sequence_ratio(logprobs: Array, behavior_logprobs: Array, over: Array) -> Array:
    """GSPO's ratio, the geometric mean of a row's token ratios, at every token: `[B, T] x2, [B, T] bool -> [B, T]`.

    `s_it = stop(s_i) * p(y_t) / stop(p(y_t))`,  `s_i = exp(mean_t (log p - log b))`: the value is the row's, the
    gradient the token's own.  To be averaged by `sequence_mean`.  A row whose mean exceeds `LOG_RATIO_LIMIT`, or is not
    a number, has a ratio of 0 and no gradient (verl bounds the logarithm by 10).

    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071 (GSPO-token).
    """
    chex.assert_equal_shape([logprobs, behavior_logprobs, over])
    stopped = jax.lax.stop_gradient(logprobs)
    row = masked_mean(stopped - jax.lax.stop_gradient(behavior_logprobs), over, axis=-1)[:, None]
    known = jnp.isfinite(row) & (row < LOG_RATIO_LIMIT) & jnp.isfinite(logprobs)
    return jnp.where(known, jnp.exp(jnp.where(known, logprobs - stopped + row, 0.0)), 0.0)


def reinforce(logprobs: Array, advantage: Array) -> Array:
    """The score-function loss `-stop(A) * log p(y_t)`: `[B, T] -> [B, T]`.

    Source: Williams 1992.  The whole advantage is stopped: a live `log q - log p` in it would add a baseline of +1,
    the leak in the OPD baseline of vOPD's official code (Oh et al. 2026, arXiv:2605.07865).
    """
    return -_constant(advantage, logprobs) * logprobs


def _pessimistic(ratio: Array, advantage: Array, clip: tuple[float, float], dual_clip: float | None) -> Array:
    clipped = jnp.clip(ratio, 1.0 - clip[0], 1.0 + clip[1])
    loss = jnp.maximum(-ratio * advantage, -clipped * advantage)
    if dual_clip is None:
        return loss
    return jnp.where(advantage < 0.0, jnp.minimum(loss, -dual_clip * advantage), loss)


def clipped_surrogate(
    logprobs: Array,
    behavior_logprobs: Array,
    advantage: Array,
    clip: tuple[float, float] = (0.2, 0.28),
    dual_clip: float | None = None,
) -> Array:
    """PPO's pessimistic surrogate `max(-r A, -clip(r, 1 - lo, 1 + hi) A)`, `r = p/b`: `[B, T] x3 -> [B, T]`.

    `clip` is `(lo, hi)`, widths below and above 1.  `dual_clip` c (verl: 3) bounds the loss by `-c A` where `A < 0`.
    Sources: Schulman et al. 2017 (PPO), arXiv:1707.06347, Eq. 7; unequal widths, Yu et al. 2025 (DAPO),
    arXiv:2503.14476; dual clip, Ye et al. 2020, arXiv:1912.09729.  No KL term: it is another `Term`.
    """
    ratio = token_ratio(logprobs, behavior_logprobs)
    return _pessimistic(ratio, _constant(advantage, logprobs), clip, dual_clip)


def signed_surrogate(
    logprobs: Array, behavior_logprobs: Array, advantage: Array, clip: tuple[float, float] = (0.2, 0.28)
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`clipped_surrogate` in two parts, `(value, weight)` of tokens that are raised and of those that are lowered.

    `weight` is `max(A, 0)` and `max(-A, 0)`, `value` the surrogate at the advantages 1 and -1: the sum of both products
    is the surrogate at `A`.  For methods that *add* credit to an advantage, so that it may have either sign: the weights
    say how much each token counts.  `[B, T] x3 -> [B, T] x4`.
    """
    side = lambda sign: clipped_surrogate(logprobs, behavior_logprobs, jnp.full_like(logprobs, sign), clip)
    advantage = _constant(advantage, logprobs)
    return (side(1.0), jnp.maximum(advantage, 0.0)), (side(-1.0), jnp.maximum(-advantage, 0.0))


def sequence_clipped_surrogate(
    logprobs: Array,
    behavior_logprobs: Array,
    advantage: Array,
    over: Array,
    clip: tuple[float, float] = (3e-4, 4e-4),
) -> Array:
    """`clipped_surrogate` on the ratio of whole sequences: `[B, T] x3, over [B, T] bool -> [B, T]`.

    Clip widths are orders of magnitude below GRPO's, because a mean of log-ratios is.  Average by `sequence_mean`.
    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071.
    """
    ratio = sequence_ratio(logprobs, behavior_logprobs, over)
    return _pessimistic(ratio, _constant(advantage, logprobs), clip, None)


def cispo(
    logprobs: Array, behavior_logprobs: Array, advantage: Array, clip: tuple[float, float] = (0.2, 0.28)
) -> Array:
    """Policy gradient with a clipped weight, `-stop(clip(r, 1 - lo, 1 + hi)) * A * log p`: `[B, T] x3 -> [B, T]`.

    Clipping limits a token's weight and never drops its gradient.  `clip` is relative to 1, as in verl; TRL clips from
    above only and by an absolute cap: its `epsilon_high=5.0` is `clip=(1.0, 4.0)` here.
    Source: MiniMax 2025 (MiniMax-M1, CISPO), arXiv:2506.13585.
    """
    weight = jnp.clip(token_ratio(logprobs, behavior_logprobs), 1.0 - clip[0], 1.0 + clip[1])
    return -jax.lax.stop_gradient(weight) * _constant(advantage, logprobs) * logprobs


def importance_weight(logprobs: Array, behavior_logprobs: Array, *, cap: float | None = None) -> Array:
    """A constant weight per token, `min(p/b, cap)`: `[B, T] x2 -> [B, T]`.

    Corrects for a sampler `b` that is not quite the policy.  Its mean over tokens of the sampler is 1 without a cap.
    0 where `b` or `p` is not a number, and without a cap where the ratio exceeds `LOG_RATIO_LIMIT`.
    Source: Yao et al. 2025 (truncated importance sampling, TIS), cap 2.
    """
    ratio = token_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs)
    if cap is None:
        return ratio
    difference = jax.lax.stop_gradient(logprobs - behavior_logprobs)
    above = jnp.isfinite(difference) & (difference >= LOG_RATIO_LIMIT)
    return jnp.minimum(jnp.where(above, cap, ratio), cap)


def sequence_importance_weight(
    logprobs: Array, behavior_logprobs: Array, over: Array, *, cap: float | None = None
) -> Array:
    """A constant weight per row, `min(prod_t p/b, cap)` over its tokens in `over`: `[B, T] x3 -> [B]`.

    The product is taken before the cap; without one, a row whose logarithm exceeds `LOG_RATIO_LIMIT` counts for
    nothing, as does one that is not a number.  Source: as `importance_weight`.
    """
    difference = masked_sum(jax.lax.stop_gradient(logprobs - behavior_logprobs), over, axis=-1)
    most = jnp.exp(LOG_RATIO_LIMIT) if cap is None else cap
    ratio = jnp.exp(jnp.clip(jnp.nan_to_num(difference, posinf=0.0), None, jnp.log(most)))
    known = jnp.isfinite(difference) & ((difference < LOG_RATIO_LIMIT) | (cap is not None))
    return jnp.where(known, ratio, 0.0)


def icepop(weight: Array, bounds: tuple[float, float] = (0.5, 2.0)) -> Array:
    """A weight kept where it lies within `bounds`, and 0 outside: any shape.

    Drops, instead of truncating, tokens (or rows) on which sampler and policy disagree.
    Source: IcePop, as in verl's rollout correction; TRL's `sequence_mask` is this on a row's weight, bounds (0, 3).
    """
    inside = (weight >= bounds[0]) & (weight <= bounds[1])
    return jnp.where(inside, weight, 0.0)


def overlong_penalty(length: Array, limit: int, buffer: int, factor: float = 1.0) -> Array:
    """What is added to the reward of a long completion: `min(0, -factor * (length - (limit - buffer)) / buffer)`.

    `length` in tokens, any shape.  0 up to `limit - buffer`, then falling linearly to `-factor` at `limit`.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476 (limit 20480, buffer 4096).
    """
    return jnp.minimum(0.0, -factor * (length - (limit - buffer)) / buffer)


def informative_groups(reward: Array, group: Array, valid: Array) -> Array:
    """True for the valid rows of groups whose rewards are not all equal: `[B] x3 -> [B]` bool.

    The others have no group advantage.  Source: dynamic sampling, Yu et al. 2025 (DAPO), arXiv:2503.14476, which drops
    them and samples anew until the batch is full.
    """
    highest = group_maximum(reward, group, valid)
    return valid & (highest > -group_maximum(-reward, group, valid))
