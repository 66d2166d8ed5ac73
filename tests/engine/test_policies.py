"""A model that can be asked: what its writer is told, how many rows a call has, what is scored, and rules of snapshots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import unoptimised

from sdjax.collect.contexts import question
from sdjax.engine import policies
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import Follows, Gated, Sample, ema, frozen, nested, occasion, refresh, row_keys, sample
from sdjax.engine.tokens import collate
from sdjax.kernels.distributions import logprob
from sdjax.methods.opd import opd
from sdjax.methods.sdpo import sdpo
from sdjax.types import ByField, Rollout, View

quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)

CHATS = [question(e) for e in tiny.TASK.train[:3]]


# ---- who writes -----------------------------------------------------------------------------------------------------


def test_a_writer_of_its_own_is_told_all():
    """One completion, as free as the model, as long as completions may be, unless somebody says otherwise."""
    seen = []

    def writer(policy, encoded, key, *, n, sampling, limit):
        seen.append((n, sampling, limit))
        return [[Sample((i,), (0.0,), "", True)] * n for i in range(len(encoded))]

    policy, key = dataclasses.replace(tiny.policy(), writer=writer), jax.random.key(0)
    found = [sample(policy, CHATS, key), sample(policy, CHATS, key, n=2, sampling=GREEDY, limit=5)]
    sample(policy, CHATS, key, limit=1000)
    assert seen == [(1, Sampling(), 8), (2, GREEDY, 5), (1, Sampling(), 8)]
    assert [[s.tokens for s in some] for some in found[1]] == [[(0,)] * 2, [(1,)] * 2, [(2,)] * 2]


def test_calls_have_so_many_rows_and_a_row_is_what_it_is_alone(monkeypatch):
    """Four rows in a call: two prompts of two, then one and its copy; of one prompt six rows are two calls of three."""
    calls, generate = [], policies.generate

    def watched(models, params, contexts, keys, *rest, **more):
        calls.append((len(contexts[0][0]), len(keys)))
        return generate(models, params, contexts, keys, *rest, **more)

    monkeypatch.setattr(policies, "generate", watched)
    policy = tiny.policy(shapes=dataclasses.replace(tiny.SHAPES, rows=4))
    ask = lambda chats, key, n: [[s.tokens for s in some] for some in sample(policy, chats, key, n=n)]
    whole = ask(CHATS, jax.random.key(1), 2)
    assert calls == [(2, 4), (2, 4)] and len(whole) == 3
    each = jnp.stack([jax.random.fold_in(jax.random.key(1), i) for i in (2, 0)])
    assert ask([CHATS[2], CHATS[0]], each, 2) == [whole[2], whole[0]]
    calls.clear()
    alone = ask(CHATS[:1], jax.random.key(1), 6)
    assert calls == [(1, 3)] * 2 and alone[0][:2] == whole[0]


def test_keys_of_rows():
    key, draw = jax.random.key(3), jax.random.key_data
    each = jax.random.split(key, 3)
    rows = jnp.asarray([2, 0])
    for some, own in ((key, lambda row: jax.random.fold_in(key, row)), (each, lambda row: each[row])):
        wanted = [draw(jax.random.fold_in(own(int(row)), j)) for row in rows for j in range(4)]
        np.testing.assert_array_equal(draw(row_keys(some, rows, 4)), wanted)


# ---- who reads ------------------------------------------------------------------------------------------------------


def said(dist, token):
    return {name: logprob(value, token) for name, value in dist.items()}


VIEWS = {"student": View(trainable=True), "teacher": View("teacher", per_rollout=True)}


def rollout(group, tokens, told):
    example = tiny.TASK.train[group]
    row = Rollout(example, tokens, (0.0,) * len(tokens), "", group)
    return row.read_by(student=question(example), teacher=question(tiny.TASK.train[told]))


def test_rollouts_come_back_in_their_order_with_what_was_said_of_them():
    """Groups interleaved, of one and of two rows; the same rows alone; and an order of views is no other program."""
    environment = tiny.environment()
    rows = [rollout(2, (7, 8, 9), 4), rollout(0, (9,), 3), rollout(2, (10, 11), 5), rollout(1, (12, 13, 14), 6)]
    found = policies.score(environment, rows, VIEWS, said)
    before = tiny.programs("compiled_score")
    again = policies.score(environment, rows, dict(reversed(VIEWS.items())), said)
    assert tiny.programs("compiled_score") == before > 0
    mixed = policies.score(environment, [rows[i] for i in (3, 0, 2, 1)], VIEWS, said)
    for row, one, two, three in zip(rows, found, again, [mixed[i] for i in (1, 3, 2, 0)], strict=True):
        assert (one.example, one.tokens) == (row.example, row.tokens)
        for name in VIEWS:
            assert one.extras[name].shape == (len(row.tokens),)
            np.testing.assert_array_equal(one.extras[name], two.extras[name])
            np.testing.assert_allclose(one.extras[name], three.extras[name], atol=1e-5)
        assert np.abs(one.extras["student"] - one.extras["teacher"]).max() > 1e-3


def test_few_rows_and_few_positions_are_scored_at_a_time():
    rows = [rollout(g, (7, 8, 9), g) for g in range(4)]
    batch = jax.tree.map(jnp.asarray, collate(rows, VIEWS, tiny.tokenizer(), tiny.SHAPES))
    params = {"live": tiny.pretrained().params, "teacher": tiny.pretrained(1).params}
    models = tuple((name, tiny.model()) for name in params)
    text = lambda *sizes: str(
        policies.compiled_score.trace(tuple(VIEWS.items()), said, models, params, batch, *sizes).jaxpr
    )
    assert "scan" not in text(None, None) and "scan" in text(2, None) and "scan" in text(None, 8)


# ---- views ----------------------------------------------------------------------------------------------------------


def test_teachers_read_a_lesson_of_their_own_or_the_question():
    lesson = lambda rollout, rollouts: None
    assert policies.teacher_view("initial", lesson, 5) == View("initial", per_rollout=True, entries=5, told=True)
    assert policies.teacher_view("teacher", None) == View("teacher", per_rollout=False, entries=None, told=False)
    names = [policies.teacher_name(*given) for given in (("a", lesson), ("a", None), (None, lesson), (None, None))]
    assert names == ["a", "a", "initial", "teacher"]


def test_another_policy_in_the_place_of_one():
    each = ByField("domain", ("maths", "code"))
    before, after = opd(), policies.reading(opd(), "teacher", each)
    assert after.objectives[0].views["teacher"] == before.objectives[0].views["teacher"]._replace(policy=each)
    assert after.objectives[0].views["student"] == before.objectives[0].views["student"]


def test_options_of_a_view_go_before_those_of_all():
    method = sdpo()
    views = {**method.objectives[0].views, "teacher": View("teacher", template={"a": 1})}
    own = method._replace(objectives=(method.objectives[0]._replace(views=views),), early={"judge": View()})
    found = policies.templated(own, {"a": 2, "b": 3})
    assert found.objectives[0].views["teacher"].template == {"a": 1, "b": 3}
    assert found.objectives[0].views["student"].template == {"a": 2, "b": 3} == found.early["judge"].template


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_rules_and_when_they_are_applied():
    live, old = ({"w": jnp.full(2, x)} for x in (8.0, 4.0))
    of = lambda rule, at=1: float(rule(live, old, jnp.int32(at))["w"][0])
    assert of(frozen()) == 4.0 and of(ema(0.25)) == 5.0 and of(ema(1.0)) == 8.0 and of(ema(0.0)) == 4.0
    assert [of(refresh(3), at) for at in (1, 2, 3, 6)] == [4.0, 4.0, 8.0, 8.0]
    assert of(Gated(ema(0.25), None)) == 5.0 and of(Follows(ema(0.25))) == 5.0
    assert occasion(frozen()) == occasion(refresh(1)) == "batch" and occasion(ema(0.1)) == "trained"
    assert occasion(ema(0.1, every_update=True)) == "update" and occasion(Gated(refresh(1), None)) == "gate"


def test_a_gate_looks_where_the_inner_memory_lies():
    rules = {"gated": Gated(refresh(1), lambda memory: memory["due"]), "plain": ema(0.5)}
    found = nested(rules)
    assert found["plain"] is rules["plain"] and found["gated"].rule is rules["gated"].rule
    assert [found["gated"].open({"method": {"due": due}}) for due in (True, False)] == [True, False]
    twice = functools.reduce(lambda some, _: nested(some), range(2), rules)
    assert twice["gated"].open({"method": {"method": {"due": True}}}) is True
