"""Train and test share no question: keys of question texts, and a split by them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from sdjax.tasks.data.stored import rows_at
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Messages

Problem = TypeVar("Problem", bound=Hashable)


def question_key(prompt: Messages) -> str:
    """The text by which two questions are the same: all turns, without case and spacing."""
    return "\n".join(" ".join(turn["content"].split()).casefold() for turn in prompt)


def split_by_question(
    examples: Sequence[Example], fraction: float, seed: int = 0
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Examples as (train, test): a question goes to test where a hash of it and `seed` lies below `fraction`.

    What one question does depends on no other, so that it stays on its side when examples are added; the share is
    `fraction` up to chance.  Where no question is that low the lowest goes to test, and where all are the highest stays.
    Both are views of `examples` where these lie in a file.  Raises `TaskError` for a fraction that is none, or a single question.
    """
    if not 0 < fraction < 1:
        raise TaskError(f"test_fraction is {fraction}, but must lie between 0 and 1, both excluded.")
    places = np.fromiter((hashed(question_key(example.prompt), seed) for example in examples), float, len(examples))
    distinct = np.unique(places)
    if len(distinct) < 2:
        raise TaskError(
            f"test_fraction {fraction} of {len(distinct)} distinct questions leaves none to train on; "
            "give more questions, or a test file."
        )
    count = int((distinct < fraction).sum())
    held_out = places <= distinct[min(max(count, 1), len(distinct) - 1) - 1]
    return tuple(rows_at(examples, np.flatnonzero(side)) for side in (~held_out, held_out))


def hashed(key: str, seed: int) -> float:
    """A number in [0, 1) that a question's text and a seed have for ever."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()[:7]) / 2**56


def check_sizes(**sizes: int) -> None:
    """Raises `TaskError` for a set without any problem, by the name of its size."""
    for name, size in sizes.items():
        if size < 1:
            raise TaskError(f"{name}={size}: expected at least 1")


def drawn(
    name: str,
    draw: Callable[[random.Random], Problem],
    held_out: Callable[[Problem], bool],
    size: int,
    seed: int,
    *,
    test: bool = False,
) -> list[Problem]:
    """`size` distinct problems of those that `draw` makes: `held_out` ones for a test, others to train on.

    Raises: `TaskError` if so many are not found, with the `name` of these problems.
    """
    rng, found = random.Random(f"{name}:{seed}:{test}"), {}
    for _ in range(1000 * size):
        problem = draw(rng)
        if held_out(problem) == test:
            found[problem] = None
        if len(found) == size:
            return list(found)
    raise TaskError(f"there are only {len(found)} problems of {name} to be found, not {size}: ask for fewer")
