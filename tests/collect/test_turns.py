"""Turns as rows: each trained token stands in one, its teacher reads what followed that turn and nothing that followed another."""

import dataclasses

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import talks

from sdjax.collect.controls import with_teacher_context
from sdjax.collect.turns import TurnError, by_turn
from sdjax.engine import train
from sdjax.engine.policies import Environment
from sdjax.engine.score import token_signals
from sdjax.engine.tokens import Shapes, collate
from sdjax.kernels.reductions import reduce_terms, token_mean
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.types import Rollout, Step, Verdict, World

optimised_little = pytest.fixture(scope="module", autouse=True)(networks.unoptimised)

TURNS = 3
SHAPES = Shapes(context=256, completion=96, rows=8, tokens_per_chunk=None)
SECRETS = ("left", "right", "up")


def whispering(secrets=SECRETS):
    """A world that says something else after each of three turns."""

    def step(example, messages):
        number = sum(m["role"] == "assistant" for m in messages) - 1
        said = ({"role": "tool", "name": "voice", "content": secrets[number]},)
        return Step(said, 0.1, number == 2, "all wrong" if number == 2 else None)

    return World(lambda example: example.prompt, step, turns=TURNS)


def environment():
    policy = dataclasses.replace(talks.policy(world=whispering(), shapes=SHAPES))
    return Environment({"live": policy, "teacher": policy}, lambda e, text: Verdict(0.0))


METHOD = sdpo(group_size=4, alpha=1.0, top_k=None, ema_rate=0.0, is_cap=None)


@pytest.fixture(scope="module")
def attempts():
    """What the method collects without turns of their own."""
    return METHOD.collect(environment(), talks.EXAMPLES, talks.key(), None)[0]


@pytest.fixture(scope="module")
def rows():
    return by_turn(METHOD, TURNS).collect(environment(), talks.EXAMPLES, talks.key(), None)[0]


def of_attempt(rows, i):
    return rows[TURNS * i : TURNS * (i + 1)]


def test_every_trained_token_stands_in_one_row(attempts, rows):
    assert len(rows) == TURNS * len(attempts) and sum(len(a.turns) == 3 for a in attempts) > 3
    for i, attempt in enumerate(attempts):
        counted = np.zeros(len(attempt.tokens), int)
        for number, row in enumerate(of_attempt(rows, i)):
            assert (row.group, row.reward, row.example) == (attempt.group, attempt.reward, attempt.example)
            assert row.tokens == attempt.tokens[: len(row.tokens)] and len(row.logprobs) == len(row.tokens)
            counted[: len(row.tokens)] += row.trained
            if number < len(attempt.turns):
                turn = attempt.turns[number]
                assert np.flatnonzero(row.trained).tolist() == list(range(turn.start, turn.end))
                assert row.text.endswith(turn.text) and len(row.turns) == number + 1
            else:
                assert not any(row.trained) and row.contexts["teacher"] is None
        np.testing.assert_array_equal(counted, attempt.trained or np.ones(len(attempt.tokens)))


def test_a_teacher_reads_what_followed_its_turn_and_nothing_else(attempts, rows):
    seen = set()
    for i, attempt in enumerate(attempts):
        for number, row in enumerate(of_attempt(rows, i)[: len(attempt.turns)]):
            chat = row.contexts["teacher"]
            if not attempt.turns[number].observations:  # it was cut off
                assert chat is None or "What is said of the outcome" in chat[-1]["content"]
                continue
            text = chat[-1]["content"]
            assert f"After message {number + 1}:\n[voice]\n{SECRETS[number]}" in text
            assert not any(secret in text for secret in SECRETS if secret != SECRETS[number])
            assert ("all wrong" in text) == (number == 2)
            seen.add(number)
    assert seen == {0, 1, 2}


def test_what_followed_another_turn_changes_no_score_of_this_one(attempts, rows):
    """The same streams, with other observations of the second turn in the lessons: only the rows of that turn differ."""
    policy = environment().live
    other = [dataclasses.replace(a, turns=changed(a.turns)) for a in attempts]
    method = by_turn(METHOD._replace(collect=lambda *_: (other, None)), TURNS)
    found = [signals(method, policy, some)["divergence"] for some in (rows, method.collect(None, (), None, None)[0])]
    moved = np.asarray([not np.array_equal(a, b) for a, b in zip(*found, strict=True)])
    second = [number == 1 and len(a.turns) > 1 for a in attempts for number in range(TURNS)]
    assert any(second) and moved.tolist() == second


def changed(turns):
    """Turns of which the second was followed by something else."""
    said = ({"role": "tool", "name": "voice", "content": "down"},)
    return tuple(t._replace(observations=said) if n == 1 else t for n, t in enumerate(turns))


def signals(method, policy, rows):
    """The signals of all rows in their order; nothing outside the trained tokens."""
    objective, batch = method.objectives[0], collated(method, policy, rows)
    nets, params = ({name: value for name in ("live", "teacher")} for value in (policy.model, policy.params))
    found = jax.jit(lambda b: token_signals(objective.views, objective.signals, nets, params, b))(batch)
    return {name: np.where(batch.mask, x, 0.0) for name, x in found.items()}


def collated(method, policy, rows):
    batch = collate(rows, train.all_views(method), policy.tokenizer, policy.shapes)
    return jax.tree.map(jnp.asarray, batch)


def test_one_lesson_for_all_turns_is_the_loss_of_whole_attempts(attempts):
    """Then nothing is left of the turns: loss and gradient are those of the attempts, up to rounding."""
    lesson = lambda rollout: ({"role": "user", "content": f"{rollout.example.id}: think"},)
    plain = sdpo(group_size=4, alpha=1.0, top_k=None, ema_rate=0.0, is_cap=None, lesson=lambda r, _: lesson(r))
    split = by_turn(plain, TURNS, lambda r, _: lesson(r))
    found = []
    for method in (plain, split):
        env = environment()
        rows, _ = method.collect(env, talks.EXAMPLES, talks.key(), None)
        objective, batch = method.objectives[0], collated(method, env.live, rows)

        def loss(params, objective=objective, batch=batch, net=env.live):
            policies = {"live": params, "teacher": net.params}
            models = dict.fromkeys(policies, net.model)
            sig = token_signals(objective.views, objective.signals, models, policies, batch)
            return reduce_terms(objective.terms(batch, sig, 0), batch.mask & batch.valid[:, None], token_mean)[0]

        found.append(jax.jit(jax.value_and_grad(loss))(env.live.params))
    (one, gradient), (other, same) = found
    assert float(one) == pytest.approx(float(other), rel=1e-5) and float(one) > 0
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(a).max())))


def test_all_batches_have_one_shape_and_controls_act_on_the_lessons_of_turns(rows):
    method = by_turn(METHOD, TURNS)
    single = [Rollout(talks.EXAMPLES[0], (1, 2), (0.0, 0.0), "x", 0, extras={"a": (1.0, 2.0), "b": 3.0})]
    (kept, *nothing) = by_turn(METHOD._replace(collect=lambda *_: (single, None)), TURNS).collect(None, (), None, None)[
        0
    ]
    assert kept is single[0] and len(nothing) == TURNS - 1
    assert all(r.tokens == (1,) and not any(r.trained) and r.extras == {"a": (1.0,), "b": 3.0} for r in nothing)
    plain = with_teacher_context(method, "none").collect(environment(), talks.EXAMPLES, talks.key(), None)[0]
    read = [(r.contexts["teacher"], p.contexts["teacher"]) for r, p in zip(rows, plain, strict=True)]
    assert all(
        (a is None) == (b is None) and (b is None or b == r.example.prompt)
        for (a, b), r in zip(read, rows, strict=True)
    )


def test_methods_without_a_lesson_are_refused():
    with pytest.raises(TurnError, match="no view of this method's loss is told more than the question"):
        by_turn(grpo(), TURNS)
    views = {"teacher": METHOD.objectives[0].views["teacher"]}
    with pytest.raises(TurnError, match="view 'teacher' scores whole attempts while they are collected"):
        by_turn(METHOD._replace(early=views), TURNS)
