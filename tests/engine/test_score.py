"""The engine: chunks, buckets, padding and stopped views change nothing that they should not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import VOCABULARY, batch, config, context, full_logits, network, prompts, unoptimised

from sdjax.engine import score
from sdjax.engine.score import divisor_at_least, joined_chunks, over_tokens, strided_chunks, token_signals
from sdjax.kernels.distributions import logprob, normalise
from sdjax.kernels.divergences import forward_kl, jsd, reverse_kl
from sdjax.models.configs import ModelConfig
from sdjax.models.ropes import rope
from sdjax.models.transformer import Transformer, initialise
from sdjax.types import Batch, Context, View

ROWS, LENGTH = 6, 8
LENGTHS = (8, 5, 0, 7, 1, 6)
SHARED, OWN = prompts((3, 7, 5)), prompts((9, 4, 6, 2, 8, 5), seed=1)
VIEWS = {
    "student": View(trainable=True),
    "teacher": View("teacher", per_rollout=True),
    "reference": View("live"),
}
TWO = tuple(VIEWS.items())[:2]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def three_views(before=0, after=0, fill=0, lengths=LENGTHS) -> Batch:
    """Three prompts of two rows: the student's context shared, the teacher's per row; more padding on request."""
    shared = lambda rows: context(rows, 8 + before, ROWS, fill)
    contexts = {"student": shared(SHARED), "teacher": context(OWN, 9 + before, ROWS, fill), "reference": shared(SHARED)}
    found = batch(contexts, lengths, LENGTH + after, fill=fill)
    return found.replace(valid=jnp.asarray([True] * 5 + [False]))


def models(live="plain", teacher="mixed"):
    """Models and parameters of the live policy and of another one."""
    (one, ours), (other, theirs) = network(live), network(teacher, 1)
    return {"live": one, "teacher": other}, {"live": ours, "teacher": theirs}


def divergences(dist, token):
    return {
        "jsd": jsd(dist["student"], dist["teacher"], 0.5),
        "reverse": reverse_kl(dist["student"], dist["teacher"]),
        "logprobs": logprob(dist["student"], token),
        "top": jax.lax.top_k(dist["teacher"], 3)[0],
    }


def weighted(found, weights):
    """A loss that asks something else of every row and position, each signal weighted by name (default 1)."""
    total = 0.0
    for number, (name, value) in enumerate(sorted(found.items())):
        row, column = jnp.indices(value.shape[:2])
        each = value.reshape(*value.shape[:2], -1).sum(-1) * jnp.sin(1.0 + number + 31 * row + column)
        total += weights.get(name, 1.0) * each.sum()
    return total


@functools.cache
def engine(live="plain", teacher="mixed", signals=divergences, rows=None, tokens=None, views=TWO):
    """`(params, batch, weights) -> loss, signals, gradients`, compiled."""
    networks, _ = models(live, teacher)

    def loss(params, batch, weights):
        found = token_signals(dict(views), signals, networks, params, batch, rows=rows, tokens=tokens)
        return weighted(found, weights), found

    def run(params, batch, weights):
        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, weights)
        return value, found, grads

    compiled = jax.jit(run)
    return lambda params, batch, **weights: compiled(params, batch, weights)


@functools.cache
def reader(live="plain", teacher="mixed", signals=divergences, rows=None, tokens=None, views=TWO):
    """`(params, batch) -> signals`, compiled, without gradients."""
    networks, _ = models(live, teacher)
    read = lambda params, batch: token_signals(dict(views), signals, networks, params, batch, rows=rows, tokens=tokens)
    return jax.jit(read)


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


# ---- values -------------------------------------------------------------------------------------------------------


def test_signals_are_those_of_plain_forward_passes():
    """Row by row, without padding, shared contexts or chunks."""
    networks, params = models()
    data = three_views()
    found = engine()(params, data)[1]
    for row, length in enumerate(LENGTHS):
        tokens = data.completion[row, :length]
        before = {"student": ("live", SHARED[row // 2]), "teacher": ("teacher", OWN[row])}
        dist = {n: full_logits(networks[who], params[who], told, tokens) for n, (who, told) in before.items()}
        wanted = divergences({n: normalise(jnp.asarray(d)) for n, d in dist.items()}, tokens)
        for name, value in found.items():
            np.testing.assert_allclose(value[row, :length], wanted[name] * data.valid[row], atol=2e-5, err_msg=name)
            assert not value[row, length:].any()


@pytest.mark.parametrize("rows, tokens", [(1, 1), (4, 7)])
def test_chunk_sizes_change_neither_loss_nor_gradient(rows, tokens):
    _, params = models()
    value, found, grads = engine()(params, three_views())
    chunked_value, chunked_found, chunked_grads = engine(rows=rows, tokens=tokens)(params, three_views())
    np.testing.assert_allclose(chunked_value, value, rtol=1e-5)
    for name in found:
        np.testing.assert_allclose(chunked_found[name], found[name], atol=1e-5, err_msg=name)
    for chunked, whole in zip(jax.tree.leaves(chunked_grads["live"]), jax.tree.leaves(grads["live"]), strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-5 * largest(grads["live"]))


def test_a_signal_may_have_further_axes():
    """Beside the loss test above, which covers their values."""
    _, params = models()
    assert engine()(params, three_views())[1]["top"].shape == (ROWS, LENGTH, 3)
    assert engine(rows=1, tokens=1)(params, three_views())[1]["top"].shape == (ROWS, LENGTH, 3)


@pytest.mark.slow
def test_bigger_buckets_change_nothing():
    """More padding before every context and after every completion."""
    _, params = models()
    value, found, grads = engine()(params, three_views())
    wide_value, wide, wide_grads = engine()(params, three_views(before=5, after=4))
    np.testing.assert_allclose(wide_value, value, rtol=1e-5)
    for name in found:
        np.testing.assert_allclose(wide[name][:, :LENGTH], found[name], atol=1e-5, err_msg=name)
        assert not wide[name][:, LENGTH:].any()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest(grads))
    jax.tree.map(close, wide_grads, grads)


# ---- exact zeros --------------------------------------------------------------------------------------------------

TWINS = {"student": View(trainable=True), "teacher": View()}


def differences(dist, token):
    student, teacher = dist["student"], dist["teacher"]
    return {
        "jsd": jsd(student, teacher, 0.5),
        "forward": forward_kl(student, teacher),
        "reverse": reverse_kl(student, teacher),
        "ratio": logprob(student, token) - logprob(teacher, token),
    }


def twins(rows=SHARED) -> Batch:
    """The same contexts for student and teacher."""
    both = context(rows, 9, ROWS)
    return batch({"student": both, "teacher": both}, LENGTHS, LENGTH)


@pytest.mark.parametrize("rows, tokens", [(None, None), (2, 4)])
def test_same_context_and_same_policy_give_exactly_zero(rows, tokens):
    read = reader("mixed", "plain", differences, rows, tokens, tuple(TWINS.items()))
    for name, value in read(models("mixed", "plain")[1], twins()).items():
        assert not value.any(), name


@pytest.mark.parametrize("tokens", [None, 1, 4])
@pytest.mark.slow
def test_equal_models_in_bfloat16_give_exactly_zero_for_every_chunk_size(tokens):
    networks, params = models("mixed", "plain")
    narrow = {name: model.clone(dtype=jnp.bfloat16) for name, model in networks.items()}
    read = jax.jit(lambda p, b: token_signals(TWINS, differences, narrow, p, b, rows=2, tokens=tokens))
    for name, value in read(params, twins()).items():
        assert value.dtype == jnp.float32 and not value.any(), name


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_that_share_a_context_may_be_read_apart(rows):
    """Fewer rows at a time than share a context: each chunk has a copy of it, and no number changes."""
    units, chunks = score.row_units([ROWS // 2, ROWS], ROWS, rows)
    assert ROWS % units == 0 and units % chunks == 0 and ROWS // chunks <= max(rows, 1) and chunks > 1
    told = context(SHARED, 9, ROWS)
    copied = score.repeated(told, units)
    np.testing.assert_array_equal(
        np.repeat(copied.tokens, ROWS // len(copied.tokens), 0), np.repeat(told.tokens, ROWS // len(told.tokens), 0)
    )


def test_another_policy_does_not():
    views = TWINS | {"teacher": View("teacher")}
    found = reader("mixed", "plain", differences, None, None, tuple(views.items()))(
        models("mixed", "plain")[1], twins()
    )
    assert all(largest(value) > 0.1 for value in found.values())


# ---- gradients ----------------------------------------------------------------------------------------------------


def likelihoods(dist, token):
    return {name: logprob(value, token) for name, value in dist.items()}


def grads_of_each(views):
    """`{view: gradients of its log-probabilities alone}`; `student` and `reference` are the same policy."""
    run = engine("plain", "plain", likelihoods, None, 12, tuple(views.items()))
    _, params = models("plain", "plain")
    return {n: run(params, three_views(), **{m: float(m == n) for m in VIEWS})[2] for n in VIEWS}


def test_gradients_flow_through_the_trainable_view_only():
    grads = grads_of_each(VIEWS)
    assert largest(grads["student"]["live"]) > 0.1 and largest(grads["student"]["teacher"]) == 0
    assert largest(grads["teacher"]) == 0 and largest(grads["reference"]) == 0


def test_declaring_the_other_views_trainable_opens_them():
    """The negative control; each view's own policy, and no other, receives its gradient."""
    grads = grads_of_each(
        {"student": View(), **{n: VIEWS[n]._replace(trainable=True) for n in ("teacher", "reference")}}
    )
    assert largest(grads["student"]) == 0
    assert largest(grads["teacher"]["teacher"]) > 0.1 and largest(grads["teacher"]["live"]) == 0
    assert largest(grads["reference"]["live"]) > 0.1 and largest(grads["reference"]["teacher"]) == 0


# ---- absent positions ---------------------------------------------------------------------------------------------

PAD = VOCABULARY - 1


def ratios(dist, token):
    ratio = logprob(dist["student"], token) - logprob(dist["teacher"], token)
    return {"jsd": jsd(dist["student"], dist["teacher"], 0.5), "ratio": ratio}


def test_garbage_at_absent_positions_changes_neither_value_nor_gradient():
    """The embedding of a token that occurs in padding only; embeddings and head are not tied."""
    run = engine("mixed", "mixed", ratios, None, 12)
    _, params = models("mixed", "mixed")
    clean = run(params, three_views(fill=PAD))
    for garbage in (np.nan, np.inf, 1e30):
        spoilt = {n: {**tree, "embed": tree["embed"].at[PAD].set(garbage)} for n, tree in params.items()}
        jax.tree.map(np.testing.assert_array_equal, run(spoilt, three_views(fill=PAD)), clean)


def test_the_garbage_would_be_seen():
    """The negative control: the same tokens, declared present."""
    _, params = models("mixed", "mixed")
    spoilt = {n: {**tree, "embed": tree["embed"].at[PAD].set(np.nan)} for n, tree in params.items()}
    data = three_views(fill=PAD)
    run = engine("mixed", "mixed", ratios, None, 12)
    assert not jnp.isfinite(run(spoilt, data.replace(present=jnp.ones_like(data.present)))[0])


def spoiling(dist, token):
    return {"bad": jnp.where(token == PAD, jnp.nan, logprob(dist["student"], token))}


def test_nan_from_a_signal_at_absent_positions_is_dropped():
    _, params = models("mixed", "mixed")
    _, found, grads = engine("mixed", "mixed", spoiling, None, 12)(params, three_views(fill=PAD))
    assert jnp.isfinite(found["bad"]).all() and all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert largest(found["bad"]) > 1


def test_hidden_states_at_absent_positions_are_replaced_before_the_head(monkeypatch):
    """Whatever they are: a NaN there would reach the gradient of the head through zero times NaN."""
    honest = score.hidden_states

    def spoilt(model, params, context, completion, present):
        return jnp.where(present[..., None], honest(model, params, context, completion, present), jnp.nan)

    _, params = models("mixed", "mixed")
    clean = engine("mixed", "mixed", ratios, None, 12)(params, three_views(fill=PAD))
    monkeypatch.setattr(score, "hidden_states", spoilt)
    found = engine("mixed", "mixed", lambda dist, token: ratios(dist, token), None, 12)(params, three_views(fill=PAD))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, clean)


# ---- chunks -------------------------------------------------------------------------------------------------------


def test_slices_without_a_live_token_are_skipped_and_zero():
    """Rows end at 3 of 8 tokens: of four slices of two tokens the last two are never computed."""
    networks, params = models("plain", "plain")
    counted = []

    def signals(dist, token):
        jax.debug.callback(lambda: counted.append(1))
        return {"one": jnp.ones_like(token, jnp.float32) + 0 * logprob(dist["student"], token)}

    views = {"student": VIEWS["student"]}
    run = jax.jit(lambda p, b: token_signals(views, signals, networks, p, b, tokens=2 * ROWS)["one"])

    def slices(lengths, valid=True):
        counted.clear()
        data = batch({"student": three_views().contexts["student"]}, lengths, LENGTH)
        data = data.replace(valid=jnp.full(ROWS, valid))
        found = jax.block_until_ready(run(params, data))
        jax.effects_barrier()
        np.testing.assert_array_equal(found, data.present * 1.0 * valid)
        return len(counted)

    assert slices((8,) * ROWS) == 4
    assert slices((3,) * ROWS) == 2
    assert slices((3, 1, 0, 5, 2, 2)) == 3
    assert slices((8,) * ROWS, valid=False) == 0


def test_over_tokens_maps_the_time_axis_of_trees():
    value = jnp.arange(2.0 * 6 * 3).reshape(2, 6, 3)
    live = jnp.ones((2, 6), bool).at[:, 4:].set(False)
    tree = {"a": value, "b": {"c": value[..., 0]}}
    found = over_tokens(lambda x: {"twice": 2 * x["a"], "c": x["b"]["c"]}, tree, live, 3)
    np.testing.assert_array_equal(found["twice"], jnp.where(live[..., None], 2 * value, 0))
    np.testing.assert_array_equal(found["c"], jnp.where(live, value[..., 0], 0))


def test_strided_chunks_take_every_nth_unit_and_are_inverted():
    rows = jnp.arange(12).reshape(12, 1)
    chunks = strided_chunks({"rows": rows, "groups": jnp.arange(6)}, units=6, chunks=3)
    assert chunks["groups"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert chunks["rows"][..., 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    np.testing.assert_array_equal(joined_chunks(chunks, 6, 3)["rows"], rows)


def test_divisor_at_least():
    for number in range(1, 40):
        for wanted in range(1, 45):
            found = divisor_at_least(number, wanted)
            smaller = [d for d in range(wanted, found) if number % d == 0]
            assert number % found == 0 and found >= min(wanted, number) and not smaller


# ---- memory -------------------------------------------------------------------------------------------------------

QWEN3 = 151_936


def temporary_bytes(length, tokens, rows=None) -> int:
    """Of a full-vocabulary Jensen-Shannon loss with gradient, 8 rows; compiled, never run."""
    ropes = (rope(32, 1024),)
    model = Transformer(ModelConfig("llama", QWEN3, 64, 1, 2, 1, 32, 128, 1e-5, 1024, True, (None,), ropes))
    of = jax.ShapeDtypeStruct
    grid = lambda dtype: of((8, length), dtype)
    row = lambda dtype: of((8,), dtype)
    before = Context(of((8, 16), jnp.int32), of((8, 16), bool), row(bool))
    data = Batch(
        *(grid(jnp.int32), grid(bool), grid(bool), grid(jnp.float32), {"student": before, "teacher": before}),
        *(row(jnp.float32), row(jnp.int32), row(jnp.int32), row(bool), row(bool), {}),
    )
    views = {"student": View(trainable=True), "teacher": View("teacher")}
    signals = lambda dist, token: {"jsd": jsd(dist["student"], dist["teacher"], 0.5)}

    def loss(params, teacher, batch):
        policies = {"live": params, "teacher": teacher}
        both = {"live": model, "teacher": model}
        return token_signals(views, signals, both, policies, batch, rows=rows, tokens=tokens)["jsd"].sum()

    params = jax.eval_shape(lambda key: initialise(model, key), jax.random.key(0))
    return jax.jit(jax.value_and_grad(loss)).lower(params, params, data).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_one_slice_whatever_the_batch():
    whole = temporary_bytes(256, None)
    assert whole > 3 * 4 * 8 * 256 * QWEN3
    sliced = temporary_bytes(256, 64, rows=1)
    assert 10 * sliced < whole
    # Twice the tokens: eight copies of all hidden states and of one row's attention weights, and no logits.
    hidden = 4 * 8 * 256 * 64
    attention = 4 * 2 * (512 * (512 + 16) - 256 * (256 + 16))
    grown = temporary_bytes(512, 64, rows=1) - sliced
    assert grown < 8 * (hidden + attention) < 4 * 64 * QWEN3


def test_the_tiny_networks_differ_where_it_matters():
    """What these tests rely on: a window, norms of queries and keys, and an untied head in one of them."""
    assert config("mixed").windows[0] == 3 and config("mixed").qk_norm == "head"
    assert not config("mixed").tied_embeddings and config("plain").tied_embeddings
