"""Operations on log-probabilities `[..., V]` (float32, normalised): what a divergence is computed from."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.top_k import top_k

NEVER = -1e30
"""Stands for log 0: finite, so that `0 * NEVER` is 0 and no gradient is NaN."""


def normalise(logits: Array) -> Array:
    """Float32 log-probabilities of logits: `logits - logsumexp(logits)` over the last axis, `[..., V] -> [..., V]`."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def logprob(dist: Array, token: Array) -> Array:
    """Log-probability of one token per position: `dist [..., V]`, `token [...]` int -> `[...]`."""
    chex.assert_equal_shape_prefix([dist, token], token.ndim)
    return jnp.take_along_axis(dist, token[..., None], axis=-1)[..., 0]


def entropy(dist: Array) -> Array:
    """Shannon entropy in nats, `H(p) = -sum_v p_v log p_v`: `[..., V] -> [...]`.  An entry of log 0 adds 0."""
    safe = jnp.maximum(dist, NEVER)
    return -jnp.sum(jnp.exp(safe) * safe, axis=-1)


def temper(dist: Array, temperature: Array | float) -> Array:
    """The distribution at another temperature, `p^(1/t) / sum p^(1/t)`: `[..., V] -> [..., V]`."""
    return normalise(dist / temperature)


def interpolate(first: Array, second: Array, rate: Array | float) -> Array:
    """Normalised geometric mixture `first^(1-rate) * second^rate`: `[..., V] x2 -> [..., V]`.

    The trust-region teacher of SDPO (Hübotter et al. 2026, arXiv:2601.20802, section 3.3): the solution of
    `max E_q log(second/first)` under a bound on `KL(q || first)`.
    """
    chex.assert_equal_shape([first, second])
    return normalise((1.0 - rate) * first + rate * second)


def top_k_entries(student: Array, teacher: Array, *, by: Array, k: int) -> tuple[Array, Array]:
    """Both distributions at the `k` likeliest entries of `by`, not renormalised: `[..., V] -> [..., k]`."""
    chex.assert_equal_shape([student, teacher, by])
    chosen = top_k(jax.lax.stop_gradient(by), k)[1]
    return jnp.take_along_axis(student, chosen, axis=-1), jnp.take_along_axis(teacher, chosen, axis=-1)


def log_rest(entries: Array) -> Array:
    """Log of the mass outside the kept entries, `log(-expm1(min(logsumexp(entries), -1e-7)))`: `[..., k] -> [..., 1]`.

    The bound of SDPO's official code keeps the rest above 1e-7, so value and gradient stay finite when nothing is left.
    """
    kept = jnp.minimum(jax.nn.logsumexp(entries, axis=-1, keepdims=True), -1e-7)
    return jnp.log(-jnp.expm1(kept))


def top_k_with_rest(student: Array, teacher: Array, *, by: Array, k: int) -> tuple[Array, Array]:
    """Both distributions on the `k` likeliest entries of `by`, and one bucket for all others: `[..., V] -> [..., k+1]`.

    Merging entries never raises a divergence (data processing), so top-k with rest is a lower bound of the full one.
    With `k >= V` nothing is merged: the full distributions come back.
    Source: Hübotter et al. 2026, arXiv:2601.20802, section 3.2 (`by` = student).
    """
    if k >= student.shape[-1]:
        return student, teacher
    kept = top_k_entries(student, teacher, by=by, k=k)
    return tuple(jnp.concatenate([x, log_rest(x)], axis=-1) for x in kept)


def top_k_renormalised(student: Array, teacher: Array, *, by: Array, k: int) -> tuple[Array, Array]:
    """Both distributions restricted to the `k` likeliest entries of `by` and renormalised: `[..., V] -> [..., k]`.

    Unlike `top_k_with_rest` the divergence of the result may exceed the full one.
    """
    if k >= student.shape[-1]:
        return student, teacher
    return tuple(normalise(x) for x in top_k_entries(student, teacher, by=by, k=k))
