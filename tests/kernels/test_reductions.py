"""Reducers and the sum of terms: hand-checked numbers, garbage outside the population, exactness under chunking."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import reductions as red

ROWS = jnp.array([True, True])
REDUCERS = {
    "token_mean": red.token_mean,
    "token_sum": red.token_sum,
    "sequence_mean": red.sequence_mean,
    "sequence_mean_of": red.sequence_mean_of(ROWS),
    "sequence_sum": red.sequence_sum,
    "constant_mean": red.constant_mean(8),
}
VALUE = jnp.array([[1.0, 1, 1, 1], [3, 3, 0, 0]])
OVER = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=list(REDUCERS))
def reducer(request):
    return REDUCERS[request.param]


def term(value, weight=1.0, over=None, reduce=None, coef=1.0, importance=1.0):
    return SimpleNamespace(value=value, weight=weight, over=over, reduce=reduce, coef=coef, importance=importance)


def test_aggregation_table():
    """Four tokens of loss 1 in one row, two of loss 3 in the other."""
    want = {
        "token_mean": 10 / 6,
        "token_sum": 10.0,
        "sequence_mean": 2.0,
        "sequence_mean_of": 2.0,
        "sequence_sum": 5.0,
        "constant_mean": 0.625,
    }
    for name, reduce in REDUCERS.items():
        np.testing.assert_allclose(reduce(VALUE, OVER), want[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(jax.jit(reduce)(VALUE, OVER), want[name], rtol=1e-6, err_msg=name)


def test_means_coincide_for_rows_of_equal_length():
    value = jnp.arange(12.0).reshape(3, 4)
    over = jnp.ones((3, 4), bool)
    np.testing.assert_allclose(red.token_mean(value, over), red.sequence_mean(value, over), rtol=1e-6)
    np.testing.assert_allclose(red.token_mean(value, over), red.constant_mean(4)(value, over), rtol=1e-6)
    assert red.sequence_sum(value, over) == 4 * red.sequence_mean(value, over)


def test_matches_float64():
    rng = np.random.default_rng(0)
    value, over = rng.normal(size=(7, 11)), rng.random((7, 11)) < 0.6
    over[3] = False
    over[4] = True
    rows = over.any(-1)
    row_mean = np.array([v[o].mean() if o.any() else 0.0 for v, o in zip(value, over, strict=True)])
    row_sum = (value * over).sum(-1)
    want = {
        "token_mean": value[over].mean(),
        "token_sum": row_sum.sum(),
        "sequence_mean": row_mean[rows].mean(),
        "sequence_sum": row_sum[rows].mean(),
        "constant_mean": row_sum.sum() / (rows.sum() * 8),
    }
    for name, value_ in want.items():
        np.testing.assert_allclose(REDUCERS[name](jnp.array(value), jnp.array(over)), value_, rtol=1e-5, err_msg=name)
    counted = red.sequence_mean_of(jnp.ones(7, bool))(jnp.array(value), jnp.array(over))
    np.testing.assert_allclose(counted, row_mean.mean(), rtol=1e-5)


@pytest.mark.parametrize("garbage", [jnp.inf, -jnp.inf, jnp.nan])
def test_garbage_outside_the_population(reducer, garbage):
    dirty = jnp.where(OVER, VALUE, garbage)
    value, gradient = jax.value_and_grad(reducer)(dirty, OVER)
    clean_value, clean_gradient = jax.value_and_grad(reducer)(VALUE, OVER)
    np.testing.assert_array_equal(value, clean_value)
    np.testing.assert_array_equal(gradient, clean_gradient)
    np.testing.assert_array_equal(gradient[1, 2:], 0.0)


def test_garbage_inside_the_population_is_not_hidden(reducer):
    assert np.isnan(reducer(VALUE.at[0, 0].set(jnp.nan), OVER))


def test_empty_population_is_zero(reducer):
    empty = jnp.zeros_like(OVER)
    value, gradient = jax.value_and_grad(reducer)(VALUE * jnp.nan, empty)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_rows_without_tokens():
    """The one difference between the two sequence means: who is in the divisor."""
    over = OVER.at[1].set(False)
    np.testing.assert_allclose(red.sequence_mean(VALUE, over), 1.0)
    np.testing.assert_allclose(red.sequence_mean_of(ROWS)(VALUE, over), 0.5)
    np.testing.assert_allclose(red.sequence_mean_of(jnp.array([True, False]))(VALUE, OVER), 1.0)


def test_sdpo_code_is_a_sequence_mean_over_all_rows():
    """A token mean per micro-batch of one row, averaged over all rows, those without a lesson included."""
    over = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    value = jnp.array([[1.0, 2, 3, 4], [5, 7, 9, 9], [9, 9, 9, 9]])
    micro = [red.token_mean(value[i : i + 1], over[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(red.sequence_mean_of(jnp.ones(3, bool))(value, over), sum(micro) / 3, rtol=1e-6)
    assert abs(float(red.token_mean(value, over)) - float(sum(micro) / 3)) > 0.5


def test_short_answers_give_zero_when_their_first_tokens_are_dropped():
    """sdft 6.3 and 6.4: three tokens of which three are skipped; ten tokens of constant 2 are 2, not 1.4."""
    place = jnp.arange(10)[None, :]
    trained = (place < jnp.array([[3], [10]])) & (place >= 3)
    value = jnp.full((2, 10), 2.0)
    gradient = jax.grad(red.sequence_mean)(value, trained)
    np.testing.assert_array_equal(gradient[:, :3], 0.0)
    np.testing.assert_array_equal(red.masked_mean(value, trained, axis=-1), (0.0, 2.0))
    assert float(red.sequence_mean(value, trained)) == 2.0


def test_constant_mean_ignores_lengths():
    gradient = jax.grad(red.constant_mean(8))(VALUE, OVER)
    np.testing.assert_allclose(gradient[OVER], 1 / 16)
    np.testing.assert_allclose(red.constant_mean(16)(VALUE, OVER), red.constant_mean(8)(VALUE, OVER) / 2)
    np.testing.assert_allclose(jax.grad(red.sequence_mean)(VALUE, OVER)[:, 0], (1 / 8, 1 / 4))


def test_microbatches_need_the_global_count():
    """Sums over parts divided by the global count are the token mean; means of parts are not."""
    parts = [(VALUE[i : i + 1], OVER[i : i + 1]) for i in range(2)]
    total = sum(red.masked_sum(*p) for p in parts) / jnp.sum(OVER)
    np.testing.assert_allclose(total, red.token_mean(VALUE, OVER), rtol=1e-6)
    assert abs(float(sum(red.token_mean(*p) for p in parts) / 2 - total)) > 0.3


def test_values_per_row():
    value, over = jnp.array([2.0, 4.0, jnp.nan]), jnp.array([True, True, False])
    for reduce in (red.token_mean, red.sequence_mean, red.sequence_sum, red.sequence_mean_of(over)):
        assert float(reduce(value, over)) == 3.0


def test_half_precision_is_summed_in_float32():
    value = jnp.ones((1, 4096), jnp.bfloat16)
    result = red.token_sum(value, jnp.ones((1, 4096), bool))
    assert result.dtype == jnp.float32 and float(result) == 4096.0


def test_population_must_be_boolean_and_of_the_same_shape():
    with pytest.raises(AssertionError):
        red.token_mean(VALUE, OVER.astype(jnp.float32))
    with pytest.raises(AssertionError):
        red.token_mean(VALUE, OVER[:, :1])


# ---- terms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_loss_is_the_sum_of_terms(wrap):
    def loss(value, rows):
        terms = {
            "a": term(value, coef=0.5),
            "b": term(value, weight=2.0, reduce=red.sequence_mean),
            "c": term(rows, coef=jnp.float32(10.0)),
        }
        return red.reduce_terms(terms, OVER)

    total, metrics = wrap(loss)(VALUE, jnp.array([1.0, 5.0]))
    np.testing.assert_allclose([metrics[n] for n in "abc"], (10 / 6, 4.0, 3.0), rtol=1e-6)
    np.testing.assert_allclose(total, 0.5 * 10 / 6 + 4.0 + 30.0, rtol=1e-6)


def test_default_reducer_and_no_terms():
    total, metrics = red.reduce_terms({"a": term(VALUE)}, OVER, red.sequence_sum)
    assert float(total) == float(metrics["a"]) == 5.0
    total, metrics = red.reduce_terms({}, OVER)
    assert float(total) == 0.0 and metrics == {}


def test_weight_has_no_gradient_and_does_not_normalise():
    def loss(x):
        return red.reduce_terms({"a": term(VALUE * x, weight=x)}, OVER)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.float32(3.0))
    np.testing.assert_allclose(value, 9 * 10 / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 * 10 / 6, rtol=1e-6)  # 6 * 10/6 if the weight were live


def test_weight_and_importance_multiply():
    both = term(VALUE, weight=jnp.array([1.0, 4.0]), importance=jnp.array([[2.0] * 4, [0.25] * 4]))
    np.testing.assert_array_equal(red.whole_weight(both), [[2.0] * 4, [1.0] * 4])


@pytest.mark.parametrize("coef", [0, 0.0])
def test_what_is_only_measured_has_no_backward_pass(coef):
    """A Python 0 of either kind: 0 times the gradient of infinity would be no number."""
    loss = lambda x: red.reduce_terms({"a": term(VALUE * x), "b": term(jnp.sqrt(VALUE * x - x), coef=coef)}, OVER)[0]
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(1.0)), 10 / 6, rtol=1e-6)


def test_metrics_carry_no_gradient():
    metric = lambda x: red.reduce_terms({"a": term(VALUE * x)}, OVER)[1]["a"]
    assert float(metric(2.0)) == pytest.approx(20 / 6)
    assert float(jax.grad(metric)(2.0)) == 0.0


def test_weights_broadcast_by_rows():
    for weight in (jnp.array([1.0, 10.0]), jnp.array([[1.0], [10.0]]), jnp.array([[1.0] * 4, [10.0] * 4])):
        total, _ = red.reduce_terms({"a": term(VALUE, weight=weight)}, OVER)
        np.testing.assert_allclose(total, (4 + 60) / 6, rtol=1e-6)
    # A square batch must not turn rows into columns.
    square, over = jnp.array([[1.0, 0], [0, 0]]), jnp.ones((2, 2), bool)
    total, _ = red.reduce_terms({"a": term(square, weight=jnp.array([2.0, 100.0]))}, over)
    assert float(total) == 0.5


def test_populations():
    rows = jnp.array([True, False])
    tokens = jnp.array([[0, 1, 0, 0], [1, 1, 1, 1]], bool)
    cases = [
        (term(VALUE, over=rows), 1.0),
        (term(VALUE, over=tokens), (1 + 3 + 3) / 3),  # never beyond the default population
        (term(jnp.array([2.0, 6.0])), 4.0),
        (term(jnp.array([2.0, 6.0]), over=rows), 2.0),
        (term(VALUE, over=rows[:, None]), 1.0),
    ]
    for case, want in cases:
        np.testing.assert_allclose(red.reduce_terms({"a": case}, OVER)[0], want, rtol=1e-6)
    nothing_trained = OVER.at[1].set(False)
    np.testing.assert_allclose(red.reduce_terms({"a": term(jnp.array([2.0, 6.0]))}, nothing_trained)[0], 2.0)


def test_a_row_value_refuses_a_token_population():
    with pytest.raises(AssertionError):
        red.reduce_terms({"a": term(jnp.array([2.0, 6.0]), over=OVER)}, OVER)


@pytest.mark.parametrize("garbage", [jnp.inf, jnp.nan])
def test_garbage_in_weight_and_value(garbage):
    """The gradient of a masked value is the weight beside it times zero: the value must be cleaned before they meet."""

    def loss(value, weight):
        return red.reduce_terms({"a": term(value, weight=weight)}, OVER)[0]

    weight = jnp.where(OVER, 2.0, garbage)
    dirty = jnp.where(OVER, VALUE, garbage)
    value, gradient = jax.value_and_grad(loss)(dirty, weight)
    clean, clean_gradient = jax.value_and_grad(loss)(VALUE, jnp.full_like(VALUE, 2.0))
    np.testing.assert_array_equal(value, clean)
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert np.all(np.isfinite(gradient))


def test_padding_changes_nothing(reducer):
    padded = jnp.pad(VALUE, ((0, 0), (0, 3)), constant_values=7.0)
    over = jnp.pad(OVER, ((0, 0), (0, 3)))
    np.testing.assert_allclose(reducer(padded, over), reducer(VALUE, OVER), rtol=1e-6)


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_what_is_only_measured_cannot_spoil_the_loss(nothing):
    """A Python 0, whole or with a point: neither its value nor its gradient is read."""

    def loss(x):
        spoilt = SimpleNamespace(value=x / 0.0, weight=1.0, importance=1.0, over=None, reduce=None, coef=nothing)
        whole = SimpleNamespace(value=x, weight=1.0, importance=1.0, over=None, reduce=None, coef=1.0)
        return red.reduce_terms({"spoilt": spoilt, "whole": whole}, OVER)[0]

    value, gradient = jax.value_and_grad(loss)(VALUE)
    assert float(value) == pytest.approx(10 / 6) and np.isfinite(gradient).all()
