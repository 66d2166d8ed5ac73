"""Makes the tiny random models in this folder and the logits that transformers gives them.

Run once, where torch is installed: `python tests/golden/make_models.py`, all models or those that are named.  Each model becomes a folder of the
transformers library with one more file, `logits.npz`: `tokens [2, 20]`, `lengths [2]`, `logits [20, 128]` of the first row, and
`padded [2, 20, 128]` of both rows when row `r` keeps only its last `lengths[r]` tokens, the rest being left padding
(where `padded` is zero).
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LENGTH, VOCABULARY = 20, 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def configurations() -> dict[str, tuple[transformers.PreTrainedConfig, torch.dtype]]:
    """One model per family; between them every rope type, window, norm, bias, tied head and float type."""
    llama = transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rope_parameters={**LLAMA3, "rope_theta": 10_000.0, "original_max_position_embeddings": 16},
    )
    qwen2 = transformers.Qwen2Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        rope_parameters={**YARN, "rope_theta": 1_000.0},
    )
    qwen3 = transformers.Qwen3Config(
        **SIZES, head_dim=12, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    )
    olmo3 = transformers.Olmo3Config(
        **{**SIZES, "num_hidden_layers": 3},
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {**YARN, "rope_theta": 500.0, "attention_factor": 1.2},
        },
    )
    llama_biased = transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=6)
    qwen3_biased = transformers.Qwen3Config(**SIZES, head_dim=8, attention_bias=True, tie_word_embeddings=True)
    mistral = transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=7)
    ministral = transformers.MinistralConfig(
        **SIZES, head_dim=8, sliding_window=6, layer_types=["full_attention", "sliding_attention"]
    )
    ministral3 = transformers.Ministral3Config(
        **SIZES,
        head_dim=8,
        rope_parameters={
            **YARN,
            "rope_theta": 1_000.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        }
        | {"original_max_position_embeddings": 8},
    )
    olmo2 = transformers.Olmo2Config(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 500.0} | ORIGINAL)
    smollm3 = transformers.SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4},
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=6,
        mlp_bias=True,
        rope_parameters={**YARN, "rope_theta": 1_000.0},
    )
    phi3 = transformers.Phi3Config(
        **SIZES, sliding_window=9, rope_parameters={"rope_theta": 300.0, "rope_type": "default"}
    )
    phi4 = {
        **SIZES,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 300.0,
            "short_factor": [1.0, 1.2, 1.5, 1.8, 2.0, 2.5],
            "long_factor": [2.0, 4.0, 8.0, 9.0, 10.0, 11.0],
        },
    }
    short, long = (transformers.Phi3Config(**copy.deepcopy(phi4), original_max_position_embeddings=n) for n in (20, 8))
    gemma2 = transformers.Gemma2Config(
        **SIZES,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    )
    gemma3 = transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
        },
    )
    gemma4 = {
        **SIZES,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1_000.0},
        },
    }
    gemma4_small = transformers.Gemma4TextConfig(  # like E2B and E4B
        **{**gemma4, "num_hidden_layers": 4},
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCABULARY,
        final_logit_softcapping=4.0,
    )
    gemma4_large = transformers.Gemma4TextConfig(  # like 31B
        **{**gemma4, "num_key_value_heads": 4},
        layer_types=["sliding_attention", "full_attention"],
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        hidden_size_per_layer_input=0,
    )
    granite = transformers.GraniteConfig(
        **SIZES, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=6.0
    )
    seed_oss = transformers.SeedOssConfig(**SIZES, head_dim=12)
    exaone4 = transformers.Exaone4Config(
        **SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"], sliding_window_pattern="LG"
    )
    qwen3_5 = transformers.Qwen3_5TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    )
    return {
        "llama": (llama, torch.float32),
        "llama_biased": (llama_biased, torch.bfloat16),
        "qwen2": (qwen2, torch.bfloat16),
        "qwen3": (qwen3, torch.bfloat16),
        "qwen3_biased": (qwen3_biased, torch.float16),
        "olmo2": (olmo2, torch.bfloat16),
        "olmo3": (olmo3, torch.float16),
        "mistral": (mistral, torch.bfloat16),
        "ministral": (ministral, torch.bfloat16),
        "ministral3": (ministral3, torch.bfloat16),
        "smollm3": (smollm3, torch.bfloat16),
        "phi3": (phi3, torch.bfloat16),
        "phi4": (short, torch.bfloat16),
        "phi4_long": (long, torch.bfloat16),
        "gemma2": (gemma2, torch.bfloat16),
        "gemma3_text": (gemma3, torch.bfloat16),
        "gemma4_text": (gemma4_small, torch.bfloat16),
        "gemma4_large": (gemma4_large, torch.bfloat16),
        "granite": (granite, torch.bfloat16),
        "seed_oss": (seed_oss, torch.bfloat16),
        "exaone4": (exaone4, torch.bfloat16),
        "qwen3_5_text": (qwen3_5, torch.float32),
    }


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that attention is far from uniform, norms and biases far from their initial values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.4 * torch.randn_like(parameter))  # they begin at 1 or, kept as a distance from 1, at 0
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.25))
        for name, number in model.named_buffers():
            if name.endswith("layer_scalar"):  # they begin at 1
                number.uniform_(0.5, 1.5)


def logits_of(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Float32 logits, zero at padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    return (logits * mask[..., None]).numpy()


def make(name: str, config: transformers.PreTrainedConfig, dtype: torch.dtype) -> None:
    """Writes one model's folder."""
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.to(dtype).save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens, lengths = torch.randint(VOCABULARY, (2, LENGTH)), torch.tensor([14, LENGTH - 1])
    mask = (torch.arange(LENGTH) >= LENGTH - lengths[:, None]).long()
    np.savez_compressed(
        HERE / name / "logits.npz",
        tokens=tokens.numpy().astype(np.int32),
        lengths=lengths.numpy().astype(np.int32),
        logits=logits_of(model, tokens, torch.ones_like(tokens))[0],
        padded=logits_of(model, tokens, mask),
    )


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for name, (config, dtype) in configurations().items():
        if not wanted or name in wanted:
            make(name, config, dtype)
