"""Shapes with their places on the entered mesh, for programs that are compiled before there are arrays."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.devices import sharding


def laid(tree: Any, specs: Any) -> Any:
    """Shapes with these shardings over the entered mesh; plain shapes outside."""
    if sharding.current() is None:
        return jax.tree.map(lambda x, _: jax.ShapeDtypeStruct(x.shape, x.dtype), tree, specs)
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree, specs
    )


def laid_parameters(tree: Any) -> Any:
    """Shapes of parameters or an optimizer's state, split by the rules."""
    mesh = sharding.current()
    specs = jax.tree.map(lambda _: P(), tree) if mesh is None else sharding.parameter_specs(tree, mesh.shape)
    return laid(tree, specs)


def bytes_beside_data(tree: Any, dtype: Any) -> float:
    """Bytes on one device of parameters in a type where nothing is split over the data axis."""
    sizes = {} if (mesh := sharding.current()) is None else mesh.shape
    specs = sharding.parameter_specs(tree, sizes, math.inf) if sizes else jax.tree.map(lambda _: P(), tree)
    split = lambda spec: math.prod(sharding.devices_along(sizes, axes) for axes in spec if axes)
    own = jax.tree.map(lambda x, spec: math.prod(x.shape) / split(spec), tree, specs)
    return sum(jax.tree.leaves(own)) * jnp.dtype(dtype).itemsize


def laid_rows(tree: Any) -> Any:
    """Shapes with a first axis of rows, split over the data axis where they divide."""
    whole = sharding.current() is None
    return laid(tree, jax.tree.map(lambda x: P() if whole or not x.ndim else P(sharding.rows_axis(x.shape[0])), tree))


def laid_whole(*shape: int, dtype: Any = jnp.int32) -> Any:
    """A shape that every device holds whole."""
    return laid(jax.ShapeDtypeStruct(shape, dtype), P())
