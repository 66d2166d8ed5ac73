"""Tasks from files: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sdjax.tasks import maths
from sdjax.tasks.errors import TaskError
from sdjax.tasks.splits import question_key, split_by_question
from sdjax.types import Example, Messages, Task, Verdict

ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "messages", "answer", "solution", "feedback", "id")

Path = str | os.PathLike[str]
ReadRow = Callable[[Mapping[str, Any], str, str], Example]
"""Takes a row, where it stands and the id of a row without one; returns its example or raises `TaskError`."""


def jsonl(
    path: Path,
    *,
    test_path: Path | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    verify: Callable[[Example, str], Verdict] = maths.verify,
    skip_bad_rows: bool = False,
    read: ReadRow | None = None,
) -> Task:
    """A task from a file of problems, and another file or a fraction of the questions (default 0.1) to test on.

    A line is an object with `prompt` (a text) or `messages` (turns with role and content, the last one the user's),
    `answer` (a text, a number, or a list of them where several are right), and optionally `solution`, `feedback` and `id`; other fields go to `Example.meta`.  The split is by
    question text and depends on texts, fraction and `seed` only.  With `skip_bad_rows` bad rows are left out with one
    warning (`read_jsonl` lists them), and so are train rows whose question is in the test file.  `read` takes rows of
    another form.

    Raises: `TaskError` naming file, line and field.
    """
    if test_path is not None and test_fraction is not None:
        raise TaskError("Give either test_path or test_fraction, not both.")
    train, bad = read_jsonl(path, skip_bad_rows=skip_bad_rows, read=read)
    if test_path is None:
        _warn_of(bad)
        train, test = split_by_question(train, 0.1 if test_fraction is None else test_fraction, seed)
    else:
        test, bad_test = read_jsonl(test_path, skip_bad_rows=skip_bad_rows, read=read)
        train, shared = _without_test_questions(train, test, path, test_path, skip_bad_rows)
        _warn_of((*bad, *bad_test, *shared))
    return Task(pathlib.Path(path).stem, tuple(train), tuple(test), verify)


def read_jsonl(
    path: Path, *, skip_bad_rows: bool = False, read: ReadRow | None = None
) -> tuple[tuple[Example, ...], list[str]]:
    """All examples of a file, and one sentence for each bad row that was left out (none unless `skip_bad_rows`).

    Blank lines are ignored.  Raises: `TaskError` at the first bad row, for a file that is missing, or without examples.
    """
    read, examples, bad, ids = read or example_of, [], [], {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            example = read(_parsed(line, where), where, f"{pathlib.Path(path).stem}:{number}")
            if example.id in ids:
                expected = f"is {example.id!r}, which line {ids[example.id]} has already"
                raise _bad(where, "id", f"{expected}; give each row its own id or none")
        except TaskError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
        else:
            ids[example.id] = number
            examples.append(example)
    if not examples:
        reason = f"all {len(bad)} rows are bad; the first: {bad[0]}" if bad else "the file is empty."
        raise TaskError(f"{path} has no examples: {reason}")
    return tuple(examples), bad


def parsed_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line that is not blank stands, and the object or the text in it.  Raises `TaskError`."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where, texts=True)


def _lines(path: Path) -> list[bytes]:
    try:
        return pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise TaskError(f"{path} does not exist; give the path of a file with one JSON object per line.") from None
    except OSError as error:
        raise TaskError(f"{path} cannot be read ({error.strerror}); give the path of a readable file.") from None


def _parsed(line: bytes, where: str, texts: bool = False) -> Any:
    try:
        row = json.loads(
            line.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_no_number, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        raise TaskError(f"{where}: {reason}, or skip bad rows.") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise TaskError(f"{where}: this is not JSON ({reason}); each line must be one JSON object.") from None
    if not isinstance(row, dict) and not (texts and isinstance(row, str)):
        raise TaskError(f"{where}: expected a JSON object with `prompt` and `answer`, found {_kind(row)}.")
    return row


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of two values of one key nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON; write it as a text, or leave the row out")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} exceeds every number that can be computed with; write it as a text")
    return float(text)


def example_of(row: Mapping[str, Any], where: str, default_id: str) -> Example:
    """The example of a row; `where` stands in the sentence of a `TaskError`."""
    optional = {name: _text(row, name, where) for name in ("solution", "feedback") if row.get(name) is not None}
    return Example(
        id=_text(row, "id", where, numbers=True) if row.get("id") is not None else default_id,
        prompt=prompt_of(row, where),
        answer=_answer(row, where),
        meta={name: value for name, value in row.items() if name not in FIELDS},
        **optional,
    )


def _answer(row: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
    """The right answer, or all of them where the field is a list."""
    answer = row.get("answer")
    if not isinstance(answer, list) or not answer:
        return _text(row, "answer", where, numbers=True)
    named = {f"answer, number {i}": each for i, each in enumerate(answer, start=1)}
    return tuple(_text(named, name, where, numbers=True) for name in named)


def prompt_of(row: Mapping[str, Any], where: str) -> Messages:
    """The chat of a row.  Raises `TaskError`."""
    if ("prompt" in row) == ("messages" in row):
        found = "both are there" if "prompt" in row else f"found only {', '.join(sorted(row)) or 'an empty object'}"
        raise _bad(where, "prompt", f"or `messages` must be given, one of the two; {found}")
    if "prompt" in row:
        return ({"role": "user", "content": _text(row, "prompt", where)},)
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise _bad(where, "messages", f"must be a list of turns, each with `role` and `content`; found {_kind(turns)}")
    for position, turn in enumerate(turns, start=1):
        field = f"messages, turn {position}"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            found = f"the fields {', '.join(sorted(turn)) or '(none)'}" if isinstance(turn, dict) else _kind(turn)
            raise _bad(where, field, f"must be an object with `role` and `content`; found {found}")
        if turn["role"] not in ROLES:
            raise _bad(where, field, f"has the role {turn['role']!r}; expected one of {', '.join(ROLES)}")
        _text(turn, "content", f"{where}, turn {position}")
    if turns[-1]["role"] != "user":
        raise _bad(where, "messages", f"must end with a user turn; the last turn is the {turns[-1]['role']}'s")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _text(row: Mapping[str, Any], name: str, where: str, numbers: bool = False) -> str:
    """A field that must be a text with something in it, or a number where that is as good."""
    if name not in row:
        raise _bad(where, name, f"is missing; found {', '.join(sorted(row)) or 'an empty object'}")
    value = row[name]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _bad(where, name, f"is {value}, which is no number that a verifier can compare; give it as a text")
        return str(value)
    if not isinstance(value, str):
        raise _bad(where, name, f"must be a text{' or a number' if numbers else ''}; found {_kind(value)}")
    if not value.strip():
        raise _bad(where, name, "is empty; expected some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(where, name, "holds half a surrogate pair, which no tokenizer can read; remove it") from None
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", str: "a text", dict: "an object", type(None): "null", int: "a number"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "a number")


def _bad(where: str, field: str, what: str) -> TaskError:
    return TaskError(f"{where}: `{field}` {what}.")


def _without_test_questions(train, test, path: Path, test_path: Path, skip: bool) -> tuple[list[Example], list[str]]:
    held_out = {question_key(example.prompt) for example in test}
    kept = [example for example in train if question_key(example.prompt) not in held_out]
    if len(kept) == len(train):
        return kept, []
    shared = [example for example in train if question_key(example.prompt) in held_out]
    sentence = f"{path}: the question of row {shared[0].id!r} is in {test_path} too ({len(shared)} such rows)"
    if not skip or not kept:
        raise TaskError(f"{sentence}; remove them from one of the files.")
    return kept, [f"{path}: the question of row {example.id!r} is in {test_path} too." for example in shared]


def _warn_of(bad) -> None:
    if bad:
        warnings.warn(f"{len(bad)} rows were left out; the first: {bad[0]}", stacklevel=3)
