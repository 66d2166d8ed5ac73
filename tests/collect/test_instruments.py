"""Instruments log and change nothing: against NumPy, row by row."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdjax.collect import diagnostics
from sdjax.collect.instruments import with_instruments
from sdjax.kernels.distributions import normalise
from sdjax.kernels.reductions import token_sum
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.types import Rollout


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


def test_each_row_has_thirds_of_its_own_and_a_row_without_a_difference_no_concentration():
    """Rows of 3, 2, 1 and 4 tokens, the second of them with a hole, the third read alike by both, two untaught."""
    own = with_instruments(sdpo(top_k=None))
    mask = np.asarray([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    batch = tiny.batch(
        jnp.arange(20).reshape(5, 4), mask=mask, reward=[0.5, 0.4, 1.0, 1.0, 0.0], taught=[True] * 3 + [False] * 2
    )
    logits = jax.random.normal(jax.random.key(3), (2, 5, 4, 40)).at[1, 2].set(0.0).at[0, 2].set(0.0)
    terms = tiny.loss(own.objectives[0], batch, student=normalise(logits[0]), teacher=normalise(logits[1]))[1]
    found = {n.removeprefix("diagnostic/"): float(v) for n, v in terms.items() if n.startswith("diagnostic/")}
    dist = np.asarray(normalise(logits), np.float64)
    kl = (np.exp(dist[0]) * (dist[0] - dist[1])).sum(-1)
    assert found["reverse_kl_first_third"] == pytest.approx(np.mean([kl[0, 0], kl[1, 0]]), rel=1e-5)
    assert found["reverse_kl_middle_third"] == pytest.approx(np.mean([kl[0, 1], kl[2, 0]]), rel=1e-5)
    assert found["reverse_kl_last_third"] == pytest.approx(np.mean([kl[0, 2], kl[1, 2]]), rel=1e-5)
    ratio = np.take_along_axis(dist[1] - dist[0], np.asarray(batch.completion)[..., None], -1)[..., 0]
    size = [np.abs(ratio[row][mask[row]]) for row in range(2)]
    assert found["concentration"] == pytest.approx(np.mean([x.max() / x.sum() for x in size]), rel=1e-5)
    over = mask & (np.arange(5) < 3)[:, None]
    assert found["log_ratio"] == pytest.approx(ratio[over].mean(), rel=1e-4)
    assert found["absolute_log_ratio"] == pytest.approx(np.abs(ratio[over]).mean(), rel=1e-4)
    # Half a reward is a success unless somebody says otherwise.
    assert found["log_ratio_correct"] == pytest.approx(np.mean([ratio[0, :3].mean(), 0.0]), rel=1e-4)
    assert found["log_ratio_wrong"] == pytest.approx(ratio[1][mask[1]].mean(), rel=1e-4)
    assert found["teacher_entropy"] == pytest.approx(-(np.exp(dist[1]) * dist[1]).sum(-1)[over].mean(), rel=1e-5)
