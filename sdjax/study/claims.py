"""Claims that are written down before anything is measured, and the verdicts on them, computed from results.

A claim compares two arms, or an arm with its own beginning, over the same bases and seeds.  Its effect is the mean of the
paired differences; its uncertainty is a bootstrap over bases and over seeds, and never less than that of so many answers.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from sdjax.errors import InputError

LEVEL = 0.05
"""The chance of any false verdict among all claims of a file."""

RESAMPLES = 9999

Verdict = Literal["holds", "does not hold", "cannot be told"]


class ClaimError(InputError, ValueError):
    """A file of claims that cannot be read; the message says which claim, which field and what was expected."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a file of claims.

    Args:
      name: what tables call it.
      says: the claim in words; `source` and `arxiv` say whose.
      grammar: whose base models.
      arm, against: names of arms; `against` "itself" is the same arm's measurement before training.
      problems: the set of problems; `measure`: what was measured on it; `step`: after so many batches.
      sign: 1 or -1, the sign of `arm` minus `against` that the source predicts.
      margin: the smallest effect that counts.  The claim does not hold where one as large is excluded.
      fails: the same in words.
    """

    name: str
    says: str
    source: str
    arxiv: str
    grammar: str
    arm: str
    against: str
    problems: str
    measure: str
    step: int
    sign: int
    margin: float
    fails: str


def read_claims(path: Path) -> list[Claim]:
    """The claims of a TOML file, in order.  Raises `ClaimError`."""
    fields = {f.name: f.type for f in dataclasses.fields(Claim)}
    kinds = {"str": str, "int": int, "float": (int, float)}
    found = []
    for number, row in enumerate(tomllib.loads(path.read_text(encoding="utf-8")).get("claim", ()), 1):
        where = f"{path}: claim {number} ({row.get('name', 'without a name')})"
        if row.keys() != fields.keys():
            wrong = sorted(row.keys() ^ fields.keys())
            raise ClaimError(f"{where}: fields missing or unknown: {', '.join(wrong)}; expected {', '.join(fields)}")
        for name, kind in fields.items():
            if not isinstance(row[name], kinds[kind]) or isinstance(row[name], bool):
                raise ClaimError(f"{where}: {name} = {row[name]!r}: expected {kind}")
        if row["sign"] not in (1, -1) or row["margin"] < 0:
            raise ClaimError(f"{where}: expected sign 1 or -1 and margin 0 or more")
        found.append(Claim(**row))
    if not found:
        raise ClaimError(f"{path}: no [[claim]] in it")
    return found


class Effect(NamedTuple):
    """A paired difference: its mean, its 95 % interval, and how likely it is to be seen if the truth were otherwise.

    `p_none`: the truth has not the predicted sign.  `p_margin`: it has, and is as large as the margin.
    """

    mean: float
    low: float
    high: float
    p_none: float
    p_margin: float


class Counts(NamedTuple):
    """Of a share: the mean of each side, and of how many answers each is; `None` where a number is no share."""

    arm: float
    against: float
    answers: int


def resampled(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of `differences [bases, seeds]` with bases and seeds drawn anew, each with replacement: `[RESAMPLES]`.

    Seeds are the same problems for every base, so rows and columns are drawn apart (McCullagh 2000, Resampling and
    exchangeable arrays).
    """
    bases, seeds = differences.shape

    def mean(rows, columns, axis=-1):
        return differences[rows[..., :, None], columns[..., None, :]].mean((-2, -1))

    drawn = scipy.stats.bootstrap(
        (np.arange(bases), np.arange(seeds)),
        mean,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return drawn.bootstrap_distribution


def binomial_deviation(counts: Counts | None) -> float:
    """The standard deviation of a difference of two independent shares, each with one right and one wrong answer added."""
    if counts is None:
        return 0.0
    known = lambda share: (share * counts.answers + 1) / (counts.answers + 2)
    return math.sqrt(sum(s * (1 - s) / counts.answers for s in map(known, (counts.arm, counts.against))))


def effect(differences: Sequence[Sequence[float]], sign: int, margin: float, counts: Counts | None = None) -> Effect:
    """The effect of paired differences `[bases][seeds]`; whichever uncertainty is larger counts, for each number apart."""
    values = np.asarray(differences, np.float64)
    drawn, mean, deviation = np.sort(resampled(values)), float(values.mean()), binomial_deviation(counts)
    low, high = np.quantile(drawn, (0.025, 0.975))
    half = scipy.stats.norm.ppf(0.975) * deviation
    share = lambda within: (np.count_nonzero(within) + 1) / (RESAMPLES + 1)
    tail = lambda distance: float(scipy.stats.norm.sf(distance / deviation)) if deviation else 0.0
    p_none = max(share(sign * drawn <= 0), tail(sign * mean))
    p_margin = max(share(sign * drawn >= margin), tail(margin - sign * mean))
    return Effect(mean, min(float(low), mean - half), max(float(high), mean + half), p_none, p_margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given (Holm 1979): the chance of any false rejection is at most the level."""
    order, found, worst = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = worst
    return found


def verdicts(effects: Sequence[Effect]) -> list[Verdict]:
    """The verdict on each claim, both questions about all of them corrected together.

    An effect that is there but is shown to be smaller than the margin does not hold.
    """
    corrected = holm([p for e in effects for p in (e.p_margin, e.p_none)])
    pairs = zip(corrected[::2], corrected[1::2], strict=True)
    return [
        "does not hold" if small < LEVEL else "holds" if none < LEVEL else "cannot be told" for small, none in pairs
    ]


# ---- from results ---------------------------------------------------------------------------------------------------

Results = Mapping[str, Sequence[Sequence[Sequence[Mapping[str, Any]]]]]
"""`{arm: [base][seed][measurement]}`, of one grammar; a measurement is `{"step": ..., problems: {measure: ...}}`."""


def measured(rows: Sequence[Mapping[str, Any]], claim: Claim, step: int) -> float:
    """What a run measured after `step` batches."""
    row = next(r for r in rows if r["step"] == step)
    return row[claim.problems][claim.measure]


def judge(claim: Claim, results: Results) -> Effect:
    """The effect that a claim is about.  Raises `KeyError` for an arm that was not run."""
    before = results[claim.arm if claim.against == "itself" else claim.against]
    reference = 0 if claim.against == "itself" else claim.step
    runs = [list(zip(*pair, strict=True)) for pair in zip(results[claim.arm], before, strict=True)]
    sides = np.asarray([[[measured(a, claim, claim.step), measured(b, claim, reference)] for a, b in r] for r in runs])
    answers = sum(a[0][claim.problems]["answers"] for r in runs for a, _ in r)
    share = claim.measure == "accuracy"
    counts = Counts(*sides.mean((0, 1)).tolist(), answers) if share else None
    return effect((sides[..., 0] - sides[..., 1]).tolist(), claim.sign, claim.margin, counts)
