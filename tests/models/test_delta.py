"""The gated delta net against its definition, token by token in float64; padding, chunks, and a past that rows share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_families import LENGTH, golden, in_one_run
from networks import unoptimised

from sdjax.devices.sharding import AXES, parameter_specs
from sdjax.models import delta, transformer
from sdjax.models.transformer import Transformer


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def by_definition(query, key, value, decay, beta, state):
    """`S' = a S + k (b (v - (a S)^T k))^T`, one token after another, and `S'^T q`."""
    state, read = np.moveaxis(state, 1, 2).astype(np.float64), np.zeros(value.shape)
    for b, t, n, r in np.ndindex(value.shape[:4]):
        own = np.exp(decay[b, t, n, r]) * state[b, n, r]
        k = key[b, t, n, 0]
        own = own + np.outer(k, beta[b, t, n, r] * (value[b, t, n, r] - own.T @ k))
        state[b, n, r], read[b, t, n, r] = own, own.T @ query[b, t, n, 0]
    return read, np.moveaxis(state, 2, 1)


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (19, 64), (19, 5), (20, 5)])
def test_chunks_are_the_definition(length, chunk, monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", chunk)
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    query, key = normal(2, length, 3, 1, 4), unit(normal(2, length, 3, 1, 4))
    rest = normal(2, length, 3, 2, 5), -(normal(2, length, 3, 2) ** 2), draw.uniform(size=(2, length, 3, 2))
    state = normal(2, 2, 3, 4, 5)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, *rest, state)]
    run = delta.one_step if length == 1 else delta.in_chunks
    for found, expected in zip(jax.jit(run)(*arrays), by_definition(query, key, *rest, state), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 33, 64])
def test_the_inverse_of_a_chunk_is_exact(size):
    entries = np.random.default_rng(size).uniform(-0.3, 0.3, (3, 2, size, size))
    system = np.tril(entries, -1) + np.eye(size)
    expected = np.linalg.inv(system)
    np.testing.assert_allclose(
        delta.inverse(jnp.asarray(system, jnp.float32)), expected, atol=1e-6 * abs(expected).max()
    )


def test_no_chunk_calls_the_solver_that_may_wait_for_itself():
    """Two of jaxlib's batched triangular solves at once stood still for ever on a CPU of two cores."""
    ones = lambda *shape: jnp.ones((1, 70, 1, 1, *shape))
    traced = jax.make_jaxpr(delta.in_chunks)(ones(4), ones(4), ones(4), ones(), ones(), jnp.zeros((1, 1, 1, 4, 4)))
    assert "cumsum" in str(traced) and "triangular_solve" not in str(traced)


def test_a_great_decay_forgets_without_overflow():
    """Sums of logarithms within a chunk reach -10^4: nothing of it may become infinite, in the gradient neither."""
    ones = jnp.ones((1, 40, 1, 1, 4)) / 2
    decay = jnp.full((1, 40, 1, 1), -300.0)
    run = lambda value: delta.in_chunks(ones, ones, value, decay, decay * 0 + 0.5, jnp.zeros((1, 1, 1, 4, 4)))[0]
    value = jax.random.normal(jax.random.key(0), (1, 40, 1, 1, 4))
    found, back = jax.vjp(run, value)
    np.testing.assert_allclose(found, 0.5 * value, rtol=1e-5)  # each token reads itself alone
    assert np.isfinite(back(found)[0]).all()


def test_tokens_that_are_left_out_change_nothing():
    """Garbage between and before the tokens of a row, also where another layer has made it infinite."""
    config, params, _ = golden("qwen3_5_text")
    net = delta.DeltaNet(config)
    own = {"params": params["layers_0"]["delta"]}
    x = jax.random.normal(jax.random.key(0), (1, 9, config.width))
    run = lambda x, mask: net.apply(own, x, None, mask, None, None, None, None)
    plain, tail, state = run(x, jnp.ones((1, 9), bool))
    noisy = jnp.concatenate([jnp.full((1, 4, config.width), jnp.inf), x], axis=1)
    mask = jnp.arange(13)[None] >= 4
    found = run(noisy, mask)
    np.testing.assert_allclose(found[0][:, 4:], plain, atol=1e-5)
    np.testing.assert_allclose(found[1], tail, atol=1e-6)
    np.testing.assert_allclose(found[2], state, atol=1e-5)


def test_rows_share_a_past():
    """Two continuations of each of two padded prompts read what one run of everything reads."""
    config, params, arrays = golden("qwen3_5_text")
    model, prefix = Transformer(config), 12
    padded = np.arange(LENGTH) >= LENGTH - arrays["lengths"][:, None]
    tokens = np.repeat(arrays["tokens"], 2, axis=0)
    tokens[1::2, prefix:] = tokens[::2, prefix:][:, ::-1]
    mask = np.repeat(padded, 2, axis=0)
    whole = in_one_run(model, params, tokens, mask)
    positions = transformer.positions_of(jnp.asarray(mask))
    part = lambda rows: (tokens[rows, :prefix], positions[rows, :prefix], mask[rows, :prefix])
    run = jax.jit(transformer.hidden, static_argnums=0)
    _, past = run(model, params, *part(slice(None, None, 2)))
    after, _ = run(model, params, tokens[:, prefix:], positions[:, prefix:], mask[:, prefix:], past)
    found = transformer.logits(model, params, after)
    np.testing.assert_allclose(found, whole[:, prefix:], atol=1e-4 * np.abs(whole).max())


def test_a_row_that_has_not_written_begins_at_its_past():
    """As where a finished row makes room: its cache keeps numbers, of which none may be read."""
    shape = golden("qwen3_5_text")[0].delta
    past = transformer.layer_of(transformer.empty_cache(Transformer(golden("qwen3_5_text")[0]), 1, 4), 0)
    past = past._replace(keys=past.keys + 2, values=past.values + 2)
    mask = jnp.asarray([[True, True, False], [False, True, False]])
    cache = past._replace(
        keys=jnp.full((2, *past.keys.shape[1:]), 7.0), values=jnp.full((2, *past.values.shape[1:]), 7.0), mask=mask
    )
    tail, state = delta.before(shape, 2, jnp.float32, past, cache, transformer.Column(jnp.asarray(1), jnp.asarray(2)))
    assert (tail[0] == 7).all() and (state[0] == 7).all() and (tail[1] == 2).all() and (state[1] == 2).all()


def test_a_mesh_splits_it_by_key_heads():
    params = golden("qwen3_5_text")[1]
    found = parameter_specs(params["layers_0"], dict(zip(AXES, (1, 2), strict=True)))["delta"]
    split = {
        name: [axis for axis, part in enumerate(spec) if part == "model"]
        for name, spec in found.items()
        if name != "norm"
    }
    assert split == {"mixed": [1], "convolution": [0], "decay_rate": [0], "step_bias": [0], "out": [0]}


@pytest.mark.slow
def test_a_loop_over_periods_and_recomputation_change_neither_value_nor_gradient():
    config, _, arrays = golden("qwen3_5_text")
    per_layer = {name: getattr(config, name) * 2 for name in ("windows", "ropes", "delta_layers")}
    config = dataclasses.replace(config, layers=6, **per_layer)
    plain, looped = Transformer(config), Transformer(config, remat=True, scan=True)
    assert transformer.period_of(config) == 3
    params = jax.jit(transformer.initialise, static_argnums=0)(plain, jax.random.key(0))
    tokens, mask = jnp.asarray(arrays["tokens"]), jnp.arange(LENGTH)[None] >= jnp.asarray([[0], [6]])
    positions = transformer.positions_of(mask)

    def loss(params, model):
        _, past = transformer.hidden(model, params, tokens[:, :12], positions[:, :12], mask[:, :12])
        hidden, _ = transformer.hidden(model, params, tokens[:, 12:], positions[:, 12:], mask[:, 12:], past)
        return jnp.mean(jax.nn.logsumexp(transformer.logits(model, params, hidden), axis=-1))

    of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for one, other in zip(jax.tree.leaves(of(params, plain)), jax.tree.leaves(of(params, looped)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
