"""What the default device can do at best: products per second, bytes read per second; and how anything is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SIZES = {"cpu": (2048, 8192, 1)}
"""Rows of the square matrix of products and of the one that is read, and products in a program; `LARGE` elsewhere."""

LARGE = (8192, 16384, 16)


class Timing(NamedTuple):
    """Seconds: the first call (compilation included) and the median of the following ones."""

    first: float
    median: float


def timed(function: Callable[[int], Any], repeats: int) -> Timing:
    """Times `function(i)` for `i = 0 ... repeats`, the first apart, each until its result is there."""
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(i))
        seconds.append(time.perf_counter() - start)
    return Timing(seconds[0], statistics.median(seconds[1:]))


def sizes() -> tuple[int, int, int]:
    """What is multiplied on the default device."""
    return SIZES.get(jax.devices()[0].platform, LARGE)


def matrix_product(dtype: Any) -> float:
    """FLOP per second (two per multiply-add) of large square matrix products in `dtype`, added up in float32."""
    size, _, turns = sizes()
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return turns * 2 * size**3 / seconds_of_products(matrix, matrix, turns)


def bandwidth(dtype: Any) -> float:
    """Bytes per second at which a large matrix is read for a product with sixteen rows, as weights are in decoding."""
    _, size, turns = sizes()
    matrix = jnp.ones((size, size), dtype)
    return turns * matrix.nbytes / seconds_of_products(jnp.ones((16, size), dtype), matrix, turns)


def seconds_of_products(rows: jax.Array, matrix: jax.Array, turns: int) -> float:
    """Seconds of `turns` products in one program, each of what the one before has given: a launch costs next to nothing."""

    @jax.jit
    def chain(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        product = lambda x: jnp.matmul(x, matrix, preferred_element_type=jnp.float32) / len(matrix)
        return jax.lax.fori_loop(0, turns, lambda _, x: product(x).astype(x.dtype), rows)

    return timed(lambda _: chain(rows, matrix), 5).median
