"""Which answers to one problem are the same: what a majority is counted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdjax.tasks import maths
from sdjax.tasks.answers import extraction
from sdjax.tasks.judging import Case, has_marked_answer
from sdjax.types import Example


def given(case: Case) -> str | None:
    """What a completion gives as its answer, as a verdict would see it; `None` where there is none."""
    if not case.finished and not has_marked_answer(case.text):
        return None
    found = [extraction.taken(case.text, maths.unwrapped(right)).answer for right in case.example.answers]
    return next((maths.unwrapped(each) for each in found if each is not None), None)


def votes(example: Example, answers: Sequence[str | None], same: Callable[[str, str], bool] = maths.equal) -> list[int]:
    """For each answer the number of its group of equal ones, in order of appearance; -1 for none.

    Equality is asked of both sides, since the correct answer's kind decides how it is read.  Right answers are compared
    with the given ones first, so that all ways to write one are together.
    """
    firsts: list[str] = [maths.unwrapped(right) for right in example.answers[:1] if right.strip()]
    numbers: dict[int, int] = {}
    found = []
    for answer in answers:
        if answer is None:
            found.append(-1)
            continue
        place = next((i for i, first in enumerate(firsts) if same(first, answer) or same(answer, first)), None)
        if place is None:
            place = len(firsts)
            firsts.append(answer)
        found.append(numbers.setdefault(place, len(numbers)))
    return found
