"""Runs side by side: those that differ only in their seed are one group, with a band or an interval over its seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.report.runs import Curve, Run
from sdjax.study.tables import interval


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    runs: tuple[Run, ...]


class Interval(NamedTuple):
    """A mean with its 95 % interval; the ends are `None` where nothing is known of them."""

    mean: float
    low: float | None = None
    high: float | None = None


class Band(NamedTuple):
    """A curve of a group: the seeds' mean at each step, and the lowest and highest of them."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    window: int = 1
    """Each point is the mean of this many steps."""


# ---- which runs belong together -------------------------------------------------------------------------------------


def grouped_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of appearance, labelled by what tells them apart."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.arguments.items() if k != "seed"}, sort_keys=True)
        members.setdefault(key, []).append(run)
    arguments = [rows[0].arguments for rows in members.values()]
    labels = numbered([label(own, arguments) for own in arguments])
    return [Group(label, tuple(rows)) for label, rows in zip(labels, members.values(), strict=True)]


def label(own: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """The method, and every argument in which the groups of this method differ."""
    same = [some for some in others if some.get("method") == own.get("method")]
    differing = [
        name
        for name in sorted(own)
        if name not in ("seed", "method" if own.get("method") else "experiment")
        and len({json.dumps(some.get(name)) for some in same}) > 1
    ]
    said = [f"{name.removeprefix('method.')}={own[name]}" for name in differing]
    name = own.get("method") or os.path.basename(str(own.get("experiment", "run")))
    return shortened(" ".join([str(name), *said]))


def shortened(text: str, most: int = 60) -> str:
    """A text of at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def numbered(labels: Sequence[str]) -> list[str]:
    """The labels, with a number after those that occur twice."""
    return [
        f"{name} ({labels[:i].count(name) + 1})" if labels.count(name) > 1 else name for i, name in enumerate(labels)
    ]


# ---- curves and intervals -------------------------------------------------------------------------------------------


def band(curves: Sequence[Curve], most: int = 150) -> Band | None:
    """The band of equally named curves of a group's runs, in at most `most` points; `None` without values.

    More steps are averaged within windows of equal size, run by run, before lowest and highest are taken.
    """
    steps = sorted({step for curve in curves for step in curve})
    if not steps:
        return None
    window = math.ceil(len(steps) / most)
    parts = [steps[i : i + window] for i in range(0, len(steps), window)]
    means = [[mean_of(curve, part) for curve in curves] for part in parts]
    values = np.array(means, float)
    centre = np.array([np.mean(part) for part in parts])
    with np.errstate(invalid="ignore"):
        return Band(centre, np.nanmean(values, 1), np.nanmin(values, 1), np.nanmax(values, 1), window)


def mean_of(curve: Curve, steps: Sequence[int]) -> float:
    """Mean of a curve's values at some steps; NaN without any."""
    values = [curve[step] for step in steps if step in curve]
    return float(np.mean(values)) if values else math.nan


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Mean and 95 % interval of Student's t over seeds; no interval for one seed, `None` for none.

    `mean +- t(0.975, n-1) s / sqrt(n)`, cut to [0, 1] where all values lie in it.
    """
    if not values:
        return None
    mean, low, high = interval(values)
    if len(values) == 1:
        return Interval(mean)
    least, most = (0.0, 1.0) if all(0 <= v <= 1 for v in values) else (-math.inf, math.inf)
    return Interval(mean, max(least, low), min(most, high))


def accuracy_at(group: Group, place: Callable[[Sequence[int]], int]) -> Interval | None:
    """Held-out accuracy at the evaluation that `place` (`min`, `max`) picks from each run's own steps.

    Its interval is the wider of two, end by end: over seeds, and the runs' mean interval over problems.  More seeds do
    not make the problems more.
    """
    found = [run.evaluations for run in group.runs if run.evaluations.get("accuracy")]
    steps = [place(list(own["accuracy"])) for own in found]
    seeds = over_seeds([own["accuracy"][step] for own, step in zip(found, steps, strict=True)])
    if seeds is None:
        return None
    lows, highs = (
        [own[end][step] for own, step in zip(found, steps, strict=True) if step in own.get(end, {})]
        for end in ("low", "high")
    )
    low = min([x for x in (seeds.low, float(np.mean(lows)) if lows else None) if x is not None], default=None)
    high = max([x for x in (seeds.high, float(np.mean(highs)) if highs else None) if x is not None], default=None)
    return Interval(seeds.mean, None if low is None else max(low, 0.0), None if high is None else min(high, 1.0))


def closing(group: Group, name: str, share: float = 0.1) -> Interval | None:
    """Mean of a logged number over the last `share` of each run's steps (at least one), with an interval over seeds."""
    found = []
    for run in group.runs:
        curve = run.steps.get(name, {})
        steps = sorted(curve)[-max(1, math.ceil(share * len(curve))) :] if curve else []
        found += [mean_of(curve, steps)] if steps else []
    return over_seeds(found)


def last_values(group: Group, prefix: str, end: str = "") -> dict[int, Interval]:
    """The last evaluations that go by `prefix`, a whole number and `end`, such as `pass@8`: `{number: interval}`."""
    numbers: dict[int, list[float]] = {}
    for run in group.runs:
        for name, curve in run.evaluations.items():
            number = name.removeprefix(prefix).removesuffix(end)
            if name == f"{prefix}{number}{end}" and number.isdecimal() and curve:
                numbers.setdefault(int(number), []).append(curve[max(curve)])
    return {number: over_seeds(values) for number, values in sorted(numbers.items())}
