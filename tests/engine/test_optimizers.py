"""Optimizers by option: their steps by the papers' formulas, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdjax.devices import sharding
from sdjax.engine import optimizers


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def steps_of(optimizer, start, grads):
    """Parameters after each of some gradients."""
    params, state, found = start, optimizer.init(start), []
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(params))
    return found


def test_adafactor_is_the_papers():
    """Algorithm 4 in float64: a row and a column in place of a matrix, steps clipped by their root mean square."""
    start, rate, decay = draw(0, 128, 130), 0.1, 0.02
    grads = [(10.0 if i == 1 else 1.0) * draw(1 + i, 128, 130) for i in range(4)]
    x, row, column, wanted = start.astype(np.float64), 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        share, square = 1 - t**-0.8, g.astype(np.float64) ** 2 + 1e-30
        row = share * row + (1 - share) * square.mean(1)
        column = share * column + (1 - share) * square.mean(0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
        u = u / max(1.0, np.sqrt((u**2).mean()))
        x = x - rate * (u + decay * x)
        wanted.append(x)
    found = steps_of(optimizers.adafactor(rate, weight_decay=decay), start, grads)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_first_moment_in_bfloat16_makes_nearly_the_same_steps():
    start, grads = draw(0, 64), [draw(1 + i, 64) for i in range(8)]
    plain, short = (
        steps_of(optimizers.adamw(0.1, weight_decay=0.01, first_moment=t), start, grads)
        for t in ("float32", "bfloat16")
    )
    moved = np.asarray(plain) - start
    difference = np.asarray(short) - np.asarray(plain)
    assert 0 < np.linalg.norm(difference) < 0.01 * np.linalg.norm(moved)


BYTES = {("adamw", "float32"): 8.0, ("adamw", "bfloat16"): 6.0, ("adafactor", "float32"): 4 * (1 / 512 + 1 / 1024)}


@pytest.mark.parametrize("name, first_moment", BYTES)
def test_what_is_kept_of_a_parameter(name, first_moment):
    shape = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    state = jax.eval_shape(optimizers.chosen(name, 1e-3, first_moment=first_moment).init, shape)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert kept / (1024 * 512) == pytest.approx(BYTES[name, first_moment], abs=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_gradients_are_clipped_before(name):
    """Adam and Adafactor do not see a gradient's size, but two gradients' sizes: the second counts for as much as it may."""
    start, small, large = draw(0, 128, 128), 1e-3 * draw(1, 128, 128), 1e3 * draw(2, 128, 128)
    norm = float(np.linalg.norm(small))
    clipped = steps_of(optimizers.chosen(name, 0.1, clip_norm=norm, weight_decay=0.0), start, [small, large])
    by_hand = steps_of(
        optimizers.chosen(name, 0.1, clip_norm=1e9, weight_decay=0.0),
        start,
        [small, large * norm / np.linalg.norm(large)],
    )
    np.testing.assert_allclose(clipped, by_hand, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_of_experts_go_by_no_rule_of_parameters():
    """A row of experts' matrices has as many axes as an ordinary layer's, which would be split along another axis."""
    sizes = {"data": 2, "model": 4}
    shape = jax.ShapeDtypeStruct((4, 256, 2, 130), jnp.float32)
    state = jax.eval_shape(optimizers.adafactor(1e-3, weight_decay=0.0).init, {"layers_0": {"mlp": {"gate_up": shape}}})
    specs = sharding.parameter_specs(state, sizes, least=1)
    found = {
        sharding.path_of(p): s
        for p, s in jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, P))[0]
    }
    sums = {path: spec for path, spec in found.items() if "v_row" in path or "v_col" in path}
    assert len(sums) == 2 and all("model" not in spec for spec in sums.values())
