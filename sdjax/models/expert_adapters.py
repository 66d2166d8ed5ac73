"""Low-rank adapters on the matrices of experts: a pair for each expert, which the same tokens go through as its weights.

They are named as the parameters of the transformers library that hold all experts of a layer, and lie beside a layer's
other adapters: `{"experts.gate_up_proj": {"a": [E, r, in], "b": [E, out, r]}, ...}`.  Gates and inputs share `a`, as in
the peft library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models.configs import ModelConfig
from sdjax.models.fields import ModelError

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
TARGETS = (GATE_UP, DOWN)
"""The matrices of experts, by their names in the transformers library."""


@flax.struct.dataclass
class AdaptedExperts:
    """Frozen matrices `[E, in, out ...]` of experts and what is added to them: stand in a parameter's place."""

    weight: Array  # the first leaf, of the parameter's shape
    a: Array  # [E, r, in]
    b: Array  # [E, out, r]
    scale: float = flax.struct.field(pytree_node=False)

    def astype(self, dtype: Any) -> AdaptedExperts:
        """The same in another type."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def folded(self) -> Array:
        """`W_e + scale A_e^T B_e^T` as one float32 array."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        added = jnp.einsum("eri,eor->eio", a, b).reshape(self.weight.shape)
        return self.weight.astype(jnp.float32) + self.scale * added


def through(x: Array, matrices: Array | AdaptedExperts, product: Callable[[Array, Array], Array]) -> Array:
    """`product(x, W)` with `W [E, in, out]`, the expert's matrices; of adapted ones `+ scale product(product(x, A^T), B^T)`."""
    if not isinstance(matrices, AdaptedExperts):
        return product(x, matrices.reshape(*matrices.shape[:2], -1))
    low = product(x, matrices.a.swapaxes(1, 2))
    return through(x, matrices.weight, product) + matrices.scale * product(low, matrices.b.swapaxes(1, 2))


class Target(NamedTuple):
    """The matrices of a layer's experts that have adapters: `[E, inputs, *outputs]`, where our parameters hold them."""

    block: str
    name: str
    path: str
    inputs: int
    outputs: tuple[int, ...]


def targeted(config: ModelConfig, targets: tuple[str, ...]) -> list[Target]:
    """Those of the named matrices that a network has.  Raises: ModelError if experts are named and it has none."""
    named = [name for name in TARGETS if name in targets]
    if named and config.moe is None:
        raise ModelError(f"lora_experts: {config.family} has no experts to adapt here: leave --lora-experts out")
    layers = [layer for layer in range(config.layers) if config.has_experts(layer)]
    return [_target(config, f"layers_{layer}", name) for layer in layers for name in named]


def _target(config: ModelConfig, block: str, name: str) -> Target:
    if name == GATE_UP:
        return Target(block, name, f"{block}/mlp/gate_up", config.width, (2, config.moe.width))
    return Target(block, name, f"{block}/mlp/down", config.moe.width, (config.width,))


def initial(config: ModelConfig, target: Target, rank: int, key: Array) -> dict[str, Array]:
    """A pair for each expert that changes nothing yet: `a` uniform within `1 / sqrt(in)`, and `b` 0."""
    experts, bound = config.moe.experts, target.inputs**-0.5
    a = jax.random.uniform(key, (experts, rank, target.inputs), jnp.float32, -bound, bound)
    return {"a": a, "b": jnp.zeros((experts, math.prod(target.outputs), rank), jnp.float32)}
