"""The problems that a run began with: a mark of each row in the run's folder, so that it goes on with the same or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.run.folder import RunError
from sdjax.run.storage.places import read_json, replace_text
from sdjax.tasks.splits import question_key
from sdjax.types import Example, Task

FILE = "data.json"


def mark(value: Any) -> str:
    """A short hash of a JSON-able value; of a dataclass in it (tests) its fields count, of anything else its kind."""
    known = lambda x: dataclasses.is_dataclass(x) and not isinstance(x, type)
    fields = lambda x: dataclasses.asdict(x) if known(x) else type(x).__name__
    text = json.dumps(value, sort_keys=True, default=fields)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def marked(example: Example) -> str:
    """The mark of everything that an example says."""
    said = (example.id, [dict(turn) for turn in example.prompt], example.answer, example.solution, example.feedback)
    return mark([*said, dict(example.meta)])


def asked(example: Example, task: Task) -> str:
    """The mark of a problem by which it must not be learned and held out at once: its question, without spacing and case.

    In a world the same words may begin other problems: there the answer and what the world knows count, too.
    """
    question = question_key(example.prompt)
    return mark(question if task.world is None else [question, example.answers, dict(example.meta)])


def described(task: Task) -> dict[str, Any]:
    """Marks of all rows in order, and of the held-out questions; how they were read."""
    questions = sorted({asked(example, task) for example in task.test})
    rows = {"train": [*map(marked, task.train)], "test": [*map(marked, task.test)], "held_out": questions}
    return {**rows, "read": dict(task.read)}


def check(folder: Path, task: Task) -> None:
    """Raises `RunError` if the run in the folder began with other problems or another order.

    Warns of held-out questions that are learned.
    """
    known = {asked(example, task) for example in task.test}
    learned = [example.id for example in task.train if asked(example, task) in known]
    if learned:
        warnings.warn(
            f"task {task.name}: {len(learned)} training rows ask held-out questions (the first is {learned[0]!r}): the "
            "accuracy on these says what was memorised",
            stacklevel=2,
        )
    try:
        begun = read_json(folder / FILE)
        changes = differences(begun, task)
    except (OSError, ValueError, KeyError, TypeError):  # begun by an earlier version, or not yet
        return
    if changes:
        raise RunError(
            f"{folder}: the problems are not those that the run began with: {'; '.join(changes)}: resume with the same "
            "data, or start a new run with --out"
        )


def differences(begun: Mapping[str, Any], task: Task) -> list[str]:
    """What has changed, in words; nothing if nothing has."""
    now, found = described(task), []
    for name, what, rows in (("train", "training rows", task.train), ("test", "held-out rows", task.test)):
        old, new = begun[name], now[name]
        if old == new:
            continue
        if len(old) != len(new):
            found.append(f"there were {len(old)} {what} and are {len(new)}")
        if sorted(old) == sorted(new):
            found.append(f"the {what} are in another order")
        else:
            known = {*old}
            strange = [row.id for row, own in zip(rows, new, strict=True) if own not in known]
            gone = len(known - {*new})
            found.append(
                f"{len(strange)} of the {what} are new or changed"
                + (f" (the first is {strange[0]!r})" if strange else "")
                + (f", and {gone} are no longer among them" if gone else "")
            )
    if begun.get("read", {}).get("judge") != now["read"].get("judge"):
        found.append("the judge's model, scores or rubric are others")
    held_out, trained = {*begun["held_out"]}, {*begun["train"]}
    moved = [row.id for row in task.train if asked(row, task) in held_out and marked(row) not in trained]
    if moved:
        found.append(f"{len(moved)} rows that were held out would be trained on (the first is {moved[0]!r})")
    return found


def write(folder: Path, task: Task) -> None:
    """Keeps the marks in the run's folder."""
    replace_text(folder / FILE, json.dumps(described(task)))
