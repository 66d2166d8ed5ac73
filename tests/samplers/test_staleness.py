"""Rollouts of older weights: written by a snapshot, recorded, bounded, counted and weighed."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from networks import unoptimised

from sdjax.engine.policies import score
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.kernels.distributions import logprob
from sdjax.methods.grpo import grpo
from sdjax.methods.opsd import opsd
from sdjax.run.fit import fit
from sdjax.samplers.staleness import DROPPED, STALENESS, WRITER, bounded, lagged, times, weighed
from sdjax.types import STUDENT, SYNTHETIC, Objective, Task, Term, View

SHAPES = Shapes(context=48, completion=8, rows=8, tokens_per_chunk=None)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def own_logprob(dist, token):
    return {"own": logprob(dist["student"], token)}


def experiment(method, steps):
    return Experiment(
        method=method,
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=optax.adam(1e-2),
        shapes=SHAPES,
        steps=steps,
        prompts=2,
        evaluation=0,
        export=False,
    )


def watched(method, seen):
    """The method, with what it collects and what the live weights then say of it appended to `seen`."""

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        scored = score(environment, rollouts, {"student": View()}, own_logprob) if rollouts else []
        seen.append([(r.extras[STALENESS], np.subtract(r.extras["own"], r.logprobs)) for r in scored])
        return rollouts, memory

    return method._replace(collect=collect)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "reward" in row}


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps whose writer is refreshed after every third, with rollouts of at most one step ago."""
    folder, seen = tmp_path_factory.mktemp("runs") / "lagged", []
    method = watched(bounded(lagged(grpo(group_size=4), 2), 1, cap=2.0), seen)
    return folder, seen, fit(experiment(method, 6), folder)


def test_rollouts_record_their_age_and_those_beyond_the_bound_are_dropped(run):
    _, seen, _ = run
    ages = [{age for age, _ in batch} for batch in seen]
    assert ages == [{0}, {1}, set(), {0}, {1}, set()]
    assert [len(batch) for batch in seen] == [8, 8, 0, 8, 8, 0]


def test_their_logprobs_are_those_of_the_weights_that_wrote_them(run):
    """Fresh ones agree with the live weights, those a step old do not."""
    _, seen, _ = run
    for batch in seen:
        for age, difference in batch:
            assert (np.abs(difference).max() < 1e-5) == (age == 0)


def test_age_drops_and_importance_are_logged(run):
    folder, _, result = run
    logged = metrics(folder)
    assert [logged[step][f"{STALENESS}/age"] for step in (1, 2, 4, 5)] == [0, 1, 0, 1]
    assert logged[1][f"{STALENESS}/importance"] == pytest.approx(1.0, abs=1e-5)
    assert logged[1][f"{STALENESS}/truncated"] == 0
    assert abs(logged[2][f"{STALENESS}/importance"] - 1.0) > 1e-4
    assert 3 not in logged and 6 not in logged
    manifest = json.loads((folder / "checkpoints" / "6.json").read_text())
    assert manifest["host"]["memory"] == {"dropped": 16, "method": {"batches": 6, "method": None}}
    assert int(result.state.step) == 6


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(run, tmp_path):
    _, _, whole = run
    method = lambda: bounded(lagged(grpo(group_size=4), 2), 1, cap=2.0)
    fit(experiment(method(), 2), tmp_path / "halves")
    resumed = fit(experiment(method(), 6), tmp_path / "halves", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.snapshots[WRITER], whole.state.snapshots[WRITER])


# ---- parts ----------------------------------------------------------------------------------------------------------


def collected(method, ages):
    """What a bound leaves of one group of rollouts of these ages."""
    base = grpo(group_size=len(ages))

    def collect(environment, examples, key, memory):
        rollouts, memory = base.collect(environment, examples, key, memory)
        return [r.with_extras(**{STALENESS: age}) for r, age in zip(rollouts, ages, strict=True)], memory

    method = bounded(base._replace(collect=collect), 2)
    return method.collect(tiny.environment(), list(tiny.TASK.train[:1]), jax.random.key(0), method.memory)


def test_the_bound_itself_is_kept():
    kept, memory = collected(None, (0, 2, 3, 9))
    assert [r.extras[STALENESS] for r in kept] == [0, 2]
    assert {r.extras[DROPPED] for r in kept} == {2.0} and memory["dropped"] == 2


def test_rows_that_the_policy_did_not_write_have_no_age():
    base = grpo(group_size=2)

    def collect(environment, examples, key, memory):
        rollouts, memory = base.collect(environment, examples, key, memory)
        return [dataclasses.replace(rollouts[0], source=SYNTHETIC), rollouts[1]], memory

    method = lagged(base._replace(collect=collect), 3)
    environment = tiny.environment(method)
    _, memory = method.collect(environment, list(tiny.TASK.train[:1]), jax.random.key(0), method.memory)
    rollouts, memory = method.collect(environment, list(tiny.TASK.train[:1]), jax.random.key(0), memory)
    assert [r.extras.get(STALENESS) for r in rollouts] == [None, 1]


def weighed_value(source, cap):
    """The loss of one row of two tokens, `-log p` each, with p = 0.5, 0.25 and b = 0.1, 0.5."""
    objective = weighed(
        Objective(
            {"student": View(trainable=True)},
            lambda dist, token: {"nll": -logprob(dist["student"], token)},
            lambda batch, sig, step: {"nll": Term(sig["nll"]), "row": Term(batch.reward)},
        ),
        cap,
    )
    batch = tiny.batch([[0, 1]], behavior=jnp.log(jnp.asarray([[0.1, 0.5]])), reward=[3.0], views=("student",))
    batch = batch.replace(
        source=jnp.asarray([source]), extras={STALENESS: jnp.asarray([1]), DROPPED: jnp.asarray([4.0])}
    )
    return tiny.loss(objective, batch, student=tiny.log([[0.5, 0.5], [0.75, 0.25]]))


def test_weights_are_truncated_ratios_of_the_students_tokens():
    _, terms = weighed_value(STUDENT, 2.0)
    assert float(terms["nll"]) == pytest.approx((2.0 * math.log(2) + 0.5 * math.log(4)) / 2, rel=1e-6)
    assert float(terms["row"]) == 3.0
    assert float(terms[f"{STALENESS}/importance"]) == pytest.approx((2.0 + 0.5) / 2, rel=1e-6)
    assert float(terms[f"{STALENESS}/truncated"]) == 0.5
    assert (float(terms[f"{STALENESS}/age"]), float(terms[f"{STALENESS}/dropped"])) == (1.0, 4.0)
    for source, cap in ((STUDENT, None), (SYNTHETIC, 2.0)):
        assert float(weighed_value(source, cap)[1]["nll"]) == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)


def test_importance_multiplies_and_leaves_credit_alone():
    term = times(Term(jnp.ones((2, 3)), 3.0, importance=jnp.asarray([1.0, 2.0])), jnp.full((2, 3), 0.5))
    np.testing.assert_array_equal(term.importance, [[0.5] * 3, [1.0] * 3])
    assert term.weight == 3.0
    assert times(Term(jnp.ones((2, 3)), coef=0.0), jnp.zeros((2, 3))).importance == 1.0


def test_an_objective_without_a_trained_student_is_left_alone():
    (objective,) = opsd().objectives
    assert weighed(objective, 2.0) is not objective
    views = {"student": View(), "other": View(trainable=True)}
    assert weighed(objective._replace(views=views), 2.0).views == views
    assert weighed(objective._replace(views=views), 2.0) == objective._replace(views=views)


def test_bad_numbers_and_a_second_lag_are_refused():
    with pytest.raises(ValueError, match="lag=-1"):
        lagged(grpo(), -1)
    with pytest.raises(ValueError, match="most=-1"):
        bounded(grpo(), -1)
    with pytest.raises(ValueError, match="cap=0"):
        bounded(grpo(), 1, cap=0)
    with pytest.raises(ValueError, match="lag it once"):
        lagged(lagged(grpo(), 1), 1)
