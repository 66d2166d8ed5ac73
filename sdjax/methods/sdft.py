"""SDFT: learning from demonstrations on-policy; a slow copy of the model that reads the demonstration is the teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from sdjax.collect.contexts import question, with_demonstration
from sdjax.collect.lessons import before_writing, by_teacher
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import ema
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import jsd
from sdjax.kernels.policy_gradient import importance_weight
from sdjax.kernels.reductions import Reducer, masked_mean, sequence_mean
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Shenfeld et al. 2026, Self-Distillation Enables Continual Learning",
    arxiv="2601.19897",
    equation="w_i KL(teacher||student), w_i = mean_t min(p/b, cap), without the first 3 tokens",
    student="question",
    teacher="question + demonstration; parameters: EMA of the student",
    reduction="sequence mean over rows with a lesson",
    differences=(
        "the paper's equations say KL(student||teacher) (alpha=1); its code and all its results are alpha=0 (default)",
        "rows of 3 tokens or fewer are left out of the mean; the code counts them with loss 0",
        "skip is 0 in the code's configuration and 3 in its launcher (default)",
        "the teacher moves after every optimiser step, minibatches and epochs included, as in the paper and its code",
    ),
)


def demonstration(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
    """SDFT's lesson: the question and the example's solution as a demonstration, or `None` without one."""
    example = rollout.example
    return None if example.solution is None else with_demonstration(question(example), example.solution)


@check_ranges
def sdft(
    *,
    alpha: Share = 0.0,
    skip: NonNegativeInt = 3,
    is_cap: Positive | None = 2.0,
    ema_rate: Share = 0.01,
    from_teacher: bool = False,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Self-distillation fine-tuning (Shenfeld et al. 2026, arXiv:2601.19897; its code rather than its Eq. 1).

    `loss_t = w_i * JSD_alpha(student || teacher)` for `t >= skip`.  Sequence mean over rows with a lesson.

    Args:
      alpha: 0 KL(teacher||student) (the results), 1 KL(student||teacher) (the equations), between: Jensen-Shannon.
      skip: first tokens left out of the loss, and of the loss only: the student is not to learn the teacher's prefaces.
      is_cap: cap of the importance weight, whose mean over a row's tokens is `w_i`; `None`: no weight.
      ema_rate: the teacher's parameters follow the student's after every update: 0 is frozen, 1 is live (paper: 0.01 to
        0.05).
      from_teacher: the teacher, reading its lesson, writes the texts: the paper's offline arm, without weight.
      group_size: rollouts per prompt.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `demonstration`.  With
        `from_teacher` it is asked before anything is written: about an empty rollout.
      reduce: how tokens are averaged.
    """
    told = lesson or demonstration
    name = "live" if ema_rate == 1.0 else "teacher"

    def collect(environment, examples, key, memory):
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        if from_teacher:
            return by_teacher(environment, name, examples, key, before_writing(told), **how), memory
        rollouts = attempts(environment, examples, key, **how)
        return [r.read_by(teacher=told(r, rollouts)) for r in rollouts], memory

    def signals(dist, token):
        student = dist["student"]
        return {
            "divergence": jsd(student, dist["teacher"], alpha),
            "logprobs": logprob(student, token),
            "entropy": entropy(student),
        }

    def terms(batch, sig, step):
        late = jnp.arange(batch.mask.shape[1]) >= skip
        over = batch.mask & (batch.valid & batch.contexts["teacher"].valid)[:, None] & late
        importance = 1.0
        if is_cap is not None and not from_teacher:
            weight = importance_weight(sig["logprobs"], batch.behavior_logprobs, cap=is_cap)
            importance = masked_mean(weight, over, axis=-1)
        return {
            "divergence": Term(sig["divergence"], 1.0, over, reduce, importance=importance),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    teacher = View(name, per_rollout=lesson is not None, told=True)
    objective = Objective({"student": View(trainable=True), "teacher": teacher}, signals, terms)
    return Method(collect, (objective,), {} if name == "live" else {"teacher": ema(ema_rate, every_update=True)})
