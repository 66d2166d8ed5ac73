"""Makes the tiny mixtures of experts in this folder, as `make_models.py` makes the others; all, or those that are named."""

import sys

import torch
import transformers
from make_models import SIZES, YARN, make


def configurations() -> dict[str, tuple[transformers.PreTrainedConfig, torch.dtype]]:
    """Weights renormalised and not, a layer without experts, shared experts, norms of both kinds, files of every naming."""
    qwen3_moe = transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    mixtral = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=7)
    olmoe = transformers.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False)
    gpt_oss = transformers.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 3, "intermediate_size": 20},
        head_dim=12,
        num_local_experts=8,
        num_experts_per_tok=3,
        swiglu_limit=0.7,
        sliding_window=6,
        rope_parameters={**YARN, "rope_theta": 1_000.0, "truncate": False},
    )
    shared = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
    shared |= {"shared_expert_intermediate_size": 20, "head_dim": 16}
    delta = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
    }
    mixed = {"layer_types": ["linear_attention", "full_attention"], **delta}
    quarter = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    without = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    qwen2_moe = transformers.Qwen2MoeConfig(
        **SIZES, **shared, use_sliding_window=True, sliding_window=6, max_window_layers=2, norm_topk_prob=False
    )
    qwen3_5_moe = transformers.Qwen3_5MoeTextConfig(**without, **shared, **mixed, rope_parameters=quarter)
    qwen3_next = transformers.Qwen3NextConfig(**SIZES, **shared, **mixed, mlp_only_layers=[0], rope_parameters=quarter)
    return {
        "gpt_oss": (gpt_oss, torch.bfloat16),
        "qwen3_moe": (qwen3_moe, torch.bfloat16),
        "mixtral": (mixtral, torch.bfloat16),
        "olmoe": (olmoe, torch.bfloat16),
        "qwen2_moe": (qwen2_moe, torch.bfloat16),
        "qwen3_5_moe_text": (qwen3_5_moe, torch.float32),
        "qwen3_next": (qwen3_next, torch.bfloat16),
    }


if __name__ == "__main__":
    for name, (config, dtype) in configurations().items():
        if name in (sys.argv[1:] or [name]):
            make(name, config, dtype)
