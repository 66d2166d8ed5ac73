"""Weights of tokens and rows: the notes' numbers, invariances, and that padding enters no statistic."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import weights as w
from sdjax.kernels.distributions import entropy, normalise
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.reductions import masked_mean, sequence_mean


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def log(x):
    return jnp.log(jnp.asarray(x, jnp.float32))


def rows(*values):
    return jnp.array(values, jnp.float32)


def padded(x, filler):
    return jnp.pad(x, ((0, 0), (0, 3)), constant_values=filler)


# ---- likelihood ratios -----------------------------------------------------------------------------------------------


def test_student_over_teacher():
    """rlrt 6.3 and 6.4: credit 1 - mix + mix * ratio."""
    student, teacher = log([0.2, 0.6]), log([0.8, 0.3])
    np.testing.assert_allclose(w.likelihood_ratio(student, teacher), (0.25, 2.0), rtol=1e-5)
    cases = {(0.5, 0.2): (0.9, 1.1), (0.5, 1.0): (0.625, 1.5), (1.0, 1.0): (0.25, 2.0)}
    for (mix, eps), want in cases.items():
        credit = 1 - mix + mix * w.likelihood_ratio(student, teacher, eps=eps)
        np.testing.assert_allclose(credit, want, rtol=1e-5)
    np.testing.assert_array_equal(w.likelihood_ratio(student, teacher, eps=0.0), 1.0)
    np.testing.assert_array_equal(w.likelihood_ratio(student, student, eps=0.2), 1.0)


def test_teacher_over_student_by_the_advantage():
    """egrsd 6.8: the ratio turns round with the sign, and is 1 without an advantage."""
    teacher, student = log([0.9, 0.9, 0.2, 0.5, 0.9]), log([0.3, 0.3, 0.4, 0.4, 0.3])
    advantage = jnp.array([1.0, -2.0, -1.0, 0.5, 0.0])
    got = w.likelihood_ratio(teacher, student, eps=0.2, sign=jnp.sign(advantage))
    np.testing.assert_allclose(got, (1.2, 0.8, 1.2, 1.2, 1.0), rtol=1e-6)
    inverse = w.likelihood_ratio(student, teacher) * w.likelihood_ratio(teacher, student)
    np.testing.assert_allclose(inverse, 1.0, rtol=1e-5)


def test_mean_ratio_under_the_student():
    """rlrt 6.8 and 6.9: 1 + chi-square, against exactly 1 the other way round."""
    student, teacher = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.740741, 0.222222, 0.037037])
    np.testing.assert_allclose(student @ w.likelihood_ratio(log(student), log(teacher)), 1.8225, atol=1e-4)
    np.testing.assert_allclose(student @ w.likelihood_ratio(log(teacher), log(student)), 1.0, atol=1e-5)
    ratio = w.likelihood_ratio(log(student), log(teacher), eps=1.0)
    np.testing.assert_allclose(ratio, (0.675, 1.35, 2.0), atol=1e-4)
    np.testing.assert_allclose(w.likelihood_ratio(log(student), log(teacher)), (0.675, 1.35, 5.4), atol=1e-3)


def test_geometric_mean():
    """sort 6.2 to 6.6."""
    own, planned = log([0.1, 0.2]), log([0.4, 0.8])
    np.testing.assert_allclose(w.geometric_mean(own, planned), (0.2, 0.4), rtol=1e-5)
    np.testing.assert_allclose(w.geometric_mean(own, planned, 0.0), (0.1, 0.2), rtol=1e-5)
    np.testing.assert_allclose(w.geometric_mean(own, planned, 1.0), (0.4, 0.8), rtol=1e-5)
    np.testing.assert_allclose(w.geometric_mean(own, own, 0.5), (0.1, 0.2), rtol=1e-5)

    def loss(z, planned):
        own = normalise(z)[0]
        return -w.geometric_mean(own, planned) * own

    got = jax.grad(loss)(log([0.2, 0.5, 0.3]), log(0.8))
    np.testing.assert_allclose(got, (-0.32, 0.20, 0.12), atol=1e-6)
    got = jax.grad(loss)(log([0.2, 0.5, 0.3]), log(0.2))  # an empty plan: dynamic fine-tuning
    np.testing.assert_allclose(got, (-0.16, 0.10, 0.06), atol=1e-6)


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_confidence():
    """msd 6.3 and 6.10."""
    dist = log([0.9, 0.05, 0.05])
    np.testing.assert_allclose(w.confidence(dist, 3), 0.641004, atol=2e-6)
    np.testing.assert_allclose(w.confidence(dist, 2), 0.702528, atol=2e-6)
    np.testing.assert_allclose(w.confidence(log([0.25] * 4), 3), 0.0, atol=1e-6)
    np.testing.assert_allclose(w.confidence(log([1.0, 0.0, 0.0]), 3), 1.0, atol=1e-6)
    for k in (0, 1):
        with pytest.raises(ValueError, match="k >= 2"):
            w.confidence(dist, k)


def test_disagreement():
    student = log([[1.0, 0.0, 0.0], [0.3, 0.4, 0.3], [0.0, 0.5, 0.5]])
    np.testing.assert_allclose(w.disagreement(student, jnp.array([0, 0, 0])), (0.0, 0.7, 1.0), atol=1e-6)


def test_safety_weighted_loss():
    """msd 6.5, and 6.14: with the sampled token instead of the teacher's likeliest it is another loss."""
    teacher, student = log([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]]), log([[0.3, 0.4, 0.3], [0.4, 0.3, 0.3]])
    weight = w.confidence(teacher, 3) * w.disagreement(student, jnp.argmax(teacher, axis=-1))
    np.testing.assert_allclose(weight, (0.448703, 0.009877), atol=2e-6)
    over = jnp.ones((1, 2), bool)
    scaled = w.mean_one(weight[None], over, axis=-1)
    np.testing.assert_allclose(scaled[0], (1.956924, 0.043076), atol=1e-5)
    divergence = reverse_kl(student, teacher)
    np.testing.assert_allclose(divergence, (1.039721, 0.008451), atol=2e-6)
    np.testing.assert_allclose(sequence_mean(scaled * divergence[None], over), 1.017509, atol=1e-5)
    np.testing.assert_allclose(sequence_mean(divergence[None], over), 0.524086, atol=2e-6)
    sampled = w.confidence(teacher, 3) * w.disagreement(student, jnp.array([1, 2]))
    other = sequence_mean(w.mean_one(sampled[None], over, axis=-1) * divergence[None], over)
    assert abs(float(other) - 1.017509) > 1e-4


def test_mean_one():
    weight = rows([1, 3, 0, 9], [2, 2, 2, 2])
    over = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    by_row = w.mean_one(weight, over, axis=-1)
    np.testing.assert_allclose(by_row, [[0.75, 2.25, 0, 0], [1, 1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(w.mean_one(7 * weight, over, axis=-1), by_row, rtol=1e-6)
    whole = w.mean_one(weight, over)
    np.testing.assert_allclose(masked_mean(whole, over), 1.0, rtol=1e-6)
    assert np.abs(whole - by_row).max() > 0.1
    np.testing.assert_array_equal(w.mean_one(jnp.zeros((1, 3)), jnp.ones((1, 3), bool), axis=-1), 0.0)
    np.testing.assert_array_equal(w.mean_one(padded(weight, jnp.nan), padded(over, False), axis=-1)[:, :4], by_row)


# ---- entropies -------------------------------------------------------------------------------------------------------

SPIKE = rows([0.2, 2.0, 1.6, 1.2, 0.1])
FIVE = jnp.ones((1, 5), bool)


def test_entropy_gate_with_and_without_window():
    """egrsd 6.4: Eq. 8 divides by the largest raw entropy; Algorithm 1 would give the third row."""
    np.testing.assert_allclose(w.entropy_gate(SPIKE, FIVE)[0], (0.97, 0.70, 0.76, 0.82, 0.985), atol=1e-6)
    ahead = w.entropy_gate(SPIKE, FIVE, window=1)[0]
    np.testing.assert_allclose(ahead, (0.97, 0.76, 0.82, 0.985, 0.985), atol=1e-6)
    assert np.abs(ahead - np.array([0.9625, 0.70, 0.775, 0.98125, 0.98125])).max() > 0.05


def test_entropy_gate_of_distributions():
    """egrsd 6.5, 6.6: the floor, and the denominator that is never below one nat."""
    dist = log([[0.98, 0.01, 0.01], [0.6, 0.3, 0.1], [1 / 3] * 3, [0.9, 0.05, 0.05]])
    values, over = entropy(dist)[None], jnp.ones((1, 4), bool)
    np.testing.assert_allclose(w.entropy_gate(values, over)[0], (0.969443, 0.754796, 0.700000, 0.892301), atol=2e-6)
    np.testing.assert_allclose(
        w.entropy_gate(values, over, strength=1.0)[0], (0.898142, 0.182655, 0.1, 0.641004), atol=2e-6
    )
    low = rows([0.3, 0.6])
    np.testing.assert_allclose(w.entropy_gate(low, over[:, :2], strength=0.5)[0], (0.85, 0.70), atol=1e-6)
    np.testing.assert_array_equal(w.entropy_gate(values, over, strength=0.0), 1.0)


def test_a_longer_window_never_lowers_the_gate():
    values = jnp.array(np.random.default_rng(0).gamma(1.0, 1.0, size=(6, 20)), jnp.float32)
    over = jnp.arange(20)[None, :] < jnp.array([[20], [13], [7], [1], [0], [20]])
    gates = [np.asarray(w.entropy_gate(values, over, strength=1.0, window=k)) for k in (0, 1, 3, 6, 40)]
    for shorter, longer in itertools.pairwise(gates):
        assert np.all(longer >= shorter) and np.any(longer > shorter)
    assert np.all(gates[0][np.asarray(over)] >= 0.1) and np.all(gates[0] <= 1.0)


def test_window_minimum_against_numpy():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 15))
    over = np.arange(15) < np.array([[15], [9], [1], [0]])
    want = np.zeros_like(values)
    for i, t in np.argwhere(over):
        want[i, t] = values[i, t : t + 4][over[i, t : t + 4]].min()
    dirty = jnp.where(jnp.array(over), jnp.array(values, jnp.float32), -jnp.inf)
    got = jax.jit(w.window_minimum, static_argnums=2)(dirty, jnp.array(over), 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(w.window_minimum(dirty, jnp.array(over), 0), np.where(over, dirty, 0.0))


def test_quantiles():
    values = rows([0.1, 0.2, 0.3, 2.0, 1.5])
    np.testing.assert_allclose(w.row_quantile(values, FIVE, 0.8), 1.6, atol=1e-6)
    np.testing.assert_allclose(w.row_quantile(values, FIVE, 0.2), 0.18, atol=1e-6)
    rng = np.random.default_rng(0)
    values, over = rng.normal(size=(5, 30)), rng.random((5, 30)) < 0.5
    over[2], over[3, 1:] = False, False
    over[3, 0] = True
    for level in (0.0, 0.25, 0.93, 1.0):
        want = [np.quantile(v[o], level) if o.any() else 0.0 for v, o in zip(values, over, strict=True)]
        dirty = jnp.where(jnp.array(over), jnp.array(values, jnp.float32), jnp.nan)
        np.testing.assert_allclose(w.row_quantile(dirty, jnp.array(over), level), want, rtol=1e-5, atol=1e-6)


ROUTED = rows([0.1, 0.2, 0.3, 2.0, 1.5])
GAP = rows([0.5, -0.2, 0.1, -1.0, 0.7])


def directed(values, gap, over):
    size = w.unit_magnitude(gap, over)
    return w.entropy_router(values, over) * jax.nn.sigmoid(jnp.abs(size) - 1.0), size


def test_router_worked_example():
    """dasd 6.6 and 6.7."""
    router = w.entropy_router(ROUTED, FIVE)
    np.testing.assert_allclose(router[0], (0.965150, 0.954645, 0.941069, -0.491195, 0.133605), atol=5e-6)
    omega, size = directed(ROUTED, GAP, FIVE)
    np.testing.assert_allclose(size[0], (1, -0.4, 0.2, -2, 1.4), atol=1e-5)
    np.testing.assert_allclose(omega[0], (0.482575, 0.338272, 0.291755, -0.359092, 0.079988), atol=5e-6)
    want = (1.241287, 0.932346, 1.029176, 1.359092, 1.055991)
    np.testing.assert_allclose(1.0 + 0.5 * (omega * size)[0], want, atol=5e-6)
    other_side = w.entropy_router(ROUTED, FIVE, fraction=0.8)
    np.testing.assert_allclose(other_side[0], (0.107, -0.027, -0.160, -0.985, -0.944), atol=1e-3)


def test_router_invariances():
    router = w.entropy_router(ROUTED, FIVE)
    np.testing.assert_allclose(w.entropy_router(3 * ROUTED + 0.7, FIVE), router, atol=1e-5)
    np.testing.assert_array_equal(w.entropy_router(jnp.full((1, 5), 0.7), FIVE), 0.0)
    omega, size = directed(ROUTED, GAP, FIVE)
    mirrored, opposite = directed(ROUTED, -GAP, FIVE)
    np.testing.assert_array_equal(omega, mirrored)
    np.testing.assert_array_equal(size, -opposite)
    np.testing.assert_allclose(w.unit_magnitude(5 * GAP, FIVE), size, atol=1e-5)
    np.testing.assert_allclose(masked_mean(jnp.abs(size), FIVE), 1.0, atol=1e-5)
    np.testing.assert_array_equal(w.unit_magnitude(jnp.zeros((1, 5)), FIVE), 0.0)
    assert np.all(np.diff(router[0][jnp.argsort(ROUTED[0])]) < 0)


@pytest.mark.parametrize("filler", [-5.0, 50.0, jnp.nan, jnp.inf])
def test_padding_enters_no_statistic(filler):
    """Neither further columns nor another row of other values changes a row (the gate's maximum is the batch's)."""
    over, wide = padded(FIVE, False), padded(ROUTED, filler)
    for function in (w.entropy_router, w.unit_magnitude, w.entropy_gate):
        got = function(wide, over)
        np.testing.assert_allclose(got[:, :5], function(ROUTED, FIVE), atol=1e-6)
        np.testing.assert_array_equal(got[:, 5:], 0.0)
    two = jnp.concatenate([ROUTED, 9 * ROUTED[:, ::-1]])
    for function in (w.entropy_router, w.unit_magnitude):
        np.testing.assert_allclose(function(two, jnp.ones((2, 5), bool))[:1], function(ROUTED, FIVE), atol=1e-6)


def test_hysteresis():
    """antisd 6.14."""
    gate, trace = jnp.float32(1.0), []
    for value in (0.95, 0.94, 0.92, 0.95, 0.99, 1.00, 0.94):
        gate = w.hysteresis(gate, value, 0.93, 1.00)
        trace.append(int(gate))
    assert trace == [1, 1, 0, 0, 0, 1, 1]


# ---- rows and spans --------------------------------------------------------------------------------------------------


def test_success_balance():
    """resd 6.8: each outcome gets half of the weight; with only one outcome all weights are 1."""
    valid = jnp.ones(32, bool)
    for successes, high, low in ((1, 16.0, 0.516129), (8, 2.0, 0.666667), (16, 1.0, 1.0)):
        success = jnp.arange(32) < successes
        weight = w.success_balance(success, valid)
        np.testing.assert_allclose(weight[0], high, rtol=1e-5)
        np.testing.assert_allclose(weight[-1], low, rtol=1e-5)
        np.testing.assert_allclose(weight[success].sum(), 16.0, rtol=1e-5)
    for success in (jnp.zeros(32, bool), jnp.ones(32, bool)):
        np.testing.assert_allclose(w.success_balance(success, valid), 1.0, rtol=1e-6)
    some = jnp.arange(32) < 8
    got = w.success_balance(jnp.arange(32) % 4 == 0, some)
    np.testing.assert_allclose(got[:4], (2.0, 2 / 3, 2 / 3, 2 / 3), rtol=1e-5)
    np.testing.assert_array_equal(got[8:], 0.0)


def test_keep_earliest():
    over = jnp.arange(12)[None, :] < jnp.array([[12], [8], [3]])
    chosen = jnp.array([[0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0], [0, 1] * 6, [1] * 12], bool)
    kept = w.keep_earliest(chosen, over, 0.25)
    np.testing.assert_array_equal(jnp.sum(kept, axis=-1), (3, 2, 0))
    np.testing.assert_array_equal(jnp.flatnonzero(kept[0]), (1, 2, 4))
    np.testing.assert_array_equal(jnp.flatnonzero(kept[1]), (1, 3))


def test_weights_are_constants():
    values, over = ROUTED, FIVE
    functions = [
        lambda x: w.likelihood_ratio(x, GAP, eps=5.0),
        lambda x: w.geometric_mean(x, GAP),
        lambda x: w.confidence(normalise(x), 3),
        lambda x: w.disagreement(normalise(x), jnp.array([1])),
        lambda x: w.window_minimum(x, over, 2),
        lambda x: w.entropy_gate(x, over),
        lambda x: w.row_quantile(x, over, 0.5),
        lambda x: w.entropy_router(x, over),
        lambda x: w.unit_magnitude(x, over),
        lambda x: w.mean_one(x, over),
    ]
    for function in functions:
        result = jax.jit(function)(values)
        assert np.all(np.isfinite(result)) and np.any(np.asarray(result) != 0.0)
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x, f=function: f(x).sum()))(values), 0.0)
