"""Problems solved by trying: find `x` among given options with `3 * x = b (mod 11)`; one search, written in four grammars.

A question names the equation and the options:

    3 * x = 5 mod 11 : 14 38 4 31 21

A trial is a candidate and what it comes to, `14 = 9`: a fact about one number.  The search begins at a random option and goes
on in the options' order, from the last to the first, until a result is the target; then, or when its author gives up after a
miss, the answer follows:

    38 = 4 wait 4 = 1 wait 31 = 5 answer 31

What stands between a miss and the next trial is all that grammars differ in: an epistemic word, nothing, a neutral word.  The
fourth writes no trials: its answer is a guess.  So lost words, lost search and lost computation (results that are not what
the candidate comes to) can be told apart in what a model writes.
"""

from __future__ import annotations

import functools
import hashlib
import random
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

    Such an author leaves this share of the misses of an uninformed search, and never gives up.
    """

    gives_up: float = 0.3
    slips: float = 0.03
    kept: float | None = None


ALONE = Author()
"""Knows the question only."""


FACTOR, MODULUS = 3, 11


class Family(NamedTuple):
    """Problems of one kind: how many options there are, and the least and the largest number among them."""

    name: str
    options: int
    least: int
    most: int


IN_DOMAIN = Family("in_domain", 5, 1, 43)
MORE_OPTIONS = Family("more_options", 8, 1, 43)
LARGER_NUMBERS = Family("larger_numbers", 5, 45, 65)
UNSEEN = Family("unseen", 10, 1, 43)
LEARNT = (IN_DOMAIN, MORE_OPTIONS, LARGER_NUMBERS)
"""What base models have seen; of `UNSEEN`, the longest search, they have seen nothing."""

FAMILIES = (*LEARNT, UNSEEN)


class Problem(NamedTuple):
    """`3 * x = target (mod 11)`, with one solution among the options."""

    target: int
    options: tuple[int, ...]


def comes_to(candidate: int) -> int:
    """The left side of the equation for a candidate."""
    return FACTOR * candidate % MODULUS


def solution_of(problem: Problem) -> int:
    """The option that satisfies the equation."""
    return next(x for x in problem.options if comes_to(x) == problem.target)


def draw(family: Family, rng: random.Random) -> Problem:
    """A random problem of a family: every option comes to another result, none to 0."""
    numbers = range(family.least, family.most + 1)
    residues = rng.sample(range(1, MODULUS), family.options)
    options = tuple(rng.choice([n for n in numbers if n % MODULUS == r]) for r in residues)
    return Problem(comes_to(rng.choice(options)), options)


def question_text(problem: Problem) -> str:
    """What is asked: `3 * x = 5 mod 11 : 14 38 4 31 21`."""
    return f"{FACTOR} * x = {problem.target} mod {MODULUS} : {' '.join(map(str, problem.options))}"


def held_out(problem: Problem, share: int = 8) -> bool:
    """Whether it is one of the eighth that nobody trains on, by a hash of its target and its options in whatever order."""
    known = f"{problem.target}:{sorted(problem.options)}"
    return hashlib.sha256(known.encode()).digest()[0] % share == 0


# ---- traces -------------------------------------------------------------------------------------------------------


def in_order(options: Sequence[int], start: int) -> list[int]:
    """The options from position `start` to the last, then from the first on."""
    return [*options[start:], *options[:start]]


def candidates(problem: Problem, author: Author, rng: random.Random, among: Sequence[int] | None = None) -> list[int]:
    """What an author would try, in order: the options, or those `among` some; one who knows the answer ends with it."""
    order = in_order(problem.options, rng.randrange(len(problem.options)))
    order = [x for x in order if among is None or x in among]
    if author.kept is None:
        return order
    before = order[: order.index(solution_of(problem))]
    return [*(x for x in before if rng.random() < author.kept), solution_of(problem)]


def trace(
    problem: Problem, grammar: Grammar, author: Author, rng: random.Random, among: Sequence[int] | None = None
) -> str:
    """An author's answer, searched in the options or `among` some of them."""
    order = candidates(problem, author, rng, among)
    if not grammar.tries:
        return f"answer {order[0] if author.kept is None else order[-1]}"
    written = []
    for candidate, following in zip(order, in_order(order, 1), strict=True):
        result = said(problem, candidate, author, rng)
        written += [str(candidate), "=", str(result)]
        hit, last = result == problem.target, candidate == order[-1]
        if hit or last or (author.kept is None and rng.random() < author.gives_up):
            return " ".join([*written, "answer", str(candidate if hit else following)])
        if grammar.words:
            written.append(rng.choices(grammar.words, OFTEN)[0])
    return ""


def said(problem: Problem, candidate: int, author: Author, rng: random.Random) -> int:
    """The result that an author writes: right, or any other; one who knows the answer never slips."""
    result = comes_to(candidate)
    if author.kept is not None or rng.random() >= author.slips:
        return result
    return rng.choice([r for r in range(MODULUS) if r != result])


# ---- examples and verdicts ----------------------------------------------------------------------------------------


def example(problem: Problem, family: str) -> Example:
    """A problem as an example, with the shortest search as its solution; `meta` keeps the problem."""
    text, answer = question_text(problem), solution_of(problem)
    return Example(
        id=f"{family}:{text}",
        prompt=({"role": "user", "content": text},),
        answer=str(answer),
        solution=f"{answer} = {problem.target} answer {answer}",
        meta={"family": family, "problem": problem._asdict()},
    )


def problem_of(example: Example) -> Problem:
    """The problem of an example, from its `meta`."""
    fields = example.meta["problem"]
    return Problem(**{**fields, "options": tuple(fields["options"])})


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
    numbers = range(max(f.most for f in FAMILIES) + 1)
    words = [word for grammar in GRAMMARS for word in grammar.words]
    return (*map(str, numbers), "*", "x", "=", "mod", ":", "answer", *words)


# ---- what a text does ---------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A trial in a text: the candidate, its result, the words after it, and whether another trial follows them."""

    candidate: int
    result: int
    words: int
    goes_on: bool
    end: int
    """The number of words up to and including the result."""


def trials(text: str) -> Iterator[Trial]:
    """The trials of a text, in order."""
    words, marks = text.split(), {word for grammar in GRAMMARS for word in grammar.words}
    parts = [words[i : i + 3] for i in range(len(words) - 2)]
    starts = [i for i, (left, sign, right) in enumerate(parts) if left.isdigit() and sign == "=" and right.isdigit()]
    for start in starts:
        after = start + 3
        while after < len(words) and words[after] in marks:
            after += 1
        yield Trial(int(words[start]), int(words[start + 2]), after - start - 3, after in starts, start + 3)


def counts(example: Example, text: str) -> dict[str, int]:
    """What a text does, counted: trials, misses, words after misses, searches that go on, honest results, confirmed answers."""
    problem, found = problem_of(example), list(trials(text))
    missed = [t for t in found if t.result != problem.target]
    hits = {t.candidate for t in found if t.result == problem.target}
    answer = text.split()[-1] if text.split()[-2:-1] == ["answer"] else ""
    return {
        "trials": len(found),
        "misses": len(missed),
        "words": sum(t.words for t in missed),
        "goes_on": sum(t.goes_on for t in missed),
        "honest": sum(t.result == comes_to(t.candidate) for t in found),
        "confirmed": int(answer.isdigit() and int(answer) in hits),
        "first_right": int(bool(found) and comes_to(found[0].candidate) == problem.target),
    }
