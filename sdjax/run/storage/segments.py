"""What a method remembers by key, in files beside the checkpoints: each save writes what is new, not what there is.

`checkpoints/remembered/STEP.jsonl` has the entries that are new in the save of that step, one JSON line each: the number
of the mapping, key, value.  It is written in one go before the manifest, which names the files that together hold
everything, oldest first.  A file is merged into the next one that is as long: of n entries there are about log2 n files,
and each entry is written about as often.  What no manifest names, after a kill say, is removed after the next save.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.collect import remembered
from sdjax.collect.remembered import Remembered
from sdjax.run.storage import manifest, places

FOLDER = "remembered"


class Segment(NamedTuple):
    """One file: its name, how long it is, what is in it, and which part of each log it has."""

    name: str
    size: int
    crc: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def entries(self) -> int:
        """How many entries it has."""
        return sum(self.ends) - sum(self.starts)


class Segments:
    """The files of one run, as far as this process has written them; the first save of a process writes everything."""

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        self.logs: dict[remembered.Path, list] = {}
        self.written: list[Segment] = []
        self.named: dict[int, set[str]] = {}

    def write(self, step: int, found: Mapping[remembered.Path, Remembered]) -> dict[str, Any]:
        """Writes what is new in a step's save; returns what its manifest says of it."""
        logs = {path: part.log for path, part in found.items()}
        if logs.keys() != self.logs.keys() or any(logs[path] is not self.logs[path] for path in logs):
            self.logs, self.written = logs, []
        ends = tuple(part.length for part in found.values())
        kept, starts = list(self.written), self.written[-1].ends if self.written else (0,) * len(ends)
        while kept and starts != ends and kept[-1].entries() <= sum(ends) - sum(starts):
            starts = kept.pop().starts
        if starts != ends:
            kept.append(self.segment(f"{step}.jsonl", list(logs.values()), starts, ends))
        self.written = kept
        return {"paths": [list(path) for path in found], "files": [[s.name, s.size, s.crc] for s in kept]}

    def segment(self, name: str, logs: Sequence[list], starts: tuple[int, ...], ends: tuple[int, ...]) -> Segment:
        """Writes a part of each log into a file."""
        parts = enumerate(zip(logs, starts, ends, strict=True))
        lines = [json.dumps([number, *entry]) + "\n" for number, (log, a, b) in parts for entry in log[a:b]]
        text = "".join(lines)
        places.make(self.folder)
        places.replace_text(self.folder / name, text)
        return Segment(name, len(text), zlib.crc32(text.encode()), starts, ends)

    def prune(self, steps: Sequence[int]) -> None:
        """Removes the files that the manifests of these steps do not name."""
        if not self.written:
            return
        for step in {*steps}.difference(self.named):
            self.named[step] = {name for name, *_ in manifest.read(self.folder.parent, step).get(FOLDER, NONE)["files"]}
        self.named = {step: self.named[step] for step in steps}
        for name in {*places.names(self.folder)}.difference(*self.named.values()):
            places.remove(self.folder / name)


NONE: dict[str, Any] = {"paths": [], "files": []}
"""What a manifest says where nothing is remembered by key."""


def entries(folder: Path, told: Mapping[str, Any]) -> list[list]:
    """`[number of the mapping, key, value]` of everything that a manifest's files hold, in order.

    Raises `OSError` or `ValueError` if a file is not what was written.
    """
    found = []
    for name, size, crc in told["files"]:
        file = folder / FOLDER / name
        if not file.exists():
            raise ValueError(f"{FOLDER}/{name} is missing")
        text = file.read_bytes()
        if (len(text), zlib.crc32(text)) != (size, crc):
            raise ValueError(f"{FOLDER}/{name} does not match its checksum")
        found += map(json.loads, text.splitlines())
    return found


def mappings(told: Mapping[str, Any], found: Sequence[list]) -> dict[remembered.Path, Remembered]:
    """What was remembered by key, made of its entries, by where it stood."""
    parts = [Remembered() for _ in told["paths"]]
    for number, key, value in found:
        parts[number].append({key: value})
    return {tuple(path): part for path, part in zip(told["paths"], parts, strict=True)}
