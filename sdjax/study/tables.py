"""Means over seeds with intervals that promise no more than the data hold, paired differences, and tables of them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from sdjax.run.measuring.estimates import wilson


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t over independent runs (infinite for one)."""
    values = np.asarray(values, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    half = float(scipy.stats.t.ppf(0.975, count - 1) * values.std(ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def binomial_half(share: float, answers: float) -> float:
    """Half the 95 % score interval (Wilson 1927) of a share of so many answers."""
    low, high = wilson(round(share * answers), round(answers))
    return (high - low) / 2


def at(result: Any, path: Sequence[Any]) -> Any:
    """What stands at `path` in nested mappings and lists."""
    return functools.reduce(operator.getitem, path, result)


def across(results: Iterable[Any], *path: Any, scale: float = 1.0, digits: int = 1) -> str:
    """`shown` of the numbers that stand at `path` in the results of all seeds."""
    return shown([at(result, path) for result in results], scale, digits)


def shares(results: Sequence[Any], *path: Any, what: str = "accuracy", answers: int | None = None) -> str:
    """A share in per cent over seeds, `mean +- half`, of the `behaviour` that stands at `path`.

    `half` is Student's over seeds, or half the binomial interval of all answers where that is wider: seeds that agree by
    chance do not make the answers more.  `answers` is how many each seed gave, by default what the behaviour says.
    """
    found = [at(result, path) for result in results]
    values = [own[what] for own in found]
    total = sum(own["answers"] if answers is None else answers for own in found)
    mean, low, _ = interval(values)
    half = max(binomial_half(mean, total), 0.0 if math.isinf(low) else mean - low)
    return f"{100 * mean:.1f} +- {100 * half:.1f}"


def gains(results: Sequence[Any], before: Sequence[Any], *path: Any, what: str = "accuracy") -> str:
    """The difference of a share to the same seed's `before`, in points: `mean +- half`.

    `half` is Student's over the seeds' differences, or where it is wider that of two independent shares of all answers.
    """
    pairs = [(at(one, path), at(other, path)) for one, other in zip(results, before, strict=True)]
    mean, low, _ = interval([one[what] - other[what] for one, other in pairs])
    total = sum(one["answers"] for one, _ in pairs)
    each = [float(np.mean([side[what] for side in sides])) for sides in zip(*pairs, strict=True)]
    half = max(math.hypot(*(binomial_half(share, total) for share in each)), 0.0 if math.isinf(low) else mean - low)
    return f"{100 * mean:+.1f} +- {100 * half:.1f}"


def changes(results: Sequence[Any], before: Sequence[Any], *path: Any, digits: int = 1) -> str:
    """The difference of a number to the same seed's `before`: `mean +- half` by Student's t over seeds."""
    values = [at(one, path) - at(other, path) for one, other in zip(results, before, strict=True)]
    return shown(values, digits=digits, sign="+")


def shown(values: Sequence[float], scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """`mean +- half the interval` of independent runs, or the value of one."""
    mean, low, _ = interval([scale * v for v in values])
    return f"{mean:{sign}.{digits}f}" + (f" +- {mean - low:.{digits}f}" if len(values) > 1 else "")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows `{column: cell}`."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
