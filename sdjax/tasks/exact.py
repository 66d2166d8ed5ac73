"""Verifier by equality of text."""

from __future__ import annotations

from sdjax.tasks.answers import marks
from sdjax.tasks.completions import split
from sdjax.tasks.judging import reads_answers
from sdjax.types import Example, Verdict


@reads_answers
def verify(example: Example, text: str, *, reveal_answer: bool = False) -> Verdict:
    """1 where the stated answer is `example.answer`, or one of them, up to spacing and a final full stop; capitals count.

    The answer is found by `marks.stated_answer`, after the thinking.  Never raises.
    """
    said = split(text).answer
    found = [marks.stated_answer(said, lines=right.count("\n") + 1) for right in example.answers]
    for answer, right in zip(found, example.answers, strict=True):
        if answer is not None and _normalised(answer) == _normalised(right):
            return Verdict(1.0)
    answer = next(iter(found), None)
    remark = marks.remark_on(
        answer, example.main_answer, fixed=example.feedback, remark=marks.outcome, reveal_answer=reveal_answer
    )
    return Verdict(0.0, remark)


def _normalised(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
