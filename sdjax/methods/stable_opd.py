"""StableOPD: on-policy distillation beside complete golden solutions, anchored to the student as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import references
from sdjax.engine.policies import frozen
from sdjax.kernels.distributions import logprob
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.estimators import sampled_reverse_kl
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.methods.opd import opd
from sdjax.ranges import NonNegative, PositiveInt, check_ranges
from sdjax.types import REFERENCE, Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Luo et al. 2026, Demystifying OPD: Length Inflation and Stabilization Strategies",
    arxiv="2604.08527",
    equation="clipped surrogate with A = log q - log b, - gold_coef log p on gold, + kl_coef KL(student||initial)",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="sequence mean, of each term over its own rows",
    differences=(
        "gold_coef, kl_coef (a third party's), the clip, and the anchor's estimator and rows (the student's) are not published",
    ),
    status="second-hand",
)


@check_ranges
def stable_opd(
    *,
    teacher: str | None = None,
    group_size: PositiveInt = 4,
    gold_coef: NonNegative = 0.1,
    kl_coef: NonNegative = 0.01,
    anchor: Literal["full", "sampled"] = "full",
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Stabilised on-policy distillation (Luo et al. 2026, arXiv:2604.08527, Eq. 2, 5, 6).

    Each prompt's golden solution, the example's own, rides along with its rollouts.  Sequence mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      group_size: rollouts per prompt; the golden solution is one more row.
      gold_coef: weight of the golden rows; 0: there are none.
      kl_coef: weight of the anchor; 0: none.
      anchor: `full` vocabulary, or the `sampled` token's estimate, unbiased in value and gradient.
      clip: widths of the surrogate's clip below and above 1.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """
    base = opd(teacher=teacher, group_size=group_size, temperature=temperature, lesson=lesson)
    (plain,) = base.objectives

    def collect(environment, examples, key, memory):
        rollouts, memory = base.collect(environment, examples, key, memory)
        golden = [r.read_by(teacher=None) for r in references(environment, examples) if gold_coef and r.finished]
        return [r.read_by(reference=question(r.example)) for r in [*rollouts, *golden]], memory

    def signals(dist, token):
        found = plain.signals(dist, token)
        if not kl_coef:
            return found
        if anchor == "full":
            return {**found, "drift": reverse_kl(dist["student"], dist["reference"])}
        return {**found, "drift": sampled_reverse_kl(found["logprobs"], logprob(dist["reference"], token))}

    def terms(batch, sig, step):
        golden = batch.source == REFERENCE
        taught = batch.contexts["teacher"].valid & ~golden
        gap = sig["teacher_logprobs"] - batch.behavior_logprobs
        surrogate = clipped_surrogate(sig["logprobs"], batch.behavior_logprobs, gap, clip)
        measured = {"log_ratio": Term(-gap, 1.0, taught, coef=0.0), "entropy": Term(sig["entropy"], coef=0.0)}
        found = {"pg": Term(surrogate, 1.0, taught, reduce), **measured}
        if gold_coef:
            found["gold"] = Term(-sig["logprobs"], 1.0, golden, reduce, gold_coef)
        if kl_coef:
            found["drift"] = Term(sig["drift"], 1.0, ~golden, reduce, kl_coef)
        return found

    views, snapshots = plain.views, base.snapshots
    if kl_coef:
        views, snapshots = {**views, "reference": View("initial")}, {**snapshots, "initial": frozen()}
    return base._replace(collect=collect, objectives=(Objective(views, signals, terms),), snapshots=snapshots)
