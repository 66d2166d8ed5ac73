"""The mark of a whole checkpoint: `checkpoints/<step>.json`, written last and in one go.

It lists the files of `checkpoints/<step>/` with their sizes, the arrays with their shapes and digests
(`sdjax.run.storage.digests`), the host's half of the state, and a checksum of all that.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.run.storage import places


def steps(folder: Path) -> list[int]:
    """The steps of all complete checkpoints in a folder, oldest first."""
    stems = (name.removesuffix(".json") for name in places.names(folder) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def write(folder: Path, step: int, content: Mapping[str, Any]) -> None:
    """Declares a step's checkpoint whole."""
    places.replace_text(folder / f"{step}.json", json.dumps({**content, "checksum": checksum(content)}))


def read(folder: Path, step: int) -> dict[str, Any]:
    """What the manifest of a step says.  Raises `ValueError` if it is not what was written."""
    content = places.read_json(folder / f"{step}.json")
    if not isinstance(content, dict) or content.pop("checksum", None) != checksum(content) or not content["files"]:
        raise ValueError(f"{step}.json does not match its checksum")
    return content


def checksum(content: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest's text."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def difference(folder: Path, step: int, content: Mapping[str, Any]) -> str:
    """The first file of a checkpoint that is not as its manifest says, in words; empty if all are.

    Its bytes are read in checkpoints of earlier versions alone, which have no digests of their arrays.
    """
    target, wanted = folder / str(step), content["files"]
    found = places.listing(target) if "digests" in content else checksums(target)
    for name in sorted({*wanted, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was not there"
        (size, sum_), (size_then, sum_then) = found[name], wanted[name]
        if size != size_then:
            return f"{name} has {size} bytes of {size_then}"
        if sum_ != sum_then and None not in (sum_, sum_then):
            return f"{name} does not match its checksum"
    return ""


def checksums(folder: Path) -> dict[str, list]:
    """`{relative path: [bytes, CRC-32]}` of every file below a folder."""
    sums = {}
    for name, (size, _) in places.listing(folder).items():
        crc = 0
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        sums[name] = [size, crc]
    return sums
