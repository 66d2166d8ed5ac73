"""From a file's bytes to its rows: JSON lines, JSON, CSV, Parquet and Arrow files, plain or compressed."""

from __future__ import annotations

import bz2
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sdjax.tasks.data.fields import kind
from sdjax.tasks.errors import TaskError


class Row(NamedTuple):
    """A row: where it stands in its file ("line 3"), and its object, or a text, or why it cannot be read."""

    place: str
    value: Any


WRAPPED = ("data", "rows", "examples", "problems", "questions", "instances", "train", "test")
"""Keys under which a JSON file that is one object may hold its rows."""

WHOLE = "; a file that is one list or one object must have the ending .json"

COMPRESSIONS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
BINARY = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
"""Endings by the first bytes of a file."""

UTF16 = "is UTF-16; save the file as UTF-8"
NO_ROWS = {
    b"pk\x03\x04": "is a ZIP archive or a spreadsheet; unpack it, or save it as CSV",
    b"version https://git-lfs": "is a pointer of Git LFS in place of the file; fetch it with `git lfs pull`",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
}
"""What files are that begin so (in small letters) and hold no rows."""


def rows_of(path: Path, *, texts: bool = False) -> Iterator[Row]:
    """The rows of a file, one at a time; `texts` may be rows.

    How it is read is said by its first bytes where they are those of a known format, else by its ending (JSON lines for
    endings that are not known).  The value of a row that cannot be read is a `TaskError`.

    Raises: `TaskError` for a file that cannot be read.
    """
    with opened(path) as stream:
        for row in reader_of(stream, path)(stream, path):
            if isinstance(row.value, Mapping | TaskError) or (texts and isinstance(row.value, str)):
                yield row
            else:
                expected = "expected a JSON object with `prompt` and `answer`"
                hint = WHOLE if isinstance(row.value, list) and row.place == "line 1" else ""
                yield Row(row.place, TaskError(f"{path}, {row.place}: {expected}, found {kind(row.value)}{hint}."))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed.  Raises: `TaskError` here, or later where the file turns out to be damaged."""
    try:
        with COMPRESSED.get(compression(path), plain)(path) as stream:
            yield stream
    except FileNotFoundError:
        raise TaskError(f"{path} does not exist; give the path of a file with one JSON object per line.") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise TaskError(f"{path} is damaged or cut off ({error}); get it again.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise TaskError(f"{path} cannot be read ({reason}); give the path of a readable file.") from None


def compression(path: Path) -> str:
    """The ending of the compression that a file has by its first bytes, whatever its name says; empty for none."""
    with open(path, "rb") as stream:
        start = stream.read(8)
    return next((ending for mark, ending in COMPRESSIONS.items() if start.startswith(mark)), "")


def reader_of(stream: BinaryIO, path: Path) -> Callable[[BinaryIO, Path], Iterator[Row]]:
    """What reads a file's rows.  Raises: `TaskError` for contents that are none of rows."""
    start = stream.peek(64)
    for mark, what in NO_ROWS.items():
        if start.lower().startswith(mark):
            raise TaskError(f"{path} {what}.")
    inner = path.stem if path.suffix.lower() in COMPRESSED else path.name
    ending = next((ending for mark, ending in BINARY.items() if start.startswith(mark)), Path(inner).suffix.lower())
    return READERS.get(ending, json_lines)


def plain(path: Path) -> BinaryIO:
    """A file that is not compressed."""
    return open(path, "rb")


def zstandard(path: Path) -> BinaryIO:
    """A file compressed by zstd."""
    return io.BufferedReader(arrow(path).input_stream(str(path), compression="zstd"))


def arrow(path: Path) -> Any:
    """The library for what Python cannot read itself.  Raises: `TaskError` if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise TaskError(f"{path} needs pyarrow; install it: pip install pyarrow.") from None
    return pyarrow


# ---- JSON -----------------------------------------------------------------------------------------------------------


def json_lines(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """One object a line; blank lines are passed over."""
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield Row(f"line {number}", parsed(line.rstrip(b"\r\n"), f"{path}, line {number}"))


def json_document(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A list of objects, an object that holds such a list, one object, or JSON lines under another name."""
    content = stream.read()
    try:
        whole = json.loads(content.decode("utf-8-sig"), object_pairs_hook=each_once)
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from json_lines(io.BytesIO(content), path)
            return
        place = f"line {error.lineno}, column {error.colno}"
        raise TaskError(f"{path}: this is not JSON ({error.msg} at {place}).") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: this is not JSON ({error}).") from None
    if isinstance(whole, dict):
        lists = [whole[name] for name in WRAPPED if isinstance(whole.get(name), list)]
        whole = lists[0] if lists else [whole]
    if not isinstance(whole, list):
        raise TaskError(f"{path}: expected a list of objects with `prompt` and `answer`, found {kind(whole)}.")
    for number, value in enumerate(whole, start=1):
        yield Row(f"row {number}", value)


def parsed(line: bytes, where: str) -> Any:
    """What a line says, or the `TaskError` that says why it cannot be read."""
    try:
        return json.loads(
            line.decode("utf-8"), object_pairs_hook=each_once, parse_constant=no_number, parse_float=finite
        )
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        return TaskError(f"{where}: {reason}, or skip bad rows.")
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = WHOLE if where.endswith(", line 1") else ""
        return TaskError(f"{where}: this is not JSON ({reason}); each line must be one JSON object{hint}.")


def each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of two values of one key nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def no_number(text: str) -> Any:
    """Refuses NaN and infinities."""
    raise ValueError(f"{text} is not a number in JSON; write it as a text, or leave the row out")


def finite(text: str) -> float:
    """A number, unless it is too large to be one."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} exceeds every number that can be computed with; write it as a text")
    return float(text)


# ---- tables ---------------------------------------------------------------------------------------------------------


ESCAPED = re.compile("[\udc80-\udcff]")
"""What stands for a byte that is not UTF-8."""


def comma_separated(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A table with a header; cells in quotes may hold line breaks.  Empty cells are left out.

    Cells are separated by what stands most often in the header: a comma, a semicolon or a tab.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    if first.startswith(("{", "[")):
        raise TaskError(f"{path}, line 1: this is JSON and no table; give the file the ending .jsonl or .json.")
    separator = max(",;\t", key=first.count)
    csv.field_size_limit(1 << 30)
    lines = csv.reader(chain_first(first, text), delimiter=separator, strict=True)
    header = [name.strip() for name in next(lines, [])]
    if len({*header}) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise TaskError(f"{path}, line 1: two columns have the name {twice!r}; rename one of them.")
    while True:
        place = f"line {lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            yield Row(place, TaskError(f"{path}, {place}: this is not CSV ({error}); are the quotes closed?"))
            continue
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            found = f"{len(cells)} cells, and the header names {len(header)} columns"
            yield Row(place, TaskError(f"{path}, {place}: found {found}; put cells with commas in quotes."))
        elif any(map(ESCAPED.search, cells)):
            yield Row(
                place, TaskError(f"{path}, {place}: this is not UTF-8; save the file as UTF-8, or skip bad rows.")
            )
        else:
            yield Row(place, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})


def chain_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    """A line that was read already, and those after it."""
    yield first
    yield from rest


def parquet(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A Parquet file, read a few rows at a time, and a part of each column: a row group may be all of the file."""
    arrow(path)
    from pyarrow.parquet import ParquetFile

    partly = {"buffer_size": 1 << 20, "pre_buffer": False}
    yield from numbered(lambda: ParquetFile(stream, **partly).iter_batches(batch_size=256), path)


def arrow_file(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """A file as the datasets library keeps it (a stream of batches), or Arrow's other form with a footer."""
    ipc = arrow(path).ipc

    def batches():
        start = stream.read(6)
        stream.seek(0)
        if start != b"ARROW1":
            return ipc.open_stream(stream)
        file = ipc.open_file(stream)
        return (file.get_batch(i) for i in range(file.num_record_batches))

    yield from numbered(batches, path)


def numbered(batches: Callable[[], Any], path: Path) -> Iterator[Row]:
    """The rows of Arrow batches.  Raises: `TaskError` for a file that is damaged."""
    number = 0
    try:
        for batch in batches():
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", {name: readable(each) for name, each in value.items()})
    except arrow(path).ArrowException as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise TaskError(f"{path} is damaged after row {number}, or of another kind ({reason}); get it again.") from None


def readable(value: Any) -> Any:
    """A value of a table as JSON has it: times and decimals as text, bytes left out."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [readable(each) for each in value]
    if isinstance(value, dict):
        return {str(name): readable(each) for name, each in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta | os.PathLike) else None


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstandard,
}

READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": comma_separated,
    ".tsv": comma_separated,
    ".parquet": parquet,
    ".arrow": arrow_file,
}
