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
from sdjax.models.primitives import INIT, RMSNorm, biased, grown, project, project_heads, rotate


class Attention(nn.Module):
    """Grouped-query attention.  `qkv [width, kv_heads, per_kv + 2, head_dim]` holds each group's queries, key, value.

    With gates, a group has a gate after each query.
    """

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x, positions, mask, past, cache, column, bias):
        c = self.config
        per_kv = c.heads // c.kv_heads
        queries = 2 * per_kv if c.gated_attention else per_kv
        qkv = self.param("qkv", INIT, (c.width, c.kv_heads, queries + 2, c.head_dim))
        out = self.param("out", INIT, (c.kv_heads, per_kv, c.head_dim, c.width))
        mixed = project(x, qkv)
        if c.qkv_bias:
            mixed = biased(self, mixed, "qkv_bias", (c.kv_heads, queries + 2, c.head_dim))
        query, key, value = mixed[..., :queries, :], mixed[..., queries, :], mixed[..., queries + 1, :]
        if c.gated_attention:  # each query stands before its gate
            query, gate = query[..., ::2, :], query[..., 1::2, :]
        if c.qk_norm != "none":
            query, key = self.normalised(query, key)
        rope = c.ropes[self.layer]
        query, key = grown(rotate(query, positions, rope), positions, rope), rotate(key, positions, rope)
        query = scaled(query, query_factor(c, query.shape[-1]))
        sinks = self.param("sinks", nn.initializers.zeros, (c.kv_heads, per_kv)) if c.sinks else None
        own, before = Keys(key, value, positions, mask), () if past is None else (past,)
        if cache is None:
            read = attend(query, positions, (*before, own), c.windows[self.layer], bias, c.score_cap, sinks)
        else:
            own = cache._replace(keys=put(cache.keys, key, column), values=put(cache.values, value, column))
            window, rest = c.windows[self.layer], (c.score_cap, sinks)
            read = attend_written(query, positions, before, own, column.written, window, *rest)
        if c.gated_attention:
            read = read * jax.nn.sigmoid(gate)
        mixed = project_heads(read, out)
        return biased(self, mixed, "out_bias", (c.width,)) if c.out_bias else mixed, own.keys, own.values

    def normalised(self, query, key):
        """RMS norm of queries and keys, per head or over all heads together."""
        norm = lambda name: RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)
        norms = norm("q_norm"), norm("k_norm")
        if self.config.qk_norm == "head":
            return norms[0](query), norms[1](key)
        flat = lambda norm, x: norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return flat(norms[0], query), flat(norms[1], key)


def scaled(x: Array, factor: float) -> Array:
    """`x` times a number; as it is where that is 1."""
    return x if factor == 1 else x * factor


def query_factor(config: ModelConfig, head_dim: int) -> float:
    """What queries are multiplied by, so that scores, which are then divided by the root of `head_dim`, are as the family's."""
    if config.score_scale is not None:
        return config.score_scale * head_dim**0.5
    return (head_dim / (config.query_scalar or head_dim)) ** 0.5


def mixer_of(config: ModelConfig, layer: int) -> nn.Module:
    """What mixes the tokens of a layer: `(x, positions, mask, past, cache, column, bias)` -> output, keys, values."""
    return DeltaNet(config, name="delta") if config.has_delta(layer) else Attention(config, layer, name="attention")


def mlp_of(config: ModelConfig, layer: int) -> nn.Module:
    """What follows it, token by token: `x [B, S, D]` -> `[B, S, D]`."""
    return Experts(config, name="mlp") if config.has_experts(layer) else MLP(config, config.mlp_width, name="mlp")


class Block(nn.Module):
    """One residual layer: attention, then MLP, normalised before (most families) or after (OLMo) each, or both (Gemma)."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x, positions, mask, past, cache, column, bias):
        c = self.config
        mixer, mlp = mixer_of(c, self.layer), mlp_of(c, self.layer)
        norm = lambda name: RMSNorm(c.norm_eps, c.norm_offset, name=name)
        same = lambda x: x
        before = (same, same) if c.norms == "after" else (norm("attention_norm"), norm("mlp_norm"))
        after = (same, same)
        if c.norms != "before":
            names = ("attention_norm", "mlp_norm") if c.norms == "after" else ("attention_out_norm", "mlp_out_norm")
            after = norm(names[0]), norm(names[1])
        read, key, value = mixer(before[0](x), positions, mask, past, cache, column, bias)
        x = x + scaled(after[0](read), c.residual_scale)
        return x + scaled(after[1](mlp(before[1](x))), c.residual_scale), key, value
