"""PowerOPD: on-policy distillation whose rewards are differences of powers of probabilities, and so bounded."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.kernels.credit import power_difference
from sdjax.kernels.policy_gradient import token_ratio
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opd import opd_with
from sdjax.ranges import NonNegative, Positive, PositiveInt, check_ranges
from sdjax.types import Card, Messages, Method, Rollout, Term

CARD = Card(
    paper="PowerOPD 2026 (authors not in our source)",
    arxiv="2606.17199",
    equation="-(p/b) (q^alpha - b^alpha)",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "alpha is 5 in the released script (default) and 0.1 in the code's class",
        "the reward is not divided by alpha; scaled=True does, and tends to plain OPD as alpha -> 0",
        "its mean over tokens is not minus a divergence: the fixed point q = p is shared, the path there is not",
        "known from a paragraph and from its code; group size and reduction are ours",
    ),
    status="second-hand",
)


@check_ranges
def power_opd(
    *,
    teacher: str | None = None,
    alpha: Positive = 5.0,
    scaled: bool = False,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy distillation with a power reward (arXiv:2606.17199).

    `loss_t = -(p/b) * stop(q^alpha - b^alpha)`, b the sampler: within [-1, 1], of the sign of q - b.  Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      alpha: power, above 0 (5 in the released script, 0.1 in its class; 5 to 500 do alike in the paper).
      scaled: divide the reward by `alpha`; a small `alpha` is then plain on-policy distillation.
      group_size: rollouts per prompt.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """

    def terms(batch, sig, step):
        taught, old = batch.contexts["teacher"].valid, batch.behavior_logprobs
        reward = power_difference(old, sig["teacher_logprobs"], alpha) / (alpha if scaled else 1.0)
        return {
            "pg": Term(-token_ratio(sig["logprobs"], old) * reward, 1.0, taught, reduce),
            "token_reward": Term(reward, 1.0, taught, coef=0.0),
            "log_ratio": Term(old - sig["teacher_logprobs"], 1.0, taught, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    return opd_with(terms, teacher=teacher, group_size=group_size, temperature=temperature, lesson=lesson)
