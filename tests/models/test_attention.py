"""Attention three ways: all scores at once, in blocks of queries, and by the TPU kernel (interpreted here)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import attention
from sdjax.models.attention import Keys, at_once, attend, attend_written, by_cudnn, by_kernel, in_blocks, prefixes

BEFORE, OWN, HEADS, PER_KEY, WIDTH = 150, 90, 2, 3, 16


@pytest.fixture(scope="module")
def data():
    """Six rows of queries after three shared contexts, padded left and right."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    contexts = jnp.arange(BEFORE) >= jnp.asarray([0, 40, 149])[:, None]
    lengths = jnp.asarray([90, 3, 60, 90, 1, 89])[:, None]
    own = jnp.arange(OWN) < lengths
    past_positions = jnp.maximum(contexts.cumsum(-1) - 1, 0)
    positions = jnp.repeat(contexts.sum(-1), 2)[:, None] + jnp.arange(OWN)
    keys = lambda i, rows, length: draw(i, rows, length, HEADS, WIDTH)
    past = Keys(keys(0, 3, BEFORE), keys(1, 3, BEFORE), past_positions, contexts)
    here = Keys(keys(2, 6, OWN), keys(3, 6, OWN), positions, own)
    return draw(4, 6, OWN, HEADS, PER_KEY, WIDTH), positions, (past, here)


def reference(query, positions, runs, window):
    """In float64 NumPy, a row, head and query at a time."""
    rows, length = query.shape[:2]
    found = np.zeros(query.shape)
    joined = lambda name, row: np.concatenate(
        [np.asarray(getattr(r, name), np.float64)[row // (rows // len(r.keys))] for r in runs]
    )
    for row in range(rows):
        keys, values, at, mask = (joined(name, row) for name in ("keys", "values", "positions", "mask"))
        for i in range(length):
            distance = float(positions[row, i]) - at
            readable = (mask > 0) & (distance >= 0) & (distance < (window or np.inf))
            for head in range(query.shape[2]):
                scores = np.asarray(query[row, i, head], np.float64) @ keys[:, head].T / np.sqrt(WIDTH)
                weights = np.exp(scores - scores.max()) * readable
                total = np.maximum(weights.sum(-1, keepdims=True), 1e-30)  # of a row that is padding
                found[row, i, head] = weights @ values[:, head] / total
    return found


def real(x, data):
    return jnp.where(data[2][-1].mask[..., None, None, None], x, 0)


WINDOWS = pytest.mark.parametrize("window", [None, 20])


@WINDOWS
def test_all_at_once_is_softmax_attention(data, window):
    query, positions, runs = data
    wanted = reference(query, positions, runs, window)
    np.testing.assert_allclose(real(at_once(*data, window), data), real(wanted, data), atol=2e-6)


def gradients(how, data, window, **more):
    query, positions, runs = data

    def total(query, keys, values):
        own = tuple(r._replace(keys=k, values=v) for r, k, v in zip(runs, keys, values, strict=True))
        read = real(how(query, positions, own, window, **more), data)
        return jnp.sum(jnp.sin(3 * read)), read

    inputs = query, [r.keys for r in runs], [r.values for r in runs]
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)


def assert_same(found, wanted, atol):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-6)


@WINDOWS
@pytest.mark.parametrize("most", [6 * 6 * 240 * 7, 6 * 6 * 240, 1])
def test_blocks_change_neither_value_nor_gradient(data, window, most, monkeypatch):
    wanted = gradients(at_once, data, window)
    monkeypatch.setattr(attention, "SCORES", most)
    assert_same(gradients(in_blocks, data, window), wanted, 2e-5)


@WINDOWS
def test_the_kernel_changes_neither_value_nor_gradient(data, window, monkeypatch):
    monkeypatch.setattr(attention, "TILE", 128)  # two of keys
    wanted = gradients(at_once, data, window)
    assert_same(gradients(by_kernel, data, window, interpret=True), wanted, 2e-4)


@WINDOWS
def test_what_cudnn_is_told_changes_neither_value_nor_gradient(data, window):
    wanted = gradients(at_once, data, window)
    assert_same(gradients(by_cudnn, data, window, implementation="xla"), wanted, 2e-5)


@pytest.mark.parametrize("how", [at_once, in_blocks, by_kernel, by_cudnn])
def test_garbage_that_may_not_be_read_changes_nothing(data, how, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 6 * 6 * 240 * 7)
    monkeypatch.setattr(attention, "TILE", 128)
    more = {by_kernel: {"interpret": True}, by_cudnn: {"implementation": "xla"}}.get(how, {})
    query, positions, runs = data
    dirty = tuple(
        r._replace(
            keys=jnp.where(r.mask[..., None, None], r.keys, 1e9),
            values=jnp.where(r.mask[..., None, None], r.values, -1e9),
        )
        for r in runs
    )
    clean, soiled = gradients(how, data, None, **more), gradients(how, (query, positions, dirty), None, **more)
    np.testing.assert_array_equal(clean[0][1], soiled[0][1])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(soiled))


@WINDOWS
@pytest.mark.parametrize("written", [1, 23, 24, 46, 47, 89, 90])
def test_a_step_of_decoding_reads_what_is_written(data, window, written, monkeypatch):
    """Columns of the cache beyond the prefix that holds it are not even looked at: they are NaN here."""
    monkeypatch.setattr(attention, "LEAST", 23)
    assert prefixes(OWN) == [23, 46, 90]
    query, positions, (past, own) = data
    at = written - 1
    own = own._replace(mask=own.mask & (jnp.arange(OWN) < written))
    query, positions = query[:, at : at + 1], positions[:, at : at + 1]
    wanted = at_once(query, positions, (past, own), window)
    unread = (jnp.arange(OWN) >= next(n for n in prefixes(OWN) if n >= written))[:, None, None]
    cache = own._replace(keys=jnp.where(unread, jnp.nan, own.keys), values=jnp.where(unread, jnp.nan, own.values))
    found = jax.jit(lambda *x: attend_written(*x, window))(query, positions, (past,), cache, jnp.asarray(written))
    some = own.mask[:, at]  # rows that still write
    np.testing.assert_allclose(found[some], wanted[some], atol=2e-6)


@pytest.mark.parametrize("nvidia", [False, True])
def test_a_step_of_decoding_keeps_caps_and_sinks_on_every_device(data, nvidia, monkeypatch):
    """Where the whole cache is read, too."""
    monkeypatch.setattr(attention, "on_nvidia", lambda: nvidia)
    query, positions, (past, own) = data
    query, positions = query[:, -1:], positions[:, -1:]
    sinks = jnp.asarray(np.random.default_rng(0).normal(size=query.shape[2:4]), jnp.float32)
    wanted = at_once(query, positions, (past, own), cap=0.5, sinks=sinks)
    found = attend_written(query, positions, (past,), own, jnp.asarray(OWN), cap=0.5, sinks=sinks)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.abs(wanted - at_once(query, positions, (past, own), cap=0.5)).max() > 1e-3


def test_short_caches_are_read_whole_and_long_ones_in_few_ways():
    assert prefixes(1) == [1] and prefixes(128) == [128] and prefixes(170) == [170]
    assert prefixes(171) == [128, 171] and prefixes(1000) == [128, 256, 512, 1000]
    assert prefixes(32768) == [2**i for i in range(7, 16)]


def test_blocks_with_a_bias(data, monkeypatch):
    bias = jax.random.normal(jax.random.key(9), (6, OWN, OWN))
    wanted = at_once(*data, None, bias)
    assert np.abs(wanted - at_once(*data)).max() > 0.1
    monkeypatch.setattr(attention, "SCORES", 6 * 6 * 240 * 7)
    np.testing.assert_allclose(in_blocks(*data, None, bias), wanted, atol=2e-6)


def test_long_runs_hold_a_block_of_scores(data, monkeypatch):
    """And the gradient does not keep them either."""
    monkeypatch.setattr(attention, "SCORES", 2**20)
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    length = 2048
    run = Keys(
        shape(1, length, 1, 8),
        shape(1, length, 1, 8),
        shape(1, length, dtype=jnp.int32),
        shape(1, length, dtype=jnp.bool_),
    )
    loss = lambda how: jax.jit(jax.grad(lambda q, p, r: how(q, p, (r,)).sum()))
    used = lambda how: loss(how).lower(shape(1, length, 1, 2, 8), shape(1, length, dtype=jnp.int32), run).compile()
    scores = 2 * length * length * 4
    assert used(at_once).memory_analysis().temp_size_in_bytes > scores
    assert used(attend).memory_analysis().temp_size_in_bytes < 0.8 * scores
