"""Accuracy of a policy on examples: greedy with an interval, by the length that answers may have, and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import sample, verdicts
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import Policy
from sdjax.run.measuring.estimates import pass_at, wilson
from sdjax.types import Example, Messages, Rollout, Verdict


class Accuracy(NamedTuple):
    """A share of solved examples with its 95 % interval, the completions behind it, and which of them are right."""

    solved: float
    low: float
    high: float
    examples: int
    rollouts: tuple[Rollout, ...] = ()
    right: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return f"{100 * self.solved:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.examples}"


def accuracy(
    policy: Policy,
    examples: Sequence[Example],
    verify: Callable[[Example, str], Verdict],
    *,
    context: Callable[[Example], Messages] = question,
    success: float = 0.5,
    limit: int | None = None,
) -> Accuracy:
    """The share of examples whose greedy answer earns a reward of at least `success`.

    An answer that was cut off counts as `sdjax.tasks.judging` says.  `context` is what the policy reads: give a teacher's context to measure the teacher.  `limit` caps the completion.
    """
    rollouts = sample(policy, examples, jax.random.key(0), context=context, sampling=GREEDY, limit=limit)
    right = [verdict.reward >= success for verdict in verdicts(verify, rollouts)]
    good, total = sum(right), len(rollouts)
    return Accuracy(good / max(total, 1), *wilson(good, total), total, tuple(rollouts), tuple(right))


def by_cap(lengths: Sequence[int], right: Sequence[bool], most: int, parts: int = 8) -> dict[str, float]:
    """The share of answers that are right and end within a cap: `{"accuracy@32": share, "accuracy@64": ...}`.

    The caps are `parts` equal steps up to `most` tokens.  An answer of `n` tokens is the same under every cap of at
    least `n`, so one sample tells for all of them; one that a cap cuts off counts as wrong.
    """
    solved = np.asarray(lengths)[np.asarray(right, bool)]
    caps = sorted({-(-most * part // parts) for part in range(1, parts + 1)})
    return {f"accuracy@{cap}": float((solved <= cap).sum() / max(len(lengths), 1)) for cap in caps}


def pass_at_k(
    policy: Policy,
    examples: Sequence[Example],
    verify: Callable[[Example, str], Verdict],
    key: Array,
    *,
    n: int,
    ks: Sequence[int] = (1, 2, 4, 8),
    sampling: Sampling | None = None,
    success: float = 0.5,
) -> dict[int, float]:
    """The chance that one of `k` samples solves an example, `1 - C(n-c, k) / C(n, k)` averaged over examples.

    Unbiased for `k <= n`; larger `k` are left out.  Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1.
    """
    rollouts = sample(policy, examples, key, n=n, sampling=sampling)
    right = np.asarray([verdict.reward >= success for verdict in verdicts(verify, rollouts)]).reshape(-1, n).sum(1)
    return {k: float(np.mean([pass_at(int(c), n, k) for c in right])) for k in ks if k <= n}
