"""DASH: self-distillation whose losses look ahead, further where student and teacher still agree."""

from __future__ import annotations

from collections.abc import Callable

import jax

from sdjax.kernels.credit import compounded_weight
from sdjax.kernels.reductions import Reducer, masked_mean, token_mean
from sdjax.methods.opsd import opsd
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Rollout

CARD = Card(
    paper="DASH 2026 (authors not in our source), self-distillation with an adaptive horizon",
    arxiv="2608.06243",
    equation="A_t = r_t + f_t A_{t+1}, f = horizon sigmoid(-kappa (r - mean r)), r = sum_v min(q_v log(q_v/p_v), clip)",
    student="question",
    teacher="question + reference solution; parameters: the initial ones",
    reduction="token mean",
    differences=(
        "implemented by the equivalent weights c_1 = 1, c_k = 1 + f_{k-1} c_{k-1} of r, constants",
        "their mean is above 1 and is not divided out: part of any effect is a larger step",
        "that the mean of r is the row's, and the reduction, are reconstructions",
        "not DASH-OPD (2607.29078), which switches executors",
        "known from one line of a survey, without code",
    ),
    status="reconstruction",
)


@check_ranges
def dash(
    *,
    kappa: NonNegative = 5.0,
    horizon: Share = 1.0,
    entry_clip: NonNegative | None = 0.05,
    temperature: Positive = 1.1,
    top_p: PositiveShare = 0.95,
    top_k: NonNegativeInt = 20,
    ema_rate: Share = 0.0,
    group_size: PositiveInt = 1,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Self-distillation with an adaptive horizon (arXiv:2608.06243): `opsd` on losses that include discounted later ones.

    `loss = mean of A_t = mean of c_t r_t`, the factors constant.  `horizon` 0 is plain `opsd`.  Token mean.

    Args:
      kappa: how fast the factor falls as a token's divergence rises above its row's mean; 0: it is half of `horizon`.
      horizon: scale of the factor, from 0 (no look ahead) to 1 (paper).
      entry_clip: bound of every vocabulary entry's addend; `None` is no bound.
      temperature: of sampling *and* of both distributions in the loss, above 0.
      top_p, top_k: of sampling (1 and 0: no filter).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      group_size: rollouts per prompt.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the reference solution.
      reduce: how tokens are averaged.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "group_size": group_size}
    base = opsd(clip=entry_clip, ema_rate=ema_rate, lesson=lesson, reduce=reduce, **sampling)
    (plain,) = base.objectives

    def terms(batch, sig, step):
        over = batch.mask & (batch.valid & batch.contexts["teacher"].valid)[:, None]
        excess = sig["divergence"] - masked_mean(sig["divergence"], over, axis=-1)[:, None]
        weight = compounded_weight(horizon * jax.nn.sigmoid(-kappa * excess), over)
        found = plain.terms(batch, sig, step)
        return {**found, "divergence": found["divergence"]._replace(weight=weight)}

    return base._replace(objectives=(plain._replace(terms=terms, credit=("divergence",) if horizon else ()),))
