"""Who writes, who reads and who is asked, with which context, key and sampling: policies that all differ, and a spy."""

import dataclasses

import jax
import pytest
import spies
import tiny
from networks import unoptimised

from sdjax.collect.annotators import Span, request
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.lessons import before_writing
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.methods.gkd import gkd
from sdjax.methods.minillm import minillm
from sdjax.methods.mixsd import mixsd
from sdjax.methods.pbsd import pbsd
from sdjax.methods.sdft import sdft
from sdjax.methods.trace import trace
from sdjax.types import STUDENT, TEACHER

EXAMPLES = tiny.TASK.train[:2]
FOUR = {"n": 4, "sampling": Sampling(temperature=1.0)}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def told(rollout, rollouts):
    """A lesson before anything is written; of a text that is written, another one: nobody may mistake them."""
    solution = rollout.example.solution
    if solution is None:
        return None
    return with_solution(question(rollout.example), f"{solution} {solution}" if rollout.tokens else solution)


def before(example):
    return with_solution(question(example), example.solution)


def test_a_lesson_before_anything_is_written():
    assert before_writing(None)(EXAMPLES[0]) == question(EXAMPLES[0])
    assert before_writing(told)(EXAMPLES[0]) == before(EXAMPLES[0]) != question(EXAMPLES[0])
    assert before_writing(told)(dataclasses.replace(EXAMPLES[0], solution=None)) is None


WRITERS = {
    "sdft": (lambda **how: sdft(from_teacher=True, group_size=4, **how), "teacher"),
    "sdft live": (lambda **how: sdft(from_teacher=True, group_size=4, ema_rate=1.0, **how), "live"),
    "gkd": (lambda **how: gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0, **how), "initial"),
    "gkd live": (
        lambda **how: gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0, teacher="live", **how),
        "live",
    ),
    "pbsd": (lambda **how: pbsd(pairs=4, **how), "teacher"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_teacher_that_writes_has_read_its_lesson(name, monkeypatch):
    """The lesson comes before the text, and the same chat is read again when the text is scored."""
    factory, who = WRITERS[name]
    method = factory(lesson=told)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    silent = dataclasses.replace(EXAMPLES[1], solution=None)
    rows, _ = method.collect(environment, [*EXAMPLES, silent], jax.random.key(0), None)
    chats = tuple(before(e) for e in EXAMPLES)
    assert (sampled[0].who, sampled[0].chats, sampled[0].n, sampled[0].sampling) == (who, chats, *FOUR.values())
    assert all(r.contexts == {"student": question(r.example), "teacher": before(r.example)} for r in rows)
    assert {r.example.id for r in rows} == {e.id for e in EXAMPLES} and silent not in [r.example for r in rows]
    if name != "pbsd":
        assert len(sampled) == 1 and [r.source for r in rows] == [TEACHER] * 8
        return
    own = sampled[1]
    assert (own.who, own.chats, own.n, own.sampling) == ("live", tuple(map(question, EXAMPLES)), *FOUR.values())
    assert own.key != sampled[0].key
    assert [(r.source, r.extras["pair"]) for r in rows] == [(s, i) for s in (TEACHER, STUDENT) for i in range(8)]


def test_a_teacher_without_a_lesson_writes_after_the_question(monkeypatch):
    method = gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), None)
    assert [(s.who, s.chats) for s in sampled] == [("teacher", tuple(map(question, EXAMPLES)))]
    assert all(r.contexts["teacher"] == r.contexts["student"] == question(r.example) for r in rows)


def test_a_teacher_that_helps_to_write_has_read_its_lesson(monkeypatch):
    method = minillm(lesson=told, group_size=4)
    environment = spies.distinct(method)
    sampled, scored = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), None)
    ((who, chats, *_),) = sampled
    assert who == ("live", "initial") and chats == (tuple(map(question, EXAMPLES)), tuple(map(before, EXAMPLES)))
    assert [(s.views, s.who) for s in scored] == [({"student": "live", "teacher": "initial"}, {"live", "initial"})]
    assert all(r.contexts["teacher"] == before(r.example) for r in rows)

    method = mixsd(lesson=told)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    method.collect(environment, EXAMPLES, jax.random.key(0), {})
    assert {s.who for s in sampled} == {("initial", "initial")}
    assert sampled[0].chats == (tuple(map(question, EXAMPLES)), tuple(map(before, EXAMPLES)))


# ---- TRACE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotator", ["coach", "live", "initial"])
def test_trace_asks_its_annotator_about_the_rows_it_can_distil(annotator, monkeypatch):
    """Those whose branch has a weight, with the verdict and never the log-probabilities; only while the schedule lasts."""
    method = trace(group_size=4, temperature=1.0, annotator=annotator)
    environment = spies.distinct(method, also=("coach",))
    assert set(method.snapshots) == {"teacher", *({"initial"} & {annotator})}
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, memory = method.collect(environment, EXAMPLES, jax.random.key(0), 39)
    right = [r for r in rows if r.reward >= 0.5]
    assert 0 < len(right) < len(rows) and memory == 40
    attempts, asked = sampled
    assert (attempts.who, attempts.n, attempts.sampling) == ("live", *FOUR.values())
    assert asked.who == annotator and asked.sampling == GREEDY and asked.key != attempts.key
    requests = [request(r) for r in right]
    assert list(asked.chats[: len(right)]) == requests and all(chat in requests for chat in asked.chats)
    # No key of an attempt is drawn from again.
    assert asked.key not in {spies.key_of(jax.random.fold_in(jax.random.key(0), i)) for i in range(len(EXAMPLES))}
    method.collect(environment, EXAMPLES, jax.random.key(0), 40)
    assert len(sampled) == 3


def test_trace_asks_about_wrong_rows_where_they_are_distilled(monkeypatch):
    seen = []

    def annotate(environment, rollouts, key):
        seen.append({r.reward >= 0.5 for r in rollouts})
        return [[Span(0, len(r.text), " "), Span(0, 1, "sign")][: 1 + i % 2] for i, r in enumerate(rollouts)]

    for options in ({"error_weight": 1.0}, {"error_weight": 1.0, "key_weight": 0.0}, {"active_only": False}, {}):
        method = trace(group_size=4, temperature=1.0, annotate=annotate, **options)
        rows, _ = method.collect(spies.distinct(method), EXAMPLES, jax.random.key(0), 0)
        # A span without a kind is none: nothing could be told about it.
        for r in rows:
            assert r.extras["span"].any() == (r.contexts["teacher"] is not None)
    assert seen == [{True, False}, {False}, {True, False}, {True}]
