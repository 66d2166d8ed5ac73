"""What methods remember by key (a text per problem, say): more of it makes neither a step nor a checkpoint slower."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sdjax.errors import InputError

SUPERSEDED = 1000
"""A log may have so many entries that later ones have replaced, and beyond that as many as there are keys."""

Path = tuple[str, ...]
"""Where something stands in nested dictionaries."""


class RememberedError(InputError, TypeError):
    """A method would remember what a JSON file cannot hold."""


class Remembered(Mapping[str, Any]):
    """A mapping of JSON values that is never changed in place: `memory | {key: value}` is one with more entries.

    That takes time for the new entries, and none for those that are there: versions share one `log`, of which the first
    `length` entries are this version's.  Values are those that a JSON file gives back, and are not to be changed.
    """

    def __init__(self, entries: Mapping[str, Any] | None = None):
        self.log: list[tuple[str, Any]] = []
        self.places: dict[str, list[int]] = {}  # of each key in the log, oldest first
        self.length = self.count = 0
        if entries:
            self.__dict__ |= vars(self | entries)

    def __or__(self, more: Mapping[str, Any]) -> Remembered:
        """This and more; of equal keys the later value counts.  Raises: RememberedError."""
        try:
            entries = json.loads(json.dumps(dict(more)))
        except (TypeError, ValueError) as error:
            raise RememberedError(f"what a method remembers cannot be saved as JSON: {error}") from error
        found = Remembered()
        newest, short = len(self.log) == self.length, self.length <= 2 * self.count + SUPERSEDED
        if newest and short:
            found.__dict__ |= vars(self)
        else:  # a log of its own, without what was replaced
            found.append(self)
        found.append(entries)
        return found

    def append(self, entries: Mapping[str, Any]) -> None:
        """Appends to the log: for `|` alone, while nobody else has this version."""
        for key, value in entries.items():
            places = self.places.setdefault(key, [])
            self.count += not places
            places.append(self.length)
            self.log.append((key, value))
            self.length += 1

    def __getitem__(self, key: str) -> Any:
        place = next((p for p in reversed(self.places.get(key, ())) if p < self.length), None)
        if place is None:
            raise KeyError(key)
        return self.log[place][1]

    def __iter__(self) -> Iterator[str]:
        return iter([key for key, places in self.places.items() if places[0] < self.length])

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Remembered({dict(self)!r})"


def apart(tree: Any, path: Path = ()) -> tuple[Any, dict[Path, Remembered]]:
    """A tree of dictionaries with `None` in place of what is remembered by key; and that, by where it stood."""
    if isinstance(tree, Remembered):
        return None, {path: tree}
    if not isinstance(tree, dict):
        return tree, {}
    bare, found = {}, {}
    for name, part in tree.items():
        bare[name], below = apart(part, (*path, str(name)))
        found |= below
    return bare, found


def together(tree: Any, found: Mapping[Path, Remembered]) -> Any:
    """The tree that `apart` took apart, changed in place."""
    for path, part in found.items():
        if not path:
            return part
        place = tree
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = part
    return tree


def like(tree: Any, initial: Any) -> Any:
    """A tree whose dictionaries are remembered by key where they are initially: checkpoints of earlier versions had none."""
    if isinstance(initial, Remembered):
        return tree if isinstance(tree, Remembered) else Remembered(tree)
    if isinstance(initial, dict) and isinstance(tree, dict):
        return {name: like(part, initial.get(name)) for name, part in tree.items()}
    return tree
