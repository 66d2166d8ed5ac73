"""What crosses between two sandboxed processes: plain values as tagged JSON, in frames of a bounded length.

A value is rebuilt on the other side from exact built-in types, so its class, `__eq__`, `__reduce__` and identity stay
behind: what comes out is equal to what a reader would take it for, or to nothing.
"""

from __future__ import annotations

import decimal
import fractions
import itertools
import json
import math
import os
import select
import struct
import time
from typing import Any

LONGEST = 1 << 24
"""Bytes of a frame."""

DEEPEST = 150
"""Containers inside containers."""

MOST_ITEMS = 1_000_000
"""Items that are taken from an iterator."""

_SHORT_INTEGER_BITS = 10_000  # longer ones cross as hexadecimals: Python refuses to read so many decimal digits


class ValueCannotCross(Exception):
    """A result is of no plain type; the message names its type."""


# ---- values -------------------------------------------------------------------------------------------------------


def encoded(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it.  Subclasses become their plain base, arrays lists, iterators the items they still have.

    Raises: `ValueCannotCross` for anything else, and for what is nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueCannotCross("a value that is nested too deeply")
    inner = lambda values: [encoded(v, depth + 1) for v in values]
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if kind is int:
        return value if value.bit_length() < _SHORT_INTEGER_BITS else {"integer": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is list:
        return inner(value)
    if kind in (tuple, set, frozenset):
        return {kind.__name__: inner(value)}
    if kind is dict:
        return {"dict": [inner(pair) for pair in value.items()]}
    return _encoded_rarer(value, kind, depth, inner)


def _encoded_rarer(value: Any, kind: type, depth: int, inner: Any) -> Any:
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is range:
        return {"range": inner((value.start, value.stop, value.step))}
    if kind is fractions.Fraction:
        return {"fraction": inner((value.numerator, value.denominator))}
    if kind is decimal.Decimal:
        return {"decimal": str(value)}
    for base in (bool, int, float, str, bytes, complex, list, tuple, set, frozenset, dict):
        if isinstance(value, base):
            return encoded(base(value), depth)
    if kind.__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encoded(value.tolist(), depth)
    if hasattr(kind, "__next__"):
        return {"iterator": inner(itertools.islice(value, MOST_ITEMS))}
    if kind in (type({}.keys()), type({}.values()), type({}.items())):
        return {"iterator": inner(value)}
    raise ValueCannotCross(f"an object of type {kind.__name__}")


def decoded(value: Any) -> Any:
    """The plain value of what `encoded` made.  Raises: `ValueError`, `TypeError` or `KeyError` for anything else."""
    if type(value) is list:
        return [decoded(v) for v in value]
    if type(value) is not dict:
        return value
    ((tag, inner),) = value.items()
    return _DECODERS[tag](inner)


_DECODERS = {
    "integer": lambda x: int(x, 16),
    "float": float.fromhex,
    "complex": lambda x: complex(*map(float.fromhex, x)),
    "tuple": lambda x: tuple(map(decoded, x)),
    "set": lambda x: set(map(decoded, x)),
    "frozenset": lambda x: frozenset(map(decoded, x)),
    "dict": lambda x: {decoded(key): decoded(value) for key, value in x},
    "iterator": lambda x: iter([decoded(v) for v in x]),
    "range": lambda x: range(*x),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "fraction": lambda x: fractions.Fraction(*map(decoded, x)),
    "decimal": decimal.Decimal,
}


def alike(one: Any, other: Any) -> bool:
    """Whether two plain values are the same answer: lists and tuples alike, floats within 1e-9 of their size."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
        return numbers and (one == other or math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9))
    return type(one) is type(other) and one == other


# ---- frames -------------------------------------------------------------------------------------------------------


def frame(value: Any) -> bytes:
    """A JSON value with its length before it."""
    body = json.dumps(value, allow_nan=False).encode()
    return struct.pack("!I", len(body)) + body


def send(descriptor: int, value: Any) -> None:
    """Writes a frame."""
    body = memoryview(frame(value))
    while body:
        body = body[os.write(descriptor, body) :]


def receive(descriptor: int, deadline: float = math.inf) -> Any:
    """Reads a frame.  Raises: `EOFError`, `TimeoutError` after `deadline` (monotonic), `ValueError` for no JSON."""
    (length,) = struct.unpack("!I", _read(descriptor, 4, deadline))
    if length > LONGEST:
        raise ValueError(f"a frame of {length} bytes")
    return json.loads(_read(descriptor, length, deadline))


def _read(descriptor: int, count: int, deadline: float) -> bytes:
    parts = []
    while count:
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        if left is not None and not select.select([descriptor], [], [], left)[0]:
            raise TimeoutError
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
