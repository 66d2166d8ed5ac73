"""MSD: the model that thinks about safety in English teaches itself in other languages, where it is sure and heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from sdjax.collect.lessons import english_version
from sdjax.kernels.distributions import entropy
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.kernels.weights import confidence, disagreement, mean_one
from sdjax.methods.sdft import sdft
from sdjax.ranges import NonNegative, PositiveInt, Range, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term

CARD = Card(
    paper="Qin et al. 2026, Multilingual Safety Alignment via Self-Distillation",
    arxiv="2605.02971",
    equation="w KL(student||teacher), w ~ (1 - H(q top k) / log k) (1 - p(argmax q)), mean 1 per row",
    student="question",
    teacher="question + its English version + a request to judge safety first; parameters: the initial ones",
    reduction="sequence mean over rows with a lesson",
    differences=(
        "k is not published (20 here); that weights are constants is ours",
        "the preferred token is the teacher's likeliest; sampled_token reads it as the sampled one",
        "the English reasoning part of a teacher's own sample is trained on too: the sources do not say",
    ),
    status="second-hand",
)


@check_ranges
def msd(
    *,
    weighted: bool = True,
    top_k: Annotated[int, Range(2)] = 20,
    sampled_token: bool = False,
    from_teacher: bool = False,
    ema_rate: Share = 0.0,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Multilingual self-distillation with dual-perspective weights (Qin et al. 2026, arXiv:2605.02971).

    `loss_t = w_t * KL(student || teacher)`, `w` the teacher's confidence times the student's disagreement, of mean 1 in
    every row.  Sequence mean over rows with a lesson.

    Args:
      weighted: weigh tokens; without, the plain mean of the divergence.
      top_k: the teacher's likeliest entries, at least 2, whose entropy is its confidence.
      sampled_token: disagree about the sampled token instead of the teacher's likeliest one.
      from_teacher: the teacher, reading its lesson, writes the texts (the off-policy variant).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen (paper), 1 is live.
      group_size: rollouts per prompt.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `english_version`.
      reduce: how tokens are averaged.
    """
    how = {"from_teacher": from_teacher, "ema_rate": ema_rate, "group_size": group_size, "temperature": temperature}
    base = sdft(lesson=lesson or english_version, **how)

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        preferred = token if sampled_token else jnp.argmax(teacher, axis=-1)
        found = {"divergence": reverse_kl(student, teacher), "entropy": entropy(student)}
        return {
            **found,
            "weight": confidence(teacher, min(top_k, teacher.shape[-1])) * disagreement(student, preferred),
        }

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        over = batch.mask & (batch.valid & taught)[:, None]
        weight = mean_one(sig["weight"], over, axis=-1) if weighted else 1.0
        return {
            "divergence": Term(sig["divergence"], weight, over, reduce),
            "weight": Term(sig["weight"], 1.0, over, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    objective = Objective(base.objectives[0].views, signals, terms, credit=("divergence",) if weighted else ())
    return base._replace(objectives=(objective,))
