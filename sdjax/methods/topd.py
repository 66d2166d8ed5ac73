"""TOP-D: on-policy distillation from a proximal teacher, between the teacher and the student."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax

from sdjax.kernels.advantages import reward_to_go
from sdjax.kernels.credit import group_whiten
from sdjax.kernels.divergences import log_mixture_ratio
from sdjax.kernels.policy_gradient import token_ratio
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opd import opd_with
from sdjax.ranges import NonNegative, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Rollout, Term

CARD = Card(
    paper="TOP-D 2026 (authors not in our source), on-policy distillation from a proximal teacher",
    arxiv="2607.04751",
    equation="-(p/b) A, A = group-whitened mean of r to come, r = log(alpha q/p + 1 - alpha)",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "alpha, and how returns and normalisation are composed (the mean to come, then whitened), are reconstructions",
        "not 2605.31490 (truncated horizons), which goes by the same name",
    ),
    status="reconstruction",
)


@check_ranges
def topd(
    *,
    teacher: str | None = None,
    alpha: PositiveShare = 0.5,
    discount: Share = 1.0,
    normalised: bool = True,
    group_size: PositiveInt = 8,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy distillation from a proximal teacher (arXiv:2607.04751), a reconstruction.

    The teacher is `alpha q + (1 - alpha) p`, so that the reward `log(alpha q/p + 1 - alpha)` is at least
    `log(1 - alpha)`.  With `alpha` 1, `discount` 0 and not `normalised` it is plain `opd`.  Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      alpha: share of the teacher in the proximal teacher.
      discount: of later rewards in the mean reward to come; 0 is the token's own.
      normalised: shift and scale advantages to mean 0 and deviation 1 over the tokens of each group.
      group_size: rollouts per prompt.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        over = batch.mask & (batch.valid & taught)[:, None]
        # The student of now, not the sampler: an equal teacher then has rewards of exactly 0, and nothing to scale up.
        gap = lax.stop_gradient(sig["teacher_logprobs"] - sig["logprobs"])
        reward = log_mixture_ratio(gap, alpha)
        advantage = reward_to_go(reward, over, discount, normalised=True)
        if normalised:
            advantage = group_whiten(advantage, over, batch.group, batch.valid)
        policy_gradient = -token_ratio(sig["logprobs"], batch.behavior_logprobs) * advantage
        return {
            "pg": Term(policy_gradient, 1.0, taught, reduce),
            "token_reward": Term(reward, 1.0, taught, coef=0.0),
            "log_ratio": Term(-gap, 1.0, taught, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    return opd_with(terms, teacher=teacher, group_size=group_size, temperature=temperature, lesson=lesson)
