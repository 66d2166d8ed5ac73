"""Estimators from one sampled token, by exact enumeration: every token's estimate, weighted by its probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import divergences as div
from sdjax.kernels import estimators as est
from sdjax.kernels.distributions import logprob, normalise

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])
BETAS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def log(x):
    return jnp.log(jnp.asarray(x, jnp.float32))


def enumerated(estimate, logits, teacher, sampler=None):
    """Expected value and expected logit gradient of `estimate(student log-prob, token)`; tokens by `sampler`."""
    weights = jnp.exp(normalise(logits) if sampler is None else sampler)
    tokens = jnp.arange(logits.size)

    def one(z, token):
        return estimate(logprob(normalise(z), token), token)

    values, gradients = jax.vmap(jax.value_and_grad(one), (None, 0))(logits, tokens)
    return jnp.sum(weights * values), jnp.sum(weights[:, None] * gradients, axis=0), values, gradients


def exact(loss, logits, teacher):
    return jax.value_and_grad(lambda z: loss(normalise(z), teacher))(logits)


def random_pair(vocabulary=50, scale=1.5, seed=3):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, vocabulary)) * scale
    return jnp.array(student, jnp.float32), normalise(jnp.array(teacher))


# ---- k1, k2, k3 ------------------------------------------------------------------------------------------------------


def test_values_of_the_usual_estimators():
    k1 = est.sampled_kl(log(P), log(Q), "k1")
    k2 = est.sampled_kl(log(P), log(Q), "k2")
    k3 = est.sampled_kl(log(P), log(Q), "k3")
    np.testing.assert_allclose(k1, (1.6094, -0.6931, -0.4055), atol=1e-4)
    np.testing.assert_allclose(k3, (0.8094, 0.3069, 0.0945), atol=1e-4)
    np.testing.assert_allclose([P @ k1, P @ k3, P @ k2], (0.515682, 0.515682, 0.736081), atol=2e-6)
    np.testing.assert_allclose(est.sampled_kl(log(P), log(Q), "k3_plus"), k3, rtol=1e-6)


def test_values_toward_a_reference():
    """stableopd 6.5: k1 and k3 average to the same KL."""
    student, reference = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])
    k1, k3 = (est.sampled_kl(log(student), log(reference), k) for k in ("k1", "k3"))
    np.testing.assert_allclose(k1, (0.182322, 0.0, -0.693147), atol=2e-6)
    np.testing.assert_allclose(k3, (0.015655, 0.0, 0.306853), atol=2e-6)
    np.testing.assert_allclose([student @ k1, student @ k3], 0.040078, atol=2e-6)
    _, gradient = exact(div.reverse_kl, log(student), log(reference))
    np.testing.assert_allclose(gradient, (0.085346, -0.012023, -0.073323), atol=2e-6)


@pytest.mark.parametrize(
    "estimator,want",
    [
        ("k1", (0.0, 0.0, 0.0)),
        ("k2", (0.546878, -0.362649, -0.184229)),
        ("k3", (0.4, -0.3, -0.1)),
        ("k3_plus", (0.546878, -0.362649, -0.184229)),
    ],
)
def test_gradient_that_each_estimator_really_has(estimator, want):
    _, gradient, _, _ = enumerated(lambda s, y: est.sampled_kl(s, log(Q)[y], estimator), log(P), log(Q))
    np.testing.assert_allclose(gradient, want, atol=2e-6)


def test_k3_is_never_negative_and_unknown_names_raise():
    logits, teacher = random_pair(scale=4.0)
    assert np.min(est.sampled_kl(normalise(logits), teacher, "k3")) >= 0.0
    with pytest.raises(KeyError):
        est.sampled_kl(log(P), log(Q), "k4")


def test_clamp_of_the_log_ratio():
    student, teacher = jnp.array([-1.0, -40.0]), jnp.array([-41.0, -1.0])
    np.testing.assert_allclose(est.sampled_kl(student, teacher, "k1", clamp=20.0), (20.0, -20.0))
    gradient = jax.grad(lambda s: est.sampled_kl(s, teacher, "k2", clamp=20.0).sum())(student)
    np.testing.assert_array_equal(gradient, 0.0)
    assert np.all(np.isfinite(est.sampled_kl(student[:1], jnp.array([-jnp.inf]), "k3")))


# ---- unbiased estimators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_value_and_gradient_are_unbiased(beta, off_policy):
    logits, teacher = random_pair()
    behavior = normalise(logits * 0.7 + jnp.cos(jnp.arange(50.0))) if off_policy else None

    def estimate(student, token):
        return est.sampled_jsd(student, teacher[token], beta, behavior=None if behavior is None else behavior[token])

    value, gradient, _, _ = enumerated(estimate, logits, teacher, sampler=behavior)
    want_value, want_gradient = exact(lambda s, t: div.jsd(s, t, beta), logits, teacher)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_hand_checked_pair(beta):
    value, gradient, values, _ = enumerated(lambda s, y: est.sampled_jsd(s, log(Q)[y], beta), log(P), log(Q))
    want_value, want_gradient = exact(lambda s, t: div.jsd(s, t, beta), log(P), log(Q))
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)
    assert np.all(np.asarray(values) >= 0.0)
    closed = {0.0: (0.4, -0.3, -0.1), 1.0: (0.546878, -0.362649, -0.184229), 0.5: (0.105420, -0.074191, -0.031229)}
    if beta in closed:
        np.testing.assert_allclose(gradient, closed[beta], atol=2e-6)


def test_without_the_behavior_weight_the_estimate_is_biased():
    """Negative control of the off-policy test."""
    logits, teacher = random_pair()
    behavior = normalise(logits * 0.7 + jnp.cos(jnp.arange(50.0)))
    _, gradient, _, _ = enumerated(lambda s, y: est.sampled_jsd(s, teacher[y], 0.5), logits, teacher, sampler=behavior)
    _, want = exact(lambda s, t: div.jsd(s, t, 0.5), logits, teacher)
    assert np.abs(gradient - want).max() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_that_agrees_sends_nothing_token_by_token(beta):
    logits, _ = random_pair()
    same = normalise(logits)
    _, _, values, gradients = enumerated(lambda s, y: est.sampled_jsd(s, same[y], beta), logits, same)
    np.testing.assert_array_equal(values, 0.0)
    np.testing.assert_array_equal(gradients, 0.0)


def test_ends_are_forward_and_reverse_kl():
    logits, teacher = random_pair(8)
    student = normalise(logits)
    np.testing.assert_array_equal(est.sampled_reverse_kl(student, teacher), est.sampled_jsd(student, teacher, 1.0))
    np.testing.assert_allclose(
        est.sampled_reverse_kl(student, teacher), est.sampled_kl(student, teacher, "k3"), rtol=1e-5
    )
    how = {"behavior": student - 0.3, "clamp": 0.5}
    for options in (how, {"behavior": student - 0.3}, {"clamp": 0.5}):
        found = est.sampled_reverse_kl(student, teacher, **options)
        np.testing.assert_array_equal(found, est.sampled_jsd(student, teacher, 1.0, **options))
        assert np.abs(found - est.sampled_reverse_kl(student, teacher)).max() > 1e-3
    slope = jax.vmap(jax.grad(est.sampled_reverse_kl))(student, teacher)
    np.testing.assert_allclose(slope, student - teacher, rtol=1e-5)  # a policy with advantage log q - log p


def test_any_constant_may_be_added_to_the_coefficient():
    logits, teacher = random_pair(12)
    student = normalise(logits)
    scores = jax.vmap(lambda y: jax.grad(lambda z: logprob(normalise(z), y))(logits))(jnp.arange(12))
    coefficient = est.score_coefficient(teacher - student, 0.3)
    with_constant = jnp.einsum("v,v,vz->z", jnp.exp(student), coefficient + 5.0, scores)
    _, want = exact(lambda s, t: div.jsd(s, t, 0.3), logits, teacher)
    np.testing.assert_allclose(with_constant, want, atol=3e-6)


def test_no_gradient_to_the_teacher_and_one_path_to_the_student():
    student, teacher = jnp.float32(-1.2), jnp.float32(-0.4)
    for beta in BETAS:
        assert float(jax.grad(est.sampled_jsd, argnums=1)(student, teacher, beta)) == 0.0
        slope = jax.grad(est.sampled_jsd)(student, teacher, beta)
        np.testing.assert_allclose(slope, est.score_coefficient(teacher - student, beta), rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_ratios_are_finite(beta):
    student, teacher = jnp.array([-1e-3, -200.0, -3.0]), jnp.array([-300.0, -1e-3, -jnp.inf])
    value, gradient = jax.value_and_grad(lambda s: est.sampled_jsd(s, teacher, beta).sum())(student)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_clamp_bounds_the_weight_and_biases():
    student, teacher = jnp.float32(-10.0), jnp.float32(-1.0)
    free = jax.grad(lambda s, t: est.sampled_jsd(s, t, 0.0))(student, teacher)
    bounded = jax.grad(lambda s, t: est.sampled_jsd(s, t, 0.0, clamp=2.0))(student, teacher)
    np.testing.assert_allclose(free, 1 - np.exp(9.0), rtol=1e-5)
    np.testing.assert_allclose(bounded, 1 - np.exp(2.0), rtol=1e-5)


def test_importance_of_the_behavior_is_a_constant():
    estimate = lambda s: est.sampled_jsd(s, jnp.float32(-0.5), 0.5, behavior=jnp.float32(-2.0))
    plain = lambda s: est.sampled_jsd(s, jnp.float32(-0.5), 0.5)
    student = jnp.float32(-1.0)
    np.testing.assert_allclose(estimate(student), np.e * plain(student), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(estimate)(student), np.e * jax.grad(plain)(student), rtol=1e-5)


def test_monte_carlo_agrees():
    logits, teacher = random_pair(20, scale=1.0)
    tokens = jax.random.categorical(jax.random.key(0), logits, shape=(40_000,))
    for beta in (0.0, 0.5, 1.0):
        estimates = est.sampled_jsd(normalise(logits)[tokens], teacher[tokens], beta)
        error = jnp.std(estimates) / 200.0
        assert abs(float(estimates.mean() - div.jsd(normalise(logits), teacher, beta))) < 4 * float(error)


# ---- the coefficient at one half -------------------------------------------------------------------------------------


def test_phi_of_antisd():
    """antisd 6.1 to 6.5: phi is minus the coefficient of JSD(1/2)."""
    phi = lambda u: -est.score_coefficient(jnp.asarray(u, jnp.float32), 0.5)
    u = np.array([-20.0, -2.0, -1.0, 0.0, 1.0, 2.0, 10.0])
    want = (0.346574, 0.283110, 0.189943, 0.0, -0.310057, -0.716890, -4.653449)
    np.testing.assert_allclose(-phi(u), want, atol=2e-6)
    np.testing.assert_allclose(phi(u) - phi(-u), u / 2, atol=2e-6)
    np.testing.assert_allclose(phi(u), 0.5 * (np.logaddexp(0, u) - np.log(2)), atol=2e-6)
    slope = jax.vmap(jax.grad(phi))(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(slope, 0.5 / (1 + np.exp(-u)), atol=2e-6)
    assert float(-phi(-80.0)) * 0.5 == pytest.approx(0.173287, abs=1e-6)
    np.testing.assert_allclose(-phi(1e-3), -1e-3 / 4, rtol=1e-3)


def test_exact_gradient_of_antisd():
    """antisd 6.5, 6.6, 6.8."""
    logits, teacher = jnp.array([0.0, 1.0, -1.0]), log([0.7, 0.2, 0.1])
    student = jnp.exp(normalise(logits))
    np.testing.assert_allclose(student, (0.244728, 0.665241, 0.090031), atol=2e-6)
    value, gradient, _, _ = enumerated(lambda s, y: est.sampled_jsd(s, teacher[y], 0.5), logits, teacher)
    np.testing.assert_allclose(value, 0.123298, atol=2e-6)
    np.testing.assert_allclose(gradient, (-0.095207, 0.103055, -0.007848), atol=2e-6)
    _, reverse = exact(div.reverse_kl, logits, teacher)
    np.testing.assert_allclose(reverse, (-0.387599, 0.445028, -0.057429), atol=2e-6)
    mean = jnp.sum(student * est.score_coefficient(teacher - normalise(logits), 0.5))
    np.testing.assert_allclose(mean, 0.060230, atol=2e-6)
    middle = jnp.log((student + jnp.exp(teacher)) / 2)
    np.testing.assert_allclose(mean, 0.5 * div.reverse_kl(jnp.log(student), middle), atol=2e-6)


def test_jit():
    student, teacher = log(P), log(Q)
    for beta in (0.0, 0.4, 1.0):
        compiled = jax.jit(lambda s, t, b=beta: est.sampled_jsd(s, t, b))
        np.testing.assert_allclose(compiled(student, teacher), est.sampled_jsd(student, teacher, beta), rtol=1e-5)
    compiled = jax.jit(est.sampled_kl, static_argnums=2)
    np.testing.assert_allclose(compiled(student, teacher, "k3"), est.sampled_kl(student, teacher, "k3"), rtol=1e-5)
