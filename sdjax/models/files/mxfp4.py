"""MXFP4: numbers of four bits in blocks of 32 that share a power of two, as gpt-oss keeps its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.models.fields import ModelError
from sdjax.models.files.safetensors_files import Stored

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What four bits say: a sign, two bits of exponent, one of fraction."""

BLOCKS, SCALES = "_blocks", "_scales"


def unpacked(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors of a file in which each pair `NAME_blocks`, `NAME_scales` is the tensor `NAME`, `[E, in, out]`.

    `blocks [E, out, in / 32, 16]` hold two numbers to a byte, the lower bits first; `scales [E, out, in / 32]` are
    exponents of two, 127 more than they mean.  A slice of experts and outputs is all that is read for a slice of them.

    Raises: ModelError for a pair that does not fit.
    Source: Open Compute Project 2023, Microscaling Formats (MX) 1.0; gpt-oss's model card, arXiv:2508.10925.
    """
    found = dict(stored)
    for name in [name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)]:
        blocks, scales = found.pop(name + BLOCKS), found.pop(name + SCALES, None)
        if scales is None or blocks.shape != (*scales.shape, 16) or {blocks.kind, scales.kind} != {"U8"}:
            raise ModelError(
                f"{name}{BLOCKS} in {blocks.file} {list(blocks.shape)} has no {name}{SCALES} of its shape: expected "
                "blocks [experts, out, in / 32, 16] and scales [experts, out, in / 32], both of type U8"
            )
        experts, out, groups = scales.shape
        read = lambda index, blocks=blocks, scales=scales: part(blocks, scales, index)
        found[name] = Stored(blocks.file, (experts, 32 * groups, out), "BF16", read)
    return found


def part(blocks: Stored, scales: Stored, index: tuple[slice, ...]) -> np.ndarray:
    """A part `[experts, in, out]` of the tensor that blocks and scales make, in float32: exact."""
    experts, inputs, outputs = index
    bits, exponents = blocks.read((experts, outputs)), scales.read((experts, outputs))
    numbers = VALUES[np.stack([bits & 15, bits >> 4], axis=-1)]
    numbers = np.ldexp(numbers.reshape(*bits.shape[:3], 32), exponents.astype(np.int32)[..., None] - 127)
    return numbers.reshape(*bits.shape[:2], -1).swapaxes(1, 2)[:, inputs]


def is_mxfp4(section: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` asks for nothing else."""
    return section.get("quant_method") == "mxfp4"
