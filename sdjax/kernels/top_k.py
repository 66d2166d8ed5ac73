"""The largest entries of an axis that may be split over devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest entries of the last axis and where they are, `[..., V] -> [..., k]` twice; ties go to the first.

    On a mesh with the axes data and model (and, perhaps, expert, along which rows lie as well) every device finds the `k`
    largest of its own part of the last axis, and the candidates' largest are the result: XLA by itself would gather all
    of `x` on every device.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if not {"data", "model"} <= {*sizes} or max(sizes.values()) == 1:
        return jax.lax.top_k(x, k)
    along = tuple(axis for axis in ("data", "expert") if axis in sizes)
    divides = x.ndim > 1 and x.shape[0] % math.prod(sizes[axis] for axis in along) == 0
    size, rows = x.shape[-1], along if divides else None
    leading = (rows, *(None,) * (x.ndim - 2)) if x.ndim > 1 else ()
    # Padding stands last and so loses every tie.
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -size % sizes["model"])), constant_values=-jnp.inf)

    def own(part: Array) -> tuple[Array, Array]:
        values, places = jax.lax.top_k(part, min(k, part.shape[-1]))
        return values, places + jax.lax.axis_index("model") * part.shape[-1]

    spec, whole = P(*leading, "model"), P(*leading, None)
    values, places = jax.shard_map(own, in_specs=spec, out_specs=spec)(x)
    values, order = jax.shard_map(lambda v: jax.lax.top_k(v, k), in_specs=whole, out_specs=whole)(values)
    return values, jnp.take_along_axis(jax.lax.with_sharding_constraint(places, whole), order, axis=-1)
