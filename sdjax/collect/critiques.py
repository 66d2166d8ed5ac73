"""Critiques: what the policy, told the answer, says of its own failed attempts (VPD).

Source: the self-critique of Li et al. 2026, arXiv:2605.15113, paraphrased.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from sdjax.collect.contexts import question, rewrite_last, with_feedback, without_thinking
from sdjax.collect.synthesis import ask
from sdjax.engine.policies import Environment
from sdjax.types import Messages, Rollout


def critique_request(rollout: Rollout) -> Messages:
    """A failed attempt and the correct answer, and the request for two or three sentences about the mistake."""
    example = rollout.example
    content = (
        f"{question(example)[-1]['content']}\n\nA wrong attempt:\n{rollout.text}\n\nThe correct answer is "
        f"{example.main_answer}. In two or three sentences, say what the mistake and the misconception behind it are, "
        "specifically and so that it can be acted upon, without merely stating the answer."
    )
    return rewrite_last(question(example), content, rollout.text)


def criticised(environment: Environment, rollouts: Sequence[Rollout], key: Array, success: float) -> list[Rollout]:
    """The rollouts with a critique by the live policy as the lesson of every failure, whether its group has a success.

    Successes, and failures about which nothing is said, read what they read anyway.
    """
    wrong = [r for r in rollouts if r.reward < success]
    asked = [critique_request(r) for r in wrong]
    said = [without_thinking(s.text) for s in ask(environment.live, asked, key, slots=8)]
    told = {id(r): with_feedback(question(r.example), feedback=s) for r, s in zip(wrong, said, strict=True) if s}
    return [r.read_by(teacher=told.get(id(r), r.contexts["teacher"])) for r in rollouts]
