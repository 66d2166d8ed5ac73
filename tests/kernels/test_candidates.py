"""Reverse KL on candidate tokens: the numbers of section 6 of the design note on Rethinking OPD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdjax.kernels.candidates import (
    among,
    candidate_reverse_kl,
    candidate_surrogate,
    candidate_weights,
    candidates,
)
from sdjax.kernels.distributions import NEVER, normalise
from sdjax.kernels.divergences import reverse_kl

P, Q = (normalise(jnp.asarray(z)) for z in ((2.0, 1.0, 0.0, -1.0), (1.0, 1.5, 0.5, -0.5)))
FIRST, SECOND = tiny.log(0.40, 0.25, 0.15, 0.12, 0.08), tiny.log(0.20, 0.35, 0.05, 0.30, 0.10)
near = functools.partial(np.testing.assert_allclose, atol=2e-6)

RELEASED = (0.330034, -0.281999, -0.035116, -0.012919)
EQUATION = (0.294918, -0.294918, 0.0, 0.0)
STOPPED = (0.290693, -0.248384, -0.03093, -0.011379)


def released(student, teacher, k=2, support="student", of="student", raw=False):
    ids, kept = candidates(student, teacher, k, support)
    own, other = student[ids], teacher[ids]
    return candidate_surrogate(own, other, candidate_weights(own, other, kept, of, raw=raw))


def equation(student, teacher, k=2, support="student"):
    ids, kept = candidates(student, teacher, k, support)
    return candidate_reverse_kl(student[ids], teacher[ids], kept)


def slope(loss, student=P, teacher=Q, **how):
    return tiny.logit_gradient(lambda dist: loss(dist, teacher, **how), student)


def test_masses_and_value_of_equation_5():
    kept = jnp.ones(2, bool)
    near(jnp.exp(among(P[:2], kept)), (0.731059, 0.268941))
    near(jnp.exp(among(Q[:2], kept)), (0.377541, 0.622459))
    near(equation(P, Q), 0.257403)


def test_the_gradients_in_circulation():
    near(slope(released), RELEASED)
    near(slope(equation), EQUATION)
    near(slope(released, raw=True), STOPPED)
    near(slope(released, raw=True) / 0.880797, RELEASED)
    # The released one also moves the student's mass on the candidates.
    inside = np.asarray([0.731059, 0.268941, 0.0, 0.0])
    near(slope(released) - slope(equation), (np.log(0.880797 / 0.761481) + 0.257403) * (inside - np.exp(P)))


def test_the_truncated_sum_is_none_of_them():
    truncated = lambda student, teacher: jnp.sum(jnp.exp(student[:2]) * (student[:2] - teacher[:2]))
    near(slope(truncated), (0.367449, -0.220147, -0.107687, -0.039616))
    near(slope(truncated, student=Q), (0.068572, 0.113056, -0.132781, -0.048847))
    for loss in (released, equation, functools.partial(released, raw=True)):
        near(slope(loss, teacher=P), 0.0, atol=1e-7)
        near(loss(P, P), 0.0)


@pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])
def test_with_every_token_a_candidate_it_is_the_reverse_kl(support):
    exact = (0.343933, -0.228798, -0.08417, -0.030964)
    near(slope(reverse_kl), exact)
    for loss in (released, equation):
        near(slope(loss, k=9, support=support), exact)
        near(loss(P, Q, k=9, support=support), 0.272249)


@pytest.mark.parametrize(
    ("support", "raw", "total"),
    [
        ("student", False, -0.447416),
        ("teacher", False, -0.108034),
        ("intersection", False, -0.29714),
        ("union", False, -0.269541),
        ("symmetric_difference", True, -0.054837),
    ],
)
def test_strategies(support, raw, total):
    near(released(FIRST, SECOND, 3, support, raw=raw), -total)


def test_a_token_of_both_sets_stands_once():
    ids, kept = candidates(FIRST, SECOND, 3, "union")
    assert sorted(np.asarray(ids)[kept]) == [0, 1, 2, 3]
    ids, kept = candidates(FIRST, SECOND, 3, "symmetric_difference")
    assert sorted(np.asarray(ids)[kept]) == [2, 3]
    ids, kept = candidates(FIRST, SECOND, 3, "intersection")
    assert sorted(np.asarray(ids)[kept]) == [0, 1]


def test_weights():
    kept = jnp.asarray([True, True, False])
    own, other = FIRST[:3], SECOND[:3]
    near(candidate_weights(own, other, kept), (0.40 / 0.65, 0.25 / 0.65, 0.0))
    near(candidate_weights(own, other, kept, "teacher"), (0.20 / 0.55, 0.35 / 0.55, 0.0))
    near(candidate_weights(own, other, kept, "uniform"), (0.5, 0.5, 0.0))
    near(candidate_weights(own, other, kept, raw=True), (0.40, 0.25, 0.0))
    near(candidate_weights(own, other, kept, "uniform", raw=True), (1.0, 1.0, 0.0))
    for of in ("student", "teacher"):  # each alone: their sum is constant anyway
        near(jax.jacobian(lambda x, of=of: candidate_weights(x, x, kept, of))(own), 0.0)


def test_positions_are_apart():
    """A batch of positions is its positions one by one; where none is kept nothing is left to renormalise over."""
    own, other = jnp.stack([FIRST, SECOND]), jnp.stack([SECOND, jnp.roll(FIRST, 1)])
    kept = jnp.asarray([[True, True, False, True, False], [False, True, True, False, False]])
    surrogate = lambda own, other, kept: candidate_surrogate(own, other, candidate_weights(own, other, kept))
    for loss in (surrogate, candidate_reverse_kl):
        near(loss(own, other, kept), [loss(*one) for one in zip(own, other, kept, strict=True)])
    near(among(own, jnp.zeros_like(kept)) / NEVER, 1.0)


def test_without_a_common_token_there_is_no_loss():
    one, other = tiny.log(0.9, 0.04, 0.03, 0.03), tiny.log(0.03, 0.03, 0.04, 0.9)
    for loss in (released, equation):
        assert float(loss(one, other, 1, "intersection")) == 0.0
        assert not slope(loss, one, other, k=1, support="intersection").any()


def test_clips_act_off_policy_only():
    """One candidate of weight 1: PPO with its dual clip."""
    weight, teacher = jnp.ones(1), jnp.asarray([-3.0])
    of = lambda ratio, old=-1.0: candidate_surrogate(
        jnp.asarray([old]) + np.log(ratio), teacher, weight, old=jnp.asarray([old])
    )
    near(of(1.0), 2.0)  # A = log q - log old = -2, loss -A
    near(of(1.1), 2.2)
    near(of(9.0), 6.0)  # at most 3 |A|
    near(of(0.5), 1.6)  # 1 - 0.2
    up = lambda ratio: candidate_surrogate(
        jnp.asarray([-3.0 + np.log(ratio)]), jnp.asarray([-1.0]), weight, old=teacher
    )
    near(up(1.5), -2.4)
    gradient = jax.grad(lambda x: candidate_surrogate(x, teacher, weight).sum())(jnp.asarray([-1.0]))
    near(gradient, 2.0)
