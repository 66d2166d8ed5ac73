"""Plans: what to do, made from a reference solution, without its answer (SORT)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jax import Array

from sdjax.collect.contexts import question, rewrite_last, without_thinking
from sdjax.collect.rollouts import references
from sdjax.collect.synthesis import ask
from sdjax.engine.policies import Environment, grouped
from sdjax.types import Example, Messages, Rollout

BLANK = "..."
"""Stands for the answer in a plan."""


def redacted(text: str, answer: str | Sequence[str]) -> str:
    """The text without the answers, wherever they stand by themselves: not inside a word, nor as a part of a number."""
    for each in (answer,) if isinstance(answer, str) else answer:
        if each.strip():
            alone = rf"(?<![\w.]){re.escape(each.strip())}(?!\w|\.\d)"
            text = re.sub(alone, BLANK, text, flags=re.IGNORECASE)
    return text


def plan_request(example: Example) -> Messages:
    """The question, its solution without the answer, and the request for a plan."""
    shown = redacted(example.solution or "", example.answers)
    content = (
        f"{question(example)[-1]['content']}\n\nA solution without its answer:\n{shown}\n\n"
        "Write down the steps of this solution as a short numbered plan: what to do, no results."
    )
    return rewrite_last(question(example), content, shown)


def written_plans(environment: Environment, examples: Sequence[Example], key: Array, slots: int) -> list[str]:
    """Plans by the live policy, which sees the redacted solution; where the answer comes up again, it is taken out."""
    said = ask(environment.live, [plan_request(e) for e in examples], key, slots=slots)
    return [redacted(without_thinking(s.text), e.answers) for s, e in zip(said, examples, strict=True)]


def repairs(
    environment: Environment, rollouts: Sequence[Rollout], examples: Sequence[Example], success: float
) -> list[Rollout]:
    """The solutions of the examples whose attempts all fail, as rows of their groups; none of those without a solution."""
    lost = [g for g, rows in grouped(rollouts).items() if all(r.reward < success for r in rows)]
    lost = [g for g in lost if examples[g].solution is not None]
    rows = references(environment, [examples[g] for g in lost])
    return [dataclasses.replace(r, group=lost[r.group]) for r in rows]


def with_plan(messages: Messages, plan: str) -> Messages:
    """The question with a plan for its solution; the question alone for an empty plan."""
    if not plan.strip():
        return messages
    content = f"{messages[-1]['content']}\n\nA plan for the solution:\n{plan}\n\nSolve the problem by this plan."
    return rewrite_last(messages, content, plan)
