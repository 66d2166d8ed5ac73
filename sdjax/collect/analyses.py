"""A teacher that thinks about what it was told before it grades: OPSD's `reason_first`."""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from sdjax.collect.contexts import with_suffix
from sdjax.collect.synthesis import ask
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Policy
from sdjax.types import Messages, Rollout

REQUEST = (
    "\n\nDo not solve the problem yet. First analyse the reference solution: which ideas it rests on, why each step "
    "holds, and where one could go wrong."
)
TRANSITION = "With this analysis in mind, now solve the original problem step by step in your own words."
"""What a teacher is asked for first, and what it reads after its analysis; the wording is ours."""


def with_analyses(
    policy: Policy, rollouts: Sequence[Rollout], key: Array, *, slots: int, limit: int, sampling: Sampling
) -> list[Rollout]:
    """The rollouts whose teacher has read its lesson, an analysis that it wrote of it, and a transition.

    One analysis of at most `limit` tokens per lesson: attempts that are told the same share it.  Analysis and lesson
    stand in one turn and are privileged.  Source: Zhao et al. 2026 (OPSD), arXiv:2601.18734, `reason_first` of the code.
    """
    lessons = list({repr(r.contexts["teacher"]): r.contexts["teacher"] for r in rollouts}.values())
    told = [chat for chat in lessons if chat is not None]
    asked = [with_suffix(chat, REQUEST) for chat in told]
    said = ask(policy, asked, key, slots=slots, limit=limit, sampling=sampling)
    read = {repr(chat): analysed(chat, s.text) for chat, s in zip(told, said, strict=True)}
    return [r.read_by(teacher=read.get(repr(r.contexts["teacher"]))) for r in rollouts]


def analysed(chat: Messages, analysis: str) -> Messages:
    """A lesson with an analysis of it and a transition in its last turn."""
    last = chat[-1]
    known = last["content"] + f"\n\nAnalysis of the reference solution:\n\n{analysis}"
    start = known.find(last.get("privileged") or "\n\n")
    return (*chat[:-1], {**last, "content": f"{known}\n\n{TRANSITION}", "privileged": known[max(start, 0) :]})
