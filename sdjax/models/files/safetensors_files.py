"""Tensors of safetensors files, in one file or in shards: what they are, and any part of one when it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sdjax.models.fields import ModelError

FLOATS = ("F64", "F32", "F16", "BF16")
"""The types of numbers that a model's tensors may have."""

MAPPED = 16 * 2**20
"""Bytes after which a file is mapped anew: pages that were read count as memory of this process while it is mapped."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """One tensor of a file: where it is, what it is, and how to read a part of it; `whole`: at once or not at all."""

    file: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[Any], np.ndarray]
    whole: bool = False


class File:
    """A safetensors file that is open while it is read."""

    def __init__(self, path: Path):
        self.path, self.read_bytes = path, 0
        self.file = self.opened()

    def opened(self) -> Any:
        """The file, its header read and its size checked.  Raises ModelError."""
        try:
            return safe_open(self.path, "numpy")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.path} is not a readable safetensors file: {error}") from error

    def part(self, name: str, index: Any) -> np.ndarray:
        """A part of one tensor, as a copy."""
        if self.read_bytes > MAPPED:
            self.file, self.read_bytes = None, 0
        self.file = self.file or self.opened()
        found = self.file.get_slice(name)[index]
        self.read_bytes += found.nbytes
        return found

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name."""
        found, names = {}, self.file.keys()
        for name in names:
            head = self.file.get_slice(name)
            read = lambda index, name=name: self.part(name, index)
            found[name] = Stored(self.path.name, tuple(head.get_shape()), head.get_dtype(), read)
        return found


def open_folder(folder: Path) -> tuple[dict[str, Stored], str]:
    """Every tensor of a folder's safetensors, and what to call them together: the file, or the folder of the shards.

    Only headers are read.  Raises: ModelError for a file that is absent, cut off or damaged, and for an index that does
    not fit its shards.
    """
    if (folder / SINGLE).is_file():
        return File(folder / SINGLE).tensors(), str(folder / SINGLE)
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"there is neither {SINGLE} nor {INDEX} in {folder}")
    named = _weight_map(index)
    shards = sorted({*named.values()})
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise ModelError(f"{index} names {', '.join(absent)}, which {folder} does not hold")
    found = {shard: File(folder / shard).tensors() for shard in shards}
    stale = next((name for name, shard in named.items() if name not in found[shard]), None)
    if stale is not None:
        raise ModelError(
            f"{index} says that {stale} is in {named[stale]}, which does not hold it: the index is that of other files; "
            "take index and shards of one model"
        )
    # A tensor that no index names is one too many, and is refused as such.
    tensors = {name: tensor for shard in shards for name, tensor in found[shard].items()}
    where = shards[0] if len(shards) == 1 else ""
    return tensors | {name: found[shard][name] for name, shard in named.items()}, str(folder / where)


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor, by an index."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("'weight_map' is not an object of names of files")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read the list of shards in {index}: {error!r}") from error


def common_dtype(tensors: Iterable[Stored]) -> str:
    """The type of most of the numbers, as config.json names it."""
    count: dict[str, int] = {}
    for tensor in tensors:
        count[tensor.kind] = count.get(tensor.kind, 0) + math.prod(tensor.shape)
    return {"BF16": "bfloat16", "F16": "float16"}.get(max(count, key=count.get, default=""), "float32")
