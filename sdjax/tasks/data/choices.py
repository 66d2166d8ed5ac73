"""Multiple choice: the choices of a row, written below its question, and the letter of the right one."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.tasks.data.fields import bad, unpacked

CHOICES = ("choices", "options")
RIGHT = ("answer", "answerKey", "label", "correct", "target", "answer_index")
"""Columns, the first that a row fills."""


class Asked(NamedTuple):
    """A question with its choices, the letter of the right one, and the columns of the choices and of the right one."""

    text: str
    letter: str
    column: str
    right: str


def asked(row: Mapping[str, Any], question: str, where: str) -> Asked | None:
    """The question of a row with its choices below it; `None` for a row without choices, or whose question holds them.

    Raises: `TaskError` where the answer is none of the choices.
    """
    column = next((name for name in CHOICES if labelled(row.get(name))), None)
    right = next((name for name in RIGHT if row.get(name) is not None), None)
    if column is None or right is None or not isinstance(row[question], str):
        return None
    choices = labelled(row[column])
    if all(text in row[question] for text in choices.values()):
        return None
    letter = letter_of(row[right], choices)
    if letter is None:
        raise bad(where, right, f"is {row[right]!r}, which is none of the choices in `{column}`")
    text = f"{row[question]}\n\n{listed(choices)}\n\nAnswer with the letter of the right choice."
    return Asked(text, letter, column, right)


def labelled(value: Any) -> dict[str, str]:
    """Choices by label: those of a list are A, B, ...; ARC's have labels of their own.  Empty where there are none."""
    value, labels = unpacked(value), None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or not 2 <= len(value) <= 26 or not all(isinstance(each, str) for each in value):
        return {}
    own = labels if isinstance(labels, list) and len(labels) == len(value) else string.ascii_uppercase
    return {str(label): text for label, text in zip(own, value, strict=False)}


def listed(choices: Mapping[str, str]) -> str:
    """The choices, one a line, each after its label; some data sets write that into the choice."""
    marked = all(
        text.lstrip("( ").startswith((f"{label})", f"{label}.", f"{label}:")) for label, text in choices.items()
    )
    return "\n".join(text if marked else f"{label}. {text}" for label, text in choices.items())


def letter_of(answer: Any, choices: Mapping[str, str]) -> str | None:
    """The label of the right choice, which is named by its label, its text, or its place from 0."""
    said, labels = str(answer).strip(), list(choices)
    if said in choices:
        return said
    named = next((label for label, text in choices.items() if text.strip() == said), None)
    placed = labels[int(said)] if said.isdecimal() and int(said) < len(labels) else None
    return placed if isinstance(answer, int) else named or placed
