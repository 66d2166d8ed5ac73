"""Controls change one thing and nothing else; instruments change nothing at all."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sdjax.collect import controls, diagnostics
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.instruments import with_instruments
from sdjax.engine import train
from sdjax.kernels.distributions import normalise
from sdjax.kernels.reductions import token_sum
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


def test_instruments_measure_without_changing_loss_or_gradient():
    own = sdpo(group_size=2, alpha=0.5, top_k=None, ema_rate=0.0)
    batch = tiny.batch([[1, 2, 3], [2, 1, 0]], reward=[1.0, 0.0], taught=[True, True])
    logits = jax.random.normal(jax.random.key(1), (2, 2, 3, 40))
    run = lambda m: jax.value_and_grad(
        lambda z: tiny.loss(m.objectives[0], batch, student=normalise(z), teacher=normalise(logits[1])), has_aux=True
    )(logits[0])
    (loss, _terms), gradient = run(own)
    (loss_too, measured), gradient_too = run(with_instruments(own))
    assert float(loss) == float(loss_too)
    np.testing.assert_array_equal(gradient, gradient_too)
    extra = {n.removeprefix("diagnostic/"): float(v) for n, v in measured.items() if n.startswith("diagnostic/")}
    dist = np.asarray(normalise(logits), np.float64)
    kl = (np.exp(dist[0]) * (dist[0] - dist[1])).sum(-1)
    assert extra["reverse_kl"] == pytest.approx(kl.mean(), rel=1e-5)
    thirds = [extra[f"reverse_kl_{name}_third"] for name in ("first", "middle", "last")]
    np.testing.assert_allclose(thirds, kl.mean(0), rtol=1e-5)
    ratio = np.take_along_axis(dist[1] - dist[0], np.asarray(batch.completion)[..., None], -1)[..., 0]
    assert extra["log_ratio_correct"] == pytest.approx(ratio[0].mean(), rel=1e-4)
    assert extra["log_ratio_wrong"] == pytest.approx(ratio[1].mean(), rel=1e-4)
    assert 0.0 <= extra["overlap"] <= 1.0 and extra["overlap_advantage"] <= 0.0


def test_instruments_tell_outcomes_and_markers_apart():
    """Against the functions of whole sets: AUROC, the table of agreement and outcome; and signs on marker tokens."""
    own = with_instruments(sdpo(group_size=2, top_k=None, ema_rate=0.0))
    rewards, taught = [1.0, 1.0, 0.0, 1.0, 0.0], np.asarray([True, True, True, True, False])
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    marker = jnp.asarray([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    repeats = jnp.asarray([False, True, False, False, True])
    extras = {"diagnostic_marker": marker, "diagnostic_repeats": repeats}
    prompts = np.asarray([0, 0, 1, 1, 1])
    batch = tiny.batch(jnp.arange(15).reshape(5, 3), reward=rewards, taught=taught, mask=mask, group=prompts, **extras)
    logits = jax.random.normal(jax.random.key(2), (2, 5, 3, 40))

    def measured(batch, **how):
        dists = {"student": normalise(logits[0]), "teacher": normalise(logits[1])}
        terms = tiny.loss(own.objectives[0], batch, **how, **dists)[1]
        return {n.removeprefix("diagnostic/"): float(v) for n, v in terms.items() if n.startswith("diagnostic/")}

    found, dist = measured(batch), np.asarray(normalise(logits))
    ratio = np.take_along_axis(dist[1] - dist[0], np.asarray(batch.completion)[..., None], -1)[..., 0]
    over = np.asarray(mask) & taught[:, None]
    correct = np.asarray(rewards) > 0.5
    reward = np.asarray(diagnostics.sequence_reward(jnp.asarray(ratio), jnp.asarray(over)))
    # Rows of one prompt are compared: how hard the prompts are does not enter.
    by_prompt = diagnostics.auroc_by_prompt(reward[taught], correct[taught], prompts[taught])
    assert found["auroc"] == pytest.approx(by_prompt) != diagnostics.auroc(reward[taught], correct[taught])
    # Means, whatever the experiment averages its losses by.
    assert measured(batch, reduce=token_sum) == found
    table = diagnostics.agreement_by_outcome(ratio, over, correct)
    names = (("agree_correct", "agree_wrong"), ("disagree_correct", "disagree_wrong"))
    np.testing.assert_allclose([[found[n] for n in row] for row in names], table, atol=1e-6)
    assert 0.0 < table[0].sum() < 1.0
    marked = ratio[over & np.asarray(marker)]
    assert found["markers"] == pytest.approx(len(marked) / over.sum())
    assert found["log_ratio_on_markers"] == pytest.approx(marked.mean(), rel=1e-4)
    assert found["positive_on_markers"] == pytest.approx((marked > 0).mean())
    assert found["repeats"] == pytest.approx(1 / 4)
    held = np.abs(ratio[1][over[1]]).sum() / np.abs(ratio[over]).sum()
    assert found["log_ratio_held_by_repeats"] == pytest.approx(held, rel=1e-5)
    # Nothing to tell apart, nothing marked: no information, not "always the wrong way round".
    nothing = {**extras, "diagnostic_marker": jnp.zeros((5, 3), bool)}
    alike = measured(batch.replace(reward=jnp.ones(5), extras=nothing))
    assert alike["auroc"] == 0.5 and alike["markers"] == 0.0 == alike["positive_on_markers"]


def test_instruments_find_markers_in_what_was_written():
    pieces = (" Wait,", "what", "but", "butter")
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(pieces[t] for t in tokens))
    environment = SimpleNamespace(live=SimpleNamespace(tokenizer=tokenizer))
    texts = ("Wait,whatbutterbut", "again " * 2000)
    rows = [Rollout(tiny.TASK.train[0], (0, 1, 3, 2), (0.0,) * 4, text, 0) for text in texts]
    own = with_instruments(sdpo()._replace(collect=lambda *_: (rows, None)))
    for row, repeats in zip(own.collect(environment, [], None, None)[0], (False, True), strict=True):
        np.testing.assert_array_equal(row.extras["diagnostic_marker"], [True, False, False, True])
        assert row.extras["diagnostic_repeats"] is repeats
    assert with_instruments(grpo()).collect.__module__ == "sdjax.methods.grpo"  # no teacher: nothing to mark for


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
