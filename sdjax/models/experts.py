"""A mixture of experts: a token's hidden state goes through few of many MLPs, chosen by a router, and none is dropped.

Tokens are sorted by their experts, and each expert reads its own as one group of a grouped matrix product
(`jax.lax.ragged_dot`).  On a mesh the experts are split over the model axis: every device reads all tokens of its rows for
the experts that it holds, and what they give is summed.  Where there is an expert axis they are split over that, too, and
its devices, which have rows of their own, read one another's.  Where a token goes to half of the experts or more, all experts
read all tokens: there is nothing to gain by sorting.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from sdjax.devices.sharding import EXPERT, MODEL, current, devices_along, of_experts, rows_axis
from sdjax.models.adapters import folded
from sdjax.models.configs import ModelConfig
from sdjax.models.expert_adapters import through
from sdjax.models.mlp import MLP
from sdjax.models.primitives import ACTIVATIONS, INIT, project
from sdjax.models.routing import ALPHA, Routes, Usage, route, usage


class Experts(nn.Module):
    """`sum_i w_i MLP_i(x)` over the experts that a token goes to; the router computes in float32.

    Parameters: `router [width, E]`, `gate_up [E, width, 2, F]`, `down [E, F, width]`, and gpt-oss's biases of all three.
    With a shared expert `sigmoid(x shared_gate) MLP(x)` is added, `shared_gate [width, 1]` (Qwen2-MoE and later).
    Where it is `watched`, what the router did with the tokens of `mask [B, S]` comes, too.
    """

    config: ModelConfig
    watched: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, Usage | None]:
        c, moe = self.config, self.config.moe
        shapes = {"gate_up": (moe.experts, c.width, 2, moe.width), "down": (moe.experts, moe.width, c.width)}
        router = self.param("router", INIT, (c.width, moe.experts))
        weights = {name: self.param(name, INIT, shape) for name, shape in shapes.items()}
        # In full float32 everywhere: a rounded logit can send a token elsewhere when it is scored than when it was sampled.
        exact = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=exact)
        if moe.clamped is not None:
            zeros = nn.initializers.zeros
            logits = logits + self.param("router_bias", zeros, (moe.experts,)).astype(jnp.float32)
            weights["gate_up_bias"] = self.param("gate_up_bias", zeros, (moe.experts, 2, moe.width))
            weights["down_bias"] = self.param("down_bias", zeros, (moe.experts, c.width))
        weights = {name: array.astype(x.dtype) for name, array in weights.items()}
        routes = route(logits, moe)
        read = by_all if 2 * moe.per_token >= moe.experts else over_mesh
        found = read(x, routes, weights, c)
        found = found if moe.shared is None else found + self.shared(x, moe.shared)
        return found, usage(logits, routes, mask) if self.watched else None

    def shared(self, x: Array, units: int) -> Array:
        """What the expert gives that every token goes to."""
        gate = self.param("shared_gate", INIT, (self.config.width, 1))
        return jax.nn.sigmoid(project(x, gate)) * MLP(self.config, units, name="shared")(x)


def gated(both: Array, config: ModelConfig) -> Array:
    """`[..., 2, F]` -> `[..., F]`: `act(gate) up`, or gpt-oss's `gate sigmoid(1.702 gate) (up + 1)` of cut numbers."""
    gate, up = both[..., 0, :], both[..., 1, :]
    limit = config.moe.clamped
    if limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)


def by_all(x: Array, routes: Routes, weights: dict[str, Array], config: ModelConfig) -> Array:
    """Every expert reads every token `[B, S, D]`; those that a token does not go to have the weight 0."""
    weights = {name: array.astype(x.dtype) for name, array in folded(weights).items()}
    each = jax.nn.one_hot(routes.experts, config.moe.experts, dtype=jnp.float32)
    shares = jnp.einsum("bsk,bske->bse", routes.weights, each).astype(x.dtype)
    both = jnp.einsum("bsd,edcf->bsecf", x, weights["gate_up"])
    if "gate_up_bias" in weights:
        both = both + weights["gate_up_bias"]
    out = jnp.einsum("bsef,efd,bse->bsd", gated(both, config), weights["down"], shares)
    return out + jnp.einsum("bse,ed->bsd", shares, weights["down_bias"]) if "down_bias" in weights else out


def over_mesh(x: Array, routes: Routes, weights: dict[str, Array], config: ModelConfig) -> Array:
    """`by_groups` on one device; on a mesh every device for the experts that it holds, summed over those that hold others.

    Along an expert axis the rows of all its devices are gathered before, and a device keeps its own rows' sum.  Sending
    a token to its `k` experts alone moves `k / n` of these bytes on an axis of `n` devices, more where `k > n`.
    """
    mesh = current()
    if mesh is None:
        return by_groups(x, routes, weights, config, 0)
    across, rows = of_experts(mesh.shape), rows_axis(len(x))
    own, apart = config.moe.experts // devices_along(mesh.shape, across), EXPERT in mesh.shape and rows is not None

    def one_device(x: Array, routes: Routes, weights: dict[str, Array]) -> Array:
        first = own * jax.lax.axis_index(across)
        if not apart:
            return jax.lax.psum(by_groups(x, routes, weights, config, first), across)
        together = jax.tree.map(lambda x: jax.lax.all_gather(x, EXPERT, tiled=True), (x, routes))
        found = by_groups(*together, weights, config, first)
        return jax.lax.psum(jax.lax.psum_scatter(found, EXPERT, tiled=True), MODEL)

    specs = P(rows), Routes(P(rows), P(rows)), dict.fromkeys(weights, P(across))
    return jax.shard_map(one_device, in_specs=specs, out_specs=P(rows), check_vma=False)(x, routes, weights)


def by_groups(x: Array, routes: Routes, weights: dict[str, Array], config: ModelConfig, first: Array | int) -> Array:
    """What the experts from number `first` on give of tokens `x [B, S, D]`; others' tokens get 0 here.

    The tokens' order is undone before they are summed: the sum of a token does not depend on who else is in the batch.
    """
    experts, width, k = len(jax.tree.leaves(weights)[0]), x.shape[-1], config.moe.per_token
    number = routes.experts.reshape(-1) - first
    number = jnp.where((number >= 0) & (number < experts), number, experts)  # others' tokens come last
    order = jnp.argsort(number, stable=True)
    sizes = jnp.zeros(experts, jnp.int32).at[number].add(1, mode="drop")
    expert, tokens = number[order], x.reshape(-1, width)[order // k]
    here, at = (expert < experts)[:, None], jnp.minimum(expert, experts - 1)
    # What a grouped product writes beyond its groups is not defined on every backend.
    product = lambda rows, matrices: jnp.where(here, jax.lax.ragged_dot(rows, matrices, sizes), 0)
    both = through(tokens, weights["gate_up"], product).reshape(len(tokens), 2, -1)
    if "gate_up_bias" in weights:
        both = both + weights["gate_up_bias"][at]
    out = through(gated(both, config), weights["down"], product)
    if "down_bias" in weights:
        out = jnp.where(here, out + weights["down_bias"][at], 0)
    each = out[jnp.argsort(order)].reshape(-1, k, width)
    shares = routes.weights.reshape(-1, k, 1)
    return (each * shares.astype(x.dtype)).sum(1).reshape(x.shape)
