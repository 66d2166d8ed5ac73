"""Which experts a token goes to: what a config.json says of it, the choice itself, and how evenly experts are used."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class Moe:
    """A mixture of experts in place of a layer's MLP: each token is read by `per_token` of `experts` MLPs of a `width`.

    A token's weights are its probabilities over all experts or, `renormalised`, over those that it goes to alone.
    `dense` are the layers that keep an ordinary MLP.  Every token is read by a further MLP, too, with so many `shared`
    units, if there are any.  With `clamped` gates and inputs are cut at this number, the gate is
    `x sigmoid(1.702 x)`, and router and experts have biases (gpt-oss).
    """

    experts: int
    per_token: int
    width: int
    renormalised: bool = True
    dense: tuple[int, ...] = ()
    clamped: float | None = None
    shared: int | None = None

    @property
    def units(self) -> int:
        """Hidden units that a token goes through."""
        return self.per_token * self.width + (self.shared or 0)


class Routes(NamedTuple):
    """Where tokens go: `weights [..., k]` float32, most first, and `experts [..., k]` int32."""

    weights: Array
    experts: Array


def route(logits: Array, moe: Moe) -> Routes:
    """The `k` most probable experts of each token by a router's float32 logits `[..., E]`.

    `p = softmax(logits)`; weights are `p_i`, or `p_i / sum_j p_j` over those chosen if `renormalised`, which is the
    softmax of their logits alone.
    Source: Shazeer et al. 2017, arXiv:1701.06538; as in Qwen3-MoE, Mixtral and gpt-oss.
    """
    chosen, experts = jax.lax.top_k(logits, moe.per_token)
    if moe.renormalised:
        return Routes(jax.nn.softmax(chosen, axis=-1), experts)
    return Routes(jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), experts)


class Usage(NamedTuple):
    """What routers did with the tokens of each row: sums over tokens that are there, float32.

    Of one layer `[B, ...]`, of a model `[B, L, ...]` with its `L` layers that have experts.
    """

    chosen: Array  # [B, (L,) E] tokens that went to each expert
    probability: Array  # [B, (L,) E] of the router's probabilities
    log_partition: Array  # [B, (L)] of the squared logarithm of the sum of exponentials of the router's logits
    entropy: Array  # [B, (L)] of the router's distribution, nats
    tokens: Array  # [B, (L)]


def usage(logits: Array, routes: Routes, mask: Array) -> Usage:
    """The `Usage` of one layer: a router's logits `[B, S, E]` and routes, of the tokens where `mask [B, S]`.

    Logits of tokens that are not there may hold anything.
    """
    logits = jnp.where(mask[..., None], logits, 0.0)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    logprobs = logits - log_partition[..., None]
    probability = jnp.exp(logprobs)
    chosen = jax.nn.one_hot(routes.experts, logits.shape[-1], dtype=jnp.float32).sum(-2)
    total = lambda x: jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0.0).sum(1)
    entropy = -(probability * logprobs).sum(-1)
    tokens = mask.sum(1).astype(jnp.float32)
    return Usage(total(chosen), total(probability), total(log_partition**2), total(entropy), tokens)


# ---- config.json ----------------------------------------------------------------------------------------------------


def _checked(fields: Fields, moe: Moe) -> Moe:
    if moe.per_token > moe.experts:
        fields.refuse(f"'num_experts_per_tok' {moe.per_token} exceeds the number of experts, {moe.experts}")
    return moe


def _count(fields: Fields, default: int) -> int:
    """The number of experts, by either of its names."""
    return fields.integer("num_local_experts" if fields.has("num_local_experts") else "num_experts", default)


@dataclasses.dataclass(frozen=True)
class QwenExperts:
    """Qwen's: every `decoder_sparse_step`-th layer has experts, but those of `mlp_only_layers`.

    The fields are a family's defaults of experts, of those that a token goes to, of their width and of the shared one's.
    """

    experts: int
    per_token: int
    width: int
    shared: int | None = None
    renormalised: bool = True

    def read(self, fields: Fields, layers: int) -> Moe:
        """The mixture in a config.json.  Raises ModelError."""
        only, step = fields.values.get("mlp_only_layers") or [], fields.integer("decoder_sparse_step", 1)
        if not isinstance(only, list) or not all(isinstance(layer, int) for layer in only):
            fields.refuse(f"'mlp_only_layers' must be a list of layers, found {only!r}")
        dense = tuple(layer for layer in range(layers) if layer in only or (layer + 1) % step)
        return _checked(
            fields,
            Moe(
                _count(fields, self.experts),
                fields.integer("num_experts_per_tok", self.per_token),
                fields.integer("moe_intermediate_size", self.width),
                fields.flag("norm_topk_prob", self.renormalised),
                dense,
                shared=self.shared and fields.integer(SHARED, self.shared),
            ),
        )

    def written(self, moe: Moe) -> dict[str, Any]:
        """The fields that `read` reads."""
        shared = {SHARED: moe.shared} if moe.shared else {}
        return shared | {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.per_token,
            "moe_intermediate_size": moe.width,
            "norm_topk_prob": moe.renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(moe.dense),
        }


class MixtralExperts:
    """Mixtral: experts in every layer, as wide as `intermediate_size`."""

    @staticmethod
    def read(fields: Fields, layers: int) -> Moe:
        width = fields.integer("intermediate_size")
        return _checked(fields, Moe(_count(fields, 8), fields.integer("num_experts_per_tok", 2), width))

    @staticmethod
    def written(moe: Moe) -> dict[str, Any]:
        return {"num_local_experts": moe.experts, "num_experts_per_tok": moe.per_token}


class OlmoeExperts:
    """OLMoE: as Mixtral, and weights need not sum to one."""

    @staticmethod
    def read(fields: Fields, layers: int) -> Moe:
        sizes = _count(fields, 64), fields.integer("num_experts_per_tok", 8), fields.integer("intermediate_size")
        return _checked(fields, Moe(*sizes, fields.flag("norm_topk_prob")))

    @staticmethod
    def written(moe: Moe) -> dict[str, Any]:
        sizes = {"num_experts": moe.experts, "num_experts_per_tok": moe.per_token}
        return {**sizes, "norm_topk_prob": moe.renormalised}


class GptOssExperts:
    """gpt-oss: as Mixtral, with biases, and numbers that are cut."""

    @staticmethod
    def read(fields: Fields, layers: int) -> Moe:
        if fields.number("swiglu_alpha", ALPHA) != ALPHA:
            fields.refuse(f"'swiglu_alpha' other than {ALPHA} is not supported")
        sizes = _count(fields, 128), fields.integer("num_experts_per_tok", 4), fields.integer("intermediate_size")
        return _checked(fields, Moe(*sizes, clamped=fields.number("swiglu_limit", 7.0)))

    @staticmethod
    def written(moe: Moe) -> dict[str, Any]:
        sizes = {"num_local_experts": moe.experts, "num_experts_per_tok": moe.per_token}
        return {**sizes, "swiglu_limit": moe.clamped, "swiglu_alpha": ALPHA}


SHARED = "shared_expert_intermediate_size"

ALPHA = 1.702
"""What gpt-oss multiplies a gate by before the sigmoid."""
