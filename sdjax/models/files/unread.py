"""Parameters that still lie in their files: known by shape and type, read part by part where they are wanted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax.models.files.layout import Place
from sdjax.models.files.safetensors_files import Stored

FLOAT32 = np.dtype(np.float32)

BLOCK = 16 * 2**20
"""Bytes of a file that are converted at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """One of our parameters in the tensors of a file: `x[part]` reads that part and no more.

    It stands in an array's place where parameters are placed on devices (`sdjax.devices.sharding.place_parameters`);
    `numpy.asarray(x)` reads it whole.  Each device's part is read where it is wanted, in the wanted type.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[Place, Stored], ...]
    dtype: np.dtype = FLOAT32

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def astype(self, dtype: Any) -> Unread:
        """The same parameter, to be read as another type."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part `[slice, slice, ...]` (steps of 1; axes that are left out are whole)."""
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        box = [range(*some.indices(size)) for some, size in zip(index, self.shape, strict=True)]
        result = np.empty([len(some) for some in box], self.dtype)
        for place, stored in self.pieces:
            fill(result, box, place, stored)
        return result


def fill(result: np.ndarray, box: list[range], place: Place, stored: Stored) -> None:
    """Writes into `result`, the part `box` of our array, what one tensor of a file holds of it, block by block."""
    own, target = [], []
    for wanted, begin, end in zip(box, place.begins, place.ends, strict=True):
        first, end = max(wanted.start, begin), min(wanted.stop, end)
        if first >= end:
            return
        own.append(range(first - begin, end - begin))
        target.append(slice(first - wanted.start, end - wanted.start))
    part, order = result[tuple(target)], np.argsort(place.axes)
    part, view = part.transpose(order), [own[i] for i in order]
    outer = leading(place.view)
    row = 4 * math.prod(place.view) // place.view[outer]  # bytes of a file, about
    step = len(view[outer]) if stored.whole else max(1, BLOCK // max(row, 1))
    for start in range(0, len(view[outer]), step):
        some = view[outer][start : start + step]
        target = (slice(None),) * outer + (slice(start, start + len(some)),)
        part[target] = read_part(place, stored, [*view[:outer], some, *view[outer + 1 :]])


def leading(sizes: Sequence[int]) -> int:
    """The first axis of more than one entry (the last, if there is none): what a file's rows are rows of."""
    return next((i for i, size in enumerate(sizes) if size > 1), len(sizes) - 1)


def read_part(place: Place, stored: Stored, view: list[range]) -> np.ndarray:
    """A box of the file's tensor, seen with every axis apart: the smallest slice that covers it is read."""
    slices, within, shape, axis = [], [], [], 0
    for group in place.groups:
        sizes, some = place.view[axis : axis + group], view[axis : axis + group]
        outer = leading(sizes)
        inner, rows = math.prod(sizes[outer + 1 :]), some[outer]
        first = 0 if slices else place.row  # the tensor may hold other rows before
        slices.append(slice(first + rows.start * inner, first + rows.stop * inner))
        shape += [*sizes[:outer], len(rows), *sizes[outer + 1 :]]
        within += [slice(None)] * (outer + 1) + [slice(other.start, other.stop) for other in some[outer + 1 :]]
        axis += group
    return stored.read(tuple(slices)).reshape(shape)[tuple(within)]
