"""GGUF files of every architecture, written as llama.cpp's converter writes them; quantised tensors; tokenizers."""

import jax
import numpy as np
import pytest
from models.test_families import GOLDEN, golden
from safetensors.numpy import load_file

from sdjax.models.files import gguf_files
from sdjax.models.files.gguf_tokenizers import SPLITS, gguf_tokenizer
from sdjax.models.files.layout import layout

gguf = pytest.importorskip("gguf")

FILES = {
    "llama_biased": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "smollm3": "smollm3",
}
FILES |= {"gemma2": "gemma2", "gemma3_text": "gemma3"}


def written(path, name, change=lambda key, tensor: (tensor, None)):
    """A committed model as a GGUF."""
    config, architecture = golden(name)[0], FILES[name]
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {"embedding_length": config.width, "feed_forward_length": config.mlp_width, "block_count": config.layers}
    numbers |= {"attention.head_count": config.heads, "attention.head_count_kv": config.kv_heads}
    numbers |= {"context_length": config.max_context, "attention.key_length": config.head_dim}
    windows = [window for window in config.windows if window]
    numbers |= {"attention.sliding_window": windows[0]} if windows else {}
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    caps = {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}
    rest = {"attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": 500.0} | caps
    for key, value in rest.items():
        if value is not None:
            writer.add_float32(f"{architecture}.{key}", value)
    arrays = load_file(GOLDEN / name / "model.safetensors")
    for place in layout(config):
        if place.row:
            continue
        tensor = np.asarray(arrays[place.name], np.float32)
        if "norm" in place.name:
            tensor = tensor + np.float32(config.norm_offset)
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(place.name.split(".")[-2])
        if gguf_files.ARCHITECTURES[architecture].pairs and heads:
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        tensor, kind = change(place.gguf, np.ascontiguousarray(tensor))
        writer.add_tensor(place.gguf, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_files.open_gguf(path)


@pytest.mark.parametrize("name", FILES)
def test_weights_are_those_of_the_safetensors(name, tmp_path):
    config, params, _ = golden(name)
    reader = written(tmp_path / "x.gguf", name)
    found = gguf_files.gguf_config(reader, "x.gguf")
    same = (
        "family",
        "width",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp_width",
        "qkv_bias",
        "out_bias",
        "mlp_bias",
    )
    same += (
        "score_cap",
        "logit_cap",
        "norms",
        "norm_offset",
        "tied_embeddings",
        "activation",
        "embedding_scale",
        "fused",
    )
    assert {n: getattr(found, n) for n in same} == {n: getattr(config, n) for n in same}
    read = gguf_files.load_gguf(reader, found, "x.gguf")
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-7)  # norms went through a sum


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "BF16", "F16"])
def test_quantised_tensors_are_read(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    change = lambda key, x: (gguf.quantize(x, kind), kind) if x.ndim == 2 and x.shape[-1] % 32 == 0 else (x, None)
    config, params, _ = golden("qwen2")
    read = gguf_files.load_gguf(written(tmp_path / "x.gguf", "qwen2", change), config, "x.gguf")
    off = [
        np.abs(a - b).max() / np.abs(b).max()
        for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True)
    ]
    assert max(off) < 0.15


def test_the_largest_gemmas_divide_scores_by_other_widths(tmp_path, monkeypatch):
    """That a GGUF does not say: llama.cpp goes by the number of layers."""
    reader, row = written(tmp_path / "x.gguf", "gemma2"), gguf_files.ARCHITECTURES["gemma2"]
    assert gguf_files.gguf_config(reader, "x").query_scalar == 12  # a head's width
    monkeypatch.setitem(gguf_files.ARCHITECTURES, "gemma2", row._replace(scaled_by_heads=2))
    assert gguf_files.gguf_config(reader, "x").query_scalar == 32 // 4


class Said:
    """A reader's fields."""

    def __init__(self, **fields):
        said = lambda value: type("Field", (), {"contents": staticmethod(lambda: value)})
        self.fields = {f"tokenizer.ggml.{name}": said(value) for name, value in fields.items()}


TEXT = "Don't add 1234 and 56,  then\n\n  über-naïve   words!"


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "gpt-2", "llama-bpe"])
def test_byte_level_tokenizers_split_as_their_kind_says(pre):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "Ġa", "Do", "Don", "'t"]
    merges = ["1 2", "12 3", "Ġ a", "D o", "Do n", "' t"]
    tokenizer = gguf_tokenizer(Said(model="gpt2", pre=pre, tokens=tokens, merges=merges), 64, "x")
    found = tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"])
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT and "Don" in found
    assert ("123" in found) == (pre in ("gpt-2", "llama-bpe")) and pre in SPLITS


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece_joins_the_highest_score_first_and_writes_bytes(prefixed):
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "a", "b", "ab", "▁a", "▁ab", "ba"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 7
    said = Said(
        model="llama", tokens=tokens, scores=scores, token_type=kinds, add_space_prefix=prefixed, eos_token_id=2
    )
    tokenizer = gguf_tokenizer(said, 64, "x")
    found = tokenizer.convert_ids_to_tokens(tokenizer("ab aba é")["input_ids"])
    expected = ["▁ab" if prefixed else "ab", "▁ab", "a", "▁", "<0xC3>", "<0xA9>"]
    assert found == expected and tokenizer.decode(tokenizer("ab aba é")["input_ids"]) == "ab aba é"
    assert tokenizer.eos_token_id == 2 and tokenizer("</s>")["input_ids"][-1] == 2
