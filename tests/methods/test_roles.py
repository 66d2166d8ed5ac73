"""Who writes, who reads and who is asked, with which context, key and sampling: policies that all differ, and a spy."""

import dataclasses

import jax
import pytest
import spies
import tiny
from networks import unoptimised

from sdjax.collect.contexts import question, with_solution
from sdjax.collect.lessons import before_writing
from sdjax.engine.generate import Sampling
from sdjax.methods.gkd import gkd
from sdjax.methods.minillm import minillm
from sdjax.methods.mixsd import mixsd
from sdjax.methods.pbsd import pbsd
from sdjax.methods.sdft import sdft
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
