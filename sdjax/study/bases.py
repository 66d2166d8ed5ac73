"""Base models of studies: pre-trained once, and kept under a hash of their arguments and of their first texts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.devices.compilation import user_cache
from sdjax.models import pretrained
from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.pretrained import Pretrained
from sdjax.types import Messages

Texts = Iterator[tuple[Messages, str]]
"""Pre-training texts without end: `(chat, answer)`."""


def decoder(size: int, *, width: int, layers: int, units: int, head_dim: int, positions: int) -> ModelConfig:
    """Qwen3's family with a vocabulary of `size`: heads of `head_dim` as wide as the model together, MLPs of `units`."""
    return from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": size,
            "hidden_size": width,
            "intermediate_size": units,
            "num_hidden_layers": layers,
            "num_attention_heads": width // head_dim,
            "num_key_value_heads": width // head_dim,
            "head_dim": head_dim,
            "max_position_embeddings": positions,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        }
    )


def made_once(
    name: str,
    arguments: Mapping[str, Any],
    words: Sequence[str],
    texts: Callable[[], Texts],
    make: Callable[[], Pretrained],
    cache: str = "",
) -> Path:
    """The folder of a base model, made by `make()` unless one of these arguments, words and first texts is kept already."""
    folder = cache_folder(cache) / f"{name}-{fingerprint(arguments, words, texts())}"
    if not folder.is_dir():
        keep(folder, make(), arguments)
    return folder


def cache_folder(cache: str = "") -> Path:
    """Where base models are kept: `cache`, else `SDJAX_TESTBED`, else a folder in the user's cache folder."""
    return Path(cache or os.environ.get("SDJAX_TESTBED") or user_cache() / "testbed")


def fingerprint(arguments: Mapping[str, Any], words: Sequence[str], texts: Texts, sample: int = 100) -> str:
    """A hash of the arguments and of the first texts: another grammar is another base model."""
    said = [(chat[-1]["content"], text) for chat, text in itertools.islice(texts, sample)]
    return hashlib.sha256(json.dumps([arguments, list(words), said], sort_keys=True).encode()).hexdigest()[:12]


def identity(folder: Path) -> str:
    """A hash of a model's parameters."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def keep(folder: Path, model: Pretrained, arguments: Mapping[str, Any]) -> None:
    """Writes a model's folder, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".unfinished"))
    try:
        pretrained.save(unfinished, *model)
        (unfinished / "testbed.json").write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
        if not folder.is_dir():  # another process may have been faster, with the same model
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
