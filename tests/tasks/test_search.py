"""Searches: the same problems written in four grammars, verdicts, and what a text does."""

import itertools
import random

import pytest

from sdjax.tasks import search
from sdjax.tasks.errors import TaskError
from sdjax.tasks.search import ALONE, BARE, FILLER, IN_DOMAIN, MARKED, SILENT, Author, Problem

PROBLEM = Problem(4, 9, (("+1", "*2"), ("*3", "+5"), ("+2", "*7"), ("*2", "*2"), ("*7", "+1")))
EXAMPLE = search.example(PROBLEM, "in_domain")
NEVER = Author(gives_up=0.0, slips=0.0)


def test_the_examples_of_the_documentation_are_right():
    assert search.question_text(PROBLEM) == "4 to 9 : A +1 *2 B *3 +5 C +2 *7 D *2 *2 E *7 +1"
    assert [search.comes_to(PROBLEM, x) for x in "ABCDE"] == [10, 6, 9, 5, 7]
    assert search.results(4, ("*3", "+5", "*7")) == [1, 6, 9]
    written = {search.trace(PROBLEM, MARKED, NEVER, random.Random(s)) for s in range(3000)}
    told = "D *2 8 *2 5 wait E *7 6 +1 7 wait A +1 5 *2 10 wait B *3 1 +5 6 wait C +2 6 *7 9 answer C"
    assert told in written and told in " ".join(search.__doc__.split())
    assert EXAMPLE.solution == "C +2 6 *7 9 answer C"


@pytest.mark.parametrize("family", search.FAMILIES)
def test_every_problem_has_one_solution_and_its_programs_differ(family):
    for problem in search.problems(family, 20, 0) + search.problems(family, 20, 0, test=True):
        ends = [search.comes_to(problem, x) for x in problem.letters]
        assert ends.count(problem.goal) == 1 and len(set(problem.options)) == len(ends) == family.options
        assert {len(o) for o in problem.options} == {family.operations}


def test_no_test_problem_is_one_of_training_in_whatever_order_its_programs_stand():
    known = lambda p: (p.start, p.goal, tuple(sorted(p.options)))
    for family in search.FAMILIES:
        task = search.search(train_size=200, test_size=50, family=family, seed=1)
        trained, tested = ({known(search.problem_of(e)) for e in some} for some in (task.train, task.test))
        assert not trained & tested and len(tested) > 40
    turned = [PROBLEM._replace(options=tuple(o)) for o in itertools.permutations(PROBLEM.options)]
    assert len({search.held_out(p) for p in turned}) == 1
    drawn = [search.draw(IN_DOMAIN, random.Random(s)) for s in range(2000)]
    assert sum(map(search.held_out, drawn)) / 2000 == pytest.approx(1 / 8, abs=0.03)


def test_the_right_program_stands_anywhere():
    """Neither its place nor its operations tell it: a guess is right as often as chance has it."""
    drawn = [search.draw(IN_DOMAIN, random.Random(s)) for s in range(3000)]
    places = [search.solution_of(p) for p in drawn]
    assert all(places.count(x) / 3000 == pytest.approx(1 / 5, abs=0.03) for x in "ABCDE")


def test_grammars_differ_in_what_follows_a_miss_only():
    """The same author draws the same search; a neutral word stands where an epistemic one would."""
    for seed in range(50):
        found = {g.name: search.trace(PROBLEM, g, NEVER, random.Random(seed)) for g in (MARKED, FILLER, SILENT)}
        words = dict(zip(FILLER.words, MARKED.words, strict=True))
        assert " ".join(words.get(w, w) for w in found["filler"].split()) == found["marked"]
    marked = [search.trace(PROBLEM, MARKED, NEVER, random.Random(s)).split() for s in range(500)]
    silent = [search.trace(PROBLEM, SILENT, NEVER, random.Random(s)).split() for s in range(500)]
    count = lambda texts: sum(len(list(search.trials(text))) for text in map(" ".join, texts)) / 500
    assert count(marked) == pytest.approx(count(silent), abs=0.3) and not {w for t in silent for w in t} & {
        *MARKED.words
    }
    assert {search.trace(PROBLEM, BARE, ALONE, random.Random(s)) for s in range(99)} == {f"answer {x}" for x in "ABCDE"}


def test_a_patient_author_finds_every_solution_and_one_that_gives_up_answers_the_next_option():
    assert all(search.trace(PROBLEM, SILENT, NEVER, random.Random(s)).endswith("answer C") for s in range(50))
    hasty = Author(gives_up=1.0, slips=0.0)
    found = {search.trace(PROBLEM, SILENT, hasty, random.Random(s)) for s in range(99)}
    assert found == {
        "A +1 5 *2 10 answer B", "B *3 1 +5 6 answer C", "C +2 6 *7 9 answer C", "D *2 8 *2 5 answer E",
        "E *7 6 +1 7 answer A",
    }  # fmt: skip


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 1.0])
def test_an_author_who_knows_the_answer_leaves_that_share_of_the_misses(kept):
    patient = Author(gives_up=0.0, kept=kept)
    texts = [search.trace(PROBLEM, MARKED, patient, random.Random(s)) for s in range(2000)]
    misses = sum(search.counts(EXAMPLE, t)["misses"] for t in texts) / len(texts)
    assert misses == pytest.approx(2.0 * kept, abs=0.1)  # 0 to 4 misses before the solution, by where the search begins
    assert all(t.endswith("C +2 6 *7 9 answer C") for t in texts)
    assert search.trace(PROBLEM, BARE, patient, random.Random(0)) == "answer C"


def test_who_gives_up_after_a_miss_does_so_as_often_whether_the_answer_is_known_or_not():
    """What differs is the answer that follows: known, it is right."""
    for kept in (None, 1.0):
        texts = [search.trace(PROBLEM, SILENT, Author(0.3, 0.0, kept), random.Random(s)) for s in range(3000)]
        counted = [search.counts(EXAMPLE, t) for t in texts]
        ended = [c for t, c in zip(texts, counted, strict=True) if c["misses"] and not c["confirmed"]]
        followed = sum(c["goes_on"] for c in counted)
        assert len(ended) / (len(ended) + followed) == pytest.approx(0.3, abs=0.03)
        if kept is not None:
            assert {search.verify(EXAMPLE, t).reward for t in texts} == {1.0}


def test_authors_slip_as_often_as_they_are_said_to():
    texts = [search.trace(PROBLEM, MARKED, Author(gives_up=0.0, slips=0.2), random.Random(s)) for s in range(1000)]
    counted = [search.counts(EXAMPLE, t) for t in texts]
    assert sum(c["honest"] for c in counted) / sum(c["trials"] for c in counted) == pytest.approx(0.8, abs=0.03)


def test_a_search_among_some_programs_keeps_their_order():
    found = {search.trace(PROBLEM, SILENT, NEVER, random.Random(s), among=["E", "A", "C"]) for s in range(50)}
    a, c, e = "A +1 5 *2 10", "C +2 6 *7 9 answer C", "E *7 6 +1 7"
    assert found == {f"{a} {c}", c, f"{e} {a} {c}"}


@pytest.mark.parametrize(
    ("text", "reward"),
    [("C +2 6 *7 9 answer C", 1.0), ("answer C", 1.0), ("answer 9", 0.0), ("answer A answer C", 1.0)]
    + [("answer C answer A", 0.0), ("C +2 6 *7 9", 0.0), ("answer", 0.0), ("", 0.0)],
)
def test_the_last_answer_counts(text, reward):
    assert search.verify(EXAMPLE, text).reward == reward


def test_what_a_text_does_is_counted():
    text = "A +1 5 *2 10 wait B *3 1 +5 7 hmm maybe D *2 8 *2 5 C +2 6 *7 9 answer C"
    assert search.counts(EXAMPLE, text) == {
        "trials": 4, "misses": 3, "words": 3, "goes_on": 3, "honest": 3, "confirmed": 1, "first_right": 0,
    }  # fmt: skip
    stopped = search.counts(EXAMPLE, "C +2 6 *7 4 wait answer C")
    assert (stopped["misses"], stopped["goes_on"], stopped["words"], stopped["confirmed"]) == (1, 0, 1, 0)
    assert stopped["first_right"] == 1 and stopped["honest"] == 0
    wishful = search.counts(EXAMPLE, "A +1 5 *2 9 answer A")
    assert (wishful["misses"], wishful["confirmed"], wishful["honest"]) == (0, 1, 0)
    another = search.counts(EXAMPLE, "B *2 8 *2 5 answer C")  # not its operations, so not what it comes to
    assert (another["misses"], another["honest"], another["goes_on"]) == (1, 0, 0)
    for nothing in ("A +1 wait answer", "+1 5 *2 10", "J +1 5 *2 10", "xA +1 5", ""):
        assert not any(search.counts(EXAMPLE, nothing).values())


def test_trials_end_where_their_result_does():
    text = "A +1 5 *2 10 wait D *2 8 *2 5 answer 4"
    found = list(search.trials(text))
    assert [text.split()[t.end - 1] for t in found] == ["10", "5"] and [t.result for t in found] == [10, 5]
    assert list(search.trials(text.replace(" ", "\n"))) == found


def test_the_vocabulary_holds_all_that_is_asked_and_written():
    known, rng = {*search.vocabulary()}, random.Random(0)
    for grammar, family in itertools.product(search.GRAMMARS, search.FAMILIES):
        for _ in range(50):
            problem = search.draw(family, rng)
            text = search.trace(problem, grammar, Author(slips=0.5), rng)
            assert {*search.question_text(problem).split(), *text.split()} <= known


def test_too_many_problems_are_refused():
    with pytest.raises(TaskError, match="test_size=0"):
        search.search(test_size=0)
    assert len(search.search(train_size=3, test_size=2, family=IN_DOMAIN).train) == 3
