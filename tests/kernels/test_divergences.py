"""Divergences and distributions against float64 NumPy, closed-form gradients and hand-checked numbers.

P is the student and Q the teacher of the hand-checked numbers, which are given to six digits.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import distributions as dst
from sdjax.kernels import divergences as div

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])
BETAS = (0.0, 0.3, 0.5, 1.0)
SIX = 2e-6


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=["plain", "jit"])
def call(request):
    return jax.jit if request.param == "jit" else lambda f: f


def log(x):
    return jnp.log(jnp.asarray(x, jnp.float32))


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl64(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    safe = np.where(a > 0, a, 1.0)
    return np.sum(np.where(a > 0, a * (np.log(safe) - np.log(b)), 0.0), -1)


def jsd64(p, q, beta):
    if beta == 0.0:
        return kl64(q, p)
    if beta == 1.0:
        return kl64(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl64(q, m) + (1 - beta) * kl64(p, m)


def pairs(rows=64, vocabulary=17, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, vocabulary)) * scale, rng.normal(size=(rows, vocabulary)) * scale


def logit_gradient(loss, student=P, teacher=Q):
    """Gradient with respect to the student's logits of `loss(student, teacher)`, both log-probabilities."""
    return jax.grad(lambda z: jnp.sum(loss(dst.normalise(z), log(teacher))))(log(student))


# ---- values ----------------------------------------------------------------------------------------------------------


def test_hand_values(call):
    expected = {0.0: 0.376584, 1.0: 0.515682, 0.5: 0.103295, 0.3: 0.082794, 0.7: 0.092576}
    for beta, value in expected.items():
        np.testing.assert_allclose(call(lambda s, t, b=beta: div.jsd(s, t, b))(log(P), log(Q)), value, atol=SIX)
    np.testing.assert_allclose(call(div.forward_kl)(log(P), log(Q)), 0.376584, atol=SIX)
    np.testing.assert_allclose(call(div.reverse_kl)(log(P), log(Q)), 0.515682, atol=SIX)


@pytest.mark.parametrize("beta", BETAS)
def test_matches_float64(beta, call):
    student, teacher = pairs()
    got = call(lambda s, t: div.jsd(dst.normalise(s), dst.normalise(t), beta))(jnp.array(student), jnp.array(teacher))
    want = jsd64(softmax(student), softmax(teacher), beta)
    chex.assert_shape(got, (64,))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert np.all(np.asarray(got) > 0)


@pytest.mark.parametrize("beta", BETAS)
def test_entries_add_up(beta):
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(5))
    entries = div.jsd_entries(student, teacher, beta)
    chex.assert_equal_shape([entries, student])
    p, q = np.exp(np.asarray(student, np.float64)), np.exp(np.asarray(teacher, np.float64))
    m = beta * q + (1 - beta) * p
    family = beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m)
    want = {0.0: q * np.log(q / p), 1.0: p * np.log(p / q)}.get(beta, family)
    np.testing.assert_allclose(entries, want, atol=2e-6)


def test_argument_order_matters():
    assert abs(float(div.forward_kl(log(P), log(Q)) - div.forward_kl(log(Q), log(P)))) > 0.1
    np.testing.assert_allclose(div.forward_kl(log(P), log(Q)), kl64(Q, P), rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_symmetry_of_the_family(beta):
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(9))
    left, right = div.jsd(student, teacher, beta), div.jsd(teacher, student, 1.0 - beta)
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_jsd_is_at_most_log_two():
    certain = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    np.testing.assert_allclose(div.jsd(certain, certain[::-1], 0.5), np.log(2), rtol=1e-6)
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(scale=12.0))
    value = div.jsd(student, teacher, 0.5)
    assert np.all(np.asarray(value) <= np.log(2) + 1e-6) and np.max(value) > 0.6


def test_family_jumps_at_its_ends():
    s, t = log(P), log(Q)
    np.testing.assert_allclose(div.jsd(s, t, 0.001), 0.000376, atol=1e-6)
    np.testing.assert_allclose(div.jsd(s, t, 1e-4) / 1e-4, div.forward_kl(s, t), rtol=2e-3)
    np.testing.assert_allclose(div.jsd(s, t, 1 - 1e-3) / 1e-3, div.reverse_kl(s, t), rtol=3e-3)
    assert div.jsd(s, t, 1e-4) < 1e-3 * div.jsd(s, t, 0.0)


def test_ratio_to_alpha_of_a_coarsened_pair():
    """mopd-peers 6.4: JSD/alpha tends to KL(teacher || student)."""
    s, t = dst.normalise(jnp.array([2.0, 1, 0, -1])), dst.normalise(jnp.array([1.0, 1.5, -0.5, 0.5]))
    want = {0.5: 0.165984, 0.1: 0.323028, 0.01: 0.367297, 0.001: 0.372072}
    for alpha, value in want.items():
        np.testing.assert_allclose(div.jsd(s, t, alpha) / alpha, value, rtol=2e-4)
    np.testing.assert_allclose(div.forward_kl(s, t), 0.372611, atol=SIX)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_arguments_give_exactly_zero(beta):
    """Not only to rounding: a teacher that sees what the student sees must send nothing at all."""
    logits = jnp.array(pairs(scale=4.0)[0])
    same = dst.normalise(logits)
    np.testing.assert_array_equal(div.jsd(same, same, beta), 0.0)
    gradient = jax.grad(lambda z: div.jsd(dst.normalise(z), jax.lax.stop_gradient(same), beta).sum())(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=5e-7)  # p - q, where q is p and p sums to 1 only to rounding


@pytest.mark.parametrize("beta", BETAS)
def test_shift_of_logits_changes_nothing(beta):
    student, teacher = (jnp.array(x) for x in pairs(6))
    loss = lambda s, t: div.jsd(dst.normalise(s), dst.normalise(t), beta)
    np.testing.assert_allclose(loss(student + 7.0, teacher - 3.0), loss(student, teacher), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens_are_finite(beta):
    """log 0 on either side, or both: no NaN in value or gradient; the value is infinite only in the limit."""
    student = jnp.array([[0.0, -jnp.inf, -jnp.inf], [-0.5, -0.9327, -jnp.inf]])
    teacher = jnp.array([[-0.6931472, -0.6931472, -jnp.inf], [-0.5, -0.9327, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda s: div.jsd(s, teacher, beta).sum())(student)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    assert float(div.jsd(student, teacher, beta)[1]) == 0.0
    if 0.0 < beta < 1.0:
        p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
        np.testing.assert_allclose(div.jsd(student, teacher, beta)[0], jsd64(p, q, beta), rtol=1e-5)


def test_mixture_ratio_is_accurate_and_finite():
    u = np.array([-1e30, -60.0, -3.0, -1e-4, 0.0, 1e-4, 3.0, 60.0])
    for beta in (0.1, 0.5, 0.9):
        want = np.logaddexp(np.log(beta) + u, np.log1p(-beta))
        got = div.log_mixture_ratio(jnp.array(u, jnp.float32), beta)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
        slope = jax.vmap(jax.grad(lambda x, b=beta: div.log_mixture_ratio(x, b)))(jnp.array(u, jnp.float32))
        np.testing.assert_allclose(slope, beta * np.exp(u - want), rtol=1e-5, atol=1e-12)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_hand_gradients():
    want = {
        0.0: (0.4, -0.3, -0.1),
        1.0: (0.546878, -0.362649, -0.184229),
        0.5: (0.105420, -0.074191, -0.031229),
        0.3: (0.085358, -0.061513, -0.023845),
    }
    for beta, gradient in want.items():
        got = logit_gradient(lambda s, t, b=beta: div.jsd(s, t, b))
        np.testing.assert_allclose(got, gradient, atol=SIX)
        np.testing.assert_allclose(jnp.sum(got), 0.0, atol=1e-7)


@pytest.mark.parametrize("student,teacher", [((0.7, 0.2, 0.1), (0.5, 0.3, 0.2))])
def test_hand_gradients_of_a_second_pair(student, teacher):
    """vpd 6.6, trace 6.4."""
    np.testing.assert_allclose(div.reverse_kl(log(student), log(teacher)), 0.085123, atol=SIX)
    np.testing.assert_allclose(div.forward_kl(log(student), log(teacher)), 0.092033, atol=SIX)
    reverse = logit_gradient(div.reverse_kl, student, teacher)
    np.testing.assert_allclose(reverse, (0.175945, -0.098118, -0.077827), atol=SIX)
    np.testing.assert_allclose(logit_gradient(div.forward_kl, student, teacher), (0.2, -0.1, -0.1), atol=SIX)


def test_gradient_of_a_confidently_wrong_student():
    """trace 6.4: what reverse and forward KL do to (.9, .05, .05) under (.02, .9, .08)."""
    student, teacher = (0.9, 0.05, 0.05), (0.02, 0.9, 0.08)
    reverse = logit_gradient(div.reverse_kl, student, teacher)
    np.testing.assert_allclose(reverse, (0.493817, -0.307417, -0.186399), atol=SIX)
    np.testing.assert_allclose(logit_gradient(div.forward_kl, student, teacher), (0.88, -0.85, -0.03), atol=SIX)


@pytest.mark.parametrize("beta", BETAS)
def test_closed_form_gradients(beta):
    student, teacher = pairs(16, scale=2.0)
    p, q = softmax(student), softmax(teacher)
    m = beta * q + (1 - beta) * p
    if beta == 0.0:
        want = p - q
    else:
        ratio = np.log(p / (q if beta == 1.0 else m))
        scale = 1.0 if beta == 1.0 else 1.0 - beta
        want = scale * p * (ratio - np.sum(p * ratio, -1, keepdims=True))
    loss = lambda z: div.jsd(dst.normalise(z), dst.normalise(jnp.array(teacher)), beta).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.array(student, jnp.float32)), want, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_an_entry_changes_with_each_logarithm_by_that_ones_part(beta):
    """Whether the entries add up to 1 or not."""
    student, teacher = (np.log(softmax(x)) + shift for x, shift in zip(pairs(8, scale=3.0), (0.7, -0.2), strict=True))
    p, q = np.exp(student), np.exp(teacher)
    m = beta * q + (1 - beta) * p
    entries = lambda s, t: div.jsd_entries(s, t, beta).sum()
    got = jax.grad(entries, (0, 1))(jnp.array(student, jnp.float32), jnp.array(teacher, jnp.float32))
    np.testing.assert_allclose(got[0], (1 - beta) * p * np.log(p / m), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], beta * q * np.log(q / m), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_numerical_gradients_of_both_arguments(beta):
    student, teacher = (jnp.array(x, jnp.float32) for x in pairs(3, 5, scale=1.0))
    loss = lambda s, t: div.jsd(dst.normalise(s), dst.normalise(t), beta)
    chex.assert_numerical_grads(loss, (student, teacher), order=1, atol=1e-2, rtol=1e-2)


def test_forward_kl_gradient_is_soft_cross_entropy():
    """sdft 6.2: the teacher's entropy does not move the student."""
    entropy_loss = logit_gradient(lambda s, t: -jnp.sum(jnp.exp(t) * s))
    np.testing.assert_allclose(logit_gradient(div.forward_kl), entropy_loss, atol=1e-7)


def test_gradients_are_linear_in_the_loss():
    mixed = logit_gradient(lambda s, t: 0.3 * div.forward_kl(s, t) + 0.7 * div.reverse_kl(s, t))
    want = 0.3 * logit_gradient(div.forward_kl) + 0.7 * logit_gradient(div.reverse_kl)
    np.testing.assert_allclose(mixed, want, atol=1e-7)


def test_temperature_divides_the_gradient():
    """opsd 6.7: the loss at T is the loss of logits / T, and its gradient carries 1/T."""
    temperature = 1.7
    logits, teacher = log(P), log(Q)
    loss = lambda z: div.forward_kl(dst.temper(dst.normalise(z), temperature), dst.temper(teacher, temperature))
    at_one = lambda z: div.forward_kl(dst.normalise(z), dst.normalise(teacher / temperature))
    np.testing.assert_allclose(loss(logits), at_one(logits / temperature), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(loss)(logits), jax.grad(at_one)(logits / temperature) / temperature, rtol=1e-5, atol=1e-8
    )


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_clip_values(call):
    entries = div.forward_kl_entries(log(P), log(Q))
    np.testing.assert_allclose(entries, (-0.160944, 0.415888, 0.121640), atol=SIX)
    np.testing.assert_allclose(call(div.clip_entries)(entries, 0.4159), 0.376584, atol=SIX)
    np.testing.assert_allclose(call(div.clip_entries)(entries, 0.05), -0.060944, atol=SIX)


def test_clip_flips_every_sign_of_the_gradient():
    clipped = logit_gradient(lambda s, t: div.clip_entries(div.forward_kl_entries(s, t), 0.05))
    plain = logit_gradient(div.forward_kl)
    np.testing.assert_allclose(clipped, (-0.05, 0.03, 0.02), atol=SIX)
    assert np.all(np.sign(clipped) == -np.sign(plain))


@pytest.mark.parametrize("limit", [-1.0, -0.01, 0.0, 0.02, 0.1, 1e9])
def test_clip_gradient_closed_form(limit):
    student, teacher = pairs(16, scale=1.5)
    p, q = softmax(student), softmax(teacher)
    kept = q * np.log(q / p) < limit
    want = p * np.sum(q * kept, -1, keepdims=True) - kept * q
    loss = lambda z: div.clip_entries(
        div.forward_kl_entries(dst.normalise(z), dst.normalise(jnp.array(teacher))), limit
    ).sum()
    got = jax.grad(loss)(jnp.array(student, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 0.0, atol=1e-6)
    if limit == 1e9:
        np.testing.assert_allclose(got, p - q, atol=1e-6)
    if limit == -1.0:
        np.testing.assert_array_equal(got, 0.0)


def test_clip_on_an_under_allocated_token():
    """trace, trap 2: the token the teacher wants most is lowered, not lifted, and the clipped "KL" is negative."""
    student, teacher = (0.01, 0.495, 0.495), (0.9, 0.05, 0.05)
    entries = div.forward_kl_entries(log(student), log(teacher))
    np.testing.assert_allclose(entries, (4.0498, -0.1146, -0.1146), atol=1e-4)
    clipped = lambda s, t: div.clip_entries(div.forward_kl_entries(s, t), 0.05)
    np.testing.assert_allclose(clipped(log(student), log(teacher)), -0.1793, atol=1e-4)
    np.testing.assert_allclose(logit_gradient(clipped, student, teacher), (0.001, -0.0005, -0.0005), atol=1e-6)
    np.testing.assert_allclose(logit_gradient(div.forward_kl, student, teacher), (-0.89, 0.445, 0.445), atol=1e-6)


def test_straight_through_clip_keeps_value_and_restores_gradient():
    loss = lambda s, t: div.clip_entries_straight_through(div.forward_kl_entries(s, t), 0.05)
    np.testing.assert_allclose(loss(log(P), log(Q)), -0.060944, atol=SIX)
    np.testing.assert_allclose(logit_gradient(loss), (0.4, -0.3, -0.1), atol=SIX)


@pytest.mark.parametrize("beta", BETAS)
def test_clip_of_equal_distributions_is_silent(beta):
    loss = lambda s, t: div.clip_entries(div.jsd_entries(s, t, beta), 0.05)
    assert float(loss(log(P), log(P))) == 0.0
    np.testing.assert_allclose(logit_gradient(loss, P, P), 0.0, atol=1e-7)


def test_clamp_around_values_and_gradient():
    """resd 6.2 and 6.3."""
    student, teacher = dst.normalise(jnp.array([0.0, 1.0, -1.0])), log([0.7, 0.29, 0.01])
    clamped = div.clamp_around(student, teacher, low=0.2)
    np.testing.assert_allclose(jnp.exp(clamped), (0.7, 0.29, 0.018006), atol=SIX)
    np.testing.assert_allclose(div.reverse_kl(student, clamped), 0.440034, atol=SIX)
    np.testing.assert_allclose(div.reverse_kl(student, teacher), 0.492984, atol=SIX)
    loss = lambda s, t: div.reverse_kl(s, div.clamp_around(s, t, low=0.2))
    gradient = jax.grad(lambda z: loss(dst.normalise(z), teacher))(jnp.array([0.0, 1.0, -1.0]))
    np.testing.assert_allclose(gradient, (-0.364882, 0.259600, 0.105282), atol=SIX)

    student, teacher = log([0.6, 0.3, 0.1]), log([0.9, 0.09, 0.01])
    clamped = div.clamp_around(student, teacher)
    np.testing.assert_allclose(jnp.exp(clamped), (0.9, 0.09, 0.02), atol=SIX)
    np.testing.assert_allclose(div.reverse_kl(student, clamped), 0.278857, atol=SIX)
    np.testing.assert_allclose(div.reverse_kl(student, teacher), 0.348171, atol=SIX)
    np.testing.assert_allclose(div.jsd(student, teacher, 0.5), 0.066294, atol=SIX)


def test_clamp_around_bounds():
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(scale=4.0))
    np.testing.assert_array_equal(div.clamp_around(student, teacher, low=0.0), teacher)
    ratio = div.clamp_around(student, teacher, low=0.25, high=3.0) - student
    assert np.min(ratio) == pytest.approx(np.log(0.25), rel=1e-5)
    assert np.max(ratio) == pytest.approx(np.log(3.0), rel=1e-5)
    assert np.all(np.asarray(div.reverse_kl(student, div.clamp_around(student, teacher, low=0.2))) >= 0.0)
    assert np.isfinite(div.clamp_around(log([1.0, 0.0]), log([0.5, 0.5]))).all()


def test_unnormalised_top_k_values():
    for k, want in {1: 0.415888, 2: 0.537528, 3: 0.376584}.items():
        np.testing.assert_allclose(div.unnormalised_top_k_forward_kl(log(P), log(Q), k), want, atol=SIX)
    assert div.unnormalised_top_k_forward_kl(log(P), log(Q), 2) > div.forward_kl(log(P), log(Q))


def test_unnormalised_top_k_is_silent_below_zero():
    """Teacher .3 against student .6 on the one kept token: -.207944, clamped to 0 with its gradient."""
    student, teacher = np.array([0.6, 0.14, 0.13, 0.13]), np.array([0.3, 0.25, 0.23, 0.22])
    assert float(div.forward_kl_entries(log(student), log(teacher))[0]) == pytest.approx(-0.207944, abs=SIX)
    loss = lambda s, t: div.unnormalised_top_k_forward_kl(s, t, 1)
    assert float(loss(log(student), log(teacher))) == 0.0
    np.testing.assert_array_equal(logit_gradient(loss, student, teacher), 0.0)
    assert np.abs(logit_gradient(loss)).max() > 0.1


def test_unnormalised_top_k_floor():
    student, teacher = log([0.999, 0.001]), log([0.1, 0.9])
    got = div.unnormalised_top_k_forward_kl(student, teacher, 1, floor=float(np.log(0.01)))
    np.testing.assert_allclose(got, 0.9 * np.log(0.9 / 0.01), rtol=1e-5)


# ---- top-k -----------------------------------------------------------------------------------------------------------


def with_rest(student, teacher, k, beta):
    return div.jsd(*dst.top_k_with_rest(log(student), log(teacher), by=log(student), k=k), beta)


def renormalised(student, teacher, k, beta):
    return div.jsd(*dst.top_k_renormalised(log(student), log(teacher), by=log(student), k=k), beta)


def test_top_k_hand_values():
    for beta, want in {0.0: 0.368064, 1.0: 0.510826, 0.5: 0.101749}.items():
        np.testing.assert_allclose(with_rest(P, Q, 1, beta), want, atol=SIX)
        np.testing.assert_allclose(with_rest(P, Q, 2, beta), jsd64(P, Q, beta), atol=SIX)
        assert float(renormalised(P, Q, 1, beta)) == 0.0
    np.testing.assert_allclose(renormalised(P, Q, 2, 1.0), 0.612437, atol=SIX)
    np.testing.assert_allclose(renormalised(P, Q, 2, 0.0), 0.497738, atol=SIX)
    np.testing.assert_allclose(
        with_rest(np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.6, 0.1, 0.1, 0.2]), 2, 1.0), 0.157330, atol=SIX
    )


def test_top_k_of_the_peers_fixture():
    """mopd-peers 6.1 to 6.3, and brts 6.6's fixture: what the rest bucket hides."""
    logits = jnp.array([2.0, 1, 0, -1])
    student = softmax([2, 1, 0, -1])
    constant, swapped = softmax([1, 1.5, 0.5, -0.5]), softmax([1, 1.5, -0.5, 0.5])
    kept = dst.top_k_with_rest(log(student), log(constant), by=log(student), k=2)
    np.testing.assert_allclose(jnp.exp(kept[0]), (0.643914, 0.236883, 0.119203), atol=SIX)
    np.testing.assert_allclose(jnp.exp(kept[1]), (0.28749, 0.473991, 0.238519), atol=SIX)
    for beta, value, full in ((1.0, 0.272249, 0.327335), (0.0, 0.262387, 0.372611), (0.5, 0.065282, 0.082992)):
        np.testing.assert_allclose(with_rest(student, constant, 2, beta), value, atol=SIX)
        np.testing.assert_allclose(jsd64(student, constant, beta), value, atol=SIX)
        np.testing.assert_allclose(with_rest(student, swapped, 2, beta), value, atol=SIX)
        np.testing.assert_allclose(div.jsd(log(student), log(swapped), beta), full, atol=SIX)
    np.testing.assert_allclose(renormalised(student, swapped, 2, 1.0), 0.257403, atol=SIX)

    def merged(z):
        student = dst.normalise(z)
        return div.reverse_kl(*dst.top_k_with_rest(student, log(swapped), by=student, k=2))

    np.testing.assert_allclose(jax.grad(merged)(logits), (0.343933, -0.228798, -0.08417, -0.030964), atol=SIX)
    full = jax.grad(lambda z: div.reverse_kl(dst.normalise(z), log(swapped)))(logits)
    np.testing.assert_allclose(full, (0.308463, -0.241847, -0.001826, -0.064789), atol=SIX)


@pytest.mark.parametrize("beta", BETAS)
def test_merging_never_raises_a_divergence(beta):
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(48, 12, scale=2.0))
    full = np.asarray(div.jsd(student, teacher, beta))
    previous = np.zeros_like(full)
    for k in (1, 3, 6, 11):
        merged = np.asarray(div.jsd(*dst.top_k_with_rest(student, teacher, by=student, k=k), beta))
        slack = 1e-6 + 1e-4 * full  # the rest's mass is 1 minus a float32 sum
        assert np.all(merged <= full + slack)
        assert np.all(merged >= previous - slack)  # a finer partition of the same entries
        previous = merged
    np.testing.assert_allclose(previous, full, rtol=1e-4, atol=1e-6)  # 11 of 12 kept: the rest is one entry
    np.testing.assert_array_equal(div.jsd(*dst.top_k_with_rest(student, teacher, by=student, k=12), beta), full)


def test_top_k_of_the_full_vocabulary_is_full():
    student, teacher = (dst.normalise(jnp.array(x)) for x in pairs(8))
    np.testing.assert_allclose(
        div.unnormalised_top_k_forward_kl(student, teacher, 17), div.forward_kl(student, teacher), rtol=1e-5, atol=1e-6
    )
    renormed = dst.top_k_renormalised(student, teacher, by=teacher, k=17)
    np.testing.assert_array_equal(div.forward_kl(*renormed), div.forward_kl(student, teacher))


def test_rest_of_a_certain_student_is_finite():
    student = dst.normalise(jnp.array([[60.0, 0.0, -3.0, 1.0]]))
    teacher = dst.normalise(jnp.array([[0.0, 1.0, 2.0, 3.0]]))
    loss = lambda z: div.jsd(*dst.top_k_with_rest(dst.normalise(z), teacher, by=dst.normalise(z), k=2), 0.5).sum()
    assert np.isfinite(loss(student)) and np.all(np.isfinite(jax.grad(loss)(student)))


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_entropy_and_logprob(call):
    dist = log([[0.98, 0.01, 0.01], [0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(call(dst.entropy)(dist), (0.111902, 0.897946, 1.098612, 0.394398, 0.0), atol=SIX)
    assert np.all(np.isfinite(jax.grad(lambda x: dst.entropy(x).sum())(dist)))
    got = call(dst.logprob)(dist, jnp.array([0, 2, 1, 1, 0]))
    np.testing.assert_allclose(got, np.log([0.98, 0.1, 1 / 3, 0.05, 1.0]), atol=1e-6)


def test_trust_region_teacher():
    """sdpo 6.3: the ends, the hand-checked mixture, and logits instead of log-probabilities."""
    first, second = log([0.6, 0.3, 0.1]), log([0.1, 0.6, 0.3])
    np.testing.assert_allclose(jnp.exp(dst.interpolate(first, second, 0.25)), (0.43977, 0.40926, 0.15097), atol=1e-5)
    np.testing.assert_allclose(dst.interpolate(first, second, 0.0), first, atol=1e-6)
    np.testing.assert_allclose(dst.interpolate(first, second, 1.0), second, atol=1e-6)
    shifted = dst.interpolate(first + 5.0, second - 2.0, 0.25)
    np.testing.assert_allclose(shifted, dst.interpolate(first, second, 0.25), atol=1e-6)


def test_entries_of_every_position_are_its_own():
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher, by = (dst.normalise(jax.random.normal(key, (2, 3, 6))) for key in keys)
    places = np.argsort(-np.asarray(by), axis=-1)[..., :2]
    for found, dist in zip(dst.top_k_entries(student, teacher, by=by, k=2), (student, teacher), strict=True):
        np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(dist), places, axis=-1))


@pytest.mark.parametrize("bound", [0.3, 1.0, 1e9])
def test_advantages_are_clipped_on_both_sides(bound):
    """Value and gradient in float64; without a clip the gradient is that of the reverse KL."""
    logits, teacher = (
        jax.random.normal(jax.random.key(0), (4, 6)),
        dst.normalise(jax.random.normal(jax.random.key(1), (4, 6))),
    )
    loss = lambda z: div.advantage_clipped_reverse_kl(dst.normalise(z), teacher, bound)
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (dst.normalise(logits), teacher))
    cost = np.clip(np.log(p / q), -bound, bound)
    np.testing.assert_allclose(loss(logits), (p * cost).sum(-1), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda z: loss(z).sum())
    np.testing.assert_allclose(slope(logits), p * (cost - (p * cost).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-6)
    if bound > 100:
        exact = jax.grad(lambda z: div.reverse_kl(dst.normalise(z), teacher).sum())
        np.testing.assert_allclose(slope(logits), exact(logits), atol=1e-6)
    never = jnp.asarray([0.0, -jnp.inf])
    np.testing.assert_allclose(div.advantage_clipped_reverse_kl(never, jnp.asarray([-jnp.inf, 0.0]), 2.0), 2.0)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        div.forward_kl(jnp.zeros((2, 3)), jnp.zeros((3,)))
    with pytest.raises(AssertionError):
        div.jsd(jnp.zeros((2, 3)), jnp.zeros((2, 1)), 0.5)


def test_half_precision_logits_are_normalised_in_float32():
    logits = jnp.array(pairs(2)[0], jnp.bfloat16)
    assert dst.normalise(logits).dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(dst.normalise(logits)).sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-5, 1e-6])
def test_a_small_rest_is_as_large_as_it_is(rest):
    """Down to what float32 can tell from 1; where nothing is left it is 1e-7."""
    entries = log([0.25, 0.75 - rest])
    left = 1.0 - np.exp(np.asarray(entries, np.float64)).sum()
    np.testing.assert_allclose(dst.log_rest(entries), [np.log(left)], rtol=0.02)
    np.testing.assert_allclose(dst.log_rest(log([0.25, 0.75])), [np.log(1e-7)], atol=1e-3)
    assert np.isfinite(jax.grad(lambda x: dst.log_rest(x).sum())(log([0.25, 0.75]))).all()
