"""Ranges of numeric arguments, said in their types: `ema_rate: Share`.  Numbers that make no sense are refused by name."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from sdjax.errors import MethodError


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; `above` and `below` leave out the ends.  `but` is a number in between that is not in it."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    but: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in it; NaN and infinities never do."""
        start = value > self.low if self.above else value >= self.low
        end = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and start and end and value != self.but

    def __str__(self) -> str:
        words = []
        if self.low > -math.inf:
            words.append(f"above {self.low:g}" if self.above else f"at least {self.low:g}")
        if self.high < math.inf:
            words.append(f"below {self.high:g}" if self.below else f"at most {self.high:g}")
        words += [] if self.but is None else [f"other than {self.but:g}"]
        return f"expected {' and '.join(words)}" if words else "expected a finite number"


class Order(NamedTuple):
    """Several numbers that do not fall when they are read at these places; `words` say so."""

    places: tuple[int, ...]
    words: str

    def holds(self, values: tuple[float, ...]) -> bool:
        """Whether they are in this order; equal ones are."""
        read = [values[i] for i in self.places]
        return read == sorted(read)

    def __str__(self) -> str:
        return f"expected {self.words}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Rising = Order((0, 1), "the first at most the second")
FirstBetween = Order((1, 0, 2), "the first between the other two")


def expected(hint: Any, value: Any) -> str:
    """What a type says of its numbers that does not hold of a value; empty where all holds, or the value is no number."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        is_number = isinstance(value, numbers.Real | tuple | list) and not isinstance(value, bool)
        broken = (str(rule) for rule in parts[1:] if isinstance(rule, Range | Order) and not rule.holds(value))
        return (expected(parts[0], value) or next(broken, "")) if is_number else ""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(filter(None, (expected(part, value) for part in parts)), "")
    if typing.get_origin(hint) is tuple and isinstance(value, tuple | list):
        each = itertools.repeat(parts[0]) if parts[-1] is Ellipsis else parts
        return next(filter(None, map(expected, each, value)), "")
    return ""


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def out_of_range(function: Callable, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What was expected of each argument of a function that its type does not allow."""
    found = {name: expected(_hints(function).get(name), value) for name, value in arguments.items()}
    return {name: said for name, said in found.items() if said}


def check_ranges(factory: Callable) -> Callable:
    """A method's factory that raises `MethodError` for a number out of the range that its type says: `group_size=0`."""

    @functools.wraps(factory)
    def checked(**options: Any) -> Any:
        for name, said in out_of_range(factory, options).items():
            raise MethodError(f"{factory.__name__}({name}={options[name]!r}): {said}")
        return factory(**options)

    return checked
