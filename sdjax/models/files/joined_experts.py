"""All experts of a layer in one tensor, as Qwen3.5-MoE is published, seen as the tensors of each expert."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from sdjax.models.files.safetensors_files import Stored

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def apart(stored: Mapping[str, Stored], wanted: Collection[str]) -> dict[str, Stored]:
    """Tensors of a file in which `experts.gate_up_proj` and `experts.down_proj` are those of each expert, if such are wanted.

    `gate_up_proj [E, 2 F, D]` holds every expert's gates `[F, D]` above its inputs `[F, D]`, `down_proj [E, D, F]` the rest.
    A part of an expert is all that is read for it.  Families that keep them together themselves (gpt-oss) are left alone.
    """
    found = dict(stored)
    for name, whole in stored.items():
        stem = name.removesuffix(GATE_UP).removesuffix(DOWN) + ".experts"
        if not name.endswith((GATE_UP, DOWN)) or len(whole.shape) != 3 or f"{stem}.0.down_proj.weight" not in wanted:
            continue
        parts = ("gate_proj", "up_proj") if name.endswith(GATE_UP) else ("down_proj",)
        del found[name]
        for expert in range(whole.shape[0]):
            for number, part in enumerate(parts):
                found[f"{stem}.{expert}.{part}.weight"] = matrix(whole, expert, number, len(parts))
    return found


def matrix(whole: Stored, expert: int, number: int, parts: int) -> Stored:
    """One expert's matrix of the `parts` that lie above one another in `whole [E, rows, columns]`."""
    rows, columns = whole.shape[1] // parts, whole.shape[2]

    def read(index: tuple[slice, slice]) -> np.ndarray:
        start, end, _ = index[0].indices(rows)
        return whole.read((slice(expert, expert + 1), slice(number * rows + start, number * rows + end), index[1]))[0]

    return Stored(whole.file, (rows, columns), whole.kind, read)
