"""Grouped-query attention over several runs of keys under one softmax: at once, in blocks, or by a kernel.

Long runs never hold their scores, `[B, heads, S, P]`: on TPUs the splash attention of JAX's own library reads them, on
NVIDIA's GPUs cuDNN's where the numbers have 16 bits, and elsewhere they are computed for a block of queries at a time and
again in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from sdjax.devices.platforms import on_nvidia
from sdjax.devices.sharding import DATA, MODEL, axis_size, current, rows_axis
from sdjax.models import cudnn

LONG = 2**20
"""Queries times keys of a row from which a run is long: what a kernel saves is then more than it costs."""

SCORES = 2**27
"""Scores that a device holds at once, 512 MB in float32."""

TILE = 512
"""Queries and keys of a tile of the kernel."""

LEAST = 128
"""Columns of a cache that are read at least: a tile on TPUs, of which a part would be copied out of the whole cache."""


class Keys(NamedTuple):
    """A run of keys: `keys, values [N, P, K, H]`, their `positions [N, P]`, and which may be read, `mask [N, P]`.

    `N` divides the rows of queries: consecutive rows share a row of keys.
    """

    keys: Array
    values: Array
    positions: Array
    mask: Array


def allowed(query_positions: Array, positions: Array, mask: Array, window: int | None) -> Array:
    """Which keys a query may read: `[B, S]` queries against `[B, P]` keys -> bool `[B, S, P]`."""
    distance = query_positions[:, :, None] - positions[:, None, :]
    reachable = (distance >= 0) & mask[:, None, :]
    return reachable if window is None else reachable & (distance < window)


def attend(
    query: Array,
    positions: Array,
    runs: Sequence[Keys],
    window: int | None = None,
    bias: Array | None = None,
    cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of `query [B, S, K, G, H]` at `positions [B, S]` over several runs of keys -> `[B, S, K, G, H]`.

    `softmax(query . key / sqrt(H)) values`, over all runs together, in float32; key heads are `K`, each with `G` queries.
    A query with nothing to read gets a finite garbage row.
    Sources: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Rabe and Staats 2021, arXiv:2112.05682 (blocks).

    Args:
      runs: the last is the queries' own, or a cache that holds it.
      window: only keys fewer than this many positions back are read.
      bias: `[B, S, P]`, added to the scores of the last run, the same in every head.
      cap: a score `x` becomes `cap tanh(x / cap)` (Gemma 2).
      sinks: `[K, G]`, one more score of every query of a head, whose value is 0 (gpt-oss; Xiao et al., arXiv:2309.17453).
    """
    length, keys = query.shape[1], sum(run.keys.shape[1] for run in runs)
    if bias is None and sinks is None and length * keys >= LONG and runs[-1].keys.shape[1] == length:
        if on_nvidia() and cudnn.reads(query) and cap is None:
            return by_cudnn(query, positions, runs, window)
        kernel, blocks = partial(by_kernel, window=window, cap=cap), partial(in_blocks, window=window, cap=cap)
        return jax.lax.platform_dependent(query, positions, tuple(runs), tpu=kernel, default=blocks)
    return in_blocks(query, positions, runs, window, bias, cap, sinks)


def attend_written(
    query: Array,
    positions: Array,
    before: Sequence[Keys],
    cache: Keys,
    written: Array,
    window: int | None = None,
    cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """`attend` over the runs `before` and a cache of which only the first `written` (`[]`) columns hold anything.

    Reads the least number of `prefixes` that holds them: a step of decoding costs what has been written, not what may be.
    Not on GPUs: there the branches of a condition would copy the cache at every step, which costs more than it saves.
    """
    if on_nvidia():
        return attend(query, positions, (*before, cache), window, cap=cap, sinks=sinks)
    sizes = prefixes(cache.keys.shape[1])

    def reads(size: int) -> Callable[[Keys], Array]:
        some = lambda cache: Keys(*(x[:, :size] for x in cache))
        return lambda cache: attend(query, positions, (*before, some(cache)), window, cap=cap, sinks=sinks)

    return jax.lax.switch(sum(written > size for size in sizes[:-1]), [reads(size) for size in sizes], cache)


def prefixes(length: int) -> list[int]:
    """How many columns of a cache of this length a step may read: `LEAST`, doubled as long as that saves a quarter; all."""
    sizes = [LEAST]
    while sizes[-1] <= 0.75 * length:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], length]


# ---- at once, in blocks -----------------------------------------------------------------------------------------------


def in_blocks(
    query: Array,
    positions: Array,
    runs: Sequence[Keys],
    window: int | None = None,
    bias: Array | None = None,
    cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """`attend` for as many queries at a time as `SCORES` allows; all at once if it allows that."""
    batch, length, kv_heads, per_kv, _ = query.shape
    keys = sum(run.keys.shape[1] for run in runs)
    per_query = batch * kv_heads * per_kv * keys // devices_of(batch)
    if per_query * length <= SCORES:
        return at_once(query, positions, runs, window, bias, cap, sinks)
    blocks = min(length, math.ceil(per_query * length / SCORES))
    size = math.ceil(length / blocks)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, size * blocks - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda x: at_once(x[0], x[1], runs, window, x[2], cap, sinks))
    read = jax.lax.map(one, jax.tree.map(split, (query, positions, bias)))
    return jnp.moveaxis(read, 0, 1).reshape(batch, -1, *query.shape[2:])[:, :length]


def devices_of(rows: int) -> int:
    """Devices over which the scores of so many rows are split."""
    return axis_size(MODEL) * math.gcd(rows, axis_size(DATA))


def at_once(
    query: Array,
    positions: Array,
    runs: Sequence[Keys],
    window: int | None = None,
    bias: Array | None = None,
    cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """`attend` with all scores in memory.  Keys that rows share are never copied."""
    batch, length, kv_heads, per_kv, head_dim = query.shape
    query = query * head_dim**-0.5
    repeat = lambda x: jnp.repeat(x, batch // x.shape[0], axis=0)
    scores = []
    for run in runs:
        rows = query.reshape(run.keys.shape[0], -1, *query.shape[1:])
        score = jnp.einsum("nrskgh,npkh->nrkgsp", rows, run.keys, preferred_element_type=jnp.float32)
        score = score.reshape(batch, kv_heads, per_kv, length, -1)
        if cap is not None:
            score = cap * jnp.tanh(score / cap)
        if bias is not None and run is runs[-1]:
            score = score + bias[:, None, None]
        reachable = allowed(positions, repeat(run.positions), repeat(run.mask), window)
        scores.append(jnp.where(reachable[:, None, None], score, jnp.finfo(jnp.float32).min))
    if sinks is not None:
        shape = (batch, kv_heads, per_kv, length, 1)
        scores.append(jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None, None], shape))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    result, start = 0, 0
    for run in runs:
        part = weights[..., start : start + run.keys.shape[1]]
        part = part.reshape(run.keys.shape[0], -1, *part.shape[1:])
        read = jnp.einsum("nrkgsp,npkh->nrskgh", part, run.values)
        result = result + read.reshape(batch, length, kv_heads, per_kv, head_dim)
        start += run.keys.shape[1]
    return result


# ---- by a kernel ------------------------------------------------------------------------------------------------------


def by_kernel(
    query: Array,
    positions: Array,
    runs: Sequence[Keys],
    window: int | None = None,
    interpret: bool = False,
    cap: float | None = None,
) -> Array:
    """`attend` by splash attention, whose tiles of scores never leave the chip.

    It orders by columns: keys that rows share are copied to each, and positions must rise by one from one key that may
    be read to the next.

    Args:
      interpret: run it without a TPU, slowly.
    """
    del positions
    batch, length, kv_heads, per_kv, head_dim = query.shape
    keys, values, mask = joined(runs, batch)
    before = keys.shape[1] - length
    tiled = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE)) + ((0, 0),) * (x.ndim - 2))
    heads_first = lambda x: jnp.moveaxis(tiled(x), 1, 2)
    asked = heads_first((query * head_dim**-0.5).reshape(batch, length, kv_heads * per_kv, head_dim))
    segments = lambda x: tiled(x.astype(jnp.int32))  # real tokens read real ones, and padding itself
    arguments = (asked, heads_first(keys), heads_first(values), segments(mask[:, before:]), segments(mask))

    call = partial(splash, before=before, window=window, interpret=interpret, cap=cap)
    if current() is not None:
        rows = rows_axis(batch)
        specs = (P(rows, MODEL),) * 3 + (P(rows),) * 2
        call = jax.shard_map(call, in_specs=specs, out_specs=P(rows, MODEL), check_vma=False)
    read = jnp.moveaxis(call(*arguments), 1, 2)[:, :length]
    return read.reshape(query.shape).astype(query.dtype)


def joined(runs: Sequence[Keys], batch: int) -> tuple[Array, Array, Array]:
    """The `keys, values [B, P, K, H]` and the `mask [B, P]` of all runs, one after the other; what is masked is 0.

    Garbage that may not be read is weighed by 0, and 0 times an infinity is NaN.
    """
    of = lambda name: [jnp.repeat(getattr(run, name), batch // len(run.mask), axis=0) for run in runs]
    keys, values, mask = (jnp.concatenate(of(name), axis=1) for name in ("keys", "values", "mask"))
    return *(jnp.where(mask[..., None, None], x, 0) for x in (keys, values)), mask


def splash(
    query: Array,
    keys: Array,
    values: Array,
    own: Array,
    others: Array,
    *,
    before: int,
    window: int | None,
    interpret: bool,
    cap: float | None = None,
) -> Array:
    """One device's rows and heads: `query [B, heads, S, H]`, `keys, values [B, K, P, H]`, segments `[B, S]`, `[B, P]`.

    The query of column `i` reads the keys of columns up to `before + i`.
    """
    kernel, segments = kernel_of(query.shape[1], query.shape[2], keys.shape[2], before, window, TILE, interpret, cap)
    return jax.vmap(kernel)(query, keys, values, segments(own, others))


@functools.cache
def kernel_of(
    heads: int, length: int, keys: int, before: int, window: int | None, tile: int, interpret: bool, cap: float | None
) -> tuple[Callable, Callable]:
    """The library's kernel for these shapes, and its segments; made once, for it walks through all tiles in Python."""
    # Imported late: other backends never need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal = masks.CausalMask((length, keys), offset=before)
    if window is not None:
        causal = masks.LocalMask((length, keys), (window - 1, 0), offset=before)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    make = partial(
        kernels.make_splash_mha,
        masks.MultiHeadMask([causal] * heads),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": tile for name in sizes}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        attn_logits_soft_cap=cap,
    )
    # A thread of its own knows neither the trace nor the mesh that are being worked on: what it makes are numbers.
    with ThreadPoolExecutor(1) as pool:
        kernel = pool.submit(make).result()
    return jax.tree.map(np.asarray, kernel), kernels.SegmentIds


# ---- by cuDNN ---------------------------------------------------------------------------------------------------------


def by_cudnn(
    query: Array,
    positions: Array,
    runs: Sequence[Keys],
    window: int | None = None,
    implementation: cudnn.Implementation = "cudnn",
) -> Array:
    """`attend` by cuDNN's attention; as for `by_kernel` positions must rise by one from one key to the next."""
    del positions
    return cudnn.read(query, *joined(runs, len(query)), window, implementation)
