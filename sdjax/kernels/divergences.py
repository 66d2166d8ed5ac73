"""Divergences between next-token distributions, from `(student, teacher)`: log-probabilities `[..., V]`.

Named by who averages: `forward_kl` is KL(teacher || student), `reverse_kl` is KL(student || teacher).  Gradients flow
through both arguments; the engine stops the views that are not trained.  An `_entries` function gives the addends of a
divergence, for methods that clip or select them before the sum over the vocabulary.  In formulas p is the student and
q the teacher.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.kernels.distributions import NEVER, top_k_entries


def forward_kl_entries(student: Array, teacher: Array) -> Array:
    """The addends of KL(teacher || student), `q_v (log q_v - log p_v)`: `[..., V] -> [..., V]`."""
    chex.assert_equal_shape([student, teacher])
    student, teacher = jnp.maximum(student, NEVER), jnp.maximum(teacher, NEVER)
    return jnp.exp(teacher) * (teacher - student)


def forward_kl(student: Array, teacher: Array) -> Array:
    """KL(teacher || student) `= sum_v q_v (log q_v - log p_v)` in nats: `[..., V] -> [...]`.

    Covers the teacher's modes.  Gradient with respect to the student's logits: `p - q`.
    """
    return jnp.sum(forward_kl_entries(student, teacher), axis=-1)


def reverse_kl_entries(student: Array, teacher: Array) -> Array:
    """The addends of KL(student || teacher), `p_v (log p_v - log q_v)`: `[..., V] -> [..., V]`."""
    return forward_kl_entries(teacher, student)


def reverse_kl(student: Array, teacher: Array) -> Array:
    """KL(student || teacher) `= sum_v p_v (log p_v - log q_v)` in nats: `[..., V] -> [...]`.

    Seeks the teacher's modes.  Gradient with respect to the student's logits: `p * (log p - log q - KL)`.
    """
    return jnp.sum(reverse_kl_entries(student, teacher), axis=-1)


def advantage_clipped_reverse_kl(student: Array, teacher: Array, bound: float) -> Array:
    """`reverse_kl` in which no entry's advantage `log q - log p` exceeds `bound` in size: `[..., V] -> [...]`.

    `sum_v p_v stop(clip(log p_v - log q_v, -bound, bound))`: a policy gradient over the vocabulary, whose gradient is
    that of `reverse_kl` where nothing is clipped.  The inputs are distributions: their probabilities sum to 1.
    Source: test-time training of Hübotter et al. 2026 (SDPO), arXiv:2601.20802, section 5 (bound 5); from its text.
    """
    chex.assert_equal_shape([student, teacher])
    student, teacher = jnp.maximum(student, NEVER), jnp.maximum(teacher, NEVER)
    advantage = jnp.clip(teacher - student, -bound, bound)
    return -jnp.sum(jnp.exp(student) * jax.lax.stop_gradient(advantage), axis=-1)


def log_mixture_to_larger(log_ratio: Array, beta: float) -> Array:
    """`log(m / max(p, q))`, with `log_ratio = log q - log p` and `m = beta q + (1-beta) p`: `[...]`, at most 0.

    Exactly 0 where p is q, where adding logarithms would leave rounding, and finite for every finite ratio.
    """
    # One of the two terms is exactly 0.  A selection between them costs ten times as much on a CPU, where XLA then
    # computes one entry at a time, and has no gradient at 0 that is right for every beta.
    larger_teacher = jnp.log1p((1.0 - beta) * jnp.expm1(-jnp.maximum(log_ratio, 0.0)))
    return larger_teacher + jnp.log1p(beta * jnp.expm1(jnp.minimum(log_ratio, 0.0)))


def log_mixture_ratio(log_ratio: Array, beta: float) -> Array:
    """`log(m / p) = log(beta e^u + 1 - beta)`, with `u = log q - log p` and `m = beta q + (1-beta) p`: `[...]`."""
    return jnp.maximum(log_ratio, 0.0) + log_mixture_to_larger(log_ratio, beta)


def jsd_entries(student: Array, teacher: Array, beta: float) -> Array:
    """The addends of `jsd`, `beta q_v log(q_v/m_v) + (1-beta) p_v log(p_v/m_v)`: `[..., V] -> [..., V]`.

    `beta` 0 and 1 give the addends of the two KLs.
    """
    if beta == 0.0:
        return forward_kl_entries(student, teacher)
    if beta == 1.0:
        return reverse_kl_entries(student, teacher)
    chex.assert_equal_shape([student, teacher])
    return mixture_entries(jnp.maximum(student, NEVER), jnp.maximum(teacher, NEVER), beta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def mixture_entries(student: Array, teacher: Array, beta: float) -> Array:
    """`jsd_entries` of finite log-probabilities, `0 < beta < 1`."""
    return sum(mixture_parts(student, teacher, beta))


def mixture_parts(student: Array, teacher: Array, beta: float) -> tuple[Array, Array]:
    """`(1-beta) p_v log(p_v/m_v)` and `beta q_v log(q_v/m_v)`: `[...]` twice."""
    ratio = teacher - student
    mixture = log_mixture_to_larger(ratio, beta)
    from_student = -(1.0 - beta) * jnp.exp(student) * (mixture + jnp.maximum(ratio, 0.0))
    from_teacher = -beta * jnp.exp(teacher) * (mixture - jnp.minimum(ratio, 0.0))
    return from_student, from_teacher


@mixture_entries.defjvp
def _from_parts(beta: float, primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    """Each part is the derivative by its own log-probability: what is left of both derivatives adds up to 0.

    So the gradient costs no further logarithm or exponential.
    """
    from_student, from_teacher = mixture_parts(*primals, beta)
    return from_student + from_teacher, from_student * tangents[0] + from_teacher * tangents[1]


def jsd(student: Array, teacher: Array, beta: float) -> Array:
    """Generalised Jensen-Shannon divergence in nats: `[..., V] -> [...]`.

    `m = beta q + (1-beta) p`,  `JSD = beta KL(q || m) + (1-beta) KL(p || m)`, p the student and q the teacher.
    `beta` 0 is `forward_kl` and 1 is `reverse_kl`, as separate branches: the family itself tends to 0 at both ends
    (`JSD/beta -> forward_kl`), so there is a jump of scale there.  `beta` is a Python float: branches are chosen once.
    Gradient with respect to the student's logits: `(1-beta) p * (log(p/m) - KL(p || m))`.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, Eq. 1; SDPO's `alpha` is this `beta`.
    """
    return jnp.sum(jsd_entries(student, teacher, beta), axis=-1)


def clip_entries(entries: Array, limit: float) -> Array:
    """Sum of a divergence's addends, each bounded from above: `sum_v min(entry_v, limit)`, `[..., V] -> [...]`.

    The bound is one-sided and acts before the sum, so the result can be negative.  It is not a cap on the pull: with
    K the entries below the limit, the gradient of clipped forward KL with respect to the student's logits is
    `g_u = p_u * sum_{v in K} q_v - [u in K] q_u`.  An entry is clipped where the teacher wants clearly more mass, and
    descent then *lowers* that entry's logit.  Use `clip_entries_straight_through` for a bounded value alone.

    Source: Zhao et al. 2026 (OPSD), arXiv:2601.18734 v3, section on pointwise clipping, and its code, `limit` 0.05;
    v1 has no clip.
    """
    # Not jnp.minimum: a tie would pass half of the gradient.
    return jnp.sum(jnp.where(entries < limit, entries, limit), axis=-1)


def clip_entries_straight_through(entries: Array, limit: float) -> Array:
    """The value of `clip_entries` with the gradient of the unclipped sum: `[..., V] -> [...]`.

    Not OPSD: its gradient is that of the plain divergence, so the clip only bounds what is reported.
    """
    total = jnp.sum(entries, axis=-1)
    return total + jax.lax.stop_gradient(clip_entries(entries, limit) - total)


def clamp_around(student: Array, teacher: Array, low: float = 0.2, high: float | None = None) -> Array:
    """The teacher kept within a factor of the student, `clip(log q, log p + log low, log p + log high)`: `[..., V]`.

    Not renormalised.  The student gives the bounds as a constant; `low` 0 and `high` None are no bounds.  The reverse
    KL to the result stays >= 0 for `low < 1/e`; above it can be negative.

    Source: RESD, arXiv:2605.12741: its code; the paper states the same as a clip of the ratio q/p.  `low` 0.2, no `high`.
    """
    chex.assert_equal_shape([student, teacher])
    centre = jnp.maximum(jax.lax.stop_gradient(student), NEVER)
    if low > 0.0:
        teacher = jnp.maximum(teacher, centre + jnp.log(low))
    return teacher if high is None else jnp.minimum(teacher, centre + jnp.log(high))


def unnormalised_top_k_forward_kl(student: Array, teacher: Array, k: int, *, floor: float | None = None) -> Array:
    """Forward KL summed over the teacher's `k` likeliest entries only: `[..., V] -> [...]`.

    `max(0, sum_{v in top-k of q} q_v (log q_v - log p_v))`: the masses are the full distributions', the rest is
    dropped.  Neither a bound nor a divergence: it may exceed the full KL, and where the partial sum is negative both
    value and gradient are 0.  `floor` bounds both log-probabilities from below.

    Source: verl, `forward_kl_topk` in trainer/distillation/losses.py (k 32).
    """
    student, teacher = top_k_entries(student, teacher, by=teacher, k=k)
    if floor is not None:
        student, teacher = jnp.maximum(student, floor), jnp.maximum(teacher, floor)
    total = forward_kl(student, teacher)
    return jnp.where(total > 0.0, total, 0.0)
