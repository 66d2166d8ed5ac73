"""The MLP of a layer, which reads token by token."""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from sdjax.models.configs import ModelConfig
from sdjax.models.primitives import ACTIVATIONS, INIT, biased, project


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): `(silu(x gate) * (x up)) down`, gate and up in one `[width, 2, units]`.

    Other families have another activation than silu, or biases.
    """

    config: ModelConfig
    units: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate_up = self.param("gate_up", INIT, (c.width, 2, self.units))
        down = self.param("down", INIT, (self.units, c.width))
        both = project(x, gate_up)
        if c.mlp_bias:
            both = biased(self, both, "gate_up_bias", (2, self.units))
        found = project(ACTIVATIONS[c.activation](both[..., 0, :]) * both[..., 1, :], down)
        return biased(self, found, "down_bias", (c.width,)) if c.mlp_bias else found
