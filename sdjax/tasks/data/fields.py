"""Fields of a row: found by name or dotted path, and checked, so that a bad one is refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sdjax.errors import nearest
from sdjax.tasks.errors import TaskError

FIELDS = ("prompt", "messages", "answer", "solution", "feedback", "id")
"""What an example is made of; `prompt` and `messages` are two forms of the same."""


def bad(where: str, field: str, what: str) -> TaskError:
    """The error of a field."""
    return TaskError(f"{where}: `{field}` {what}.")


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {bool: "true or false", str: "a text", dict: "an object", type(None): "null", int: "a number"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "a number")


def text(row: Mapping[str, Any], name: str, where: str, *, numbers: bool = False, said: str = "") -> str:
    """A field that must be a text with something in it, or a number where that is as good; `said` is its name in the file.

    Raises: `TaskError`.
    """
    said = said or name
    if name not in row:
        raise bad(where, said, f"is missing; found {', '.join(sorted(row)) or 'an empty object'}")
    value = row[name]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):  # a column of floats in Parquet; JSON has none
            raise bad(where, said, f"is {value}, which is no number that a verifier can compare; give it as a text")
        return str(value)
    if not isinstance(value, str):
        raise bad(where, said, f"must be a text{' or a number' if numbers else ''}; found {kind(value)}")
    if not value.strip():
        raise bad(where, said, "is empty; expected some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad(where, said, "holds half a surrogate pair, which no tokenizer can read; remove it") from None
    return value


def unpacked(value: Any) -> Any:
    """A text that is JSON of an object or a list as that; any other value as it is.  Tables keep nested values so."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def at(row: Mapping[str, Any], path: str, where: str) -> Any:
    """What stands at a dotted path, such as `reward_model.ground_truth` or `choices.0.text`.  Raises: `TaskError`."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        value = unpacked(value)
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            names = [str(name) for name in value] if isinstance(value, Mapping) else []
            raise bad(where, path, f"is missing; found {', '.join(sorted(names)) or kind(value)}{nearest(part, names)}")
    return value


def parsed_map(text: str) -> dict[str, str]:
    """`prompt=question,answer=reward_model.ground_truth` as a mapping from fields to columns.

    A field without a column (`id=`) is not read from any.  Raises: `TaskError` naming the option.
    """
    found: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, column = (each.strip() for each in part.partition("="))
        if not equals or (not column and name not in ("id", "solution", "feedback")):
            raise TaskError(f"--fields {text}: expected FIELD=COLUMN pairs, as prompt=question,answer=answer.")
        if name not in FIELDS:
            raise TaskError(
                f"--fields {text}: there is no field {name!r}{nearest(name, FIELDS)}; there are {', '.join(FIELDS)}."
            )
        if name in found:
            raise TaskError(f"--fields {text}: {name!r} is given twice.")
        found[name] = column
    if {"prompt", "messages"} <= {*found}:
        raise TaskError(f"--fields {text}: give `prompt` or `messages`, one of the two.")
    return found
