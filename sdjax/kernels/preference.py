"""Logistic losses on which of two completions, or which class of completions, is preferred.

They act on log-ratios of whole completions, `[B]`: sums over tokens, not means.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.reductions import masked_mean, masked_sum


def sequence_log_ratio(logprobs: Array, reference_logprobs: Array, over: Array) -> Array:
    """`log p(y) - log reference(y)` of whole completions, `sum_t` over `over`: `[B, T] x3 -> [B]`.

    Times beta, the implicit reward of DPO.  The reference is a constant.
    """
    chex.assert_equal_shape([logprobs, reference_logprobs, over])
    return masked_sum(logprobs - jax.lax.stop_gradient(reference_logprobs), over, axis=-1)


def paired(preferred: Array, other: Array, beta: float) -> Array:
    """DPO's loss, `-log sigmoid(beta (preferred - other))` on sequence log-ratios: `[...] x2 -> [...]`.

    log 2 at no margin; the gradient with respect to either log-ratio is at most `beta`.
    Sources: Rafailov et al. 2023 (DPO), arXiv:2305.18290, Eq. 7; with a privileged teacher as the reference, its sample
    preferred to the student's: Yu et al. 2026 (PBSD), arXiv:2605.05040, Eq. 10.
    """
    chex.assert_equal_shape([preferred, other])
    return jax.nn.softplus(-beta * (preferred - other))


def class_midpoint(reward: Array, positive: Array, valid: Array) -> Array:
    """Half-way between the mean implicit rewards of the two classes, constant: `[B] x3 -> scalar`."""
    chex.assert_equal_shape([reward, positive, valid])
    means = masked_mean(reward, valid & positive) + masked_mean(reward, valid & ~positive)
    return jax.lax.stop_gradient(means / 2.0)


def unpaired(reward: Array, positive: Array, valid: Array, midpoint: Array | None = None) -> Array:
    """BCO's loss per row: `-log sigmoid(+-(reward - midpoint))`, plus for positive rows: `[B] x3 -> [B]`.

    `reward` is an implicit one, beta times `sequence_log_ratio`.  The midpoint (`[B]` or a scalar, a constant) is by
    default that of these rows' classes, so a constant in all rewards changes nothing; with one class absent there is
    then nothing to tell apart, and loss and gradient are 0 (VPD does not say; we skip the step).  VPD adds the *class
    means*: use one term over the positive rows and one over the others; a mean over both together is another loss.

    Sources: Jung et al. 2024 (BCO), arXiv:2404.04656; Li et al. 2026 (VPD), arXiv:2605.15113, E-step.  TRL's BCO takes
    one mean over both classes and a running midpoint.
    """
    if midpoint is None:
        valid = valid & jnp.any(valid & positive) & jnp.any(valid & ~positive)
        midpoint = class_midpoint(reward, positive, valid)
    # Cleaned first: the slope of softplus at NaN is NaN, and so would be its product with a masked row's zero.
    margin = jnp.where(valid, reward - jax.lax.stop_gradient(midpoint), 0.0)
    return jnp.where(valid, jax.nn.softplus(jnp.where(positive, -margin, margin)), 0.0)
