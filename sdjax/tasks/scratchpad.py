"""Multi-step arithmetic with a scratchpad, in which hedging is useful: an author slips, notices or not, and repairs.

A question is a chain, read from left to right, of which only the last digits count:

    3 7 a * 4 b + 5 8 =

An answer repeats the start, thinks step by step, then lists the results.  A result may be followed by a hedge word and by the same step done
digit by digit, with carries, from the right; what follows `so` replaces the result:

    <think> 3 7 ; a * 4 = 5 8 wait 7 * 4 = 2 8 , 3 * 4 = 1 2 + 2 = 1 4 , so 4 8 ; b + 5 8 = 0 6 ; </think>
    a 4 8 ; answer 0 6

Traces are drawn from an `Author` whose rates are known.  Every token stands between spaces, digits included.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from sdjax.tasks.answers import marks
from sdjax.tasks.completions import split
from sdjax.tasks.splits import check_sizes, drawn
from sdjax.types import Example, Task, Verdict

HEDGES = ("wait", "hmm", "maybe", "check")
"""What an author says before a step is done again with care; all mean the same."""

LABELS = "abcdefgh"
"""The names of the steps."""

SLIP = {"+": 0.15, "-": 0.15, "*": 0.30}
"""How often a result written at once is wrong, by operation."""

DOUBT = {"+": 0.5, "-": 0.5, "*": 0.6}
"""How often a correct result is done again with care."""


class Author(NamedTuple):
    """Who writes a trace: factors on the rates of slips and doubts, and how often a slip is noticed."""

    slip: float = 1.0
    doubt: float = 1.0
    notice: float = 0.9


ALONE = Author()
"""Knows the question only."""


class Family(NamedTuple):
    """Problems of one kind: digits that count, how many steps, and `(operation, lowest, highest operand)` to draw from.

    A highest operand of 0 is as many nines as there are digits.
    """

    name: str
    digits: int
    steps: tuple[int, int]
    operations: tuple[tuple[str, int, int], ...]


SMALL = (("+", 1, 0), ("*", 2, 5))
IN_DOMAIN = Family("in_domain", 2, (2, 3), SMALL)
MORE_STEPS = Family("more_steps", 2, (4, 5), SMALL)
MORE_DIGITS = Family("more_digits", 3, (2, 3), SMALL)
OTHER_OPERATIONS = Family("other_operations", 2, (2, 3), (("-", 1, 0), ("*", 6, 9)))
FAMILIES = (IN_DOMAIN, MORE_STEPS, MORE_DIGITS, OTHER_OPERATIONS)


class Problem(NamedTuple):
    """A chain: a start and `(operation, operand)` steps, modulo `10 ** digits`."""

    start: int
    steps: tuple[tuple[str, int], ...]
    digits: int


def draw(family: Family, rng: random.Random) -> Problem:
    """A random problem of a family."""
    nines = 10**family.digits - 1
    steps = []
    for _ in range(rng.randint(*family.steps)):
        operation, low, high = rng.choice(family.operations)
        steps.append((operation, rng.randint(low, high or nines)))
    return Problem(rng.randint(1, nines), tuple(steps), family.digits)


def spelled(number: int, digits: int) -> str:
    """A number as its digits, with leading zeros: 7 as `0 7`."""
    return " ".join(f"{number:0{digits}d}")


def step_text(number: int, operation: str, right: int, digits: int) -> str:
    """What is to be done in a step, with its label: `a * 4`.  Factors have one digit."""
    return f"{LABELS[number]} {operation} {right if operation == '*' else spelled(right, digits)}"


def drill(rng: random.Random) -> tuple[str, str]:
    """One step to be done with care, and nothing else: what an author must know by heart.  `(request, answer)`."""
    digits, operation = rng.choice((2, 3)), rng.choice("+-*")
    left, right = rng.randrange(10**digits), rng.randrange(2, 10) if operation == "*" else rng.randrange(10**digits)
    said = str(right) if operation == "*" else spelled(right, digits)
    answer = (
        f"{with_care(left, operation, right, digits)} so {spelled(applied(left, operation, right, digits), digits)}"
    )
    return f"check {spelled(left, digits)} {operation} {said} =", answer


def steps_text(problem: Problem, between: str = " ") -> str:
    """What is to be done in all steps: `a * 4 b + 5 8`."""
    return between.join(step_text(n, op, right, problem.digits) for n, (op, right) in enumerate(problem.steps))


def applied(left: int, operation: str, right: int, digits: int) -> int:
    """The result of one step, modulo `10 ** digits`."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return value % 10**digits


def question_text(problem: Problem) -> str:
    """What is asked: `3 7 a * 4 b + 5 8 =`."""
    return f"{spelled(problem.start, problem.digits)} {steps_text(problem)} ="


def results(problem: Problem) -> list[int]:
    """The value after every step."""
    values = [problem.start]
    for operation, right in problem.steps:
        values.append(applied(values[-1], operation, right, problem.digits))
    return values[1:]


def held_out(problem: Problem, share: int = 10) -> bool:
    """Whether the question is one of the tenth that nobody trains on, by a hash of its text."""
    return hashlib.sha256(question_text(problem).encode()).digest()[0] % share == 0


# ---- traces -------------------------------------------------------------------------------------------------------


def with_care(left: int, operation: str, right: int, digits: int) -> str:
    """A step digit by digit from the right, then with what was carried: `7 * 4 = 2 8 , 3 * 4 = 1 2 + 2 = 1 4 ,`.

    The two digits of a value are what is carried, or borrowed, and what stays.
    """
    lines, carry, sign = [], 0, "-" if operation == "-" else "+"
    for place in range(digits):
        above, below = left // 10**place % 10, right if operation == "*" else right // 10**place % 10
        value = {"+": above + below, "-": above - below, "*": above * below}[operation]
        line = f"{above} {operation} {below} = {two(value)}"
        if place:
            value += -carry if operation == "-" else carry
            line += f" {sign} {carry} = {two(value)}"
        carry = abs(value // 10)
        lines.append(f"{line} ,")
    return " ".join(lines)


def two(value: int) -> str:
    """What is carried, or borrowed for a value below zero, and what stays: 14 as `1 4`, -3 as `1 7`."""
    return f"{abs(value // 10)} {value % 10}"


def slipped(value: int, digits: int, rng: random.Random) -> int:
    """The value with one digit off by one."""
    place = 10 ** rng.randrange(digits)
    digit = value // place % 10
    return value + place * ((digit + rng.choice((1, 9))) % 10 - digit)


def trace(problem: Problem, author: Author, rng: random.Random, sure: Sequence[int] = ()) -> str:
    """An author's answer; at the steps numbered in `sure` (from 0) the author neither slips nor doubts."""
    value, found = problem.start, []
    steps = [f"{spelled(value, problem.digits)} ;"]
    for number, (operation, right) in enumerate(problem.steps):
        correct = applied(value, operation, right, problem.digits)
        free = 0.0 if number in sure else 1.0
        slips = rng.random() < free * author.slip * SLIP[operation]
        said = slipped(correct, problem.digits, rng) if slips else correct
        hedges = rng.random() < (author.notice if slips else free * author.doubt * DOUBT[operation])
        step = f"{step_text(number, operation, right, problem.digits)} = {spelled(said, problem.digits)}"
        if hedges:
            step += f" {rng.choice(HEDGES)} {with_care(value, operation, right, problem.digits)}"
            step += f" so {spelled(correct, problem.digits)}"
        value = correct if hedges else said
        steps.append(f"{step} ;")
        found.append(value)
    return f"<think> {' '.join(steps)} </think> {listing(found, problem.digits)}"


def listing(values: Sequence[int], digits: int) -> str:
    """The results after the thinking: `a 4 8 ; answer 0 6`."""
    before = [f"{label} {spelled(value, digits)}" for label, value in zip(LABELS, values[:-1], strict=False)]
    return " ; ".join([*before, f"answer {spelled(values[-1], digits)}"])


def solution(problem: Problem) -> str:
    """The reference: every step at once, no slip, no hedge."""
    return trace(problem, Author(0.0, 0.0, 0.0), random.Random(0))


def peer(problem: Problem, rng: random.Random) -> str:
    """A correct answer of somebody who knows the question only: with slips repaired, and doubts."""
    answer = listing(results(problem), problem.digits)
    while not (text := trace(problem, ALONE, rng)).endswith(answer):
        pass
    return text


# ---- examples and verdicts ----------------------------------------------------------------------------------------


def example(problem: Problem, family: str) -> Example:
    """A problem as an example; `meta` keeps the correct results and the plan."""
    text = question_text(problem)
    return Example(
        id=f"{family}:{text}",
        prompt=({"role": "user", "content": text},),
        answer=spelled(results(problem)[-1], problem.digits),
        solution=solution(problem),
        meta={
            "family": family,
            "results": results(problem),
            "digits": problem.digits,
            "plan": steps_text(problem, " ; "),
        },
    )


_ANSWER = re.compile(r"\banswer((?: \d)+)")
_RESULT = re.compile(r"= ((?:\d ?)+)(?:[a-z]+ [^;]*?so ((?:\d ?)+))?;")


def verify(example: Example, text: str) -> Verdict:
    """1 where the digits after the last `answer` are the answer's; else 0 and the first step that is wrong, if found."""
    stated = _ANSWER.findall(split(text).answer)
    if stated and stated[-1].strip() == example.answer:
        return Verdict(1.0)
    return Verdict(0.0, remark(first_error(example, text)) if stated else marks.NO_ANSWER)


def remark(step: int | None) -> str:
    """Feedback on a wrong answer."""
    return "The answer is wrong." if step is None else f"The answer is wrong: step {step + 1} is the first error."


def first_error(example: Example, text: str) -> int | None:
    """The number, from 0, of the first step of the trace whose final result is not the reference's; `None` without."""
    thought, answer, _ = split(text)
    said = [(again or once).strip() for once, again in _RESULT.findall(thought or answer)]
    correct = [spelled(v, example.meta["digits"]) for v in example.meta["results"]]
    pairs = zip(said, correct, strict=False)
    return next((i for i, (got, want) in enumerate(pairs) if got != want), None)


def problems(family: Family, size: int, seed: int, *, test: bool = False) -> list[Problem]:
    """Distinct problems of a family: held-out ones for tests, others for training."""
    return drawn(family.name, functools.partial(draw, family), held_out, size, seed, test=test)


def scratchpad(
    *, train_size: int = 512, test_size: int = 128, seed: int = 0, family: Family = IN_DOMAIN, train: bool = True
) -> Task:
    """Problems of one family: `train_size` to train on and `test_size` held out.  Raises `TaskError` if there are fewer."""
    check_sizes(train_size=train_size, test_size=test_size)
    made = lambda size, test: tuple(example(p, family.name) for p in problems(family, size, seed, test=test))
    return Task(f"scratchpad-{family.name}", made(train_size, False), made(test_size, True), verify)


def vocabulary() -> tuple[str, ...]:
    """All words of questions, traces and plans, and of the remarks on wrong answers."""
    signs = ("+", "-", "*", "=", ";", ",", "so", "answer", "<think>", "</think>")
    remarks = {w for step in (None, *range(8)) for w in remark(step).split()} | {*marks.NO_ANSWER.split()}
    return (*map(str, range(10)), *LABELS, *signs, *HEDGES, *sorted(remarks - {*map(str, range(10))}))
