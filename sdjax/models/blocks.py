"""One residual layer of the decoder: what mixes tokens, then an MLP, with the norms around them."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax import Array

from sdjax.models.attention import Keys, attend, attend_written
from sdjax.models.caches import put
from sdjax.models.configs import ModelConfig
from sdjax.models.delta import DeltaNet
from sdjax.models.experts import Experts
from sdjax.models.mlp import MLP
from sdjax.models.per_layer_inputs import LayerInput
from sdjax.models.primitives import INIT, RMSNorm, biased, grown, project, project_heads, rotate, unit


class Attention(nn.Module):
    """Grouped-query attention.  `qkv [width, kv_heads, per_kv + 2, head_dim]` holds each group's queries, key, value.

    With gates, a group has a gate after each query; a layer that borrows its keys has queries alone, and where a key
    becomes the value, too, there is one product of both.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x, positions, mask, past, cache, column, bias, lent=None):
        c, (kv_heads, head_dim) = self.config, self.config.heads_of(self.layer)
        per_kv = c.heads // kv_heads
        queries = 2 * per_kv if c.gated_attention else per_kv
        shape = kv_heads, queries + c.key_products(self.layer), head_dim
        qkv = self.param("qkv", INIT, (c.width, *shape))
        out = self.param("out", INIT, (kv_heads, per_kv, head_dim, c.width))
        mixed = project(x, qkv)
        if c.qkv_bias:
            mixed = biased(self, mixed, "qkv_bias", shape)
        query, rope = mixed[..., :queries, :], c.ropes[self.layer]
        if c.gated_attention:  # each query stands before its gate
            query, gate = query[..., ::2, :], query[..., 1::2, :]
        query = self.normalised(query, "q_norm")
        query = scaled(grown(rotate(query, positions, rope), positions, rope), query_factor(c, head_dim))
        key, value = self.keys(mixed[..., queries:, :], positions) if lent is None else lent
        sinks = self.param("sinks", nn.initializers.zeros, (kv_heads, per_kv)) if c.sinks else None
        own, before = Keys(key, value, positions, mask), () if past is None else (past,)
        if cache is None:
            read = attend(query, positions, (*before, own), c.windows[self.layer], bias, c.score_cap, sinks)
        else:
            # What is lent has been written by its own layer.
            write = (lambda old, new: put(old, new, column)) if lent is None else (lambda old, new: new)
            own = cache._replace(keys=write(cache.keys, key), values=write(cache.values, value))
            window, rest = c.windows[self.layer], (c.score_cap, sinks)
            read = attend_written(query, positions, before, own, column.written, window, *rest)
        if c.gated_attention:
            read = read * jax.nn.sigmoid(gate)
        mixed = project_heads(read, out)
        return biased(self, mixed, "out_bias", (c.width,)) if c.out_bias else mixed, own.keys, own.values

    def keys(self, mixed, positions):
        """Keys and values `[B, S, kv_heads, head_dim]` of products `[B, S, kv_heads, 2 or 1, head_dim]`."""
        key, value = mixed[..., 0, :], mixed[..., -1, :]
        key = rotate(self.normalised(key, "k_norm"), positions, self.config.ropes[self.layer])
        return key, unit(value, self.config.norm_eps).astype(value.dtype) if self.config.value_norm else value

    def normalised(self, x, name):
        """RMS norm of queries or keys, per head or over all heads together, or none."""
        if self.config.qk_norm == "none":
            return x
        norm = RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)
        return norm(x) if self.config.qk_norm == "head" else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def scaled(x: Array, factor: float) -> Array:
    """`x` times a number; as it is where that is 1."""
    return x if factor == 1 else x * factor


def query_factor(config: ModelConfig, head_dim: int) -> float:
    """What queries are multiplied by, so that scores, which are then divided by the root of `head_dim`, are as the family's."""
    if config.score_scale is not None:
        return config.score_scale * head_dim**0.5
    return (head_dim / (config.query_scalar or head_dim)) ** 0.5


def mixer_of(config: ModelConfig, layer: int) -> nn.Module:
    """What mixes the tokens of a layer: `(x, positions, mask, past, cache, column, bias, lent)` -> output, keys, values."""
    return DeltaNet(config, name="delta") if config.has_delta(layer) else Attention(config, layer, name="attention")


class Block(nn.Module):
    """One residual layer: attention, then MLP, normalised before (most families) or after (OLMo) each, or both (Gemma).

    `lent` are the keys and values of another layer, where it has none; `given [B, S, P]` is its own input, where it has one.
    Output: `x`, keys, values, and the `Usage` of its router where it has one that is `watched`.
    """

    config: ModelConfig
    layer: int
    watched: bool = False

    @nn.compact
    def __call__(self, x, positions, mask, past, cache, column, bias, lent=None, given=None):
        c, mixer = self.config, mixer_of(self.config, self.layer)
        norm = lambda name: RMSNorm(c.norm_eps, c.norm_offset, name=name)
        same = lambda x: x
        before = (same, same) if c.norms == "after" else (norm("attention_norm"), norm("mlp_norm"))
        after = (same, same)
        if c.norms != "before":
            names = ("attention_norm", "mlp_norm") if c.norms == "after" else ("attention_out_norm", "mlp_out_norm")
            after = norm(names[0]), norm(names[1])
        read, key, value = mixer(before[0](x), positions, mask, past, cache, column, bias, lent)
        x = x + scaled(after[0](read), c.residual_scale)
        found, usage = self.mlp(before[1](x), mask)
        x = x + scaled(after[1](found), c.residual_scale)
        if given is not None:
            x = x + LayerInput(c, name="input")(x, given)
        if c.layer_scale:
            x = x * jax.lax.stop_gradient(self.param("scale", nn.initializers.ones, (1,))).astype(x.dtype)
        return x, key, value, usage

    def mlp(self, x, mask):
        """What follows the mixer, token by token: `x [B, S, D]` -> `[B, S, D]`, and what its router did, if that is watched."""
        if self.config.has_experts(self.layer):
            return Experts(self.config, self.watched, name="mlp")(x, mask)
        return MLP(self.config, self.config.mlp_units(self.layer), name="mlp")(x), None
