"""A second look at the policy's own attempts: which are corrected, what is asked, and how many right ones are among them.

Source: CIPO (Ren et al. 2026), arXiv:2605.14539, as a third party re-implemented it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from sdjax.collect.contexts import attempt_text, question, rewrite_last
from sdjax.engine.policies import grouped
from sdjax.types import Messages, Rollout


def correction(rollout: Rollout) -> Messages:
    """The question and an attempt at it, of which is only said that it may be wrong."""
    messages, attempt = question(rollout.example), attempt_text(rollout.text)
    content = (
        f"{messages[-1]['content']}\n\nAn earlier attempt, which may be wrong:\n{attempt}\n\n"
        "Name its error if there is one, then give a correct solution and answer."
    )
    return rewrite_last(messages, content, attempt)


def anchors(
    rollouts: Sequence[Rollout], count: int, share: float, medium: tuple[float, float], key: Array, success: float = 0.5
) -> list[Rollout]:
    """At most `count` attempts to correct: `share` of them right ones, fewer where failures abound, more where they lack.

    Right is a reward of at least `success`.  Attempts at problems whose pass rate lies within `medium` come first;
    otherwise the order is the key's.
    """
    rate = {group: np.mean([r.reward >= success for r in rows]) for group, rows in grouped(rollouts).items()}
    order = [rollouts[int(i)] for i in jax.random.permutation(key, len(rollouts))]
    order.sort(key=lambda r: not medium[0] <= rate[r.group] <= medium[1])
    right, wrong = [r for r in order if r.reward >= success], [r for r in order if r.reward < success]
    some = min(len(right), int(share * count))
    wrong = wrong[: count - some]
    return [*right[: count - len(wrong)], *wrong]


def graded(
    corrections: Sequence[Rollout], attempts: Sequence[Rollout], risk: float, success: float
) -> tuple[list[float], float | None]:
    """Each correction's returns, less `risk` where it breaks a right attempt; and the share of these that stayed right.

    `attempts[i]` is what `corrections[i]` corrects.  The share is `None` where no attempt was right.
    """
    pairs = [(c, a.reward >= success) for c, a in zip(corrections, attempts, strict=True)]
    shaped = [c.returns - risk * (right and c.reward < success) for c, right in pairs]
    kept = [c.reward >= success for c, right in pairs if right]
    return shaped, float(np.mean(kept)) if kept else None


def replayed(
    memory: Mapping[str, Any],
    retention: float | None,
    target: float,
    gains: Sequence[float],
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """The next `{"share", "retention", "below"}`: the share of right attempts grows while too many of them are broken.

    `share * (1 + gains . (target - r, max(0, r_before - r), min(steps below target, 3)))` within `bounds`; `retention`
    r is the share of corrections of right attempts that are right, `None` (nothing changes) where there were none.
    """
    if retention is None:
        return dict(memory)
    before = memory["retention"]
    below = memory["below"] + 1 if retention < target else 0
    gaps = (target - retention, max(0.0, (retention if before is None else before) - retention), min(below, 3))
    share = memory["share"] * (1.0 + sum(w * f for w, f in zip(gains, gaps, strict=True)))
    return {"share": min(max(share, bounds[0]), bounds[1]), "retention": retention, "below": below}
