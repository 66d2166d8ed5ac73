"""Sequences that stay out of memory: their items lie in a temporary file and are read when they are asked for."""

from __future__ import annotations

import array
import pickle
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sdjax.tasks.errors import TaskError

Item = TypeVar("Item")

IN_MEMORY = 1 << 25
"""Bytes of items, pickled, that need no file."""


class Stored(Sequence[Item]):
    """Picklable items in the order in which they were added.

    Eight bytes per item stay in memory, and the items themselves up to `IN_MEMORY` bytes; more are moved to a temporary file
    without a name (in the folder `TMPDIR`), which is gone when the process is.  Every access gives a new, equal item; a slice
    is a view.

    Raises: `TaskError` where that folder is full or cannot be written.
    """

    def __init__(self, items: Iterable[Item] = ()):
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 # as long as the sequence is there
        weakref.finalize(self, self.file.close)
        self.ends, self.lock = array.array("Q"), threading.Lock()
        for item in items:
            self.add(item)

    def add(self, item: Item) -> None:
        """Adds an item behind all others."""
        content = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        start = self.ends[-1] if self.ends else 0
        try:
            with self.lock:
                self.file.seek(start)
                self.file.write(content)
        except OSError as error:
            raise TaskError(
                f"{tempfile.gettempdir()}: problems that exceed {IN_MEMORY >> 20} MiB are kept there while the command runs, and it "
                f"cannot be written ({error.strerror}); name another folder as TMPDIR, or read less with --first-rows."
            ) from None
        self.ends.append(start + len(content))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Chosen(self, range(len(self))[number])
        place = range(len(self))[number]
        start = self.ends[place - 1] if place else 0
        with self.lock:
            self.file.seek(start)
            content = self.file.read(self.ends[place] - start)
        return pickle.loads(content)

    def settled(self) -> Sequence[Item]:
        """The same items: a tuple of them where they need no file."""
        return self if self.ends and self.ends[-1] > IN_MEMORY else tuple(self)


class Chosen(Sequence[Item]):
    """The items of a sequence that have certain numbers, in the order of these; a slice is a view, too."""

    def __init__(self, items: Sequence[Item], numbers: Sequence[int]):
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Chosen(self.items, self.numbers[number])
        return self.items[self.numbers[number]]


def kept(items: Iterable[Item]) -> Sequence[Item]:
    """The items as a tuple, or `Stored` where they exceed `IN_MEMORY` bytes."""
    return Stored(items).settled()


def rows_at(items: Sequence[Item], numbers: Sequence[int]) -> Sequence[Item]:
    """The items that have certain numbers: of a tuple or list a tuple, of others a view."""
    return tuple(items[i] for i in numbers) if isinstance(items, tuple | list) else Chosen(items, numbers)
