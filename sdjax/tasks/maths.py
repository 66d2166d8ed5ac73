"""Verifier of mathematical answers by math-verify: `1/2`, `0.5` and `\\frac12` are the same."""

from __future__ import annotations

import functools
import importlib.util
import re

from sdjax.tasks import answers
from sdjax.tasks.bounded import Judge
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Verdict

_LONGEST = 500
_DEEPEST = 25
# What may take for ever: large factorials, products and sums, large exponents, powers of powers of numbers.
_COSTLY = re.compile(
    r"\d{3,}\s*!|!\s*!|\\(?:prod|sum|int|iint|lim)\b|(?:\^|\*\*)[\s{(]*[-+]?\d{4,}"
    r"|\d[\s)}]*(?:\^|\*\*)[\s{(]*[-+]?\d+[\s)}]*(?:\^|\*\*)"
)


def verify(
    example: Example, text: str, *, reveal_answer: bool = False, remark: answers.Remark = answers.direction
) -> Verdict:
    r"""1 where the answer of `text` equals `example.answer` mathematically, by math-verify.

    The answer is the last `\boxed{}` or `<answer>`; without one, the last number if `example.answer` is a number, else
    what follows "The answer is", else the last line.  A wrong answer's feedback is `example.feedback` if there is one,
    else `remark`, and names the correct answer only with `reveal_answer`.  Never raises on any text, may be called
    from any thread, and sets no signals; an answer that takes longer than `bounded.LIMIT_S` to compare counts as wrong.

    Raises: `TaskError` if math-verify is not installed.
    """
    gold = unwrapped(example.answer)
    answer = extract(text, gold)
    if answer is not None and equal(gold, answer):
        return Verdict(1.0)
    feedback = answers.remark_on(answer, gold, fixed=example.feedback, remark=remark, reveal_answer=reveal_answer)
    return Verdict(0.0, feedback)


def extract(text: str, gold: str) -> str | None:
    """The answer in a completion, given what kind of answer is wanted; `None` where there is none."""
    marked = answers.last_boxed(text) or answers.last_tagged(text)
    if marked:
        return unwrapped(marked)
    if answers.parse_number(gold) is not None:
        return answers.last_number(text)
    stated = answers.stated_answer(text)
    return None if stated is None else unwrapped(stated.removesuffix("."))


def unwrapped(answer: str) -> str:
    r"""An answer without `\boxed{}`, dollar signs and spaces around it."""
    return (answers.last_boxed(answer) or answer).strip().strip("$").strip()


@functools.lru_cache(maxsize=65536)
def equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same; plain integers and equal texts are compared here, all else by math-verify."""
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    numbers = answers.parse_number(gold), answers.parse_number(answer)
    if None not in numbers and (numbers[0] == numbers[1] or all(n.denominator == 1 for n in numbers)):
        return numbers[0] == numbers[1]
    if costly(gold) or costly(answer):
        return False
    if importlib.util.find_spec("math_verify") is None:
        raise TaskError("Comparing mathematical answers needs math-verify; install it: pip install math-verify.")
    return _judge.score(gold, answer) == 1.0


def costly(answer: str) -> bool:
    """Whether comparing this answer may take for ever, judged by its looks: the same verdict on every machine."""
    if len(answer) > _LONGEST or max(answer.count(opening) for opening in "({[") > _DEEPEST:
        return True
    return bool(_COSTLY.search(answer))


_judge = Judge("same_maths", ["1", "1"])
