"""PW-OPSD: self-distillation that listens to later tokens more, where the informed teacher is more reliable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from sdjax.kernels.credit import position_weight
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.methods.opsd import opsd
from sdjax.ranges import (
    Finite,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
    Range,
    Share,
    check_ranges,
)
from sdjax.types import Card, Messages, Method, Rollout

CARD = Card(
    paper="Liu et al. 2026, Position-Weighted On-Policy Self-Distillation",
    arxiv="2605.21606",
    equation="w sum_v min(q_v log(q_v/p_v), clip), w_t = lowest + (1 - lowest) sigmoid(((t - 1/2)/n - centre)/width)",
    student="question",
    teacher="question + reference solution; parameters: the initial ones",
    reduction="sequence mean",
    differences=(
        "the weights' mean is below 1 and is not divided out: part of any effect is a smaller step",
        "IW-OPD weighs early tokens more, with an external teacher: a negative width is that direction",
        "known from a paragraph and from its code",
    ),
    status="second-hand",
)


@check_ranges
def pw_opsd(
    *,
    lowest: Share = 0.25,
    centre: Finite = 0.3,
    width: Annotated[float, Range(but=0)] = 0.1,
    entry_clip: NonNegative | None = 0.05,
    temperature: Positive = 1.1,
    top_p: PositiveShare = 0.95,
    top_k: NonNegativeInt = 20,
    ema_rate: Share = 0.0,
    group_size: PositiveInt = 1,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Position-weighted self-distillation (Liu et al. 2026, arXiv:2605.21606): `opsd` with a weight that rises.

    Positions are relative to each row's own length.  `lowest` 1 is plain `opsd`.  Sequence mean.

    Args:
      lowest: the weight far before the centre; 1: no weights.
      centre: relative position at which the weight is half-way.
      width: of the rise, in relative positions; negative: the weight falls instead.
      entry_clip: bound of every vocabulary entry's addend; `None` is no bound.
      temperature: of sampling *and* of both distributions in the loss, above 0.
      top_p, top_k: of sampling (1 and 0: no filter).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen (paper), 1 is live.
      group_size: rollouts per prompt.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the reference solution.
      reduce: how tokens are averaged.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "group_size": group_size}
    base = opsd(clip=entry_clip, ema_rate=ema_rate, lesson=lesson, reduce=reduce, **sampling)
    (plain,) = base.objectives

    def terms(batch, sig, step):
        weight = position_weight(batch.mask & batch.valid[:, None], lowest=lowest, centre=centre, width=width)
        found = plain.terms(batch, sig, step)
        return {**found, "divergence": found["divergence"]._replace(weight=weight)}

    return base._replace(objectives=(plain._replace(terms=terms, credit=("divergence",) if lowest != 1.0 else ()),))
