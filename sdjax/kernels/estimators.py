"""Divergences from one sampled token: the student's and the teacher's log-probability of it are all that is needed.

Arguments are `(student, teacher)`, log-probabilities of the sampled token, `[...]`; p is the student, q the teacher and
`u = log q - log p`.  Two families, which differ in the gradient:

- `sampled_kl`: the usual k1, k2, k3, differentiated directly.  The expected gradient is not that of the value.
- `sampled_jsd` and the KLs at its ends: value and gradient are both unbiased for tokens sampled from the student.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.distributions import NEVER
from sdjax.kernels.divergences import jsd_entries, log_mixture_ratio
from sdjax.kernels.policy_gradient import importance_weight

K3_LIMIT = 10.0
"""The largest `log q/p` that k3 counts: one token that the student hardly ever writes would decide a batch, or overflow."""


def _clamped(log_ratio: Array, clamp: float | None) -> Array:
    return log_ratio if clamp is None else jnp.clip(log_ratio, -clamp, clamp)


def sampled_kl(
    student: Array, teacher: Array, estimator: Literal["k1", "k2", "k3", "k3_plus"], *, clamp: float | None = None
) -> Array:
    """KL(student || teacher) from one token `y ~ p`, to be differentiated directly: `[...] x2 -> [...]`.

    With `d = log p(y) - log q(y)`:

    | estimator | value         | expected value | expected gradient with respect to the student's logits         |
    |-----------|---------------|----------------|----------------------------------------------------------------|
    | k1        | d             | reverse KL     | 0                                                              |
    | k2        | d^2 / 2       | not a KL       | that of reverse KL                                             |
    | k3        | e^-d - 1 + d  | reverse KL     | `p - q`, that of **forward** KL                                |
    | k3_plus   | that of k3    | reverse KL     | that of reverse KL: the gradient is k2's (straight through)    |

    `clamp` bounds `d` on both sides (verl: 20); there the gradient is 0.  So it is in k3 where `q/p` exceeds
    e^10, with the value at that limit.
    Source: Schulman 2020, "Approximating KL Divergence"; names as in verl, whose default k3 without policy gradient is
    therefore a forward-KL step.  For unbiased value and gradient use `sampled_jsd`.
    """
    chex.assert_equal_shape([student, teacher])
    difference = _clamped(student - jnp.maximum(teacher, NEVER), clamp)
    if estimator == "k1":
        return difference
    bounded = jnp.maximum(difference, -K3_LIMIT)
    k2, k3 = difference**2 / 2.0, jnp.expm1(-bounded) + bounded
    if estimator == "k3_plus":
        return k2 + jax.lax.stop_gradient(k3 - k2)
    return {"k2": k2, "k3": k3}[estimator]


def score_coefficient(log_ratio: Array, beta: float) -> Array:
    """What multiplies `grad log p(y)` so that its mean over `y ~ p` is the gradient of `jsd(beta)`: `u [...] -> [...]`.

    With the divergence written as `D = sum_v p_v f(u_v)`, `grad D = E_p[(f - f') grad log p]`, and any constant may be
    added because `E_p[grad log p] = 0`.  The constant here makes the coefficient 0 at `u = 0`: a teacher that agrees
    sends nothing, token by token.

    - `beta` 0, forward KL: `1 - e^u`, i.e. minus the importance weight q/p, plus one;
    - `beta` 1, reverse KL: `-u`;
    - between: `-(1-beta) log(beta e^u + 1 - beta)`, bounded from above by `-(1-beta) log(1-beta)`.

    Its negative is an advantage.  At `beta` 1/2 it is AntiSD's `-phi(u) = -(softplus(u) - log 2) / 2` (Shen et al.
    2026, arXiv:2605.11609), which *ascends* this divergence: there the coefficient itself is the advantage.
    """
    if beta == 0.0:
        return -jnp.expm1(log_ratio)
    if beta == 1.0:
        return -log_ratio
    return -(1.0 - beta) * log_mixture_ratio(log_ratio, beta)


def _value(log_ratio: Array, beta: float) -> Array:
    """`f(u)` with `D = E_p[f(u)]`, shifted by a multiple of `e^u - 1` (mean 0) so that it is >= 0 and 0 at `u = 0`."""
    if beta == 0.0:
        return log_ratio * jnp.exp(log_ratio) - jnp.expm1(log_ratio)
    if beta == 1.0:
        return jnp.expm1(log_ratio) - log_ratio
    return jsd_entries(jnp.zeros_like(log_ratio), log_ratio, beta)


def sampled_jsd(
    student: Array, teacher: Array, beta: float, *, behavior: Array | None = None, clamp: float | None = None
) -> Array:
    """`jsd(student, teacher, beta)` from one token per position, value and gradient unbiased: `[...] x2 -> [...]`.

    `w * (stop(f(u)) + stop(c(u)) * (log p - stop(log p)))`, with `c` the `score_coefficient`, `f` a non-negative value
    whose mean is the divergence (k3 for reverse KL, `u e^u - e^u + 1` for forward KL), and `w` 1 for tokens sampled
    from the student, or `stop(p / behavior)` for tokens sampled under `behavior` log-probabilities.  The teacher
    receives no gradient.

    With `beta` 0 the weight q/p is unbounded: unbiased, but a token the student hardly ever samples counts enormously.
    `clamp` bounds `u` on both sides, which biases both value and gradient and bounds the variance; without one, `u`
    is bounded by 80 from above, where float32 ends.

    Source: ours.  For `beta` 1 the gradient is the usual policy gradient with advantage `log q - log p` (TRL and
    Tinker have this end only); at `beta` 1/2 it is the estimator of Shen et al. 2026 (AntiSD), arXiv:2605.11609.
    """
    chex.assert_equal_shape([student, teacher])
    log_ratio = _clamped(jnp.clip(teacher - student, NEVER, 80.0), clamp)
    log_ratio = jax.lax.stop_gradient(log_ratio)
    weight = 1.0 if behavior is None else importance_weight(student, behavior)
    score = student - jax.lax.stop_gradient(student)
    return weight * (_value(log_ratio, beta) + score_coefficient(log_ratio, beta) * score)


def sampled_reverse_kl(
    student: Array, teacher: Array, *, behavior: Array | None = None, clamp: float | None = None
) -> Array:
    """`sampled_jsd` at `beta` 1: KL(student || teacher), value k3, policy gradient with advantage `log q - log p`."""
    return sampled_jsd(student, teacher, 1.0, behavior=behavior, clamp=clamp)
