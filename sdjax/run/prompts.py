"""Which examples a step gets, and in which order: shuffled, in rounds, from a position that is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain

from sdjax.types import Example

ENDLESS = 1 << 62
"""Examples of a run, at most.  Without an end grain's own count overflows in batches of one."""


class Prompts:
    """Examples in shuffled order, epoch after epoch, `size` at a time.

    `take()` is a step's batch, each `rounds` times in a row; `more()` is a batch that no step has had or will have,
    wherever in its rounds the present one is.  The position is part of the saved state.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int, rounds: int = 1):
        epochs = ENDLESS // max(1, len(examples))
        order = grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat(epochs).batch(size)
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # indices need no threads
        self.examples, self.iterator = examples, iter(order.to_iter_dataset(reading))
        self.rounds, self.left, self.present = rounds, 0, []

    def next_batch(self) -> list[int]:
        return [int(i) for i in next(self.iterator)]

    def take(self) -> list[Example]:
        if not self.left:
            self.left, self.present = self.rounds, self.next_batch()
        self.left -= 1
        return [self.examples[i] for i in self.present]

    def more(self) -> list[Example]:
        return [self.examples[i] for i in self.next_batch()]

    def position(self) -> Any:
        return {"next": self.iterator.get_state(), "left": self.left, "present": self.present}

    def go_to(self, position: Any) -> None:
        self.iterator.set_state(position["next"])
        self.left, self.present = position["left"], list(position["present"])
