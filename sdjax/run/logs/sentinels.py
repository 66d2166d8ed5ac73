"""Sentinels: numbers of a run that say early that its model collapses, or that its length or doubts change at once.

A sentinel compares the mean of the last `WINDOW` steps with the mean of the first `WINDOW` steps (for the reward: with the
best mean so far).  It raises an alarm where both hold:

- the change is as large as its row in `SENTINELS` says, and
- it exceeds 4 standard errors, `4 sqrt(s_now^2 / WINDOW + s_then^2 / WINDOW)` with `s` the deviation from step to step, so
  that small batches do not alarm.

An alarm is raised once, and again only after its number has come back.  Held-out accuracy alarms where its 95 % interval lies
below that of an earlier evaluation.  Alarms are said and recorded; they end a run only with `--stop-on collapse`.  What
sentinels remember is plain JSON and part of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.collect.diagnostics import repeated_ngrams
from sdjax.types import STUDENT, Rollout

WINDOW = 20
"""Steps of a mean."""


class Sentinel(NamedTuple):
    """What is watched: alarms below `under` or above `over` times the reference, or `by` away from it.

    `least` is the smallest reference that a ratio is taken of; `best`: the reference is the highest mean so far.
    """

    number: str
    kind: str
    says: str
    under: float = 0.0
    over: float = math.inf
    by: float = math.inf
    least: float = 0.0
    best: bool = False


SENTINELS = (
    Sentinel("reward", "collapse", "the reward fell to less than half of its best", under=0.5, least=0.1, best=True),
    Sentinel("sampled_entropy", "entropy", "the sampled tokens became far more certain", under=0.2, least=0.02),
    Sentinel("sampled_entropy", "entropy", "the sampled tokens became far less certain", over=4.0, least=0.02),
    Sentinel("length", "length", "completions became far shorter", under=1 / 3, least=4.0),
    Sentinel("length", "length", "completions became far longer", over=3.0, least=4.0),
    Sentinel("finished", "length", "far more completions are cut off", by=-0.4),
    Sentinel("repetition", "repetition", "completions repeat themselves", by=0.3),
    Sentinel("epistemic_per_thousand", "hedging", "expressions of uncertainty disappear", under=0.25, least=1.0),
    Sentinel("divergence", "teacher", "student and teacher move apart", over=4.0, least=1e-3),
)
"""All sentinels of numbers that are logged in every step; a number that a run does not log is not watched."""


class Alarm(NamedTuple):
    """What a sentinel says after a step: kind, and a sentence with both means."""

    kind: str
    says: str


class Watch:
    """What the sentinels of one run remember."""

    def __init__(self, remembered: Mapping[str, Any] | None = None):
        remembered = remembered or {}
        self.last: dict[str, list[float]] = {k: list(v) for k, v in remembered.get("last", {}).items()}
        self.then: dict[str, list[float]] = {k: list(v) for k, v in remembered.get("then", {}).items()}
        self.raised: list[str] = list(remembered.get("raised", []))
        self.accuracy: list[float] | None = remembered.get("accuracy")

    def remembered(self) -> dict[str, Any]:
        """As JSON has it, for `Watch(...)` of the run that goes on."""
        return {"last": self.last, "then": self.then, "raised": self.raised, "accuracy": self.accuracy}

    def step(self, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms that one step's numbers raise."""
        for name in {sentinel.number for sentinel in SENTINELS} & {*values}:
            if math.isfinite(values[name]):
                self.last[name] = [*self.last.get(name, []), float(values[name])][-WINDOW:]
        found = [self._asked(sentinel) for sentinel in SENTINELS]
        for name, recent in self.last.items():
            if len(recent) == WINDOW:
                self._remember(name, recent)
        return [alarm for alarm in found if alarm]

    def evaluation(self, accuracy: float, low: float, high: float) -> list[Alarm]:
        """The alarm of a held-out accuracy with its 95 % interval."""
        best = self.accuracy
        if best is None or accuracy > best[0]:
            self.accuracy = [accuracy, low, high]
        fell = best is not None and high < best[1]
        said = best and f"held-out accuracy fell from {100 * best[0]:.0f} % to {100 * accuracy:.0f} %"
        alarm = self._raised("accuracy", fell, Alarm("collapse", f"{said}: their 95 % intervals do not meet"))
        return [alarm] if alarm else []

    def _remember(self, name: str, recent: list[float]) -> None:
        """A reference `[mean, deviation]`: of the first window, or of the best so far."""
        best = any(sentinel.best for sentinel in SENTINELS if sentinel.number == name)
        if name not in self.then or (best and np.mean(recent) > self.then[name][0]):
            self.then[name] = [float(np.mean(recent)), float(np.std(recent, ddof=1))]

    def _asked(self, sentinel: Sentinel) -> Alarm | None:
        recent, then = self.last.get(sentinel.number, []), self.then.get(sentinel.number)
        if then is None or len(recent) < WINDOW:
            return None
        now, (mean, deviation) = float(np.mean(recent)), then
        moved = mean >= sentinel.least and now < sentinel.under * mean
        moved |= now > sentinel.over * max(mean, sentinel.least)
        moved |= now - mean > sentinel.by if sentinel.by > 0 else now - mean < sentinel.by
        error = math.sqrt((np.var(recent, ddof=1) + deviation**2) / WINDOW)
        says = f"{sentinel.says}: {sentinel.number} was {mean:.3g} and is {now:.3g} (means of {WINDOW} steps)"
        return self._raised(sentinel.says, moved and abs(now - mean) > 4.0 * error, Alarm(sentinel.kind, says))

    def _raised(self, name: str, wrong: bool, alarm: Alarm) -> Alarm | None:
        """The alarm, where it was not raised already."""
        new = wrong and name not in self.raised
        if new:
            self.raised.append(name)
        if not wrong and name in self.raised:
            self.raised.remove(name)
        return alarm if new else None


def watched(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What sentinels read of the student's own rollouts; nothing without tokens.

    `sampled_entropy` is `-mean log p(token)` in nats over all sampled tokens whose probability is known, which estimates the
    entropy of the sampler (with filters such as top-p: from above).  `repetition` is the mean share of word 3-grams that
    occurred before in the same text.
    """
    own = [r for r in rollouts if r.source == STUDENT and r.tokens]
    known = [x for r in own for x in r.logprobs if math.isfinite(x)]
    if not known:
        return {}
    return {
        "sampled_entropy": -float(np.mean(known)),
        "repetition": float(np.mean([repeated_ngrams(r.text) for r in own])),
    }
