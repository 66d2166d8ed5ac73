"""The supported families: for each what a config.json leaves to the model's class in the transformers library.

A family is a row of `FAMILIES`.  What no row can say is a module of its own, chosen in `blocks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from sdjax.models.fields import Fields
from sdjax.models.layer_kinds import (
    DELTA,
    full,
    full_every,
    rotating_as_named,
    rotating_in_windows,
    windowed,
    windowed_by_choice,
    windowed_by_pattern,
    windowed_by_turns,
    windowed_if_named,
    windowed_without_rope,
)
from sdjax.models.routing import GptOssExperts, MixtralExperts, OlmoeExperts, QwenExperts
from sdjax.models.wrapped import WRAPPERS


class Asked(NamedTuple):
    """A fact that config.json states: the field, and what counts where it is missing."""

    field: str
    default: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What a config.json leaves to the model's class in the transformers library.

    `kinds` names the layers where `layer_types` is missing (`None`: that field does not count), `window` is the default of `sliding_window`.
    There are biases, or none, or config.json asks for them.  The rest are defaults or facts of `ModelConfig`.
    """

    architecture: str
    rope_theta: float = 10_000.0
    head_dim: int | None = None  # None: width / heads
    tied_embeddings: bool = False
    kinds: Callable[[Fields, int], list[str]] = full
    layer_types: bool = True  # whether config.json may name the kinds
    window: int | None = None
    window_by_choice: bool = False  # `use_sliding_window` must say so
    rope_by_kind: bool = False  # `rope_parameters` per layer type
    full_rope: tuple[tuple[str, Any], ...] = ()  # defaults of the ropes of layers without a window, where kinds differ
    original_context: int | None = (
        None  # default of `original_max_position_embeddings` beside the ropes, where it counts
    )
    local_theta: float | None = None  # `rope_theta` of layers with a window, where it differs
    rotates: Callable[[Fields, list[str]], list[bool]] | None = None  # layers with a rope, where not all have one
    partial_rotary: float | None = None  # default of `partial_rotary_factor`; None: that field does not count
    qkv_bias: bool | Asked = False
    out_bias: bool | Asked = False
    mlp_bias: bool | Asked = False
    sinks: bool = False  # every head has a learnt score for reading nothing
    qk_norm: str = "none"
    norms: str = "before"
    norm_offset: float = 0.0
    value_norm: bool = False
    layer_scale: bool = False
    own_shapes: bool = False  # layers may have heads of another size, borrow keys and have inputs of their own
    activation: str = "silu"
    activation_field: str = "hidden_act"
    experts: Any = None  # what reads and writes the fields of a mixture of experts (`sdjax.models.routing`)
    fused: bool = False
    gated_attention: bool = False
    delta: bool = False  # layers may be gated delta nets
    embedding_scale: float | None = 1.0  # None: the root of the width
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    query_scalar: float | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    optional: tuple[str, ...] = ()  # further fields of config.json, of `OPTIONAL`, that count


OPTIONAL = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "score_scale",
    "logits_scaling": "logit_divisor",
    "query_pre_attn_scalar": "query_scalar",
    "attn_logit_softcapping": "score_cap",
    "final_logit_softcapping": "logit_cap",
}
"""Fields that some families read, and what `ModelConfig` calls them; null is none."""

_BIASED = {"qkv_bias": Asked("attention_bias"), "out_bias": Asked("attention_bias")}
_LLAMA_BIASES = {**_BIASED, "mlp_bias": Asked("mlp_bias")}

_GEMMA = {
    **_BIASED,
    "head_dim": 256,
    "tied_embeddings": True,
    "window": 4096,
    "norms": "both",
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "activation_field": "hidden_activation",
    "embedding_scale": None,
    "query_scalar": 256,
}

_QWEN_NEXT = {
    **_BIASED,
    "kinds": full_every(4, "full_attention_interval", others=DELTA),
    "head_dim": 256,
    "partial_rotary": 0.25,
    "norm_offset": 1.0,
    "qk_norm": "head",
    "gated_attention": True,
    "delta": True,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", layer_types=False, **_LLAMA_BIASES),
    "qwen2": Family("Qwen2ForCausalLM", kinds=windowed_by_choice, window=4096, window_by_choice=True, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        kinds=windowed_by_choice,
        window=4096,
        window_by_choice=True,
        head_dim=128,
        qk_norm="head",
        **_BIASED,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        kinds=full_every(4),
        rope_by_kind=True,
        rope_theta=500_000.0,
        qk_norm="flat",
        norms="after",
        **_BIASED,
    ),
    "olmo2": Family("Olmo2ForCausalLM", layer_types=False, qk_norm="flat", norms="after", **_BIASED),
    "mistral": Family("MistralForCausalLM", kinds=windowed, layer_types=False, window=4096),
    "ministral3": Family("Ministral3ForCausalLM", kinds=windowed_if_named, layer_types=False, head_dim=128),
    "phi3": Family(
        "Phi3ForCausalLM",
        kinds=windowed_if_named,
        layer_types=False,
        partial_rotary=1.0,
        original_context=4096,
        fused=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        kinds=windowed_without_rope,
        window_by_choice=True,
        rotates=rotating_as_named,
        rope_theta=2_000_000.0,
        tied_embeddings=True,
        **_LLAMA_BIASES,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **_GEMMA,
        kinds=full_every(2),
        score_cap=50.0,
        logit_cap=30.0,
        optional=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **_GEMMA,
        kinds=full_every(6, "sliding_window_pattern"),
        rope_by_kind=True,
        rope_theta=1_000_000.0,
        local_theta=10_000.0,
        qk_norm="head",
        optional=("query_pre_attn_scalar", "final_logit_softcapping"),
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        **{**_GEMMA, "norm_offset": 0.0, "query_scalar": None, "window": 512},
        kinds=full_every(6),
        rope_by_kind=True,
        rope_theta=1_000_000.0,
        local_theta=10_000.0,
        full_rope=(("rope_type", "proportional"), ("partial_rotary_factor", 0.25)),
        qk_norm="head",
        value_norm=True,
        score_scale=1.0,
        layer_scale=True,
        own_shapes=True,
        optional=("final_logit_softcapping",),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        layer_types=False,
        **_LLAMA_BIASES,
        score_scale=1.0,
        optional=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        layer_types=False,
        head_dim=128,
        qkv_bias=Asked("attention_bias", True),
        out_bias=Asked("attention_out_bias"),
        mlp_bias=Asked("mlp_bias"),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        kinds=windowed_by_pattern,
        window=4096,
        rotates=rotating_in_windows,
        qk_norm="head",
        norms="after",
    ),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", **_QWEN_NEXT),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", **_QWEN_NEXT, experts=QwenExperts(256, 8, 512, shared=512)),
    "qwen3_next": Family("Qwen3NextForCausalLM", **_QWEN_NEXT, experts=QwenExperts(512, 10, 512, shared=512)),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        kinds=windowed_by_turns,
        window=4096,
        window_by_choice=True,
        qkv_bias=Asked("qkv_bias", True),
        experts=QwenExperts(60, 4, 1408, shared=5632, renormalised=False),
    ),
    "ministral": Family("MinistralForCausalLM", kinds=windowed, window=4096),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        kinds=windowed,
        layer_types=False,
        window=4096,
        window_by_choice=True,
        head_dim=None,
        qk_norm="head",
        **_BIASED,
        experts=QwenExperts(128, 8, 768, renormalised=False),
    ),
    "mixtral": Family(
        "MixtralForCausalLM", kinds=windowed_if_named, layer_types=False, rope_theta=1_000_000.0, experts=MixtralExperts
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        layer_types=False,
        qk_norm="flat",
        **_BIASED,
        experts=OlmoeExperts,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        kinds=full_every(2),
        window=128,
        head_dim=64,
        rope_theta=150_000.0,
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        experts=GptOssExperts,
    ),
}
"""The supported families by their `model_type` in config.json."""


def supported() -> str:
    """The families in a sentence."""
    rows = [*FAMILIES.items(), *WRAPPERS.items()]
    return "supported are " + ", ".join(f"{name} ({row.architecture})" for name, row in rows)
