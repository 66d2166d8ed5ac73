"""DASD: toward the informed teacher where the student is sure, away from it where the student is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import signed_surrogate
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.kernels.weights import entropy_router, unit_deviation, unit_magnitude
from sdjax.methods.opsd import opsd
from sdjax.ranges import NonNegative, PositiveInt, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term

CARD = Card(
    paper="Zhang et al. 2026, Tailoring Teaching to Aptitude: Direction-Adaptive Self-Distillation",
    arxiv="2605.22263",
    equation="GRPO with A + beta tanh((h - H)/spread) sigmoid(|d| - 1) d, d = (log q - log p) / mean |log q - log p|",
    student="question",
    teacher="question + reference solution; parameters: the student's",
    reduction="token mean",
    differences=(
        "from one transcription; the spread's centre, the scale of d, the teacher's parameters and beta are reconstructed",
        "so is the side of the threshold: repelled=0.8 is the other reading",
        "not 2601.09088, which goes by the same name",
    ),
    status="reconstruction",
)


@check_ranges
def dasd(
    *,
    group_size: PositiveInt = 8,
    beta: NonNegative = 0.1,
    repelled: Share = 0.2,
    about: Literal["mean", "threshold"] = "mean",
    unit: Literal["magnitude", "deviation"] = "magnitude",
    ema_rate: Share = 1.0,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Direction-adaptive self-distillation (Zhang et al. 2026, arXiv:2605.22263), a reconstruction.

    `A_t = A + beta * tanh((h - H_t) / spread) * sigmoid(|d_t| - 1) * d_t`, with `H` the student's entropy, `h` its
    quantile and `spread` its mean absolute deviation in the row, `d` the log-ratio teacher / student in units of its
    mean magnitude in the row.  Clipped surrogate, token mean.

    Args:
      group_size: rollouts per prompt.
      beta: weight of the teacher's part; 0 is GRPO.
      repelled: share of a row's tokens, those of highest entropy, that are pushed away from the teacher.
      about: the centre of the entropies' mean absolute deviation, the row's mean or the quantile `h`; not published.
      unit: what `d` is measured in, the row's mean magnitude or its standard deviation; not published.
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      clip: widths of the surrogate's clip below and above 1.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the reference solution.
      reduce: how tokens are averaged.
    """
    base = opsd(temperature=temperature, top_p=1.0, top_k=0, ema_rate=ema_rate, group_size=group_size, lesson=lesson)

    in_units = unit_magnitude if unit == "magnitude" else unit_deviation

    def signals(dist, token):
        both = {"logprobs": logprob(dist["student"], token), "teacher_logprobs": logprob(dist["teacher"], token)}
        return {**both, "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        over = batch.mask & (batch.valid & taught)[:, None]
        gap = in_units(sig["teacher_logprobs"] - sig["logprobs"], over)
        direction = entropy_router(sig["entropy"], over, fraction=repelled, about=about)
        bonus = direction * jax.nn.sigmoid(jnp.abs(gap) - 1.0) * gap
        advantage = group_advantage(batch.returns, batch.group, batch.valid)[:, None] + beta * bonus
        raised, lowered = signed_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        return {
            "raised": Term(*raised, reduce=reduce),
            "lowered": Term(*lowered, reduce=reduce),
            "direction": Term(direction, over=taught, coef=0.0),
            "bonus": Term(bonus, over=taught, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    credit = (("raised", "lowered"),) if beta else ()
    objective = Objective(base.objectives[0].views, signals, terms, credit=credit, rewarded=True)
    return base._replace(objectives=(objective,))
