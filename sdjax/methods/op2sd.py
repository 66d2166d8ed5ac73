"""OP2SD: OPSD whose teacher reads *another* problem and its solution: a control of what privileged context is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax

from sdjax.collect.contexts import question, with_reference
from sdjax.errors import MethodError
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opsd import opsd
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Example, Messages, Method

CARD = Card(
    paper="Ichihara et al. 2026, OP2SD",
    arxiv="2608.09228",
    equation="sum_v min(q_v log(q_v/p_v), clip), q reading another problem and its solution",
    student="question",
    teacher="question + another problem with its solution; parameters: the initial ones",
    reduction="token mean",
    differences=(
        "prompt and choice of the other problem were not available: OPSD's template, a problem met before, at random",
        "same-topic is by a field of the data (topic); which topics the paper takes, and from where, was not available",
        "clip, temperatures and reduction are OPSD's; the paper's were not available",
    ),
    status="reconstruction",
)


def shown(example: Example, other: Mapping[str, str] | None) -> Messages | None:
    """The question and another problem's solution, with that problem unless it is this one."""
    if other is None:
        return None
    reference = other["solution"] if other["id"] == example.id else f"{other['problem']}\n\n{other['solution']}"
    return with_reference(question(example), reference)


@check_ranges
def op2sd(
    *,
    context: Literal["mismatched", "same-topic", "matched", "none"] = "mismatched",
    topic: str = "topic",
    remembered: PositiveInt = 256,
    group_size: PositiveInt = 1,
    beta: Share = 0.0,
    clip: NonNegative | None = 0.05,
    temperature: Positive = 1.1,
    top_p: PositiveShare = 0.95,
    top_k: NonNegativeInt = 20,
    ema_rate: Share = 0.0,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy self-distillation from another problem (Ichihara et al. 2026, arXiv:2608.09228): `opsd`, another context.

    Every rollout has its own other problem, uniform over those met so far (`memory`) and in this batch.  Token mean.

    Args:
      context: another problem; another one of the same topic (`None` where none was met); this one, which is OPSD; or
        the question alone.
      topic: the field of the data (`Example.meta`) that says a problem's topic, for the context "same-topic".
      remembered: problems kept in memory, the latest.
      group_size: rollouts per prompt.
      beta: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      clip: bound of every vocabulary entry's addend; `None` is no bound.
      temperature: of sampling and of both distributions in the loss.
      top_p, top_k: of sampling (1 and 0: no filter).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      reduce: how tokens are averaged.
    """
    how = {"beta": beta, "clip": clip, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    own = lambda rollout, rollouts: question(rollout.example)
    base = opsd(**how, ema_rate=ema_rate, group_size=group_size, lesson=own, reduce=reduce)

    def collect(environment, examples, key, memory):
        unnamed = [e.id for e in examples if topic not in e.meta] if context == "same-topic" else []
        if unnamed:
            raise MethodError(
                f"method.context=same-topic: problem {unnamed[0]!r} has no field {topic!r} in its data; name the field that "
                "says its topic with method.topic, or take the context mismatched"
            )
        sampling, choosing = key, jax.random.fold_in(key, len(examples))
        rollouts, _ = base.collect(environment, examples, sampling, None)
        met = {problem["id"]: problem for problem in [*memory, *map(solved, examples)] if problem["solution"]}
        rows = [r.read_by(teacher=told(r, i, met, choosing)) for i, r in enumerate(rollouts)]
        return rows, list(met.values())[-remembered:]

    def solved(example):
        return {"id": example.id, "problem": question(example)[-1]["content"], "solution": example.solution} | about(
            example
        )

    def about(example):
        """What another problem must share."""
        return {"topic": str(example.meta[topic])} if context == "same-topic" else {}

    def told(rollout, row, met, key):
        example = rollout.example
        if context == "none":
            return question(example)
        if context == "matched":
            return shown(example, met.get(example.id))
        others = [
            problem for id, problem in met.items() if id != example.id and about(example).items() <= problem.items()
        ]
        place = int(jax.random.randint(jax.random.fold_in(key, row), (), 0, max(1, len(others))))
        return shown(example, others[place] if others else None)

    (plain,) = base.objectives
    views = {**plain.views, "teacher": plain.views["teacher"]._replace(told=context != "none")}
    return base._replace(collect=collect, objectives=(plain._replace(views=views),), memory=[])
