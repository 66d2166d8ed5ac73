"""OPSD: the initial model, reading the reference solution, grades every token of the student's attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from sdjax.collect.analyses import with_analyses
from sdjax.collect.contexts import question, with_reference
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import ema
from sdjax.kernels.distributions import entropy, logprob, temper, top_k_renormalised
from sdjax.kernels.divergences import clip_entries, jsd_entries
from sdjax.kernels.estimators import sampled_reverse_kl
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Zhao et al. 2026, Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
    arxiv="2601.18734",
    equation="sum_v min(q_v log(q_v/p_v), clip), p and q at the sampling temperature",
    student="question",
    teacher="question + reference solution; parameters: the initial ones",
    reduction="token mean",
    differences=(
        "the default is version 3; opsd_v1 is version 1: JSD 0.5, no clip, temperature 1.2",
        "the paper averages per sequence, its code over the tokens of a micro-batch (default)",
        "clipped entries push the student away from what the teacher wants more of: as published, not a bounded pull",
        "version 3's templates (student's thinking off, teacher's on) are `teacher_thinks`; by default nothing is set",
        "reason_first (off in the code, too): wording ours; lesson and analysis stand in one turn of the teacher's prompt",
    ),
)

V1 = {"beta": 0.5, "clip": None, "temperature": 1.2, "top_p": 1.0, "top_k": 0}
"""What version 1 of the paper does differently."""


def reference_solution(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
    """OPSD's lesson: the question and the example's reference solution, or `None` without one."""
    example = rollout.example
    return None if example.solution is None else with_reference(question(example), example.solution)


@check_ranges
def opsd(
    *,
    beta: Share = 0.0,
    clip: NonNegative | None = 0.05,
    temperature: Positive = 1.1,
    top_p: PositiveShare = 0.95,
    top_k: NonNegativeInt = 20,
    teacher_top_k: PositiveInt | None = None,
    sampled_token: bool = False,
    teacher_thinks: bool = False,
    ema_rate: Share = 0.0,
    reason_first: NonNegativeInt = 0,
    group_size: PositiveInt = 1,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy self-distillation (Zhao et al. 2026, arXiv:2601.18734 v3, Eq. 6-8).

    `loss_t = sum_v min(JSD_beta's addend v, clip)`, both distributions at the sampling temperature.  The clip acts before
    the sum over the vocabulary and from above only: the loss may be negative.  Token mean over rows with a lesson.

    Args:
      beta: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon (version 1: 0.5).
      clip: bound of every vocabulary entry's addend; `None` is no bound (version 1).
      temperature: of sampling *and* of both distributions in the loss, above 0 (version 1: 1.2).
      top_p, top_k: of sampling (1 and 0: no filter).
      teacher_top_k: entries of the teacher's distribution that are kept, both sides renormalised; `None` is all.
      sampled_token: Eq. 9 instead: reverse KL by the sampled token alone, a policy gradient without clip.
      teacher_thinks: the student's chat template is told `enable_thinking` false and the teacher's true, as in version 3;
        for templates with that option (Qwen3).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen (paper), 1 is live.
      reason_first: tokens of an analysis of its lesson that the teacher writes before it grades, greedily; 0: none.  The
        context must have room for it.
      group_size: rollouts per prompt.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `reference_solution`.
      reduce: how tokens are averaged.
    """
    told, live = lesson or reference_solution, ema_rate == 1.0
    policy = "live" if live else "teacher"

    def collect(environment, examples, key, memory):
        sampling = Sampling(temperature, top_p, top_k)
        rollouts = attempts(environment, examples, key, n=group_size, sampling=sampling)
        rollouts = [r.read_by(teacher=told(r, rollouts)) for r in rollouts]
        if reason_first:
            own, slots = jax.random.fold_in(key, len(examples)), len(rollouts if lesson else examples)
            how = {"slots": slots, "limit": reason_first, "sampling": GREEDY}
            rollouts = with_analyses(environment.policies[policy], rollouts, own, **how)
        return rollouts, memory

    def divergence(student, teacher, token):
        if sampled_token:
            return sampled_reverse_kl(logprob(student, token), logprob(teacher, token))
        if teacher_top_k is not None:
            student, teacher = top_k_renormalised(student, teacher, by=teacher, k=teacher_top_k)
        entries = jsd_entries(student, teacher, beta)
        return entries.sum(-1) if clip is None else clip_entries(entries, clip)

    def signals(dist, token):
        student, teacher = temper(dist["student"], temperature), temper(dist["teacher"], temperature)
        return {"divergence": divergence(student, teacher, token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        return {
            "divergence": Term(sig["divergence"], 1.0, batch.contexts["teacher"].valid, reduce),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    thinking = lambda on: {"enable_thinking": on} if teacher_thinks else {}
    teacher = View(policy, per_rollout=lesson is not None, told=True, template=thinking(True))
    student = View(trainable=True, template=thinking(False))
    objective = Objective({"student": student, "teacher": teacher}, signals, terms)
    return Method(collect, (objective,), {} if live else {"teacher": ema(ema_rate)})


def opsd_v1(**options: Any) -> Method:
    """`opsd` as in version 1 of the paper: JSD 0.5, no clip, temperature 1.2, no sampling filters.  `options` override."""
    return opsd(**{**V1, **options})
