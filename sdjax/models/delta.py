"""The gated delta net of Qwen3.5: a layer that keeps a state of fixed size where attention keeps keys and values.

A head's state is a matrix `S [key, value]`; a token with key `k`, value `v`, decay `a` and rate `b` makes of it
`S' = a S + k (b (v - (a S)^T k))^T` and reads `S'^T q`.  Tokens that a mask leaves out change nothing.
Source: Yang et al. 2025 (Gated Delta Networks), arXiv:2412.06464, in chunks as in Yang et al. 2024, arXiv:2406.06484.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models.adapters import Adapted
from sdjax.models.configs import ModelConfig
from sdjax.models.delta_shapes import DeltaShape
from sdjax.models.primitives import INIT, RMSNorm, project

CHUNK = 64
"""Tokens whose updates are made into matrix products."""


class DeltaNet(nn.Module):
    """`mixed [width, heads, 2 key + 2 values + 2 per_key]`: each key head's query, key, values, gates, rates, decays.

    What it leaves behind stands where attention has keys and values: the last inputs of the convolution
    `[B, kernel - 1, heads, 2 key + values]`, and the state `[B, per_key, heads, key, value]`, float32.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions, mask, past, cache, column, bias, lent=None):
        c, shape = self.config, self.config.delta
        parts = (2 * shape.key + shape.values, shape.values, shape.per_key, shape.per_key)
        mixed = self.param("mixed", INIT, (c.width, shape.heads, sum(parts)))
        kernel = self.param("convolution", INIT, (shape.heads, parts[0], 1, shape.kernel))
        rate_of = self.param("decay_rate", nn.initializers.constant(1.0), (shape.heads, shape.per_key))
        step = self.param("step_bias", nn.initializers.ones, (shape.heads, shape.per_key))
        out = self.param("out", INIT, (shape.heads, shape.values, c.width))
        present = jnp.ones(x.shape[:2], bool) if mask is None else mask
        # A layer before leaves garbage at padding, which a convolution would read.
        both = project(jnp.where(present[..., None], x, 0), mixed)
        inputs, gate, beta, decay = jnp.split(both, [parts[0], parts[0] + parts[1], sum(parts[:3])], axis=-1)
        tail, state = before(shape, len(x), x.dtype, past, cache, column)
        inputs = jnp.concatenate([tail, inputs], axis=1)
        query, key, value = split_heads(shape, convolved(inputs, kernel, x.shape[1]))
        wide = lambda y: y.astype(jnp.float32)
        beta = jnp.where(present[..., None, None], jax.nn.sigmoid(wide(beta)), 0)
        slowed = -jnp.exp(wide(rate_of)) * jax.nn.softplus(wide(decay) + wide(step))
        slowed = jnp.where(present[..., None, None], slowed, 0)
        run = one_step if x.shape[1] == 1 else in_chunks
        read, state = run(query, key, value, slowed, beta, state)
        read = RMSNorm(c.norm_eps, name="norm")(read)
        read = (read * jax.nn.silu(wide(gate)).reshape(read.shape)).astype(x.dtype)
        read = read.reshape(*read.shape[:3], -1)
        found = (
            out.applied(read, inputs=2)
            if isinstance(out, Adapted)
            else jnp.einsum("bsnu,nud->bsd", read, out.astype(x.dtype))
        )
        return found, inputs[:, x.shape[1] :], state


def blank(shape: DeltaShape, rows: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """What a text of no tokens leaves behind."""
    tail = jnp.zeros((rows, shape.kernel - 1, shape.heads, 2 * shape.key + shape.values), dtype)
    return tail, jnp.zeros((rows, shape.per_key, shape.heads, shape.key, shape.value), jnp.float32)


def before(shape: DeltaShape, rows: int, dtype: jnp.dtype, past, cache, column) -> tuple[Array, Array]:
    """What the tokens before left behind: a row's own cache once it has written to it, else the past that it continues."""
    found = blank(shape, rows, dtype)
    if past is not None:
        found = tuple(jnp.repeat(x, rows // len(x), axis=0) for x in (past.keys, past.values))
    if cache is None:
        return found[0].astype(dtype), found[1]
    begun = (cache.mask & (jnp.arange(cache.mask.shape[1]) != column.index)).any(-1)
    choose = lambda own, other: jnp.where(begun.reshape(-1, *(1,) * (own.ndim - 1)), own, other.astype(own.dtype))
    return choose(cache.keys, found[0]), choose(cache.values, found[1])


def convolved(inputs: Array, kernel: Array, length: int) -> Array:
    """A causal convolution along time, each channel by itself, then silu: `[B, S + kernel - 1, N, C]` -> `[B, S, N, C]`."""
    weights = kernel[:, :, 0].astype(inputs.dtype)
    taps = [inputs[:, tap : tap + length] * weights[..., tap] for tap in range(weights.shape[-1])]
    return jax.nn.silu(sum(taps))


def split_heads(shape: DeltaShape, x: Array) -> tuple[Array, Array, Array]:
    """Queries and keys `[B, S, N, 1, key]` of length one (queries over the root of it), values `[B, S, N, R, value]`, float32."""
    query, key, value = jnp.split(x.astype(jnp.float32), [shape.key, 2 * shape.key], axis=-1)
    unit = lambda y: (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6))[..., None, :]
    return unit(query) * shape.key**-0.5, unit(key), value.reshape(*x.shape[:3], shape.per_key, shape.value)


def one_step(query: Array, key: Array, value: Array, decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """One token: `[B, 1, N, R, value]` and the new state; `decay` is a logarithm."""
    query, key, value, decay, beta = (x[:, 0] for x in (query, key, value, decay, beta))
    state = jnp.moveaxis(state, 1, 2) * jnp.exp(decay)[..., None, None]
    update = beta[..., None] * (value - jnp.einsum("bnrkv,bnk->bnrv", state, key[:, :, 0]))
    state = state + key[..., None] * update[..., None, :]
    return jnp.einsum("bnrkv,bnk->bnrv", state, query[:, :, 0])[:, None], jnp.moveaxis(state, 2, 1)


def in_chunks(query: Array, key: Array, value: Array, decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """All tokens of a run, a chunk after another: `[B, S, N, R, value]` and the state after the last."""
    length = value.shape[1]
    size = min(CHUNK, length)

    def split(x: Array) -> Array:
        """`[B, S, N, R, ...]` -> `[chunks, B, N, R, size, ...]`; tokens added at the end change nothing."""
        x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 2, 4)
        return jnp.moveaxis(x, 1, 0)

    lower = jnp.tril(jnp.ones((size, size), bool))

    def chunk(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, b = inputs  # [B, N, 1 or R, size, ...]
        total = jnp.cumsum(g, axis=-1)
        # Sums from one token to another, not differences of sums: those would lose what the sums have in common.
        between = jnp.cumsum(jnp.where(jnp.tril(lower, -1), g[..., :, None], 0), axis=-2)
        between = jnp.where(lower, jnp.exp(between), 0)
        system = jnp.eye(size) + jnp.where(jnp.tril(lower, -1), b[..., None] * (k @ k.mT) * between, 0)
        grown = jnp.exp(total)[..., None]
        right = jnp.concatenate([v * b[..., None], k * b[..., None] * grown], axis=-1)
        solved = jnp.matmul(inverse(system), right, precision="highest")
        new, seen = jnp.split(solved, [v.shape[-1]], axis=-1)
        new = new - seen @ state
        read = (q * grown) @ state + ((q @ k.mT) * between) @ new
        left = between[..., -1, :, None]
        return state * jnp.exp(total[..., -1])[..., None, None] + (k * left).mT @ new, read

    state, read = jax.lax.scan(chunk, jnp.moveaxis(state, 1, 2), tuple(map(split, (query, key, value, decay, beta))))
    read = jnp.moveaxis(jnp.moveaxis(read, 0, 1), 4, 2)  # [B, chunks, size, N, R, value]
    return read.reshape(read.shape[0], -1, *read.shape[3:])[:, :length], jnp.moveaxis(state, 2, 1)


def inverse(system: Array) -> Array:
    """The inverse of lower triangular `[..., size, size]` with ones on the diagonal, by inverses of ever larger blocks on it.

    `[[A, 0], [C, B]]` becomes `[[A', 0], [-B' C A', B']]`.  Products alone: `triangular_solve` of jaxlib shares a pool of
    threads with whoever calls it, and two calls at once wait for each other for ever on a CPU of two cores.
    """
    size = system.shape[-1]
    length = 1 << (size - 1).bit_length()
    system = jnp.pad(system, ((0, 0),) * (system.ndim - 2) + ((0, length - size),) * 2)
    product = partial(jnp.matmul, precision="highest")
    found = jnp.ones((*system.shape[:-2], length, 1, 1), system.dtype)
    for block in (2**level for level in range(length.bit_length() - 1)):
        pairs = system.reshape(*system.shape[:-2], length // (2 * block), 2 * block, length // (2 * block), 2 * block)
        corner = jnp.moveaxis(jnp.diagonal(pairs, axis1=-4, axis2=-2), -1, -3)[..., block:, :block]
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        below = jnp.concatenate([-product(product(second, corner), first), second], axis=-1)
        found = jnp.concatenate([jnp.concatenate([first, jnp.zeros_like(first)], axis=-1), below], axis=-2)
    return found[..., 0, :size, :size]
