"""Paired and unpaired logistic losses: the notes' numbers, and what they teach in the limit, by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import preference as pref
from sdjax.kernels.distributions import normalise
from sdjax.kernels.divergences import forward_kl
from sdjax.kernels.reductions import masked_mean, reduce_terms
from sdjax.types import Term

LN2 = 0.693147


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def log(x):
    return jnp.log(jnp.asarray(x, jnp.float32))


# ---- paired ----------------------------------------------------------------------------------------------------------


def pair_loss(logits, reference, preferred, other, beta):
    """One-token completions: the loss as a function of the student's logits."""
    ratio = normalise(logits) - log(reference)
    return pref.paired(ratio[preferred], ratio[other], beta)


def test_hand_gradient():
    """pbsd 6.3."""
    student, teacher = (0.2, 0.3, 0.5), (0.5, 0.3, 0.2)
    value, gradient = jax.value_and_grad(pair_loss)(log(student), teacher, 0, 2, 0.5)
    np.testing.assert_allclose(value, 1.252763, atol=2e-6)
    np.testing.assert_allclose(gradient, (-0.357143, 0.0, 0.357143), atol=2e-6)


def test_no_margin_and_identical_pairs():
    student = (0.2, 0.3, 0.5)
    np.testing.assert_allclose(pair_loss(log(student), student, 0, 2, 0.5), LN2, atol=1e-6)
    value, gradient = jax.value_and_grad(pair_loss)(log(student), (0.5, 0.3, 0.2), 1, 1, 0.5)
    np.testing.assert_allclose(value, LN2, atol=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)


def test_gradient_is_bounded_by_beta():
    value, gradients = jax.value_and_grad(pref.paired, argnums=(0, 1))(jnp.float32(-1e4), jnp.float32(1e4), 0.3)
    np.testing.assert_allclose(value, 6000.0, rtol=1e-5)
    np.testing.assert_allclose(gradients, (-0.3, 0.3), rtol=1e-5)
    assert float(pref.paired(jnp.float32(1e4), jnp.float32(-1e4), 0.3)) == 0.0


def test_small_beta_is_forward_kl():
    """pbsd 6.10: the mean gradient over beta tends to half that of KL(teacher || student)."""
    teacher, student = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])

    def mean_gradient(beta):
        total = jnp.zeros(3)
        for preferred, other in itertools.product(range(3), repeat=2):
            chance = teacher[preferred] * student[other]
            total += chance * jax.grad(pair_loss)(log(student), teacher, preferred, other, beta)
        return total / beta

    np.testing.assert_allclose(mean_gradient(0.01), (0.202825, 0.000065, -0.202891), atol=3e-6)
    half = 0.5 * jax.grad(lambda z: forward_kl(normalise(z), log(teacher)))(log(student))
    np.testing.assert_allclose(half, (0.2, 0.0, -0.2), atol=1e-6)
    np.testing.assert_allclose(mean_gradient(1e-3), half, atol=5e-4)


@pytest.mark.parametrize(
    "beta,want",
    [
        (0.5, (0.001733, 0.023397, 0.974870)),
        (1.0, (0.023256, 0.104651, 0.872093)),
        (2.0, (0.075298, 0.195630, 0.729071)),
    ],
)
def test_provenance_labels_overshoot_the_teacher(beta, want):
    """pbsd 6.8: with a fixed sampler S the minimiser is T (T/S)^(1/beta); there the mean gradient vanishes."""
    teacher, sampler = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    minimiser = teacher * (teacher / sampler) ** (1 / beta)
    np.testing.assert_allclose(minimiser / minimiser.sum(), want, atol=1e-6)

    def mean_loss(logits):
        pairs = itertools.product(range(3), repeat=2)
        return sum(teacher[a] * sampler[b] * pair_loss(logits, teacher, a, b, beta) for a, b in pairs)

    np.testing.assert_allclose(jax.grad(mean_loss)(log(minimiser)), 0.0, atol=2e-6)
    assert np.abs(jax.grad(mean_loss)(log(teacher))).max() > 1e-2


def test_sequence_log_ratio():
    """Sums, not means; padding and the reference's gradient are out."""
    over = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    logprobs, reference = jnp.array([[-1.0, -2.0, jnp.nan], [-1, -1, -1]]), jnp.array([[-2.0, -2.5, 0.0], [-1, -2, -3]])
    np.testing.assert_allclose(pref.sequence_log_ratio(logprobs, reference, over), (1.5, 3.0), rtol=1e-6)
    total = lambda x, y: pref.sequence_log_ratio(x, y, over).sum()
    gradients = jax.grad(total, argnums=(0, 1))(logprobs, reference)
    np.testing.assert_array_equal(gradients[0], over.astype(jnp.float32))
    np.testing.assert_array_equal(gradients[1], 0.0)


# ---- unpaired --------------------------------------------------------------------------------------------------------


def class_means(reward, positive, valid):
    """VPD's E-step: each class has its own mean."""
    loss = pref.unpaired(reward, positive, valid)
    terms = {"solved": Term(loss, over=positive), "failed": Term(loss, over=~positive)}
    return reduce_terms(terms, valid[:, None])[0]


TWO, BOTH = jnp.array([True, False]), jnp.ones(2, bool)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_one_of_each(wrap):
    """vpd 6.3, with the bounds on either side of it."""
    reward = jnp.array([0.4, -0.2])
    np.testing.assert_allclose(pref.class_midpoint(reward, TWO, BOTH), 0.1, atol=1e-7)
    np.testing.assert_array_equal(jax.grad(lambda r: pref.class_midpoint(r, TWO, BOTH))(reward), 0.0)
    value, gradient = jax.value_and_grad(wrap(lambda r: class_means(r, TWO, BOTH)))(reward)
    np.testing.assert_allclose(value, 1.108710, atol=2e-6)
    np.testing.assert_allclose(gradient, (-0.425557, 0.425557), atol=2e-6)
    np.testing.assert_allclose(pref.paired(reward[0], reward[1], 1.0), 0.437488, atol=2e-6)
    unshifted = np.log1p(np.exp(-0.4)) + np.log1p(np.exp(-0.2))
    np.testing.assert_allclose(unshifted, 1.111154, atol=2e-6)
    assert 0.437488 < float(value) < unshifted


def test_equal_views_give_two_log_two():
    np.testing.assert_allclose(class_means(jnp.zeros(2), TWO, BOTH), 1.386294, atol=2e-6)


def test_a_common_constant_changes_nothing():
    reward, positive = jnp.array([0.3, -1.0, 0.8, 0.1]), jnp.array([True, False, True, False])
    valid = jnp.ones(4, bool)
    base = jax.value_and_grad(class_means)(reward, positive, valid)
    moved = jax.value_and_grad(class_means)(reward + 4.0, positive, valid)
    np.testing.assert_allclose(moved[0], base[0], atol=1e-6)
    np.testing.assert_allclose(moved[1], base[1], atol=1e-6)


def test_duplicated_negatives_change_nothing():
    """vpd 6.5: fails for one mean over both classes."""
    reward, positive = jnp.array([0.3, -1.0, 0.6]), jnp.array([True, False, False])
    more = jnp.concatenate([reward, reward[1:]]), jnp.concatenate([positive, positive[1:]])
    base = class_means(reward, positive, jnp.ones(3, bool))
    np.testing.assert_allclose(class_means(*more, jnp.ones(5, bool)), base, rtol=1e-6)
    together = lambda r, p: masked_mean(pref.unpaired(r, p, jnp.ones_like(p)), jnp.ones_like(p))
    assert abs(float(together(*more) - together(reward, positive))) > 1e-3


def test_gradient_path_to_the_teacher_logits():
    """vpd 6.4: -beta sigmoid(-(reward - midpoint)) (onehot - q) at every token, here with a midpoint of 0."""
    teacher, student = log([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]), log([[0.5, 0.3, 0.2], [0.4, 0.5, 0.1]])
    token, over = jnp.array([[0], [1]]), jnp.ones((1, 2), bool)

    def loss(logits, reference):
        pick = lambda dist: jnp.take_along_axis(dist, token, axis=-1)[:, 0][None]
        ratio = pref.sequence_log_ratio(pick(normalise(logits)), pick(reference), over)[0]
        # A second row with the opposite reward puts the midpoint at 0 and, being constant, adds no gradient.
        reward = 0.1 * jnp.stack([ratio, -jax.lax.stop_gradient(ratio)])
        return pref.unpaired(reward, TWO, BOTH)[0], 0.1 * ratio

    (_, reward), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(teacher, student)
    np.testing.assert_allclose(reward, 0.0518794, atol=1e-6)
    want = [(-0.019481, 0.014611, 0.004870), (0.009741, -0.014611, 0.004870)]
    np.testing.assert_allclose(gradients[0], want, atol=2e-6)
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_one_class_alone_teaches_nothing():
    for positive in (jnp.ones(2, bool), jnp.zeros(2, bool)):
        value, gradient = jax.value_and_grad(class_means)(jnp.array([0.4, -3.0]), positive, BOTH)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, 0.0)


def test_padding_rows_are_out():
    reward, positive = jnp.array([0.4, -0.2, jnp.nan, jnp.inf]), jnp.array([True, False, True, False])
    valid = jnp.array([True, True, False, False])
    value, gradient = jax.value_and_grad(class_means)(reward, positive, valid)
    np.testing.assert_allclose(value, 1.108710, atol=2e-6)
    np.testing.assert_allclose(gradient, (-0.425557, 0.425557, 0, 0), atol=2e-6)


def test_against_float64_for_every_choice_of_classes_and_padding():
    """All 256 of four rows, NaN in padding: values, and gradients with the midpoint constant."""
    reward = np.array([0.4, -0.9, 1.7, 0.1])
    choices = np.array(list(itertools.product([False, True], repeat=8))).reshape(-1, 2, 4)
    wanted, slopes = np.zeros((256, 4)), np.zeros((256, 4))
    for row, (positive, valid) in enumerate(choices):
        if (valid & positive).any() and (valid & ~positive).any():
            midpoint = (reward[valid & positive].mean() + reward[valid & ~positive].mean()) / 2
            sign = np.where(positive, -1.0, 1.0)
            wanted[row] = np.where(valid, np.log1p(np.exp(sign * (reward - midpoint))), 0.0)
            slopes[row] = np.where(valid, sign / (1.0 + np.exp(-sign * (reward - midpoint))), 0.0)
    given = jnp.where(choices[:, 1], reward.astype(np.float32), jnp.nan)
    run = lambda r, positive, valid: jax.vjp(lambda r: pref.unpaired(r, positive, valid), r)
    value, back = jax.vmap(lambda r, p, v: (run(r, p, v)[0], run(r, p, v)[1](jnp.ones(4))[0]))(
        given, *map(jnp.asarray, (choices[:, 0], choices[:, 1]))
    )
    np.testing.assert_allclose(value, wanted, atol=1e-6)
    np.testing.assert_allclose(back, slopes, atol=1e-6)
