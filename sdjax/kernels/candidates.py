"""Reverse KL on a few candidate tokens per position: which tokens, how much each counts, and with which gradient.

Arguments are log-probabilities of the *full* distributions; p is the student, q the teacher, S the candidates.  With
`Zp = sum_S p`, `pbar = p / Zp` and `qbar = q / Zq` on S, the gradients in use are

| name          | gradient                                              | here                                             |
|---------------|-------------------------------------------------------|--------------------------------------------------|
| released      | `sum_S pbar log(p/q) grad log p`                      | `candidate_surrogate`                            |
| stop-gradient | `sum_S p log(p/q) grad log p`, the released times Zp  | the same with raw weights                        |
| Eq. 5         | `sum_S pbar (log(pbar/qbar) - KLbar) grad log p`      | `candidate_reverse_kl`                           |
| truncated     | `sum_S p (log(p/q) + 1) grad log p`                   | none: it is not 0 at p = q and makes texts repeat |

The first two also move the student's mass on S, the third never does; all are the exact gradient when S is everything.
Source: Li et al. 2026 (Rethinking OPD), arXiv:2604.13016, Eq. 5 and its code; stop-gradient: arXiv:2605.11182, Eq. 13.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.distributions import NEVER, normalise
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.top_k import top_k

Support = Literal["student", "teacher", "intersection", "union", "symmetric_difference"]
"""Whose `k` likeliest tokens the candidates are; the last is the union without the intersection."""

Weights = Literal["student", "teacher", "uniform"]
"""By whose probabilities candidates count."""


def candidates(student: Array, teacher: Array, k: int, support: Support = "student") -> tuple[Array, Array]:
    """Candidate tokens of every position and which of them count: `[..., V] x2 -> ids [..., n], bool [..., n]`.

    `n` is `k`, and `2 k` for the union and the symmetric difference, where a token of both sets stands once.
    """
    chex.assert_equal_shape([student, teacher])
    k = min(k, student.shape[-1])
    own, other = (top_k(jax.lax.stop_gradient(dist), k)[1] for dist in (student, teacher))
    same = own[..., :, None] == other[..., None, :]
    own_shared, other_shared = same.any(-1), same.any(-2)
    if support in ("student", "teacher"):
        ids = own if support == "student" else other
        return ids, jnp.ones(ids.shape, bool)
    if support == "intersection":
        return own, own_shared
    first = jnp.ones(own.shape, bool) if support == "union" else ~own_shared
    return jnp.concatenate([own, other], -1), jnp.concatenate([first, ~other_shared], -1)


def among(entries: Array, kept: Array) -> Array:
    """Log-probabilities renormalised over the kept entries, `NEVER` for the others: `[..., n]`, bool `-> [..., n]`."""
    chex.assert_equal_shape([entries, kept])
    return jnp.where(kept, normalise(jnp.where(kept, entries, NEVER)), NEVER)


def candidate_weights(
    student: Array, teacher: Array, kept: Array, of: Weights = "student", *, raw: bool = False
) -> Array:
    """How much each candidate counts, constants: log-probabilities `[..., n] x2`, bool `-> [..., n]`.

    Probabilities `of` one side, or equal ones, that sum to 1 over the kept candidates; `raw`: not renormalised (1 each
    for "uniform").  0 for the others, and everywhere if none is kept.
    """
    chosen = {"student": student, "teacher": teacher, "uniform": jnp.zeros_like(student)}[of]
    weight = jnp.exp(chosen if raw else among(chosen, kept))
    return jax.lax.stop_gradient(jnp.where(kept, weight, 0.0))


def candidate_surrogate(
    student: Array,
    teacher: Array,
    weight: Array,
    *,
    old: Array | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = 3.0,
) -> Array:
    """PPO over candidates, `sum_v ppo(A_v, p_v / old_v)`, `A_v = -w_v (log old_v - log q_v)`: `[..., n] x3 -> [...]`.

    `old` are the log-probabilities at rollout time.  Without them they are the student's own: the ratio is 1, no clip
    acts, the value is `sum_v w_v log(p_v/q_v)` and the gradient `sum_v w_v log(p_v/q_v) grad log p_v`.
    Weights and advantages are constants.  Source: Li et al. 2026, arXiv:2604.13016, released code.
    """
    chex.assert_equal_shape([student, teacher, weight])
    old = jax.lax.stop_gradient(student if old is None else old)
    # Cleaned first: a candidate that does not count may have a log-probability of -inf.
    old, student, teacher = (jnp.maximum(x, NEVER) for x in (old, student, teacher))
    advantage = jnp.where(weight > 0.0, weight * (teacher - old), 0.0)
    return jnp.sum(clipped_surrogate(student, old, advantage, clip, dual_clip), axis=-1)


def candidate_reverse_kl(student: Array, teacher: Array, kept: Array) -> Array:
    """KL of both distributions renormalised over the kept candidates, `KL(pbar || qbar)`: `[..., n] x3 -> [...]`.

    Its gradient is that of Eq. 5: exactly 0 outside of the candidates.  0 where none is kept.
    """
    own, other = among(student, kept), among(teacher, kept)
    return jnp.sum(jnp.where(kept, jnp.exp(own) * (own - other), 0.0), axis=-1)
