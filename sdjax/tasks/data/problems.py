"""Problems from files, folders and data sets of the hub: examples without duplicates, and tasks made of them."""

from __future__ import annotations

import array
import collections
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.tasks import maths
from sdjax.tasks.data.fields import at, bad, parsed_map
from sdjax.tasks.data.layouts import laid_out
from sdjax.tasks.data.readers import COMPRESSED, READERS, Row, rows_of
from sdjax.tasks.data.rows import example_of
from sdjax.tasks.data.sources import Source, source
from sdjax.tasks.data.stored import Stored, rows_at
from sdjax.tasks.errors import TaskError
from sdjax.tasks.splits import hashed, question_key, split_by_question
from sdjax.types import Example, Task, Verdict

Name = str | os.PathLike[str]
ReadRow = Callable[[Mapping[str, Any], str, str], Example]
"""Takes a row, where it stands and the id of a row without one; returns its example or raises `TaskError`."""


UNREAD = ("image", "images", "audio", "video", "videos", "tools")
"""Columns of pictures and sound, and of tools (where no system turn describes them), by name."""


class Problems(NamedTuple):
    """Examples in order, a sentence for each bad row that was left out, and what was read, for people and as JSON."""

    examples: Sequence[Example]
    bad: list[str]
    said: str
    about: Mapping[str, Any]


def problems(
    name: Name,
    *,
    split: str = "",
    config: str = "",
    fields: str = "",
    first: int = 0,
    skip_bad_rows: bool = False,
    duplicates: bool = False,
    read: ReadRow | None = None,
    prefer: Sequence[str] = ("train",),
) -> Problems:
    """All problems of a file, a folder or a data set of the hub.

    A row is an object with `prompt` (a text, or turns) or `messages` (turns that end with the user's), `answer` (a text, a
    number, or a list of them where several are right), and optionally `solution`, `feedback` and `id`; other fields go to
    `Example.meta`.  Rows of a known layout (`layouts.py`) are read as such; of a text to imitate there is no answer.  Rows
    are read one at a time, and of those that say the same the first is kept, beyond a size in a temporary file
    (`stored.Stored`).

    Args:
      name: JSON lines, JSON, CSV, Parquet or Arrow, plain or compressed; a folder of them; or a hub name, "openai/gsm8k".
      split, config: which part of a folder or data set, see `sources.source`; `prefer` are splits to take without one.
      fields: columns by field, as "prompt=question,answer=reward_model.ground_truth".
      first: read no more than so many rows; 0 reads all.
      skip_bad_rows: leave bad rows out.
      duplicates: keep rows that say the same as an earlier one.
      read: takes rows of another form; layouts do not count then.

    Raises: `TaskError` at the first bad row, naming file, row and field; for a file that is missing, or without problems.
    """
    files, chosen = source(os.fspath(name), split=split, config=config, prefer=prefer), parsed_map(fields)
    found, left_out, counted = Gathered(duplicates), [], collections.Counter()
    for path, row, default in numbered(files, first):
        where = f"{path}, {row.place}"
        counted["rows"] += 1
        try:
            if isinstance(row.value, TaskError):
                raise row.value
            example, layout = understood(row.value, where, default, chosen, read)
            added = found.add(example, where)
        except TaskError as error:
            if not skip_bad_rows:
                raise
            left_out.append(str(error))
        else:
            counted["duplicates"] += not added
            notes = [f"layout {layout}", *(f"unread {name}" for name in unread(row.value))]
            counted.update(notes if added else ())
            counted["unanswered"] += added and not example.answers
    if not found.examples:
        reason = f"all {len(left_out)} rows are bad; the first: {left_out[0]}" if left_out else "the file is empty."
        raise TaskError(f"{name} has no examples: {reason}")
    counted["contradicting"] = found.contradicting()
    about = description(files, counted, len(found.examples), len(left_out), fields)
    return Problems(found.examples.settled(), left_out, sentence(about), about)


class Gathered:
    """Examples as they are read: each with an id of its own and, unless `duplicates` are wanted, none that says the same."""

    def __init__(self, duplicates: bool):
        self.duplicates, self.examples, self.places = duplicates, Stored(), Stored()
        self.ids: dict[str, int] = {}
        self.seen: set[int] = set()
        self.asked, self.answered = array.array("Q"), array.array("Q")

    def add(self, example: Example, where: str) -> bool:
        """Takes an example that stands at a place, unless it says what an earlier one says.

        Raises: `TaskError` for an id that an earlier one has.
        """
        mark = said_by(example)
        if mark in self.seen and not self.duplicates:
            return False
        if example.id in self.ids:
            file = where.rsplit(", ", 1)[0]
            before = self.places[self.ids[example.id]].removeprefix(f"{file}, ")
            raise bad(where, "id", f"is {example.id!r}, which {before} has already; give each row its own id or none")
        self.seen.add(mark)
        self.ids[example.id] = len(self.examples)
        self.examples.add(example)
        self.places.add(where)
        self.asked.append(question_hash(example))
        self.answered.append(short_hash(f"{sorted(example.answers)} {self.asked[-1]}"))
        return True

    def contradicting(self) -> int:
        """How many answers there are, beyond one for each question; the order of several right ones does not count."""
        return len(np.unique(self.answered)) - len(np.unique(self.asked))


def understood(
    row: Mapping[str, Any], where: str, default: str, chosen: Mapping[str, str], read: ReadRow | None
) -> tuple[Example, str]:
    """The example of a row, and the layout that it was read in.  Raises: `TaskError`."""
    if read is not None:
        given = {name: at(row, column, where) for name, column in chosen.items() if column}
        return read({**row, **given}, where, default), "problems of programming"
    laid = laid_out(row, chosen, where)
    return example_of(laid.row, where, default, laid.names), laid.layout


def numbered(files: Source, first: int) -> Iterator[tuple[Path, Row, str]]:
    """The rows of all files, each with its file and an id."""
    many, count = len(files.files) > 1, 0
    stems = collections.Counter(stem(path) for path in files.files)
    for path in files.files:
        # Files of the same name lie in different folders.
        own = stem(path) if not many or stems[stem(path)] == 1 else f"{path.parent.name}/{stem(path)}"
        for row in rows_of(path):
            yield path, row, f"{own}:{row.place.rsplit(' ', 1)[1]}"
            count += 1
            if count == first:
                return


def stem(path: Path) -> str:
    """A file's name without the endings that say how it is read."""
    inner = path.stem if path.suffix.lower() in COMPRESSED else path.name
    return Path(inner).stem if Path(inner).suffix.lower() in READERS or inner == path.name else inner


def said_by(example: Example) -> int:
    """A hash of what an example asks and holds for right; its id and other columns do not count."""
    said = [[dict(t) for t in example.prompt], example.answers, example.solution, example.feedback]
    text = json.dumps([*said, repr(example.meta.get("tests"))], default=str)
    return short_hash(text, 16)


def short_hash(text: str, size: int = 8) -> int:
    """The first `size` bytes of a text's SHA-256, as a number."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:size])


def question_hash(example: Example) -> int:
    """Equal for two examples that ask the same question."""
    return short_hash(question_key(example.prompt))


def unread(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that belong to its question and that no model here reads."""
    filed = lambda value: isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()
    return [name for name, value in row.items() if value and (name in UNREAD or filed(value))]


def description(files: Source, counted: Mapping[str, int], kept: int, left_out: int, fields: str) -> dict[str, Any]:
    """What was read, as JSON has it."""
    hashes = []
    for path in files.files:
        with open(path, "rb") as stream:
            hashes.append({"name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()})
    chosen = {"split": files.split, "config": files.config, "revision": files.revision, "fields": fields}
    of_kind = lambda kind: {name.removeprefix(kind): n for name, n in counted.items() if name.startswith(kind)}
    notes = {name: counted[name] for name in ("contradicting", "unanswered")} | {"unread": of_kind("unread ")}
    return {
        "name": files.name,
        **{name: value for name, value in chosen.items() if value},
        "files": hashes,
        "rows": counted["rows"],
        "duplicates": counted["duplicates"],
        "bad": left_out,
        "problems": kept,
        "layouts": of_kind("layout "),
        **{name: value for name, value in notes.items() if value},
    }


def sentence(about: Mapping[str, Any]) -> str:
    """What was read, in one line."""
    part = ", ".join(f"{name} {about[name]}" for name in ("config", "split") if name in about)
    layouts = [f"{n} as {layout}" if len(about["layouts"]) > 1 else layout for layout, n in about["layouts"].items()]
    less = [
        f"{about[what]} {word} left out"
        for what, word in (("duplicates", "duplicates"), ("bad", "bad rows"))
        if about[what]
    ]
    files = f" in {len(about['files'])} files" if len(about["files"]) > 1 else ""
    counts = ", ".join([f"{about['problems']} problems of {about['rows']} rows{files}", *less])
    more = [f"{n} rows have `{name}`, which no model here reads" for name, n in about.get("unread", {}).items()]
    if "unanswered" in about:
        more += [
            f"{about['unanswered']} rows have no answer: their texts can be imitated, and no answer to them is right"
        ]
    if "contradicting" in about:
        more += [f"{about['contradicting']} rows answer a question of an earlier row otherwise, and both are kept"]
    return "; ".join(
        [f"{about['name']}{f' ({part})' if part else ''}: {counts}", f"read as {'; '.join(layouts)}", *more]
    )


# ---- tasks ----------------------------------------------------------------------------------------------------------


def task(
    name: Name,
    *,
    test: Name | None = None,
    test_split: str = "",
    test_fraction: float | None = None,
    seed: int = 0,
    verify: Callable[[Example, str], Verdict] = maths.verify,
    **how: Any,
) -> Task:
    """A task of `problems(name, **how)`, held out: another file, another split, or a share of the questions (default 0.1).

    Whether a question is held out depends on its text, the share and `seed` only: it stays where it is when a file grows.
    With `skip_bad_rows` bad rows are left out with one warning, and so are training rows whose question is in the test
    data.

    Raises: `TaskError` naming file, row and field.
    """
    held_out = os.fspath(test) if test is not None else os.fspath(name) if test_split else None
    if held_out is not None and test_fraction is not None:
        given = "a test split" if test is None else "test data"
        raise TaskError(f"Give either {given} or a test fraction, not both.")
    found = problems(name, **how)
    if held_out is None:
        fraction = 0.1 if test_fraction is None else test_fraction
        train, rest = split_by_question(found.examples, fraction, seed)
        warn_of(found.bad)
        kept = {"rule": "by a hash of each question", "fraction": fraction, "seed": seed}
        said = [f"{found.said}; {len(rest)} held out by a hash of their question, {len(train)} to train on"]
        if min(hashed(question_key(example.prompt), seed) for example in rest) >= fraction:
            said += ["no hash was low enough in so few questions: the lowest is held out, until there are more"]
        read = {"said": said, "train": found.about, "split": kept}
    else:
        how = {**how, "split": test_split, "first": 0}
        other = problems(held_out, **how, prefer=("test", "validation", "train"))
        rest, skip = other.examples, how.get("skip_bad_rows", False)
        train, shared = without_test_questions(found.examples, rest, name, held_out, skip)
        warn_of([*found.bad, *other.bad, *shared])
        read = {"said": [found.said, f"held out: {other.said}"], "train": found.about, "test": other.about}
    return Task(stem(Path(name)), train, rest, verify, read)


def without_test_questions(
    train: Sequence[Example], test: Sequence[Example], name: Name, test_name: Name, skip: bool
) -> tuple[Sequence[Example], list[str]]:
    """The examples whose question is not in the test data, and a sentence for each other.  Raises: `TaskError`."""
    held_out = {question_hash(example) for example in test}
    shared = np.fromiter((question_hash(example) in held_out for example in train), bool, len(train))
    if not shared.any():
        return train, []
    kept, left_out = rows_at(train, np.flatnonzero(~shared)), rows_at(train, np.flatnonzero(shared))
    said = f"{name}: the question of row {left_out[0].id!r} is in {test_name} too ({len(left_out)} such rows)"
    if not skip or not kept:
        raise TaskError(f"{said}; remove them from one of the files, or leave them out with --skip-bad-rows.")
    return kept, [f"{name}: the question of row {example.id!r} is in {test_name} too." for example in left_out]


def warn_of(sentences: Sequence[str]) -> None:
    """Warns of rows that were left out."""
    if sentences:
        warnings.warn(f"{len(sentences)} rows were left out; the first: {sentences[0]}", stacklevel=4)
