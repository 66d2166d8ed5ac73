"""GGUF files: configuration and dequantised weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.fields import ModelError
from sdjax.models.files.safetensors_files import Stored
from sdjax.models.files.weights import unread


def open_gguf(path: str | os.PathLike) -> Any:
    """A `gguf.GGUFReader` of a file.  Raises ModelError if it cannot be read."""
    import gguf  # pulls in half a second of imports that only these files need

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error


def gguf_field(reader: Any, name: str, default: Any = None) -> Any:
    """What a GGUF file says under `name`."""
    field = reader.fields.get(name)
    return default if field is None else field.contents()


class Architecture(NamedTuple):
    """What a GGUF of one architecture is to us: the family, and how llama.cpp's converter changes its tensors."""

    family: str
    pairs: bool = False  # rows of query and key heads in neighbouring pairs
    scaled_by_heads: int | None = None  # layers of the size whose scores are divided by the root of width / heads


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "smollm3": Architecture("smollm3", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "gemma2": Architecture("gemma2", scaled_by_heads=46),
    "gemma3": Architecture("gemma3_text", scaled_by_heads=62),
}
"""The supported architectures by their name in a GGUF."""


def architecture_of(reader: Any, where: str) -> Architecture:
    """Raises ModelError for one that is not supported."""
    name = gguf_field(reader, "general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{where}: GGUF architecture {name!r} is not supported; supported are {known}")
    return ARCHITECTURES[name]


def gguf_config(reader: Any, where: str) -> ModelConfig:
    """The configuration of a GGUF.  Raises ModelError for an architecture or variant that is not supported."""
    architecture = architecture_of(reader, where)
    say = lambda name, default=None: gguf_field(reader, f"{gguf_field(reader, 'general.architecture')}.{name}", default)
    names = {tensor.name for tensor in reader.tensors}
    scaled = {name for name in names if name.startswith(("rope_freqs", "rope_factors"))}
    if say("rope.scaling.type", "none") != "none" or scaled:
        raise ModelError(f"{where}: scaled rotary embeddings in GGUF are not supported; use the safetensors")
    embeddings = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    width, heads, layers = say("embedding_length"), say("attention.head_count"), say("block_count")
    head_dim = say("attention.key_length", None if architecture.family == "phi3" else say("rope.dimension_count"))
    fields = {
        "vocab_size": int(embeddings[0].shape[1]) if embeddings else None,  # GGUF writes the fastest axis first
        "hidden_size": width,
        "intermediate_size": say("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": say("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": say("context_length"),
        "rms_norm_eps": _decimal(say("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(say("rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in names,
        "sliding_window": say("attention.sliding_window") or None,
        "attn_logit_softcapping": _decimal(say("attn_logit_softcapping")),
        "final_logit_softcapping": _decimal(say("final_logit_softcapping")),
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_down.bias" in names,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if architecture.scaled_by_heads is not None:
        plain = head_dim if layers != architecture.scaled_by_heads else width // heads
        fields |= {"query_pre_attn_scalar": plain} if plain else {}
    if architecture.family == "phi3" and say("rope.dimension_count"):
        fields["partial_rotary_factor"] = say("rope.dimension_count") / (head_dim or width // heads)
    try:
        return from_hf({"model_type": architecture.family, **fields})
    except ModelError as error:
        raise ModelError(f"{where}, read as a {error}") from error


def _decimal(value: float | None) -> float | None:
    """The shortest decimal of a number kept as float32: 1e-05, not 9.999999747378752e-06."""
    return None if value is None else float(str(np.float32(value)))


def load_gguf(reader: Any, config: ModelConfig, where: str) -> dict:
    """Parameters of a GGUF, dequantised one tensor at a time into float32 numpy arrays.

    Raises: ModelError once for all tensors that are missing, not expected or of another shape.
    """
    pairs = architecture_of(reader, where).pairs
    stored = {tensor.name: _gguf_stored(tensor, config, where, pairs) for tensor in reader.tensors}
    return jax.tree.map(np.asarray, unread(config, stored, lambda place: place.gguf, where))


def _gguf_stored(tensor: Any, config: ModelConfig, where: str, pairs: bool) -> Stored:
    import gguf

    def read(index: Any) -> np.ndarray:
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{where}: {tensor.name} is quantised as {tensor.tensor_type.name}, not supported"
            ) from error
        part = tensor.name.split(".")[-2]
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(part) if pairs else None
        if part.endswith("norm"):
            array = array - np.float32(config.norm_offset)  # the converter has added it
        return (array if heads is None else _halves(array, heads))[index]

    return Stored(Path(where).name, tuple(int(size) for size in tensor.shape[::-1]), "F32", read, whole=True)


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: it rotates neighbours (0, 1), (2, 3), we rotate halves."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
