"""A synthetic task for tests: recall which word belongs to a key.

Nothing in the question tells the word, so a model without a hint can only guess, and a model that reads the solution
can copy it: the smallest setting in which a privileged context helps.  Made for a whitespace tokenizer.
"""

from __future__ import annotations

import random

from sdjax.tasks.answers import marks
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Task, Verdict

WORDS = ("red", "green", "blue", "black", "white", "pink", "gold", "grey")
"""The possible answers."""

ASKERS = ("ask", "tell", "find", "name")
"""The first words of questions; they mean nothing, and make train and test texts differ."""


def recall(*, keys: int = 16, seed: int = 0) -> Task:
    """Keys 0 .. `keys - 1`, each with one of 8 `WORDS`: prompt "ask key 17 ->", answer "red", solution "key 17 -> red".

    Each key is asked in four ways; one of them, another for each key in turn, is the test question: `3 * keys` train
    and `keys` test examples, every key and every asker seen in training, every test text new.  Words are used equally
    often.  Raises `TaskError` if `keys < 1`.
    """
    if keys < 1:
        raise TaskError(f"recall needs at least 1 key, got keys={keys}.")
    drawn = [WORDS[key % len(WORDS)] for key in range(keys)]
    random.Random(seed).shuffle(drawn)
    train, test = [], []
    for key, word in enumerate(drawn):
        for number, asker in enumerate(ASKERS):
            side = test if number == key % len(ASKERS) else train
            side.append(_example(key, word, asker))
    return Task("recall", tuple(train), tuple(test), verify)


def verify(example: Example, text: str) -> Verdict:
    """1 where the first word of the text is the answer; what follows it does not matter."""
    first = next(iter(text.split()), None)
    if first == example.answer:
        return Verdict(1.0)
    return Verdict(0.0, marks.NO_ANSWER if first is None else marks.outcome(first, example.answer))


def vocabulary(*, keys: int = 16) -> tuple[str, ...]:
    """All words that prompts, answers and solutions of `recall(keys=keys)` are made of, separated by single spaces."""
    return (*ASKERS, "key", *map(str, range(keys)), "->", *WORDS)


def _example(key: int, word: str, asker: str) -> Example:
    return Example(
        id=f"recall-{key}-{asker}",
        prompt=({"role": "user", "content": f"{asker} key {key} ->"},),
        answer=word,
        solution=f"key {key} -> {word}",
        meta={"key": key},
    )
