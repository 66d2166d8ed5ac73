"""A number for each array that changes with any of its bits, and that is the same however the array is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

ODD = 0x9E3779B1
"""The golden ratio of 2^32, of multiplicative hashing (Knuth, The Art of Computer Programming, 3, 6.4)."""

WORDS = {1: jnp.uint8, 2: jnp.uint16}


@jax.jit
def digest(array: Array) -> Array:
    """`sum over positions p of bits[p] (ODD p | 1)`, modulo 2^32; `bits[p]` are those of an element as a whole number.

    Every factor is odd: a change of one element shows for certain, and of several but once in 2^32.  A sum does not depend
    on its order, so devices add up what they hold, and only one number travels.
    """
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = jax.lax.bitcast_convert_type(array, WORDS.get(array.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (position * jnp.uint32(ODD) | 1), dtype=jnp.uint32)


def digests(tree: Any) -> dict[str, Array]:
    """`{path: digest}` of a tree's arrays, under way on the devices: `jax.device_get` waits for them."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found[named(path)] = one_at_a_time(digest, x)
    return found


def one_at_a_time(program: Callable[[Array], Array], x: Array) -> Array:
    """`program(x)`; where one processor plays several devices, after all that x waits for, and waited for.

    There the devices share threads: of several programs under way each may wait, in an all-reduce, for threads that the
    others hold, for ever.
    """
    if jax.default_backend() != "cpu" or not isinstance(x, Array) or len(x.sharding.device_set) == 1:
        return program(x)
    return jax.block_until_ready(program(jax.block_until_ready(x)))


def named(path: Any) -> str:
    """The path of an array in a tree, as `params/embed`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
