"""Shares over problems that were each answered several times, with intervals that promise no more than the problems hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

Z = 1.959964


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """The estimate for people, a share in per cent."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(solved: float, total: float, z: float = Z) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), within [0, 1] for every count; `(0, 1)` for none.

    `total` may be the number of independent answers that would tell as much, and then need not be whole.
    """
    if total == 0:
        return 0.0, 1.0
    share, spread = solved / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(share * (1 - share), 0.0) / total + spread / total / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(values: Sequence[float], trials: float) -> Estimate:
    """The mean over problems of a share in [0, 1] of each, problems being what is drawn at random.

    `trials` is how many independent answers there would be if problems did not matter: never more than that count.
    With `s` the deviation of `M` problems, the interval is Wilson's for `p (1 - p) M / s^2` answers, at most `trials`, with
    Student's quantile in place of the normal one; for `M` answers where every problem gives the same 0 or 1, and for one
    answer a problem.
    Source: effective sample sizes, Kish 1965, Survey Sampling; Korn and Graubard 1998, Survey Methodology 24.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if count == 0:
        return Estimate(0.0, 0.0, 1.0)
    share = float(values.mean())
    if trials <= count:
        return Estimate(share, *wilson(share * trials, trials))
    if count == 1:
        return Estimate(share, 0.0, 1.0)
    noise = float(values.var(ddof=1)) / count
    effective = share * (1 - share) / noise if noise > 0 else trials if 0 < share < 1 else count
    effective = min(effective, trials)
    return Estimate(share, *wilson(share * effective, effective, float(scipy.stats.t.ppf(0.975, count - 1))))


def mean(values: Sequence[float]) -> Estimate:
    """The mean over problems of any number, with Student's interval; infinite for one problem."""
    values = np.asarray(values, np.float64)
    centre, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(centre, -math.inf, math.inf)
    half = float(scipy.stats.t.ppf(0.975, count - 1) * values.std(ddof=1)) / math.sqrt(count)
    return Estimate(centre, centre - half, centre + half)


def paired(one: Sequence[float], other: Sequence[float], answers: int = 1) -> Estimate:
    """The difference `one - other` of two shares of the same problems, each of `answers` answers to a problem.

    Student's interval over the problems' differences, to whose squares one differing pair of answers is added (`1 /
    answers`): problems that agree by chance do not make it vanish.
    Source: for one answer, Agresti and Min 2005, Statistics in Medicine 24 (half a pair added to each of four cells).
    """
    differences = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    centre, count = float(differences.mean()), len(differences)
    if count < 2:
        return Estimate(centre, -1.0, 1.0)
    squares = float(((differences - centre) ** 2).sum()) + 1 / answers
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * math.sqrt(squares / (count * (count - 1)))
    return Estimate(centre, max(-1.0, centre - half), min(1.0, centre + half))


# ---- of one problem's answers ---------------------------------------------------------------------------------------


def pass_at(right: int, answers: int, k: int) -> float:
    """The chance that one of `k` of the answers is right, `1 - C(n-c, k) / C(n, k)`: unbiased for `k <= n`.

    Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1.
    """
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def majority_at(votes: Sequence[int], right: Sequence[bool], k: int, draws: int = 500) -> float:
    """The chance that the most frequent of `k` of the answers is right; frequent ones that tie share it.

    `votes` names the group of equal answers that each belongs to, or is -1 without an answer, which votes for nothing.
    Averaged over all answers for `k = n`, over `draws` subsets, always the same, for smaller `k`.
    """
    votes, right = np.asarray(votes), np.asarray(right, bool)
    groups = int(votes.max(initial=-1)) + 1
    if groups == 0:
        return 0.0
    good = np.asarray([right[votes == group].mean() >= 0.5 for group in range(groups)])
    order = np.random.default_rng(0).random((1 if k == len(votes) else draws, len(votes))).argsort(axis=1)[:, :k]
    counts = (votes[order][:, :, None] == np.arange(groups)).sum(axis=1)
    first = (counts == counts.max(axis=1, keepdims=True)) & (counts > 0)
    return float(((first & good).sum(axis=1) / np.maximum(first.sum(axis=1), 1)).mean())
