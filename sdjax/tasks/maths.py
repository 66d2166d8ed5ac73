"""Verifier of mathematical answers: `1/2`, `0.5` and `\\frac12` are the same, by exact numbers and math-verify."""

from __future__ import annotations

import functools
import importlib.util
import re

from sdjax.tasks import bounded
from sdjax.tasks.answers import equivalence, extraction, marks
from sdjax.tasks.answers.numbers import exact, same_value
from sdjax.tasks.errors import TaskError
from sdjax.tasks.judging import from_threads, reads_answers
from sdjax.types import Example, Verdict

_LONGEST = 500
_DEEPEST = 25
# What may take for ever: sums, products, integrals, limits, large factorials, large exponents, powers of powers of numbers.
_COSTLY = re.compile(
    r"\d{3,}\s*!|!\s*!|\\(?:prod|sum|i*int|oint|lim|bigcup|bigcap|coprod)(?![a-zA-Z])|(?:\^|\*\*)[\s{(]*[-+]?\d{4,}"
    r"|\d[\s)}]*(?:\^|\*\*)[\s{(]*[-+]?\d+[\s)}]*(?:\^|\*\*)"
)
_CHARACTERS = re.compile(r"\\.|[(\[{)\]}]", re.DOTALL)


@from_threads
@reads_answers
def verify(
    example: Example, text: str, *, reveal_answer: bool = False, remark: marks.Remark = marks.direction
) -> Verdict:
    r"""1 where the answer of `text` equals `example.answer`, or one of them, mathematically.

    What counts as the answer stands after the thinking: the last `\boxed{}` or `<answer>`; without one, what the text
    states ("The answer is 18.", "#### 18"); as a last resort the last number, or the last line where the correct answer
    is no number.  A last box that is empty or broken, or thinking that does not end, is no answer.  A wrong answer's
    feedback is `example.feedback` if there is one, else `remark`, and names the correct answer only with `reveal_answer`.

    Never raises on any text, may be called from any thread, and sets no signals; an answer that takes longer than
    `bounded.LIMIT_S` to compare counts as wrong, and is counted (`bounded.out_of_time`).

    Raises: `TaskError` if math-verify is not installed.
    """
    golds = [unwrapped(each) for each in example.answers]
    found = [extract(text, gold) for gold in golds]
    if any(each is not None and equal(gold, each) for gold, each in zip(golds, found, strict=True)):
        return Verdict(1.0)
    gold, answer = (golds[0], found[0]) if golds else ("", None)
    feedback = marks.remark_on(answer, gold, fixed=example.feedback, remark=remark, reveal_answer=reveal_answer)
    return Verdict(0.0, feedback)


def extract(text: str, gold: str) -> str | None:
    """The answer in a completion, given what kind of answer is wanted; `None` where there is none."""
    answer = extraction.taken(text, unwrapped(gold)).answer
    return None if answer is None else unwrapped(answer)


def unwrapped(answer: str) -> str:
    r"""An answer without `\boxed{}`, dollar signs and spaces around it, and without a worked solution before "####"."""
    answer = (marks.last_boxed(answer) or answer).strip()
    answer = answer.rsplit("####", 1)[-1].strip() or answer
    return answer.strip("$").strip() if answer.count("$") == 2 or not answer.startswith("$") else answer


def equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same.  A comparison that takes too long is `False`, and counted."""
    same = _equal(gold, answer)
    if same is None:
        bounded.note_out_of_time()
    return bool(same)


@functools.lru_cache(maxsize=65536)
def _equal(gold: str, answer: str) -> bool | None:
    if not gold or not answer or len(answer) > 4 * _LONGEST:
        return gold == answer != ""
    late: list[bool] = []

    def library(one: str, other: str) -> bool:
        score = _by_library(one, other)
        late.extend([True] if score is None else [])
        return score == 1.0

    try:
        return equivalence.same(gold, answer, library) or (None if late else False)
    except RecursionError:
        return False


@functools.lru_cache(maxsize=65536)
def _by_library(gold: str, answer: str) -> float | None:
    numbers = exact(gold), exact(answer)
    if None not in numbers:
        return float(same_value(*numbers))
    if costly(gold) or costly(answer):
        return 0.0
    if importlib.util.find_spec("math_verify") is None:
        raise TaskError("Comparing mathematical answers needs math-verify; install it: pip install math-verify.")
    return _judge.score(gold, answer)


def costly(answer: str) -> bool:
    """Whether comparing this answer may take for ever, judged by its looks: the same verdict on every machine."""
    if len(answer) > _LONGEST:
        return True
    depth = deepest = 0
    for sign in _CHARACTERS.findall(answer):
        depth += (sign in "([{" or sign == r"\{") - (sign in ")]}" or sign == r"\}")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST or bool(_COSTLY.search(answer))


_judge = bounded.Judge("same_maths", ["(x+1)^2", "x^2+2x+1"])
