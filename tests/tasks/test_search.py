"""Searches: the same problems written in four grammars, verdicts, and what a text does."""

import itertools
import random

import pytest

from sdjax.tasks import search
from sdjax.tasks.errors import TaskError
from sdjax.tasks.search import ALONE, BARE, FILLER, IN_DOMAIN, MARKED, SILENT, Author, Problem

PROBLEM = Problem(5, (14, 38, 4, 31, 21))
EXAMPLE = search.example(PROBLEM, "in_domain")
NEVER = Author(gives_up=0.0, slips=0.0)


def test_the_examples_of_the_documentation_are_right():
    assert search.question_text(PROBLEM) == "3 * x = 5 mod 11 : 14 38 4 31 21"
    assert [search.comes_to(x) for x in PROBLEM.options] == [9, 4, 1, 5, 8]
    written = {search.trace(PROBLEM, MARKED, NEVER, random.Random(s)) for s in range(200)}
    assert "38 = 4 wait 4 = 1 wait 31 = 5 answer 31" in written


@pytest.mark.parametrize("family", search.FAMILIES)
def test_every_problem_has_one_solution_and_no_option_comes_to_nothing(family):
    for problem in search.problems(family, 20, 0) + search.problems(family, 20, 0, test=True):
        results = [search.comes_to(x) for x in problem.options]
        assert results.count(problem.target) == 1 and 0 not in results and len(set(results)) == family.options
        assert all(family.least <= x <= family.most for x in problem.options)


def test_no_test_problem_is_one_of_training_in_whatever_order_its_options_stand():
    known = lambda e: (e.answer, tuple(sorted(search.problem_of(e).options)))
    for family in search.FAMILIES:
        task = search.search(train_size=200, test_size=50, family=family, seed=1)
        assert not {known(e) for e in task.train} & {known(e) for e in task.test}
        assert len({known(e) for e in task.test}) > 40
    turned = [PROBLEM._replace(options=tuple(o)) for o in itertools.permutations(PROBLEM.options)]
    assert len({search.held_out(p) for p in turned}) == 1
    drawn = [search.draw(IN_DOMAIN, random.Random(s)) for s in range(2000)]
    assert sum(map(search.held_out, drawn)) / 2000 == pytest.approx(1 / 8, abs=0.03)


def test_grammars_differ_in_what_follows_a_miss_only():
    """The same author draws the same search; a neutral word stands where an epistemic one would."""
    for seed in range(50):
        found = {g.name: search.trace(PROBLEM, g, NEVER, random.Random(seed)) for g in (MARKED, FILLER, SILENT)}
        words = dict(zip(FILLER.words, MARKED.words, strict=True))
        assert " ".join(words.get(w, w) for w in found["filler"].split()) == found["marked"]
    marked = [search.trace(PROBLEM, MARKED, NEVER, random.Random(s)).split() for s in range(500)]
    silent = [search.trace(PROBLEM, SILENT, NEVER, random.Random(s)).split() for s in range(500)]
    count = lambda texts: sum(text.count("=") for text in texts) / 500
    assert count(marked) == pytest.approx(count(silent), abs=0.3) and not {w for t in silent for w in t} & {
        *MARKED.words
    }
    assert {search.trace(PROBLEM, BARE, ALONE, random.Random(s)) for s in range(99)} == {
        f"answer {x}" for x in PROBLEM.options
    }


def test_a_patient_author_finds_every_solution_and_one_that_gives_up_answers_the_next_option():
    assert all(search.trace(PROBLEM, SILENT, NEVER, random.Random(s)).endswith("answer 31") for s in range(50))
    hasty = Author(gives_up=1.0, slips=0.0)
    found = {search.trace(PROBLEM, SILENT, hasty, random.Random(s)) for s in range(99)}
    assert found == {"14 = 9 answer 38", "38 = 4 answer 4", "4 = 1 answer 31", "31 = 5 answer 31", "21 = 8 answer 14"}


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 1.0])
def test_an_author_who_knows_the_answer_leaves_that_share_of_the_misses(kept):
    texts = [search.trace(PROBLEM, MARKED, Author(kept=kept), random.Random(s)) for s in range(2000)]
    misses = sum(search.counts(EXAMPLE, t)["misses"] for t in texts) / len(texts)
    assert misses == pytest.approx(2.0 * kept, abs=0.1)  # 0 to 4 misses before the solution, by where the search begins
    assert all(t.endswith("31 = 5 answer 31") for t in texts)
    assert search.trace(PROBLEM, BARE, Author(kept=kept), random.Random(0)) == "answer 31"


def test_authors_slip_as_often_as_they_are_said_to():
    texts = [search.trace(PROBLEM, MARKED, Author(gives_up=0.0, slips=0.2), random.Random(s)) for s in range(1000)]
    counted = [search.counts(EXAMPLE, t) for t in texts]
    assert sum(c["honest"] for c in counted) / sum(c["trials"] for c in counted) == pytest.approx(0.8, abs=0.03)


def test_a_search_among_some_options_keeps_their_order():
    found = {search.trace(PROBLEM, SILENT, NEVER, random.Random(s), among=[21, 14, 31]) for s in range(50)}
    assert found == {"14 = 9 31 = 5 answer 31", "31 = 5 answer 31", "21 = 8 14 = 9 31 = 5 answer 31"}


@pytest.mark.parametrize(
    ("text", "reward"),
    [("31 = 5 answer 31", 1.0), ("answer 31", 1.0), ("answer 3", 0.0), ("answer 14 answer 31", 1.0)]
    + [("answer 31 answer 14", 0.0), ("31 = 5", 0.0), ("answer", 0.0), ("", 0.0)],
)
def test_the_last_answer_counts(text, reward):
    assert search.verify(EXAMPLE, text).reward == reward


def test_what_a_text_does_is_counted():
    text = "14 = 9 wait 38 = 7 hmm maybe 4 = 1 31 = 5 answer 31"
    assert search.counts(EXAMPLE, text) == {
        "trials": 4, "misses": 3, "words": 3, "goes_on": 3, "honest": 3, "confirmed": 1, "first_right": 0,
    }  # fmt: skip
    stopped = search.counts(EXAMPLE, "31 = 4 wait answer 31")
    assert (stopped["misses"], stopped["goes_on"], stopped["words"], stopped["confirmed"]) == (1, 0, 1, 0)
    assert stopped["first_right"] == 1 and stopped["honest"] == 0
    wishful = search.counts(EXAMPLE, "14 = 5 answer 14")
    assert (wishful["misses"], wishful["confirmed"], wishful["honest"]) == (0, 1, 0)
    assert not any(search.counts(EXAMPLE, "= = 3 wait answer").values())


def test_trials_end_where_their_result_does():
    text = "14 = 9 wait 38 = 4 answer 4"
    ends = [t.end for t in search.trials(text)]
    assert [text.split()[end - 1] for end in ends] == ["9", "4"]


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
