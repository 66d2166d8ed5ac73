"""cuDNN's attention, whose scores never leave the chip: 16-bit numbers on NVIDIA's GPUs."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sdjax.devices.sharding import MODEL, current, rows_axis

Implementation = Literal["cudnn", "xla"]
"""Who computes: "xla" does the same on every device, in every type."""


def reads(query: Array) -> bool:
    """Whether cuDNN reads such queries: numbers of 16 bits, heads of at most 128 in steps of 8."""
    return query.dtype.itemsize == 2 and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0


def read(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    window: int | None = None,
    implementation: Implementation = "cudnn",
) -> Array:
    """`query [B, S, K, G, H]` over `keys, values [B, P, K, H]` with `mask [B, P]`, the last `S` their own: `[B, S, K, G, H]`.

    It reads a square, of which the query of a column reads the keys up to this column, and of every row the first columns.
    So keys that may be read are moved there, queries with them, and the columns before get queries of zeros.
    """
    batch, length, kv_heads, per_kv, head_dim = query.shape
    before = keys.shape[1] - length
    asked = query.reshape(batch, length, kv_heads * per_kv, head_dim)
    asked = jnp.pad(asked, ((0, 0), (before, 0), (0, 0), (0, 0)))
    # Its gradient takes even numbers of columns only.
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)) + ((0, 0),) * (x.ndim - 2))

    call = partial(causal, window=window, implementation=implementation)
    if current() is not None:
        rows = rows_axis(batch)
        specs = (P(rows, None, MODEL),) * 3
        call = jax.shard_map(call, in_specs=(*specs, P(rows)), out_specs=specs[0], check_vma=False)
    found = call(*map(even, (asked, keys, values, mask)))[:, before : before + length]
    return jnp.where(mask[:, before:, None, None], found, 0).reshape(query.shape)


def causal(
    query: Array,
    keys: Array,
    values: Array,
    mask: Array,
    *,
    window: int | None,
    implementation: Implementation,
) -> Array:
    """One device's rows and heads: `query [B, P, heads, H]`, `keys, values [B, P, K, H]`, `mask [B, P]`."""
    order = jnp.argsort(~mask, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    lengths = jnp.maximum(mask.sum(-1), 1).astype(jnp.int32)
    read = jax.nn.dot_product_attention(
        *(reordered(x, order, back) for x in (query, keys, values)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return reordered(read, back, order)


@jax.custom_vjp
def reordered(x: Array, order: Array, back: Array) -> Array:
    """Columns of `x [B, P, heads, H]` in the order `[B, P]`, which `back` undoes: its gradient is no scatter but a gather."""
    return jnp.take_along_axis(x, order[..., None, None], axis=1, mode="promise_in_bounds")


def reordered_forward(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    """The value, and what the gradient needs."""
    return reordered(x, order, back), (order, back)


def reordered_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    """The gradient, in the order that `x` has."""
    order, back = kept
    return reordered(gradient, back, order), None, None


reordered.defvjp(reordered_forward, reordered_backward)
