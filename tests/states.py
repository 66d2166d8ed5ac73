"""A small state of a run, for tests of how it is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.engine.train import State
from sdjax.run.storage import checkpoint

OPTIMIZER = optax.adamw(1e-3)


def state(step=3, width=4, optimizer=OPTIMIZER, snapshots=("teacher",)):
    """A small state of every kind of array."""
    params = {
        "layer": {"kernel": jnp.arange(float(width * 3)).reshape(width, 3) / 7, "bias": jnp.ones(3, jnp.bfloat16)}
    }
    return State(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        snapshots={name: jax.tree.map(lambda x: x + 1, params) for name in snapshots},
        key=jax.random.key(7),
    )


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(checkpoint.arrays_of(a)), jax.tree.leaves(checkpoint.arrays_of(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)
