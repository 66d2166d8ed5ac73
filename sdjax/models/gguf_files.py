"""GGUF files of the Llama family: configuration and dequantised weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.fields import ModelError
from sdjax.models.safetensors_files import Stored
from sdjax.models.weights import unread


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


def gguf_config(reader: Any, where: str) -> ModelConfig:
    """The configuration of a Llama-family GGUF.  Raises ModelError for another architecture or variant."""
    architecture = gguf_field(reader, "general.architecture")
    if architecture != "llama":
        raise ModelError(f"{where}: GGUF architecture {architecture!r} is not supported, only 'llama'")
    scaling = gguf_field(reader, "llama.rope.scaling.type", "none")
    names = {tensor.name for tensor in reader.tensors}
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ModelError(f"{where}: scaled rotary embeddings in GGUF are not supported; use the safetensors")
    embeddings = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    fields = {
        "vocab_size": int(embeddings[0].shape[1]) if embeddings else None,  # GGUF writes the fastest axis first
        "hidden_size": gguf_field(reader, "llama.embedding_length"),
        "intermediate_size": gguf_field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": gguf_field(reader, "llama.block_count"),
        "num_attention_heads": gguf_field(reader, "llama.attention.head_count"),
        "num_key_value_heads": gguf_field(reader, "llama.attention.head_count_kv"),
        "head_dim": gguf_field(reader, "llama.attention.key_length", gguf_field(reader, "llama.rope.dimension_count")),
        "max_position_embeddings": gguf_field(reader, "llama.context_length"),
        "rms_norm_eps": _decimal(gguf_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(gguf_field(reader, "llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in names,
    }
    try:
        return from_hf({"model_type": "llama", **fields})
    except ModelError as error:
        raise ModelError(f"{where}, read as a {error}") from error


def _decimal(value: float | None) -> float | None:
    """The shortest decimal of a number kept as float32: 1e-05, not 9.999999747378752e-06."""
    return None if value is None else float(str(np.float32(value)))


def load_gguf(reader: Any, config: ModelConfig, where: str) -> dict:
    """Parameters of a Llama-family GGUF, dequantised one tensor at a time into float32 numpy arrays.

    Raises: ModelError once for all tensors that are missing, not expected or of another shape.
    """
    stored = {tensor.name: _gguf_stored(tensor, config, where) for tensor in reader.tensors}
    return jax.tree.map(np.asarray, unread(config, stored, lambda place: place.gguf, where))


def _gguf_stored(tensor: Any, config: ModelConfig, where: str) -> Stored:
    import gguf

    def read(index: Any) -> np.ndarray:
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{where}: {tensor.name} is quantised as {tensor.tensor_type.name}, not supported"
            ) from error
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(tensor.name.split(".")[-2])
        return (array if heads is None else _halves(array, heads))[index]

    return Stored(Path(where).name, tuple(int(size) for size in tensor.shape[::-1]), "F32", read, whole=True)


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: it rotates neighbours (0, 1), (2, 3), we rotate halves."""
    pairs = array.reshape(heads, -1, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)
