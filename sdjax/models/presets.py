"""Configurations of public models, without their weights: what a plan of memory needs."""

from __future__ import annotations

from typing import Any

from sdjax.models.configs import ModelConfig, from_hf


def _preset(family: str, sizes: str, **rest: Any) -> ModelConfig:
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip(names, map(int, sizes.split()), strict=True))
    return from_hf({"model_type": family, "rms_norm_eps": 1e-6, **numbers, **rest})


_OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

_GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}

PRESETS: dict[str, ModelConfig] = {
    #                      vocabulary, context, width, MLP, layers, heads, key-value heads
    "smollm2-135m": _preset(
        "llama", "49152 8192 576 1536 30 9 3", rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True
    ),
    "qwen3-1.7b": _preset("qwen3", "151936 40960 2048 6144 28 16 8", rope_theta=1_000_000.0, tie_word_embeddings=True),
    "qwen3-8b": _preset("qwen3", "151936 40960 4096 12288 36 32 8", rope_theta=1_000_000.0),
    "deepseek-r1-distill-qwen-7b": _preset("qwen2", "152064 131072 3584 18944 28 28 4", rope_theta=10_000.0),
    "olmo3-7b-instruct": _preset(
        "olmo3", "100278 65536 4096 11008 32 32 32", sliding_window=4096, rope_scaling=_OLMO3_YARN
    ),
    "qwen3-30b-a3b": _preset(
        "qwen3_moe",
        "151936 40960 2048 6144 48 32 4",
        head_dim=128,
        rope_theta=1_000_000.0,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "gpt-oss-20b": _preset(
        "gpt_oss",
        "201088 131072 2880 2880 24 64 8",
        rms_norm_eps=1e-5,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        rope_scaling=_GPT_OSS_YARN,
    ),
}
