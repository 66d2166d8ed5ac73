"""Verdicts on many completions: what was cut off earns nothing, and verifiers that wait for others work side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from sdjax.tasks import bounded
from sdjax.tasks.answers import marks
from sdjax.tasks.completions import split
from sdjax.types import Example, Verdict

Verify = Callable[[Example, str], Verdict]
Marked = TypeVar("Marked", bound=Verify)

CUT_OFF = "Your response was cut off before it reached a final answer."


class Case(NamedTuple):
    """A completion to be judged; `finished` is False where the length limit cut it off."""

    example: Example
    text: str
    finished: bool = True


def from_threads(verify: Marked) -> Marked:
    """Marks a verifier that may be called from several threads at once: it waits for processes that do the work.

    The mark is True, as many threads as there are cores, or a number: one that waits for a server wants more.
    """
    verify.from_threads = True
    return verify


def reads_answers(verify: Marked) -> Marked:
    """Marks a verifier that looks for the answer in a text: one that was cut off may show it an intermediate value."""
    verify.reads_answers = True
    return verify


def verdicts(verify: Verify, cases: Sequence[Case]) -> list[Verdict]:
    r"""The verdict on each case, in order.

    With a verifier that `reads_answers`, a completion that was cut off has a complete, marked answer (`\boxed{}`,
    `<answer>`) after its thinking, or its reward is 0.  Other verifiers are asked all the same.
    """

    def verdict(case: Case) -> Verdict:
        if not case.finished and _is(verify, "reads_answers") and not has_marked_answer(case.text):
            return Verdict(0.0, CUT_OFF if case.example.feedback is None else case.example.feedback)
        return verify(case.example, case.text)

    return side_by_side(verdict, cases, threads=threads_for(verify))


def marked_from_threads(function: Callable) -> bool:
    """Whether a function has the mark `from_threads`."""
    return _is(function, "from_threads")


def threads_for(function: Callable) -> int:
    """How many threads may call a function at once, by its mark `from_threads`; 1 without it."""
    mark = _is(function, "from_threads")
    return bounded.cores() if mark is True else int(mark) or 1


def marked_from_first(verify: Verify) -> bool:
    """Whether a verifier has the mark `from_first`: one of several processes asks it for all, as it remembers what it said."""
    return _is(verify, "from_first")


def side_by_side(function: Callable[[Any], Any], items: Sequence[Any], *, threads: int) -> list[Any]:
    """`[function(item) for item in items]`, so many at once."""
    if threads < 2 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def has_marked_answer(text: str) -> bool:
    """Whether the last mark of the answer, after the thinking, is complete."""
    mark = marks.marked(split(text).answer)
    return mark is not None and mark.answer is not None


def _is(verify: Callable, mark: str) -> bool:
    while isinstance(verify, functools.partial) and not hasattr(verify, mark):
        verify = verify.func
    return getattr(verify, mark, False)
