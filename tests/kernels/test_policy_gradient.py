"""Surrogates and importance weights: the clip table, expected gradients by enumeration, what is and is not live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import policy_gradient as pg
from sdjax.kernels.distributions import logprob, normalise
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.reductions import masked_mean, sequence_mean, token_mean
from sdjax.kernels.weights import mean_one

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def log(x):
    return jnp.log(jnp.asarray(x, jnp.float32))


def expected_gradient(loss, student, sampler=None):
    """Mean over tokens of the sampler of the logit gradient of `loss(log-prob of the token, token)`."""
    weights = jnp.exp(log(student)) if sampler is None else jnp.asarray(sampler, jnp.float32)
    one = jax.grad(lambda z, y: loss(logprob(normalise(z), y), y))
    gradients = jax.vmap(one, (None, 0))(log(student), jnp.arange(len(student)))
    return jnp.sum(weights[:, None] * gradients, axis=0), gradients


def total_variance(gradients, student):
    weights = jnp.asarray(student, jnp.float32)
    return float(jnp.sum(weights @ (gradients - (weights @ gradients)[None]) ** 2))


def live_advantage(teacher):
    """The mistake: ratio times an advantage that still carries gradient."""
    return lambda s, y: -jnp.exp(s - jax.lax.stop_gradient(s)) * (teacher[y] - s)


# ---- reinforce -------------------------------------------------------------------------------------------------------


def test_reinforce_with_the_log_ratio_is_reverse_kl():
    teacher = log(Q)
    gradient, _ = expected_gradient(lambda s, y: pg.reinforce(s, teacher[y] - s), P)
    np.testing.assert_allclose(gradient, (0.546878, -0.362649, -0.184229), atol=2e-6)


def test_live_advantage_is_stopped():
    """vopd: a live log-ratio pushes the sampled token the other way; total variance .0663 becomes .2216."""
    student, teacher = np.array([0.7, 0.2, 0.1]), log([0.5, 0.3, 0.2])
    mean, each = expected_gradient(lambda s, y: pg.reinforce(s, teacher[y] - s), student)
    leaked_mean, leaked = expected_gradient(live_advantage(teacher), student)
    np.testing.assert_allclose(each[1], (0.283826, -0.324372, 0.040547), atol=2e-6)
    np.testing.assert_allclose(leaked[1], (-0.416174, 0.475628, -0.059453), atol=2e-6)
    np.testing.assert_allclose(leaked_mean, mean, atol=1e-6)
    assert total_variance(each, student) == pytest.approx(0.066319, abs=2e-6)
    assert total_variance(leaked, student) == pytest.approx(0.221612, abs=2e-6)


def test_variance_of_the_minillm_leak():
    """TRL's MiniLLM differentiates its advantage: same mean, .1723 becomes .9205."""
    mean, each = expected_gradient(lambda s, y: pg.reinforce(s, log(Q)[y] - s), P)
    leaked_mean, leaked = expected_gradient(live_advantage(log(Q)), P)
    np.testing.assert_allclose(leaked_mean, mean, atol=1e-6)
    assert total_variance(each, P) == pytest.approx(0.1723, abs=1e-4)
    assert total_variance(leaked, P) == pytest.approx(0.9205, abs=1e-4)


@pytest.mark.parametrize("baseline", [-3.0, 0.0, 0.085123, 2.0])
def test_baselines_are_free(baseline):
    teacher = log(Q)
    gradient, _ = expected_gradient(lambda s, y: pg.reinforce(s, teacher[y] - s - baseline), P)
    want = jax.grad(lambda z: reverse_kl(normalise(z), teacher))(log(P))
    np.testing.assert_allclose(gradient, want, atol=2e-6)


# ---- clipping --------------------------------------------------------------------------------------------------------

CLIP_TABLE = [
    (0.5, 1.0, -0.5, -0.5),
    (1.0, 1.0, -1.0, -1.0),
    (1.5, 1.0, -1.28, 0.0),
    (4.0, 1.0, -1.28, 0.0),
    (0.5, -1.0, 0.8, 0.0),
    (1.0, -1.0, 1.0, 1.0),
    (1.5, -1.0, 1.5, 1.5),
    (4.0, -1.0, 3.0, 0.0),
]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_clip_table(wrap):
    ratio, advantage, value, slope = (np.array(column, np.float32) for column in zip(*CLIP_TABLE, strict=True))
    loss = wrap(lambda x: pg.clipped_surrogate(x, jnp.zeros(8), jnp.array(advantage), (0.2, 0.28), dual_clip=3.0))
    np.testing.assert_allclose(loss(log(ratio)), value, atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(log(ratio)), slope, atol=1e-5)


def test_without_dual_clip_a_bad_token_is_unbounded():
    loss = lambda x: pg.clipped_surrogate(x, jnp.zeros(1), -jnp.ones(1))[0]
    np.testing.assert_allclose(loss(log([4.0])), 4.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(log([4.0])), [4.0], rtol=1e-5)


def test_dual_clip_scales_with_the_advantage():
    loss = lambda r, a: pg.clipped_surrogate(log([r]), jnp.zeros(1), jnp.array([a]), dual_clip=3.0)[0]
    np.testing.assert_allclose([loss(4.0, -0.5), loss(2.0, -0.5), loss(4.0, -2.0)], (1.5, 1.0, 6.0), rtol=1e-5)


def test_symmetric_clip_of_stableopd():
    loss = lambda r, a: pg.clipped_surrogate(log([r]), jnp.zeros(1), jnp.array([a]), (0.2, 0.2))[0]
    np.testing.assert_allclose([-loss(1.3, 0.5), -loss(0.7, -0.5)], (0.6, -0.4), atol=1e-6)


def test_only_the_policy_is_live():
    arguments = jnp.array([[-1.0, -0.5]]), jnp.array([[-1.1, -0.4]]), jnp.array([[0.3, -0.8]])
    for loss in (pg.clipped_surrogate, pg.cispo):
        gradients = jax.grad(lambda *a, f=loss: f(*a).sum(), argnums=(0, 1, 2))(*arguments)
        assert np.all(np.asarray(gradients[0]) != 0.0)
        np.testing.assert_array_equal(gradients[1], 0.0)
        np.testing.assert_array_equal(gradients[2], 0.0)


def test_a_row_advantage_needs_its_axis():
    """[B] beside [B, T] would be read as one advantage per column."""
    square = jnp.zeros((2, 2))
    for loss in (pg.clipped_surrogate, pg.cispo):
        assert loss(square, square, jnp.ones((2, 1))).shape == (2, 2)
        with pytest.raises(AssertionError):
            loss(square, square, jnp.ones(2))
    with pytest.raises(AssertionError):
        pg.reinforce(square, jnp.ones(2))


@pytest.mark.parametrize("behavior", [-91.0, -12.0, -jnp.inf, jnp.nan])
def test_a_ratio_that_overflows_or_is_no_number_decides_nothing(behavior):
    """The gradient is that of the batch without that token, for whatever is made of ratios; the value is near."""
    logprobs = jnp.log(jnp.array([[0.5, 0.4, 0.3, 0.2]]))
    wrong = jnp.array([[-0.7, behavior, -1.2, -1.6]])
    right, known = wrong.at[0, 1].set(logprobs[0, 1]), jnp.array([[True, False, True, True]])
    for loss in (
        lambda x, b: pg.clipped_surrogate(x, b, jnp.full_like(x, -1.0)),
        lambda x, b: -pg.token_ratio(x, b) * 2.0,
        lambda x, b: pg.importance_weight(x, b) * -x,
    ):
        total = lambda x, b, over, loss=loss: jnp.where(over, loss(x, b), 0.0).sum()
        found = jax.value_and_grad(total)(logprobs, right, known)
        whole = jax.value_and_grad(total)(logprobs, wrong, True)
        np.testing.assert_allclose(whole[1], found[1], rtol=1e-5)
        assert abs(float(whole[0] - found[0])) < 1.0  # a clipped surrogate has the value of its clip


def test_ratios_of_rows_that_are_no_numbers_are_dropped():
    logprobs, over = jnp.full((2, 3), -1.0), jnp.ones((2, 3), bool)
    behavior = jnp.array([[-1.0, -1.0, -1.0], [-1.0, -jnp.inf, -1.0]])
    np.testing.assert_allclose(pg.sequence_ratio(logprobs, behavior, over), [[1.0] * 3, [0.0] * 3])
    gradient = jax.grad(lambda x: pg.sequence_ratio(x, behavior, over).sum())(logprobs)
    np.testing.assert_allclose(gradient, [[1.0] * 3, [0.0] * 3])
    assert float(pg.importance_weight(jnp.zeros(1), jnp.full(1, -50.0), cap=2.0)[0]) == 2.0  # truncated, as ever


def test_cispo_coefficients():
    ratio = np.array([0.5, 1.5, 1.0])
    slope = lambda clip: jax.grad(lambda x: pg.cispo(x, jnp.zeros(3), jnp.ones(3), clip).sum())(log(ratio))
    np.testing.assert_allclose(slope((0.2, 0.28)), (-0.8, -1.28, -1.0), atol=1e-6)
    np.testing.assert_allclose(slope((1.0, 4.0)), (-0.5, -1.5, -1.0), atol=1e-6)


def test_all_surrogates_agree_on_policy():
    """At ratio 1 each token gets -A; the sequence form -A/T, and equal lengths make them coincide under their means."""
    rng = np.random.default_rng(0)
    logprobs = jnp.array(-rng.random((3, 4)), jnp.float32)
    advantage, over = jnp.array([[1.0], [-2.0], [0.5]]), jnp.ones((3, 4), bool)
    losses = {
        "clipped": lambda x: pg.clipped_surrogate(x, logprobs, advantage),
        "cispo": lambda x: pg.cispo(x, logprobs, advantage),
        "sequence": lambda x: pg.sequence_clipped_surrogate(x, logprobs, advantage, over),
        "reinforce": lambda x: pg.reinforce(x, advantage),
    }
    for loss in losses.values():
        gradient = jax.grad(lambda x, f=loss: f(x).sum())(logprobs)
        np.testing.assert_allclose(gradient, jnp.broadcast_to(-advantage, (3, 4)), rtol=1e-6)
        reduced = jax.grad(lambda x, f=loss: sequence_mean(f(x), over))(logprobs)
        np.testing.assert_allclose(reduced, jnp.broadcast_to(-advantage / 12, (3, 4)), rtol=1e-6)


def test_no_advantage_no_gradient():
    logprobs = jnp.array([[-0.3, -1.0]])
    for loss in (pg.clipped_surrogate, pg.cispo):
        gradient = jax.grad(lambda x, f=loss: f(x, logprobs - 0.5, jnp.zeros((1, 1))).sum())(logprobs)
        np.testing.assert_array_equal(gradient, 0.0)


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_sequence_ratio():
    difference = jnp.array([[0.2, -0.1, 0.05], [0.3, jnp.nan, jnp.nan]])
    over = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    behavior = jnp.full((2, 3), -1.0)
    logprobs = jnp.where(over, behavior + difference, -1.0)
    ratio = pg.sequence_ratio(logprobs, behavior, over)
    np.testing.assert_allclose(ratio[0], 1.051271, atol=2e-6)
    np.testing.assert_allclose(ratio[1, 0], pg.token_ratio(logprobs, behavior)[1, 0], rtol=1e-6)
    product = pg.sequence_importance_weight(logprobs, behavior, over)
    np.testing.assert_allclose(product, (1.161834, np.exp(0.3)), atol=2e-6)


def test_sequence_ratio_gradient_is_the_tokens_own():
    logprobs, behavior = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.2, -2.1]])
    over = jnp.ones((1, 2), bool)
    jacobian = jax.jacobian(lambda x: pg.sequence_ratio(x, behavior, over)[0])(logprobs)[:, 0]
    np.testing.assert_allclose(jacobian, np.exp(0.15) * np.eye(2), rtol=1e-5)


def test_sequence_clip_acts_on_whole_rows():
    behavior, over = jnp.full((2, 3), -1.0), jnp.ones((2, 3), bool)
    logprobs = behavior + jnp.array([[0.2, -0.1, 0.05], [2e-4, 1e-4, 0.0]])
    loss = lambda x: pg.sequence_clipped_surrogate(x, behavior, jnp.ones((2, 1)), over).sum()
    gradient = jax.grad(loss)(logprobs)
    np.testing.assert_array_equal(gradient[0], 0.0)
    np.testing.assert_allclose(gradient[1], -1.0, rtol=1e-3)


# ---- importance ------------------------------------------------------------------------------------------------------


def test_truncated_importance():
    logprobs, behavior = jnp.array([[0.5, -0.3, 1.2]]), jnp.zeros((1, 3))
    over = jnp.ones((1, 3), bool)
    weight = pg.importance_weight(logprobs, behavior, cap=2.0)
    np.testing.assert_allclose(weight[0], (1.64872, 0.74082, 2.0), atol=1e-5)
    assert float(masked_mean(weight, over)) == pytest.approx(1.46318, abs=1e-5)
    np.testing.assert_allclose(mean_one(weight, over)[0], (1.1268, 0.5063, 1.3669), atol=1e-4)
    free = pg.sequence_importance_weight(logprobs, behavior, over)
    np.testing.assert_allclose(free, np.exp(1.4), rtol=1e-5)
    assert float(pg.sequence_importance_weight(logprobs, behavior, over, cap=2.0)[0]) == 2.0
    dropped = pg.icepop(pg.importance_weight(logprobs, behavior), (0.5, 2.0))
    np.testing.assert_allclose(dropped[0], (1.64872, 0.74082, 0.0), atol=1e-5)
    kept = pg.icepop(free, (0.0, 3.0))
    assert float(kept[0]) == 0.0 and float(free[0]) > 3.0


def test_importance_hand_values():
    """mopd-peers 6.7: log-ratio 5 is capped at 2, -1 is e^-1."""
    weight = pg.importance_weight(jnp.array([5.0, -1.0, 0.0]), jnp.zeros(3), cap=2.0)
    np.testing.assert_allclose(weight, (2.0, 0.367879, 1.0), atol=1e-6)


def test_rows_beyond_the_limit_count_for_nothing_or_for_the_cap():
    """The product decides: 4 + 2.9 is within e^7, 4 + 4 is not, though each token is."""
    logprobs = jnp.array([[4.0, 2.9], [4.0, 4.0], [0.0, jnp.nan], [0.0, jnp.inf], [0.0, -jnp.inf]])
    over = jnp.ones((5, 2), bool)
    free = pg.sequence_importance_weight(logprobs, jnp.zeros((5, 2)), over)
    np.testing.assert_allclose(free, (np.exp(6.9), 0.0, 0.0, 0.0, 0.0), rtol=1e-5)
    capped = pg.sequence_importance_weight(logprobs, jnp.zeros((5, 2)), over, cap=3.0)
    np.testing.assert_allclose(capped, (3.0, 3.0, 0.0, 0.0, 0.0), rtol=1e-5)


def test_importance_is_one_on_policy_and_constant():
    logprobs, over = jnp.array([[-0.5, -2.0]]), jnp.array([[True, False]])
    np.testing.assert_array_equal(pg.importance_weight(logprobs, logprobs, cap=2.0), 1.0)
    np.testing.assert_array_equal(pg.sequence_importance_weight(logprobs, logprobs, over), 1.0)
    for function in (
        lambda x, b: pg.importance_weight(x, b).sum(),
        lambda x, b: pg.sequence_importance_weight(x, b, over).sum(),
    ):
        for gradient in jax.grad(function, argnums=(0, 1))(logprobs, logprobs - 0.3):
            np.testing.assert_array_equal(gradient, 0.0)


def test_importance_has_mean_one_under_the_sampler():
    rng = np.random.default_rng(0)
    policy, sampler = (normalise(jnp.array(rng.normal(size=40))) for _ in range(2))
    mean = jnp.sum(jnp.exp(sampler) * pg.importance_weight(policy, sampler))
    np.testing.assert_allclose(mean, 1.0, rtol=1e-5)


def test_minillm_mixture_weights():
    """Tokens from .2 q + .8 p: weights p / mixture have mean 1 and never exceed 1.25."""
    mixture = 0.2 * Q + 0.8 * P
    np.testing.assert_allclose(mixture, (0.42, 0.36, 0.22), atol=1e-12)
    weight = pg.importance_weight(log(P), log(mixture))
    np.testing.assert_allclose(weight, (1.1905, 0.8333, 0.9091), atol=5e-5)
    np.testing.assert_allclose(mixture @ weight, 1.0, rtol=1e-6)
    gradient, _ = expected_gradient(lambda s, y: pg.reinforce(s, log(Q)[y] - s) * weight[y], P, sampler=mixture)
    np.testing.assert_allclose(gradient, (0.546878, -0.362649, -0.184229), atol=2e-6)


# ---- rewards and groups ----------------------------------------------------------------------------------------------


def test_overlong_penalty():
    length = jnp.array([16000, 16384, 18432, 20480])
    np.testing.assert_allclose(pg.overlong_penalty(length, 20480, 4096), (0.0, 0.0, -0.5, -1.0))
    np.testing.assert_allclose(pg.overlong_penalty(length, 20480, 4096, factor=0.5), (0.0, 0.0, -0.25, -0.5))


def test_informative_groups():
    reward = jnp.array([1.0, 1, 0, 1, 0, 0, 7, 1])
    group = jnp.array([0, 0, 1, 1, 2, 2, 3, 2])
    valid = jnp.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    got = pg.informative_groups(reward, group, valid)
    np.testing.assert_array_equal(got, [0, 0, 1, 1, 0, 0, 0, 0])


def test_masked_garbage_is_the_reducers_to_drop():
    """Padding whose log-probabilities are finite and whose advantage is not: the reducer hides it entirely."""
    logprobs, over = jnp.array([[-0.5, -1.0]]), jnp.array([[True, False]])
    loss = lambda x, a: token_mean(pg.clipped_surrogate(x, logprobs, a), over)
    clean = jax.value_and_grad(loss)(logprobs, jnp.array([[1.0, 0.0]]))
    wild = jax.value_and_grad(loss)(logprobs, jnp.array([[1.0, 1e30]]))
    np.testing.assert_array_equal(clean[0], wild[0])
    np.testing.assert_array_equal(clean[1], wild[1])
