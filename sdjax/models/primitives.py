"""What every block is made of: matrix products that adapters can stand in, RMS norms, rotations, activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.platforms import on_cpu
from sdjax.devices.sharding import MODEL, axis_size, current
from sdjax.models.adapters import Adapted
from sdjax.models.ropes import Rope

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
"""What a gate goes through, by the name in `ModelConfig.activation`."""

INIT = nn.initializers.normal(0.02)
"""How matrices begin."""


def project(x: Array, weights: Array) -> Array:
    """`x [B, S, D]` times `weights [D, ...]` -> `[B, S, ...]`, as one plain matrix product.

    An einsum over the same axes computes the same, but its transposes copy every weight and every weight's gradient.
    """
    if isinstance(weights, Adapted):
        return weights.applied(x)
    if current() is not None:
        # Flattened, axes that are split over devices could no longer be told from those that are not.
        return jax.lax.dot_general(x, weights.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    flat = product(x.reshape(-1, x.shape[-1]), weights.astype(x.dtype).reshape(x.shape[-1], -1))
    return flat.reshape(*x.shape[:-1], *weights.shape[1:])


def project_heads(read: Array, weights: Array) -> Array:
    """`read [B, S, K, G, H]` times `weights [K, G, H, D]` -> `[B, S, D]`; as one plain product, too, where heads are whole."""
    if isinstance(weights, Adapted):
        return weights.applied(read, inputs=3)
    weights = weights.astype(read.dtype)
    if axis_size(MODEL) > 1:
        return jnp.einsum("bskgh,kghd->bsd", read, weights)
    flat = product(read.reshape(math.prod(read.shape[:2]), -1), weights.reshape(-1, weights.shape[-1]))
    return flat.reshape(*read.shape[:2], -1)


def product(x: Array, weights: Array) -> Array:
    """`x [N, D]` times `weights [D, F]` -> `[N, F]`, all of one type; bfloat16 on a CPU is added up in float32."""
    return widely(x, weights) if x.dtype == jnp.bfloat16 and on_cpu() else x @ weights


@jax.custom_vjp
def widely(x: Array, weights: Array) -> Array:
    """`product` whose sums, those of its gradients too, are float32 until they are rounded once.

    XLA gives a CPU's matrix unit only such products (jax 0.10; since 0.12 others, too).  The gradients that it
    would derive are products of float32 and bfloat16, which it computes in float32.
    """
    return jnp.matmul(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def _widely_forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return widely(x, weights), (x, weights)


def _widely_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weights = kept
    return widely(gradient, weights.T), widely(x.T, gradient)


widely.defvjp(_widely_forward, _widely_backward)


def biased(module: nn.Module, x: Array, name: str, shape: tuple[int, ...]) -> Array:
    """`x [..., *shape]` with a bias that is the parameter `name` of a module."""
    return x + module.param(name, nn.initializers.zeros, shape).astype(x.dtype)


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of `x [B, S, ..., H]` at `positions [B, S]`.

    Halves are rotated against each other (first with second half), as in the transformers library; features beyond
    twice the number of frequencies stay as they are.
    """
    turned = 2 * len(rope.inverse_frequencies)
    if not turned:
        return x
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.inverse_frequencies, jnp.float32)
    angles = angles.reshape(positions.shape + (1,) * (x.ndim - 3) + angles.shape[-1:])
    cos, sin = jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [x[..., turned:].astype(jnp.float32)] if turned < x.shape[-1] else []
    return jnp.concatenate([*rotated, *rest], axis=-1).astype(x.dtype)


def grown(query: Array, positions: Array, rope: Rope) -> Array:
    """`query [B, S, ..., H]` times `1 + growth log(1 + floor(p / original))`; as it is where the rope has no growth."""
    if not rope.growth:
        return query
    factor = 1 + rope.growth * jnp.log1p(jnp.floor(positions / rope.original).astype(jnp.float32))
    return query * factor.reshape(positions.shape + (1,) * (query.ndim - 2)).astype(query.dtype)


def unit(x: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + scale)` over the last axis, in float32.

    `offset` is 0 or, where a scale is kept as its distance from 1 (Gemma), 1.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        wide = unit(x, self.eps)
        return (wide * (scale + self.offset if self.offset else scale)).astype(x.dtype)
