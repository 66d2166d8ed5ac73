"""AntiSD: GRPO, plus credit for tokens that a teacher who knows the solution would not have needed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from sdjax.collect.lessons import READERS, attempt_and_verdict, scored_attempts
from sdjax.collect.memory import OPEN_GATE, entropy_gated
from sdjax.engine.generate import Sampling
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.estimators import score_coefficient
from sdjax.kernels.policy_gradient import signed_surrogate
from sdjax.kernels.reductions import Reducer, masked_mean, token_mean
from sdjax.ranges import Finite, NonNegative, NonNegativeInt, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Shen et al. 2026, Anti-Self-Distillation for Reasoning RL via Pointwise Mutual Information",
    arxiv="2605.11609",
    equation="GRPO with A - gate coef phi(u), u = log q - log p, phi = (softplus(u) - log 2) / 2",
    student="question",
    teacher="question + a correct solution as a previous attempt + the verdict on this attempt; parameters: the student's",
    reduction="token mean",
    differences=(
        "the aggregation is not said: verl's token mean; nor whether a success reads itself: it does not",
        "the mean of -phi(u) over sampled tokens is >= 0, a push toward whatever was sampled; the term 'bonus' logs it, centred removes it",
    ),
)


@check_ranges
def antisd(
    *,
    group_size: PositiveInt = 8,
    coef: Finite = 0.5,
    beta: Share = 0.5,
    warmup: NonNegativeInt = 5,
    low: Share = 0.93,
    centred: bool = False,
    success: PositiveShare = 0.5,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Anti-self-distillation (Shen et al. 2026, arXiv:2605.11609, Algorithm 1): *ascends* JSD(student, teacher).

    `A_t = A + gate * coef * c(u_t)`, `c = -phi` the divergence's `score_coefficient`, `u = log q - log p` at sampling.

    Args:
      group_size: rollouts per prompt.
      coef: weight of the teacher's part; 0 is GRPO.
      beta: which divergence is ascended: 0.5 is the paper's; 1 reverse KL, with a negative `coef` its baseline SD.
      warmup: first batches, without the teacher's part; they set the gate's levels by the teacher's median entropy.
      low: share of that entropy below which the gate closes, until it is reached again.
      centred: take its mean over the batch's tokens off the teacher's part, which then pushes no row as a whole; not in
        the paper.
      success: the least reward of a success, for the default lesson.
      clip: widths of the surrogate's clip below and above 1.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `attempt_and_verdict`.
      reduce: how tokens are averaged.
    """
    told = lesson or functools.partial(attempt_and_verdict, success=success)

    def collect(environment, examples, key, memory):
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        rollouts = scored_attempts(environment, examples, key, told, scored, **how)
        heard = [r.extras["teacher_entropy"] for r in rollouts if r.contexts["teacher"] is not None]
        median = float(np.median(np.concatenate(heard))) if heard else None
        gate, memory = (0.0, memory) if median is None else entropy_gated(median, memory, warmup, low)
        return [r.with_extras(gate=gate if r.contexts["teacher"] is not None else 0.0) for r in rollouts], memory

    def scored(dist, token):
        gap = logprob(dist["teacher"], token) - logprob(dist["student"], token)
        return {"log_ratio": gap, "teacher_entropy": entropy(dist["teacher"])}

    def signals(dist, token):
        return {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        bonus, gate = score_coefficient(batch.extras["log_ratio"], beta), batch.extras["gate"]
        if centred:
            heard = batch.mask & (batch.valid & (gate > 0.0))[:, None]
            bonus = bonus - masked_mean(bonus, heard)
        advantage = group_advantage(batch.returns, batch.group, batch.valid)[:, None]
        advantage = advantage + coef * gate[:, None] * bonus
        raised, lowered = signed_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        measured = {"bonus": bonus, "gate": gate, "entropy": sig["entropy"]}
        return {
            "raised": Term(*raised, reduce=reduce),
            "lowered": Term(*lowered, reduce=reduce),
            **{name: Term(value, coef=0.0) for name, value in measured.items()},
        }

    credit = (("raised", "lowered"),) if coef else ()
    objective = Objective({"student": View(trainable=True)}, signals, terms, credit=credit, rewarded=True)
    return Method(collect, (objective,), memory=OPEN_GATE, early=READERS)
