"""IW-OPD: on-policy distillation that listens to the first tokens most, before student and teacher have drifted apart."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax

from sdjax.kernels.credit import remaining_share
from sdjax.kernels.policy_gradient import token_ratio
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opd import opd_with
from sdjax.ranges import NonNegative, PositiveInt, check_ranges
from sdjax.types import Card, Messages, Method, Rollout, Term

CARD = Card(
    paper="IW-OPD 2026 (authors not in our source), Importance-Weighted On-Policy Distillation",
    arxiv="2606.22600",
    equation="-(p/b) w a, a = log q - log b, w_t = 1 + gamma (1 - sum_{j<t} |a_j| / sum_j |a_j|), w a constant",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "the weights' mean is above 1 and is not divided out: part of any effect is a larger step",
        "known from a paragraph and from TRL's code; group size and reduction are ours",
    ),
    status="second-hand",
)


@check_ranges
def iw_opd(
    *,
    teacher: str | None = None,
    gamma: NonNegative = 0.5,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Importance-weighted on-policy distillation (arXiv:2606.22600; code: TRL's experimental iw_opd).

    `opd` with token `t` weighted by one plus `gamma` times the share of the row's unsigned log-ratios still to come.
    Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      gamma: how much more the first token counts than the end of a row; 0 is plain on-policy distillation.
      group_size: rollouts per prompt.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        over = batch.mask & (batch.valid & taught)[:, None]
        gap = lax.stop_gradient(sig["teacher_logprobs"] - batch.behavior_logprobs)
        weight = 1.0 + gamma * remaining_share(gap, over)
        policy_gradient = -token_ratio(sig["logprobs"], batch.behavior_logprobs) * gap
        return {
            "pg": Term(policy_gradient, weight, taught, reduce),
            "log_ratio": Term(-gap, 1.0, taught, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    how = {"teacher": teacher, "group_size": group_size, "temperature": temperature, "lesson": lesson}
    return opd_with(terms, credit=("pg",) if gamma else (), **how)
