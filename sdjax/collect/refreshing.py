"""When a teacher's snapshot becomes a copy of the student: by the clock, or by what the student has learnt since."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdjax.engine.policies import Gated, nested, refresh
from sdjax.errors import InputError
from sdjax.types import STUDENT, Method, Rollout

START = {"batches": 0, "copied": 0, "level": None, "rewards": [], "lengths": [], "due": False}
"""What a gate remembers before the first batch."""


class RefreshError(InputError, ValueError):
    """A teacher's refresh cannot be chosen for this method; the message says why."""


def with_refresh(
    method: Method, every: int, *, gain: float | None = None, window: int = 10, longest: int = 0
) -> Method:
    """The method whose teacher is a copy of the student, made after every `every`-th batch or, with `gain`, at a gate.

    The gate opens at the earliest `every` batches after the last copy, once the mean reward of the last `window` batches
    is above that of the last copy by more than `gain` (at first, above that of the first window), and no attempt of the
    window has `longest` tokens (0: not asked).  While it is closed the parameters stay what they are, bit for bit.
    Source: CGTR, arXiv:2606.03532: moving averages and clocks copy a drifted student.

    Raises: RefreshError if no view named "teacher" reads a snapshot, or `window` is below 1.
    """
    names = {o.views["teacher"].policy for o in method.objectives if "teacher" in o.views} & {*method.snapshots}
    if not names:
        raise RefreshError(
            "select.refresh-every, select.refresh-gain: this method's teacher is no snapshot of the student (it is live, "
            "external, or there is none): nothing is refreshed; leave them out"
        )
    if window < 1 or every < 0:
        raise RefreshError(f"select.refresh-window={window}, select.refresh-every={every}: expected at least 1 and 0")
    if gain is None:
        return method._replace(snapshots={**method.snapshots, **dict.fromkeys(names, refresh(every))})

    def collect(environment, examples, key, memory):
        rollouts, inner = method.collect(environment, examples, key, memory["method"])
        how = {"least": every, "gain": gain, "window": window, "longest": longest}
        return rollouts, {"method": inner, "refresh": seen(rollouts, memory["refresh"], **how)}

    gated = dict.fromkeys(names, Gated(refresh(1), lambda memory: memory["refresh"]["due"]))
    snapshots = {**nested(method.snapshots), **gated}
    return method._replace(collect=collect, snapshots=snapshots, memory={"method": method.memory, "refresh": START})


def seen(
    rollouts: list[Rollout], memory: dict[str, Any], *, least: int, gain: float, window: int, longest: int
) -> dict[str, Any]:
    """The gate's memory with this batch in it; `due`: a copy is made after the batch."""
    own = [r for r in rollouts if r.source == STUDENT]
    rewards, lengths, batches = memory["rewards"], memory["lengths"], memory["batches"] + 1
    if own:
        rewards = [*rewards, float(np.mean([r.reward for r in own]))][-window:]
        lengths = [*lengths, max(len(r.tokens) for r in own)][-window:]
    mean = float(np.mean(rewards)) if len(rewards) == window else None
    level = mean if memory["level"] is None else memory["level"]
    due = batches - memory["copied"] >= least and mean is not None and mean > level + gain
    due = due and not (longest and max(lengths) >= longest)
    known = {"batches": batches, "rewards": rewards, "lengths": lengths, "due": due}
    return {**known, "copied": batches if due else memory["copied"], "level": mean if due else level}
