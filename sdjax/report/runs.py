"""What a report reads: run folders, their numbers and their rollouts, with one sentence for each thing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import InputError
from sdjax.run.logs.records import ROLLOUTS
from sdjax.run.storage import places

Curve = dict[int, float]
"""A number per step."""


class ReportError(InputError, ValueError):
    """A report cannot be made; the message says which file and why."""


class Run(NamedTuple):
    """A run folder as read: what was asked, what was logged in each step and evaluation, rollouts, and alarms."""

    folder: Path
    arguments: dict[str, Any]
    steps: dict[str, Curve]
    evaluations: dict[str, Curve]
    rollouts: list[dict[str, Any]]
    alarms: Sequence[dict[str, Any]] = ()

    @property
    def last(self) -> int:
        """The last finished step."""
        return max(step for curve in self.steps.values() for step in curve)


def read_run(folder: str | Path) -> Run:
    """Reads a run folder, finished or not.

    Raises `ReportError` if it is no run, has no finished step, or a line of it is damaged (with file and line).
    """
    folder = places.place(folder)
    places.try_reading(folder)
    arguments = read_arguments(folder)
    metrics = read_lines(folder / "metrics.jsonl", check_metrics)
    told = [line for line in metrics if "evaluation" not in line]
    if not told:
        raise ReportError(f"{folder} has no finished step: wait for its first one, or go on with --resume")
    asked = [{"step": line["step"], **line["evaluation"]} for line in metrics if "evaluation" in line]
    rollouts = read_lines(folder / ROLLOUTS, check_rollout)
    alarms = read_lines(folder / "alarms.jsonl", check_alarm)
    return Run(folder, arguments, curves(told), curves(asked), rollouts, alarms)


def read_arguments(folder: Path) -> dict[str, Any]:
    """What a run was asked for."""
    file = folder / "arguments.json"
    if not file.is_file():
        what = "is not a run folder (arguments.json is missing)" if folder.is_dir() else "does not exist"
        raise ReportError(f"{folder} {what}: name a folder that `sdjax train` has written")
    try:
        arguments = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} cannot be read: {error}") from error
    if not isinstance(arguments, dict):
        raise ReportError(f"{file}: expected an object, found {type(arguments).__name__}")
    # A run that no command has started says nothing of itself: then its folder's name tells it from others.
    return arguments or {"experiment": folder.absolute().name}


def read_lines(file: Path, check: Callable[[Any], str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file.  `check` says what is wrong with one, or nothing.

    A last line without its end is still being written and counts for nothing.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            value = json.loads(line)
            wrong = check(value)
        except ValueError as error:
            wrong = str(error)
        except RecursionError:
            wrong = "nested too deeply"
        if wrong:
            raise ReportError(f"{file}, line {number} is damaged ({wrong}): remove the line and try again")
        found.append(value)
    return found


def is_number(value: Any) -> bool:
    """Numbers of JSON, and `null`, which stands for those that were not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def check_metrics(line: Any) -> str:
    """What is wrong with a line of `metrics.jsonl`."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return "expected an object with a whole number `step`"
    values = line.get("evaluation", line)
    if not isinstance(values, dict):
        return "expected numbers under `evaluation`"
    return next((f"{name} is not a number" for name, value in values.items() if not is_number(value)), "")


def check_alarm(line: Any) -> str:
    """What is wrong with a line of `alarms.jsonl`."""
    fine = isinstance(line, dict) and type(line.get("step")) is int
    fine = fine and all(isinstance(line.get(name), str) for name in ("kind", "says"))
    return "" if fine else "expected an object with a whole number `step` and texts `kind` and `says`"


KINDS: dict[str, type] = dict.fromkeys(("id", "text"), str)
KINDS |= dict.fromkeys(("group", "source"), int) | {"finished": bool}
KINDS |= dict.fromkeys(("tokens", "pieces", "logprobs", "rewards"), list)
KINDS |= dict.fromkeys(("contexts", "extras", "policies"), dict)
"""What stands in a line of `rollouts.jsonl`."""


def check_rollout(line: Any) -> str:
    """What is wrong with a line of `rollouts.jsonl`."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return "expected an object with a whole number `step`"
    for name, kind in KINDS.items():
        if type(line.get(name)) is not kind:
            return f"expected {name} to be {kind.__name__}"
    length, trained = len(line["tokens"]), line.get("trained")
    texts = [*line["pieces"], *line["policies"].values(), line.get("feedback") or ""]
    extras = [x for value in line["extras"].values() for x in (value if isinstance(value, list) else [value])]
    checks = {
        "tokens, pieces and logprobs differ in length": len(line["pieces"]) == len(line["logprobs"]) == length,
        "tokens are whole numbers": all(type(token) is int for token in line["tokens"]),
        "pieces, policies and feedback are texts": all(isinstance(text, str) for text in texts),
        "logprobs and rewards are numbers": all(
            map(is_number, [*line["logprobs"], *line["rewards"], line.get("reward")])
        ),
        "extras are numbers": all(isinstance(x, bool) or is_number(x) for x in extras),
        "trained has a truth value per token": trained is None
        or (isinstance(trained, list) and len(trained) == length and all(isinstance(x, bool) for x in trained)),
        "a context is a list of turns": all(chat is None or is_chat(chat) for chat in line["contexts"].values()),
    }
    return next((wrong for wrong, fine in checks.items() if not fine), "")


def is_chat(value: Any) -> bool:
    """Turns that have a role and a content; what is privileged of them is text, too."""
    of = lambda turn: (turn.get("role"), turn.get("content"), turn.get("privileged", ""))
    return isinstance(value, list) and all(
        isinstance(turn, dict) and all(isinstance(text, str) for text in of(turn)) for turn in value
    )


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """`{name: {step: value}}`; numbers that were not finite are left out."""
    found: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, {})[line["step"]] = float(value)
    return found
