"""What a token gives every layer besides its embedding: an input of each layer's own (Gemma 3n and 4)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from sdjax.models.configs import ModelConfig
from sdjax.models.primitives import ACTIVATIONS, INIT, RMSNorm, project


class PerLayerInputs(nn.Module):
    """`(e sqrt(P) + norm(x W / sqrt(D))) / sqrt(2)` of tokens `[B, S]` and embeddings `x [B, S, D]` -> `[B, S, L, P]`.

    `e [L, P]` is a token's entry of a second embedding `[V, L P]`, `W` a matrix `[D, L, P]`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array, x: Array) -> Array:
        c, width = self.config, self.config.shapes.inputs
        embed = self.param("embed", INIT, (c.shapes.input_vocabulary, c.layers * width))
        mixed = project(x, self.param("project", INIT, (c.width, c.layers, width))) * c.width**-0.5
        own = jnp.take(embed, tokens, axis=0).astype(x.dtype).reshape(mixed.shape) * width**0.5
        return (own + RMSNorm(c.norm_eps, c.norm_offset, name="norm")(mixed)) * 2**-0.5


class LayerInput(nn.Module):
    """`norm((act(x G) * given) W)`, what a layer adds to `x [B, S, D]` of its own input `given [B, S, P]`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, given: Array) -> Array:
        c, width = self.config, self.config.shapes.inputs
        gate, out = self.param("gate", INIT, (c.width, width)), self.param("out", INIT, (width, c.width))
        read = project(ACTIVATIONS[c.activation](project(x, gate)) * given, out)
        return RMSNorm(c.norm_eps, c.norm_offset, name="norm")(read)
