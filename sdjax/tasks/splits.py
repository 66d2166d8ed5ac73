"""Train and test share no question: keys of question texts, and a split by them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Messages


def question_key(prompt: Messages) -> str:
    """The text by which two questions are the same: all turns, without case and spacing."""
    return "\n".join(" ".join(turn["content"].split()).casefold() for turn in prompt)


def split_by_question(
    examples: Sequence[Example], fraction: float, seed: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Examples as (train, test); `fraction` of the distinct questions, at least one, goes to test.

    Depends on texts, fraction and seed only, not on the order of the examples.  All examples of a question stay
    together.  Raises `TaskError` where either side would be empty.
    """
    if not 0 < fraction < 1:
        raise TaskError(f"test_fraction is {fraction}, but must lie between 0 and 1, both excluded.")

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}:{key}".encode()).digest()

    keys = sorted({question_key(example.prompt) for example in examples}, key=rank)
    count = max(1, round(fraction * len(keys)))
    if count >= len(keys):
        raise TaskError(
            f"test_fraction {fraction} of {len(keys)} distinct questions leaves none to train on; "
            "give more questions, a smaller fraction or a test file."
        )
    held_out = set(keys[:count])
    sides = [question_key(example.prompt) in held_out for example in examples]
    train = tuple(example for example, is_test in zip(examples, sides, strict=True) if not is_test)
    return train, tuple(example for example, is_test in zip(examples, sides, strict=True) if is_test)
