"""Controls change one thing and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sdjax.collect import controls
from sdjax.collect.contexts import question, with_solution
from sdjax.engine import train
from sdjax.methods.grpo import grpo
from sdjax.methods.opsa import opsa
from sdjax.methods.sdpo import sdpo
from sdjax.types import Objective, Rollout, Term, View


def told(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


def rollouts(method, control="matched"):
    changed = controls.with_teacher_context(method, control)
    environment = tiny.environment(method)
    return changed.collect(environment, list(tiny.TASK.train[:3]), jax.random.key(0), None)[0]


@pytest.fixture(scope="module")
def method():
    return sdpo(group_size=2, top_k=None, ema_rate=0.0, lesson=told)


@pytest.mark.parametrize("control", ["mismatched", "reference-only", "none"])
def test_only_the_teacher_reads_something_else(method, control):
    for before, after in zip(rollouts(method), rollouts(method, control), strict=True):
        assert after.contexts["student"] == before.contexts["student"]
        assert after.contexts["teacher"] != before.contexts["teacher"]
        assert (after.tokens, after.logprobs, after.reward) == (before.tokens, before.logprobs, before.reward)


def test_mismatched_is_another_prompt_of_the_batch(method):
    before, after = rollouts(method), rollouts(method, "mismatched")
    for rollout in after:
        other = [r.contexts["teacher"] for r in before if r.group == (rollout.group + 1) % 3]
        assert rollout.contexts["teacher"] in other


def test_reference_only_keeps_the_privileged_text_and_drops_the_question(method):
    for rollout in rollouts(method, "reference-only"):
        assert rollout.contexts["teacher"][-1]["content"] == rollout.example.solution


def test_without_context_a_frozen_teacher_has_nothing_to_teach(method):
    batch = tiny.collected(method, rollouts(method, "none"))
    update = train.make_update(
        method.objectives[0], {"live": tiny.model(), "teacher": tiny.model()}, optax.sgd(1.0), tiny.SHAPES
    )
    params = jax.tree.map(jnp.array, tiny.pretrained().params)
    outcome = update(params, optax.sgd(1.0).init(params), {"teacher": tiny.pretrained().params}, batch, jnp.int32(0))[2]
    # Not exactly 0: shared and separate contexts are matrix products of different shapes.
    assert float(outcome.loss) < 1e-10 and not bool(outcome.useful)


def test_a_view_with_nothing_to_say_stays_silent():
    silent = sdpo(group_size=2, lesson=lambda rollout, rollouts: None)
    for control in ("mismatched", "reference-only", "none"):
        assert all(r.contexts["teacher"] is None for r in rollouts(silent, control))


def test_an_anchor_that_reads_the_question_is_no_teacher():
    anchored = grpo(group_size=2, kl_coef=0.1)
    for rollout in rollouts(anchored):
        assert rollout.contexts["reference"] == rollout.contexts["student"] == question(rollout.example)
    with pytest.raises(controls.ControlError, match="no teacher's context"):
        controls.with_teacher_context(anchored, "mismatched")


def test_the_penalty_towards_the_initial_policy_is_zero_at_the_start_and_not_afterwards():
    anchored = grpo(group_size=2, kl_coef=0.1)
    batch = tiny.collected(anchored, rollouts(anchored))
    update = train.make_update(
        anchored.objectives[0], {"live": tiny.model(), "reference": tiny.model()}, optax.adam(1e-2), tiny.SHAPES
    )
    params = jax.tree.map(jnp.array, tiny.pretrained().params)
    opt_state, penalties = optax.adam(1e-2).init(params), []
    for step in range(2):
        params, opt_state, outcome = update(
            params, opt_state, {"reference": tiny.pretrained().params}, batch, jnp.int32(step)
        )
        penalties.append(float(outcome.terms["reference_kl"]))
    assert penalties[0] == 0.0 < penalties[1]


def test_a_method_without_a_teacher_refuses_a_context_control():
    with pytest.raises(controls.ControlError, match="no teacher's context"):
        controls.with_teacher_context(opsa(group_size=2), "none")


def test_shuffling_permutes_each_row_within_its_population():
    weight = jnp.asarray([[1.0, 2.0, 3.0, 4.0, 9.0], [5.0, 6.0, 7.0, 8.0, 9.0]])
    over = jnp.asarray([[True, True, False, True, False], [True] * 4 + [False]])
    seen = set()
    for seed in range(20):
        moved = np.asarray(controls.shuffled(weight, over, jax.random.key(seed)))
        assert (moved[~np.asarray(over)] == 0).all()
        for row in range(2):
            assert sorted(moved[row][over[row]]) == sorted(np.asarray(weight)[row][over[row]])
        seen.add(tuple(moved[0]))
    assert len(seen) == 6  # all permutations of three weights


def weighted(weight):
    signals = lambda dist, token: {"entropy": -dist["student"].max(-1)}
    terms = lambda batch, sig, step: {"x": Term(sig["entropy"], weight)}
    return (Objective({"student": View(trainable=True)}, signals, terms, credit=("x",)),)


def test_token_weights_are_rescaled_or_shuffled(method):
    batch = tiny.batch([[1, 2, 3], [3, 2, 1]], mask=[[1, 1, 0], [1, 1, 1]])
    sig = {"entropy": jnp.ones((2, 3))}
    weight = jnp.asarray([[1.0, 3.0, 50.0], [2.0, 2.0, 2.0]])
    per_token = method._replace(objectives=weighted(weight))
    of = lambda m, step=0: m.objectives[0].terms(batch, sig, jnp.int32(step))["x"].weight
    np.testing.assert_allclose(np.asarray(of(controls.with_token_weights(per_token, "mean-one")))[0, :2], [0.5, 1.5])
    shuffled = [tuple(np.asarray(of(controls.with_token_weights(per_token, "shuffled"), s))[0]) for s in range(8)]
    assert set(shuffled) == {(1.0, 3.0, 0.0), (3.0, 1.0, 0.0)}
    undeclared = per_token.objectives[0]._replace(credit=())
    with pytest.raises(controls.ControlError, match="weighs all tokens of a row alike"):
        controls.with_token_weights(method._replace(objectives=(undeclared,)), "shuffled")


def test_the_length_penalty_lowers_advantages_by_the_length():
    """And nothing else: outcomes, and what is logged as the reward, are the verifier's."""
    method = grpo(group_size=2)
    plain = rollouts(method)
    changed = controls.with_length_penalty(method, 6.0)
    found = changed.collect(tiny.environment(method), list(tiny.TASK.train[:3]), jax.random.key(0), None)[0]
    for before, after in zip(plain, found, strict=True):
        assert after.reward == before.reward
        assert after.returns == pytest.approx(before.reward - 0.06 * len(before.tokens))
    batch = tiny.collected(method, found)
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)
    close(batch.returns[batch.valid], [r.returns for r in found])
    close(batch.reward[batch.valid], [r.reward for r in plain])


def test_opsa_pushes_unlikely_tokens_down_and_leaves_the_others():
    batch = tiny.batch([[0, 1]], behavior=np.log([[0.5, 0.05]]), views=("student",))
    dist = jnp.log(jnp.broadcast_to(jnp.asarray([0.5, 0.05, 0.45]), (1, 2, 3)))
    method = opsa(threshold=0.1, penalty=2.0)
    gradient = tiny.logit_gradient(lambda d: tiny.loss(method.objectives[0], batch, student=d)[0], dist)
    np.testing.assert_allclose(gradient[0, 0], 0.0, atol=1e-7)
    # d/dz of -(-2) log p(y) / 2 tokens: one-hot minus p.
    np.testing.assert_allclose(gradient[0, 1], np.asarray([0, 1, 0]) - [0.5, 0.05, 0.45], atol=1e-6)


def test_groups_without_a_lesson_are_passed_over():
    """A group about which the teacher is silent (golden texts, an unsolved prompt) does not silence the one before it."""
    chat = lambda group: None if group == 1 else ({"role": "user", "content": f"lesson {group}"},)
    rows = [Rollout(tiny.TASK.train[g], (1,), (0.0,), "", g).read_by(student=(), teacher=chat(g)) for g in range(3)]
    found = [r.contexts["teacher"] for r in controls.mismatched(rows, {"teacher"})]
    assert found == [chat(2), None, chat(0)]


def test_rollouts_of_one_group_have_no_other_to_be_mismatched_with():
    """Nothing is read then: the right context would make the run its own control."""
    alone = Rollout(tiny.TASK.train[0], (1,), (0.0,), "", 0).read_by(student=(), teacher=({"role": "user"},))
    assert controls.mismatched([alone], {"teacher"})[0].contexts["teacher"] is None


def test_reference_only_without_a_mark_takes_the_question_out():
    """A lesson that does not say what is privileged loses the question's text; one without anything else is silent."""
    example = tiny.TASK.train[0]
    asked = question(example)[-1]["content"]
    row = Rollout(example, (1,), (0.0,), "", 0)
    said = lambda content: ({"role": "user", "content": content},)
    read = lambda chat: controls.reference_only([row.read_by(teacher=chat)], {"teacher"})[0].contexts["teacher"]
    assert read(said(f"{asked}\n\nIt is red."))[-1]["content"] == "It is red."
    assert read(said(asked)) is None and read(None) is None
