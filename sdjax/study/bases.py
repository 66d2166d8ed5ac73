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
from sdjax.models.pretrained import Pretrained
from sdjax.types import Messages

Texts = Iterator[tuple[Messages, str]]
"""Pre-training texts without end: `(chat, answer)`."""


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
