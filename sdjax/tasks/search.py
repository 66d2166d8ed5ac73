"""Problems solved by trying: which of some programs takes one number to another, modulo 11?  One search, in four grammars.

A question names the two numbers and the programs, two operations each, by letters:

    4 to 9 : A +1 *2 B *3 +5 C +2 *7 D *2 *2 E *7 +1

A trial is a program's letter and its operations, each with what it comes to, `A +1 5 *2 10`: every result needs the one before,
so that what a program comes to is known to one who writes it down, and is hard to guess from the question.  The search begins
at a random program and goes on in their order, from the last to the first, until a result is the goal; then, or when its
author gives up after a miss, the answer follows:

    D *2 8 *2 5 wait E *7 6 +1 7 wait A +1 5 *2 10 wait B *3 1 +5 6 wait C +2 6 *7 9 answer C

What stands between a miss and the next trial is all that grammars differ in: an epistemic word, nothing, a neutral word.  The
fourth writes no trials: its answer is a guess.  So lost words, lost search and lost computation (results that are not what
the program comes to) can be told apart in what a model writes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sdjax.tasks.answers import marks
from sdjax.tasks.splits import check_sizes, drawn
from sdjax.types import Example, Task, Verdict


class Grammar(NamedTuple):
    """How a search is written: the words of which one follows every miss, and whether trials are written at all."""

    name: str
    words: tuple[str, ...]
    tries: bool = True


MARKED = Grammar("marked", ("wait", "hmm", "maybe"))
SILENT = Grammar("silent", ())
FILLER = Grammar("filler", ("then", "next", "also"))
BARE = Grammar("bare", (), tries=False)
GRAMMARS = (MARKED, SILENT, FILLER, BARE)

OFTEN = (0.7, 0.2, 0.1)
"""How often each of a grammar's words follows a miss: the first is likelier than giving up, so that greedy answers search, too."""


class Author(NamedTuple):
    """Who writes: how often it gives up after a miss, how often a result is wrong; with `kept` it knows the answer.

    Such an author leaves this share of the misses of an uninformed search.  It gives up the search after one of them as
    often as others do, but then its answer is right.
    """

    gives_up: float = 0.3
    slips: float = 0.03
    kept: float | None = None


ALONE = Author()
"""Knows the question only."""


MODULUS = 11
OPERATIONS = ("+1", "+2", "+5", "*2", "*3", "*7")
LETTERS = "ABCDEFGHIJ"


class Family(NamedTuple):
    """Problems of one kind: how many programs there are, and how many operations each has."""

    name: str
    options: int
    operations: int


IN_DOMAIN = Family("in_domain", 5, 2)
MORE_OPTIONS = Family("more_options", 8, 2)
LONGER_PROGRAMS = Family("longer_programs", 5, 3)
UNSEEN = Family("unseen", 10, 2)
LEARNT = (IN_DOMAIN, MORE_OPTIONS, LONGER_PROGRAMS)
"""What base models have seen; of `UNSEEN`, the longest search, they have seen nothing."""

FAMILIES = (*LEARNT, UNSEEN)


class Problem(NamedTuple):
    """Which of the programs takes `start` to `goal`: one does."""

    start: int
    goal: int
    options: tuple[tuple[str, ...], ...]

    @property
    def letters(self) -> str:
        """The names of the programs."""
        return LETTERS[: len(self.options)]


def applied(operation: str, number: int) -> int:
    """`number + k` or `number * k`, modulo 11."""
    sign, k = operation[0], int(operation[1:])
    return (number + k if sign == "+" else number * k) % MODULUS


def results(start: int, operations: Sequence[str]) -> list[int]:
    """What each operation comes to, one after another."""
    return list(itertools.accumulate(operations, lambda number, operation: applied(operation, number), initial=start))[
        1:
    ]


def comes_to(problem: Problem, letter: str) -> int:
    """The last result of a program."""
    return results(problem.start, problem.options[problem.letters.index(letter)])[-1]


def solution_of(problem: Problem) -> str:
    """The letter of the program that comes to the goal."""
    return next(x for x in problem.letters if comes_to(problem, x) == problem.goal)


def draw(family: Family, rng: random.Random) -> Problem:
    """A random problem of a family: its programs differ, and one of them comes to the goal."""
    programs = list(itertools.product(OPERATIONS, repeat=family.operations))
    while True:
        options, start = tuple(rng.sample(programs, family.options)), rng.randrange(MODULUS)
        ends = [results(start, o)[-1] for o in options]
        if goals := [goal for goal in ends if ends.count(goal) == 1]:
            return Problem(start, rng.choice(goals), options)


def question_text(problem: Problem) -> str:
    """What is asked: `4 to 9 : A +1 *2 B *3 +5 ...`."""
    listed = " ".join(f"{x} {' '.join(o)}" for x, o in zip(problem.letters, problem.options, strict=True))
    return f"{problem.start} to {problem.goal} : {listed}"


def held_out(problem: Problem, share: int = 8) -> bool:
    """Whether it is one of the eighth that nobody trains on, by a hash of its numbers and its programs in whatever order."""
    known = f"{problem.start}:{problem.goal}:{sorted(problem.options)}"
    return hashlib.sha256(known.encode()).digest()[0] % share == 0


# ---- traces -------------------------------------------------------------------------------------------------------


def in_order(options: Sequence[str], start: int) -> list[str]:
    """The options from position `start` to the last, then from the first on."""
    return [*options[start:], *options[:start]]


def candidates(problem: Problem, author: Author, rng: random.Random, among: Sequence[str] | None = None) -> list[str]:
    """What an author would try, in order: all programs, or those `among` some; one who knows the answer ends with it."""
    order = in_order(problem.letters, rng.randrange(len(problem.letters)))
    order = [x for x in order if among is None or x in among]
    if author.kept is None:
        return order
    before = order[: order.index(solution_of(problem))]
    return [*(x for x in before if rng.random() < author.kept), solution_of(problem)]


def trace(
    problem: Problem, grammar: Grammar, author: Author, rng: random.Random, among: Sequence[str] | None = None
) -> str:
    """An author's answer, searched in all programs or `among` some of them."""
    order = candidates(problem, author, rng, among)
    if not grammar.tries:
        return f"answer {order[0] if author.kept is None else order[-1]}"
    written: list[str] = []
    for candidate, following in zip(order, in_order(order, 1), strict=True):
        steps, result = tried(problem, candidate, author, rng)
        written += [candidate, *steps]
        hit, last = result == problem.goal, candidate == order[-1]
        if hit or last or rng.random() < author.gives_up:
            guess = following if author.kept is None else order[-1]
            return " ".join([*written, "answer", candidate if hit else guess])
        if grammar.words:
            written.append(rng.choices(grammar.words, OFTEN)[0])
    return ""


def tried(problem: Problem, letter: str, author: Author, rng: random.Random) -> tuple[list[str], int]:
    """A program's operations and results as an author writes them, and the last result: right, or any other."""
    operations = problem.options[problem.letters.index(letter)]
    found = results(problem.start, operations)
    # Who knows the answer never slips.
    if author.kept is None and rng.random() < author.slips:
        found[-1] = rng.choice([r for r in range(MODULUS) if r != found[-1]])
    return [word for o, r in zip(operations, found, strict=True) for word in (o, str(r))], found[-1]


# ---- examples and verdicts ----------------------------------------------------------------------------------------


def example(problem: Problem, family: str) -> Example:
    """A problem as an example, with the shortest search as its solution; `meta` keeps the problem."""
    text, answer = question_text(problem), solution_of(problem)
    steps, _ = tried(problem, answer, Author(slips=0.0), random.Random(0))
    return Example(
        id=f"{family}:{text}",
        prompt=({"role": "user", "content": text},),
        answer=answer,
        solution=f"{answer} {' '.join(steps)} answer {answer}",
        meta={"family": family, "problem": problem._asdict()},
    )


def problem_of(example: Example) -> Problem:
    """The problem of an example, from its `meta`."""
    fields = example.meta["problem"]
    return Problem(**{**fields, "options": tuple(map(tuple, fields["options"]))})


def verify(example: Example, text: str) -> Verdict:
    """1 where the last `answer` is followed by the solution, else 0."""
    words = text.split()
    places = [i for i, word in enumerate(words[:-1]) if word == "answer"]
    if not places:
        return Verdict(0.0, marks.NO_ANSWER)
    return Verdict(float(words[places[-1] + 1] == example.answer))


def problems(family: Family, size: int, seed: int, *, test: bool = False) -> list[Problem]:
    """Distinct problems of a family: held-out ones for tests, others for training."""
    return drawn(family.name, functools.partial(draw, family), held_out, size, seed, test=test)


def search(*, train_size: int = 512, test_size: int = 64, seed: int = 0, family: Family = IN_DOMAIN) -> Task:
    """Problems of one family: `train_size` to train on and `test_size` held out.  Raises `TaskError` if there are fewer."""
    check_sizes(train_size=train_size, test_size=test_size)
    made = lambda size, test: tuple(example(p, family.name) for p in problems(family, size, seed, test=test))
    return Task(f"search-{family.name}", made(train_size, False), made(test_size, True), verify)


def vocabulary() -> tuple[str, ...]:
    """All words of questions and traces, of every grammar."""
    words = [word for grammar in GRAMMARS for word in grammar.words]
    return (*map(str, range(MODULUS)), *LETTERS, *OPERATIONS, "to", ":", "answer", *words)


# ---- what a text does ---------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A trial in a text: the program's letter, its last result, the words after it, and whether another trial follows."""

    candidate: str
    result: int
    words: int
    goes_on: bool
    end: int
    """The number of words up to and including the result."""


TRIAL = re.compile(r"(?<!\S)([A-J])((?: [+*]\d+ \d+)+)(?!\S)")


def trials(text: str) -> Iterator[Trial]:
    """The trials of a text, in order."""
    text = " ".join(text.split())
    marks = {word for grammar in GRAMMARS for word in grammar.words}
    found = list(TRIAL.finditer(text))
    starts = {match.start() for match in found}
    for match in found:
        after = list(itertools.takewhile(lambda word: word in marks, text[match.end() :].split()))
        following = match.end() + len(" ".join(["", *after])) + 1
        end = len(text[: match.end()].split())
        yield Trial(match[1], int(match[2].split()[-1]), len(after), following in starts, end)


def counts(example: Example, text: str) -> dict[str, int]:
    """What a text does, counted: trials, misses, words after misses, searches that go on, honest results, confirmed answers."""
    problem = problem_of(example)
    found = [t for t in trials(text) if t.candidate in problem.letters]
    missed = [t for t in found if t.result != problem.goal]
    hits = {t.candidate for t in found if t.result == problem.goal}
    answer = text.split()[-1] if text.split()[-2:-1] == ["answer"] else ""
    return {
        "trials": len(found),
        "misses": len(missed),
        "words": sum(t.words for t in missed),
        "goes_on": sum(t.goes_on for t in missed),
        "honest": sum(t.result == comes_to(problem, t.candidate) for t in found),
        "confirmed": int(answer in hits),
        "first_right": int(bool(found) and comes_to(problem, found[0].candidate) == problem.goal),
    }
