"""Which of several teacher rollouts to learn from: a correct one first, then the one closest to the student (BRTS)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax import Array, random

from sdjax.collect.contexts import question, rewrite_last, with_suffix
from sdjax.collect.rollouts import judge, sample
from sdjax.collect.synthesis import ask
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment, Policy, grouped, score
from sdjax.kernels.top_k import top_k
from sdjax.types import TEACHER, Example, Messages, Rollout, View


def alignment(tokens: Sequence[int], likeliest: Array) -> float:
    """Share of positions at which a token is among the student's likeliest there: `[n]`, `[m, k] ->` a number.

    Positions of the *student's own* rollout, as in BRTS's code: once the texts are out of step, it measures chance.
    Over the first `min(n, m)` positions; 0 without any.
    """
    both = min(len(tokens), len(likeliest))
    if not both:
        return 0.0
    return float((np.asarray(likeliest[:both]) == np.asarray(tokens[:both])[:, None]).any(-1).mean())


def choose(correct: Sequence[bool], score: Sequence[float], retried: bool | None, skip: bool) -> tuple[int | None, int]:
    """`(candidate, tier)`: 1 the best-scored correct one; 2 the retry (`None` for which), if correct; 3 the best-scored.

    Ties go to the first.  `retried` is the retry's correctness, `None` without one; `skip` takes nobody in tier 3.
    """
    right = [i for i, ok in enumerate(correct) if ok]
    if right:
        return max(right, key=lambda i: score[i]), 1
    if retried:
        return None, 2
    return (None if skip else max(range(len(score)), key=lambda i: score[i])), 3


def with_key(messages: Messages, answer: str) -> Messages:
    """The question and its answer as a key for silent validation: how tier 2 asks once more."""
    content = (
        f"{messages[-1]['content']}\n\nThe correct answer is {answer}. It is a key for silent validation only: never "
        "mention it or hint at it, derive every step from the problem, and use it for a final check alone."
    )
    return rewrite_last(messages, content)


PERTURBATION = "\n\nReason step by step, and rethink every step carefully."
"""What half of the candidates are asked besides, so that they differ more; the wording is ours."""


class Rule(NamedTuple):
    """How a teacher's rollout is chosen.

    `scored(dist, token)` is one function object per method: `likeliest_of(k)`, read by the live policy.  `perturb`
    asks half of the candidates with `PERTURBATION`.
    """

    scored: Callable
    candidates: int = 2
    success: float = 0.5
    align: Literal["position", "prefix"] = "position"
    retry: bool = True
    skip: bool = False
    perturb: bool = False
    sampling: Sampling = Sampling(temperature=0.7, top_p=0.95)


def likeliest_of(k: int) -> Callable:
    """Signals of a "student" view: its `k` likeliest tokens at every position, and whether the token is among them."""

    def scored(dist, token):
        likeliest = top_k(dist["student"], min(k, dist["student"].shape[-1]))[1]
        return {"likeliest": likeliest, "inside": (likeliest == token[..., None]).any(-1)}

    return scored


def selected(
    environment: Environment, teacher: Policy, own: Sequence[Rollout], told: Sequence[Messages], keys: Array, rule: Rule
) -> list[Rollout]:
    """The teacher's chosen rollout for each of the student's (one per group), with its tier; none where all are skipped.

    `told` is what the teacher reads; the answer is only shown for the retry, which is asked for where no candidate is
    correct.
    """
    examples = [r.example for r in own]
    written = grouped(judge(environment, candidates_of(teacher, examples, told, keys[0], rule)))
    lost = [g for g, rows in written.items() if all(r.reward < rule.success for r in rows)] if rule.retry else []
    chats = [with_key(told[g], examples[g].main_answer) for g in lost]
    said = ask(teacher, chats, keys[1], slots=len(examples), sampling=rule.sampling)
    again = [
        Rollout(examples[g], s.tokens, s.logprobs, s.text, g, TEACHER, finished=s.finished)
        for g, s in zip(lost, said, strict=True)
    ]
    retried = {r.group: r for r in judge(environment, again)}
    close, found = closeness(environment, own, written, rule), []
    for group, rows in written.items():
        second = retried.get(group)
        solved = None if second is None else second.reward >= rule.success
        place, tier = choose([r.reward >= rule.success for r in rows], close[group], solved, rule.skip)
        row = second if tier == 2 else None if place is None else rows[place]
        found += [] if row is None else [row.with_extras(tier=float(tier))]
    return found


def candidates_of(
    teacher: Policy, examples: Sequence[Example], told: Sequence[Messages], key: Array, rule: Rule
) -> list[Rollout]:
    """The teacher's candidates for every example, group by group, those of perturbed prompts last."""
    asked = {id(e): chat for e, chat in zip(examples, told, strict=True)}
    plain, perturbed = (lambda e: asked[id(e)]), (lambda e: with_suffix(asked[id(e)], PERTURBATION))
    more = rule.candidates // 2 if rule.perturb else 0
    how = {"sampling": rule.sampling, "source": TEACHER}
    rows = sample(teacher, examples, key, n=rule.candidates - more, context=plain, **how)
    if more:
        # Not a key that a candidate was drawn from.
        rows += sample(teacher, examples, random.fold_in(key, len(examples)), n=more, context=perturbed, **how)
    return sorted(rows, key=lambda r: r.group)


def closeness(
    environment: Environment, own: Sequence[Rollout], written: dict[int, list[Rollout]], rule: Rule
) -> dict[int, list[float]]:
    """How close every candidate of every group is to the student."""
    views = {"student": View()}
    if rule.align == "position":
        likeliest = [r.extras["likeliest"] for r in score(environment, own, views, rule.scored)]
        return {g: [alignment(r.tokens, likeliest[g]) for r in rows] for g, rows in written.items()}
    rows = [r.read_by(student=question(r.example)) for some in written.values() for r in some]
    inside = lambda r: float(np.mean(r.extras["inside"])) if len(r.tokens) else 0.0
    found = grouped(score(environment, rows, views, rule.scored))
    return {g: [inside(r) for r in some] for g, some in found.items()}


def cut(row: Rollout, length: int) -> Rollout:
    """The row trained on its first `length` tokens only."""
    trained = row.trained or (True,) * len(row.tokens)
    return dataclasses.replace(row, trained=tuple(t and i < length for i, t in enumerate(trained)))
