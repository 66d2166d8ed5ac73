"""Verifier by equality of text."""

from __future__ import annotations

from sdjax.tasks import answers
from sdjax.types import Example, Verdict


def verify(example: Example, text: str, *, reveal_answer: bool = False) -> Verdict:
    """1 where the stated answer is `example.answer`, up to spacing and a final full stop; capitals count.

    The answer is found by `answers.stated_answer`.  Never raises.
    """
    answer = answers.stated_answer(text, lines=example.answer.count("\n") + 1)
    if answer is not None and _normalised(answer) == _normalised(example.answer):
        return Verdict(1.0)
    remark = answers.remark_on(
        answer, example.answer, fixed=example.feedback, remark=answers.outcome, reveal_answer=reveal_answer
    )
    return Verdict(0.0, remark)


def _normalised(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
