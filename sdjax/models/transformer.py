"""One decoder for every family: embeddings, blocks and head, with an explicit key-value cache.

A run of tokens may continue an earlier run whose keys and values are given as `past`.  The past has `C` rows and the
run has `B`, a multiple of `C`: rows `c * B/C ... (c+1) * B/C - 1` continue past row `c`.  So a prompt is read once
however many completions share it, in sampling and in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.sharding import DATA, MODEL, constrain, divisors
from sdjax.kernels.distributions import NEVER
from sdjax.models.blocks import Block
from sdjax.models.caches import Column, KeyValues, layer_of, put
from sdjax.models.configs import ModelConfig
from sdjax.models.delta import blank
from sdjax.models.per_layer_inputs import PerLayerInputs
from sdjax.models.primitives import INIT, RMSNorm
from sdjax.models.recompute import recomputed
from sdjax.models.routing import Usage


def period_of(config: ModelConfig) -> int:
    """After how many layers what they do repeats; all of them if it does not."""
    kinds = config.of_layers()
    return next(p for p in divisors(config.layers) if kinds == kinds[:p] * (config.layers // p))


def spread(written: tuple[Array, Array, Array, Usage | None]) -> tuple[Array, Array, Array, Usage | None]:
    """What a block returns, laid over the mesh."""
    x, key, value, usage = written
    return constrain(x, DATA), constrain(key, DATA, None, MODEL), constrain(value, DATA, None, MODEL), usage


def of_all_layers(usages: Sequence[Usage | None]) -> Usage | None:
    """The usage of every layer that is watched, `[B, L, ...]`; `None` where none is."""
    found = [usage for usage in usages if usage is not None]
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *found) if found else None


class Transformer(nn.Module):
    """A decoder-only language model.  `dtype` is what it computes in, whatever its parameters are kept in.

    `remat` recomputes each block in the backward pass: memory for one block's activations instead of all, for one more
    forward pass of the blocks.  `scan` compiles one period of layers and loops over it, where nothing is decoded: programs
    of deep models compile many times faster, for a copy of the parameters and of their gradients.  `unused` are ranges
    `(first, end)` of ids that have an embedding and no token, as where an embedding is padded: their logits are `NEVER`.
    `reach` is how many tokens a text has at most, where it matters (LongRoPE).  `watched`: runs also say what routers did.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False
    unused: tuple[tuple[int, int], ...] = ()
    reach: int | None = None
    watched: bool = False

    def setup(self):
        c = self.config.reaching(self.reach)
        self.embed = self.param("embed", INIT, (c.vocab_size, c.width))
        if c.shapes and c.shapes.inputs:
            self.inputs = PerLayerInputs(c, name="inputs")
        self.blocks = [Block(c, layer, self.watched, name=f"layers_{layer}") for layer in range(c.layers)]
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")
        if not c.tied_embeddings:
            self.head = self.param("head", INIT, (c.vocab_size, c.width))

    def run(self, tokens, positions, mask, past, cache, column, bias=None):
        x = constrain(jnp.take(self.embed, tokens, axis=0).astype(self.dtype), DATA)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        if mask is not None:
            # Attention weighs what it may not read by 0, and 0 times an infinity is NaN.
            x = jnp.where(mask[..., None], x, 0)
        given = self.inputs(tokens, x) if self.config.shapes and self.config.shapes.inputs else None
        looped = self.scan and self.config.alike and cache is None and not self.is_initializing()
        x, keys, values, usages = (
            self.over_periods(x, positions, mask, past, bias)
            if looped
            else self.over_layers(x, positions, mask, past, cache, column, bias, given)
        )
        at, present = (positions, mask) if cache is None else (cache.positions, cache.mask)
        x = self.final_norm(x)
        if self.config.logit_divisor != 1:
            x = x / self.config.logit_divisor  # here, for all who read a head
        return x, KeyValues(keys, values, at, present), of_all_layers(usages)

    def over_layers(self, x, positions, mask, past, cache, column, bias, given):
        """One layer after the other; `given [B, S, L, P]` are their own inputs, where they have such."""
        keys, values, usages = [], [], []
        for layer, block in enumerate(self.blocks):
            if self.remat and cache is None and not self.is_initializing():
                block = partial(self.pure_block(layer), self.variables["params"][f"layers_{layer}"])
            source, own = self.config.keys_of(layer), None if given is None else given[:, :, layer]
            read, written = layer_of(past, source), layer_of(cache, source)
            lent = None if source == layer else (keys[source], values[source])
            x, key, value, usage = spread(block(x, positions, mask, read, written, column, bias, lent, own))
            usages.append(usage)
            if lent is None:
                keys.append(key)
                values.append(value)
        return x, tuple(keys), tuple(values), usages

    def over_periods(self, x, positions, mask, past, bias):
        """A loop over rounds of `period` layers each, which differ in their parameters alone."""
        c, params, period = self.config, self.variables["params"], period_of(self.config)
        rounds = range(0, c.layers, period)
        stacked = lambda of: jax.tree.map(
            lambda *x: jnp.stack(x), *[[of(r + i) for i in range(period)] for r in rounds]
        )
        blocks = [self.pure_block(layer) for layer in range(period)]

        def one_round(x, inputs):
            weights, before = inputs
            written = []
            for block, own, read in zip(blocks, weights, before, strict=True):
                x, *rest = spread(block(own, x, positions, mask, read, None, None, bias))
                written.append(rest)
            return x, written

        inputs = stacked(lambda layer: params[f"layers_{layer}"]), [None] * period
        if past is not None:
            inputs = inputs[0], stacked(lambda layer: layer_of(past, layer))
        x, written = jax.lax.scan(one_round, x, inputs)
        own = lambda layer: jax.tree.map(lambda x: x[layer // period], written[layer % period])
        return x, *zip(*map(own, range(c.layers)), strict=True)

    def pure_block(self, layer):
        """A layer as a function of its parameters, too; recomputed in the backward pass if the model is."""
        block = Block(self.config.reaching(self.reach), layer, self.watched, parent=None)
        call = lambda x, params, *rest: block.apply({"params": params}, x, *rest)
        call = recomputed(call) if self.remat else call
        return lambda params, x, *rest: call(x, params, *rest)

    def hidden(self, tokens, positions, mask, past=None, bias=None):
        return self.run(tokens, positions, mask, past, None, None, bias)

    def decode(self, token, position, past, cache, column):
        cache = cache.replace(
            positions=put(cache.positions, position[:, None], column),
            mask=put(cache.mask, jnp.ones_like(cache.mask[:, :1]), column),
        )
        hidden, cache, _ = self.run(token[:, None], position[:, None], None, past, cache, column)
        return hidden[:, 0], cache

    def logits(self, hidden):
        return scores(
            self.embed if self.config.tied_embeddings else self.head, hidden, self.unused, self.config.logit_cap
        )

    def everything(self, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(self.hidden(tokens, positions, jnp.ones_like(tokens, bool))[0])


def head_of(model: Transformer, params: dict) -> Array:
    """The parameter `[V, D]` that logits are computed with."""
    return params["embed" if model.config.tied_embeddings else "head"]


def scores(head: Array, hidden: Array, unused: Sequence[tuple[int, int]] = (), cap: float | None = None) -> Array:
    """Float32 logits `[..., V]` of hidden states `[..., D]` by a head `[V, D]`, or `[N, V, D]` of `sharding.copies`.

    With a `cap`, a logit `x` becomes `cap tanh(x / cap)`.
    Those of ids in the ranges `unused` are `NEVER`: such an id has no mass, whoever reads the logits.
    """
    head = head.astype(hidden.dtype)
    if head.ndim == 2:
        found = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    else:
        parts = constrain(hidden.reshape(len(head), -1, *hidden.shape[1:]), DATA)
        found = jnp.einsum("n...d,nvd->n...v", parts, head, preferred_element_type=jnp.float32)
        found = constrain(found, DATA, *(None,) * (found.ndim - 2), MODEL).reshape(*hidden.shape[:-1], -1)
    found = constrain(found, *(DATA, *(None,) * found.ndim)[: found.ndim - 1], MODEL)
    if cap is not None:
        found = cap * jnp.tanh(found / cap)
    for first, end in unused:
        ids = jnp.arange(found.shape[-1])
        found = jnp.where((ids >= first) & (ids < end), NEVER, found)
    return found


def initialise(model: Transformer, key: Array) -> dict:
    """Random float32 parameters of `model`."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32), method="everything")["params"]


def positions_of(mask: Array) -> Array:
    """Positions `[B, S]` of left- or right-padded tokens: real tokens count from 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)


def hidden(
    model: Transformer,
    params: dict,
    tokens: Array,
    positions: Array,
    mask: Array,
    past: KeyValues | None = None,
    bias: Array | None = None,
) -> tuple[Array, KeyValues]:
    """Last hidden states `[B, S, D]` (after the final norm) of a run of tokens, and its keys and values.

    Args:
      tokens, positions: `[B, S]` int32; `mask`: `[B, S]` bool, False for padding.
      past: the run that these tokens continue, with `C` rows, `C` dividing `B`; `positions` count on from it.
      bias: `[B, S, S]`, added to every layer's attention scores between these tokens before the softmax (AtManRL).
    """
    return model.apply({"params": params}, tokens, positions, mask, past, bias, method="hidden")[:2]


def watched(
    model: Transformer, params: dict, tokens: Array, positions: Array, mask: Array, past: KeyValues | None = None
) -> tuple[Array, KeyValues, Usage | None]:
    """`hidden`, and what every layer's router did with the tokens that are there; `None` of a model without experts."""
    args = tokens, positions, mask, past
    return model.clone(watched=True).apply({"params": params}, *args, method="hidden")


def empty_cache(model: Transformer, rows: int, length: int) -> KeyValues:
    """A cache of `length` unwritten columns for `decode`."""
    c = model.config
    columns = lambda layer: jnp.zeros((rows, length, *c.heads_of(layer)), model.dtype)
    pair = lambda layer: blank(c.delta, rows, model.dtype) if c.has_delta(layer) else (columns(layer), columns(layer))
    keys, values = zip(*(pair(layer) for layer in range(c.layers) if c.keys_of(layer) == layer), strict=True)
    split = lambda arrays: tuple(constrain(x, DATA, None, MODEL) for x in arrays)
    return KeyValues(split(keys), split(values), jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), bool))


def decode(
    model: Transformer, params: dict, token: Array, position: Array, past: KeyValues, cache: KeyValues, column: Column
) -> tuple[Array, KeyValues]:
    """One more token per row: `token, position [B]` are written to a column of the cache -> hidden `[B, D]`, cache."""
    return model.apply({"params": params}, token, position, past, cache, column, method="decode")


def logits(model: Transformer, params: dict, hidden: Array) -> Array:
    """Float32 logits `[..., V]` of hidden states `[..., D]`."""
    return model.apply({"params": params}, hidden, method="logits")
