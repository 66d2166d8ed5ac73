"""What methods remember from batch to batch on the host: plain JSON in, plain JSON out, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax.kernels.weights import hysteresis
from sdjax.types import Rollout

NO_REWARDS = {"steps": 0, "count": 0, "mean": 0.0, "squares": 0.0}
"""Running moments before the first batch."""


def whitened(rewards: Sequence[float], memory: dict[str, Any], warmup: int) -> tuple[list[float], dict[str, Any]]:
    """Rewards by the mean and deviation of all *earlier* batches' (Welford), and the moments with these.

    In the first `warmup` batches the reward minus 0.5; where all earlier rewards were equal, not divided.
    Source: Ke et al. 2026 (EGRSD), arXiv:2605.13255; what happens at deviation 0 is ours.
    """
    count, mean, squares = memory["count"], memory["mean"], memory["squares"]
    deviation = (squares / (count - 1)) ** 0.5 if count > 1 else 0.0
    scale = deviation if deviation > 1e-6 else 1.0
    early = memory["steps"] < warmup
    advantages = [r - 0.5 if early else (r - mean) / scale for r in rewards]
    for reward in rewards:
        count, difference = count + 1, reward - mean
        mean += difference / count
        squares += difference * (reward - mean)
    return advantages, {"steps": memory["steps"] + 1, "count": count, "mean": mean, "squares": squares}


OPEN_GATE = {"warm": [], "gate": 1.0}
"""An entropy gate before its first batch."""


def entropy_gated(median: float, memory: dict[str, Any], warmup: int, low: float) -> tuple[float, dict[str, Any]]:
    """A Schmitt trigger on the batch's median entropy: 0 in the first `warmup` batches, which set its levels.

    It opens at the median of the warm-up's medians, closes below `low` of that, and starts open.
    Source: Shen et al. 2026 (AntiSD), arXiv:2605.11609; how the five medians are joined is a reconstruction.
    """
    if len(memory["warm"]) < warmup:
        return 0.0, {**memory, "warm": [*memory["warm"], float(median)]}
    level = float(np.median(memory["warm"])) if memory["warm"] else 0.0
    gate = float(hysteresis(memory["gate"], median, low * level, level))
    return gate, {**memory, "gate": gate}


def told_apart(
    rollouts: Sequence[Rollout], implicit: np.ndarray | None, success: float, midpoint: float | None, rate: float
) -> tuple[list[Rollout], float | None]:
    """The rollouts with what the E-step needs of the whole batch, and the midpoint: constants of all its minibatches.

    `right [B]`; `midpoint`, half-way between the classes' mean implicit rewards, moved by `rate` from the one before;
    `class_weight`, the number of rows over that of their class: a mean of weighted rows over all of them is the class
    mean.  Rows without a lesson are in no class.  Without implicit rewards (no E-step is due) or with one class only
    all weights are 0, and the midpoint stays.
    """
    kept = np.asarray([r.contexts["teacher"] is not None and len(r.tokens) > 0 for r in rollouts])
    right = np.asarray([r.reward >= success for r in rollouts])
    classes, weight = (kept & right, kept & ~right), np.zeros(len(rollouts))
    if implicit is not None and all(c.any() for c in classes):
        now = float(np.mean([implicit[c].mean() for c in classes]))
        midpoint = now if midpoint is None else (1.0 - rate) * midpoint + rate * now
        weight = kept.sum() / np.where(right, *(c.sum() for c in classes))
    told = lambda r, w: r.with_extras(right=r.reward >= success, class_weight=float(w), midpoint=midpoint or 0.0)
    return [told(r, w) for r, w in zip(rollouts, weight, strict=True)], midpoint
