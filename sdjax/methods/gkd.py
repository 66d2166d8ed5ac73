"""GKD: a teacher's whole distributions, on a mixture of the student's own texts and given ones."""

from __future__ import annotations

from collections.abc import Callable

import jax

from sdjax.collect.contexts import question
from sdjax.collect.lessons import before_writing, by_teacher
from sdjax.collect.rollouts import attempts, references
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, teacher_name, teacher_view
from sdjax.kernels.distributions import entropy, top_k_with_rest
from sdjax.kernels.divergences import jsd
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, PositiveInt, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Agarwal et al. 2024, On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arxiv="2306.13649",
    equation="JSD_beta(student || teacher), beta 0: KL(teacher||student), 1: KL(student||teacher)",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "the paper's XSum runs sample at temperature 1; TRL's default, 0.9, is the default here",
        "one coin per batch, as in TRL",
        "top_k, for teachers that give no more than their likeliest tokens, is neither in the paper nor in TRL's GKD",
        "the paper's mixture with a reward is not included: see opd's rl_weight",
        "beta near 0 or 1 shrinks the loss to nothing (0.999: under 0.001 of the KL); only 0 and 1 are the two KLs",
    ),
)


@check_ranges
def gkd(
    *,
    teacher: str | None = None,
    lmbda: Share = 0.5,
    beta: Share = 0.5,
    top_k: PositiveInt | None = None,
    seq_kd: bool = False,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 0.9,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649, Eq. 1).

    `loss_t = JSD_beta(student || teacher)` on the student's own texts with probability `lmbda`, a coin per batch, else
    on the examples' solutions.  Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      lmbda: probability that the student writes the batch: 0 is supervised distillation, 1 is on-policy.
      beta: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon, which shrinks
        to nothing towards both ends (0.999 is not nearly 1: see the card).
      top_k: the teacher's likeliest entries, and one for all others, are compared instead of the whole vocabulary: a
        lower bound, and all that a teacher behind a server can give; `None`: the whole vocabulary.
      seq_kd: when the student does not write the batch, the teacher does, after its lesson, instead of the dataset.
      group_size: rollouts per prompt.
      temperature: of sampling; the loss is at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.  With `seq_kd` it is
        asked before anything is written: about an empty rollout.
      reduce: how tokens are averaged.
    """
    teacher = teacher_name(teacher, lesson)

    def collect(environment, examples, key, memory):
        coin, key = jax.random.split(key)
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        own = jax.random.uniform(coin) < lmbda
        if seq_kd and not own:
            return by_teacher(environment, teacher, examples, key, before_writing(lesson), **how), memory
        rollouts = attempts(environment, examples, key, **how) if own else references(environment, examples)
        told = lambda r: lesson(r, rollouts) if lesson else question(r.example)
        return [r.read_by(student=question(r.example), teacher=told(r)) for r in rollouts], memory

    def signals(dist, token):
        student, told = dist["student"], dist["teacher"]
        if top_k is not None:
            student, told = top_k_with_rest(student, told, by=told, k=top_k)
        return {"divergence": jsd(student, told, beta), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        return {
            "divergence": Term(sig["divergence"], 1.0, batch.contexts["teacher"].valid, reduce),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    views = {"student": View(trainable=True), "teacher": teacher_view(teacher, lesson, top_k)}
    snapshots = {"initial": frozen()} if teacher == "initial" else {}
    return Method(collect, (Objective(views, signals, terms),), snapshots, writers=(teacher,) if seq_kd else ())
