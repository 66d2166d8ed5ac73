"""Sentinels: quiet on what goes well, loud once on what collapses, and the same after a resume."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from whole_runs import lines

from sdjax.collect.rollouts import attempts
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.kernels.distributions import logprob
from sdjax.run.fit import fit
from sdjax.run.logs.sentinels import SENTINELS, WINDOW, Watch, watched
from sdjax.types import REFERENCE, Method, Objective, Rollout, Term, Verdict, View

GOOD = {
    "reward": 0.4,
    "sampled_entropy": 0.5,
    "length": 30.0,
    "finished": 0.9,
    "repetition": 0.1,
    "epistemic_per_thousand": 8.0,
    "divergence": 0.2,
}


def steps(count, seed=0, noise=0.2, **changed):
    """Numbers of steps around `GOOD` with noise in proportion, some means changed."""
    draw = np.random.default_rng(seed)
    means = GOOD | changed
    return [{k: v * (1 + noise * draw.normal()) for k, v in means.items()} for _ in range(count)]


def kinds(watch, values):
    return [alarm.kind for some in values for alarm in watch.step(some)]


def test_noise_raises_no_alarm():
    for seed in range(20):
        assert kinds(Watch(), steps(300, seed)) == []


def test_learning_raises_no_alarm():
    """A reward that rises, and with it shorter, more certain, less hedging texts."""
    watch = Watch()
    for part in range(20):
        better = {"reward": 0.1 + 0.04 * part, "length": 30 - 0.8 * part, "sampled_entropy": 0.5 - 0.015 * part}
        assert kinds(watch, steps(20, part, **better)) == []


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"reward": 0.1}, "collapse"),
        ({"reward": 0.0}, "collapse"),
        ({"sampled_entropy": 0.02}, "entropy"),
        ({"sampled_entropy": 3.0}, "entropy"),
        ({"length": 5.0}, "length"),
        ({"length": 120.0}, "length"),
        ({"finished": 0.3}, "length"),
        ({"repetition": 0.8}, "repetition"),
        ({"epistemic_per_thousand": 0.5}, "hedging"),
        ({"divergence": 2.0}, "teacher"),
    ],
)
def test_every_sentinel_raises_one_alarm(change, kind):
    watch = Watch()
    assert kinds(watch, steps(20)) == []
    assert kinds(watch, steps(40, 1, **change)) == [kind]
    assert kinds(watch, steps(20, 2)) == []  # back to normal
    assert kinds(watch, steps(40, 3, **change)) == [kind]


def test_all_sentinels_have_numbers_here():
    assert {sentinel.number for sentinel in SENTINELS} == {*GOOD}


def test_a_small_batchs_noise_is_no_collapse():
    """Two attempts a step: means of steps differ by half now and then."""
    draw, watch = np.random.default_rng(0), Watch()
    found = [alarm for _ in range(400) for alarm in watch.step({"reward": draw.binomial(2, 0.3) / 2})]
    assert len(found) <= 1


def test_an_accuracy_alarms_where_intervals_do_not_meet():
    watch = Watch()
    assert not watch.evaluation(0.40, 0.31, 0.50)
    assert not watch.evaluation(0.80, 0.71, 0.87)
    assert not watch.evaluation(0.70, 0.60, 0.78)
    (alarm,) = watch.evaluation(0.30, 0.22, 0.40)
    assert alarm.kind == "collapse" and "fell from 80 % to 30 %" in alarm.says
    assert not watch.evaluation(0.20, 0.13, 0.29)  # said once


def test_a_watch_goes_on_from_what_it_remembered():
    whole, first = Watch(), Watch()
    before, after = steps(17), steps(40, 1, reward=0.05, length=4.0)
    wanted = kinds(whole, before + after)
    kinds(first, before + after[:5])
    second = Watch(json.loads(json.dumps(first.remembered())))
    assert kinds(second, after[5:]) == wanted == ["collapse", "length"]
    assert second.remembered() == whole.remembered()


def test_numbers_that_are_not_finite_are_left_out():
    watch = Watch()
    for values in steps(30):
        watch.step(values | {"divergence": float("nan")})
    assert "divergence" not in watch.last and len(watch.last["reward"]) == WINDOW


def test_what_is_watched_is_the_students():
    example = tiny.TASK.train[0]
    own = Rollout(example, (7, 8), (-1.0, -3.0), "a b c a b c a b c", 0)
    theirs = dataclasses.replace(own, logprobs=(0.0, 0.0), text="", source=REFERENCE)
    unknown = dataclasses.replace(own, logprobs=(float("nan"), -5.0), text="")
    assert watched([theirs]) == {}
    assert watched([own, theirs, unknown]) == {"sampled_entropy": 3.0, "repetition": pytest.approx((4 / 7) / 2)}


# ---- a run that collapses -------------------------------------------------------------------------------------------

STEPS, TURN = 80, 25


def method(turns):
    """Learns to repeat what earned a reward; where it `turns`, after some steps what earned none."""

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=4)
        wrong = turns and memory >= TURN
        return [r.with_extras(factor=0.5 - r.reward if wrong else r.reward) for r in rollouts], memory + 1

    signals = lambda dist, token: {"logprobs": logprob(dist["student"], token)}
    terms = lambda batch, sig, step: {"nll": Term(-sig["logprobs"] * batch.extras["factor"][:, None])}
    return Method(collect, (Objective({"student": View(trainable=True)}, signals, terms, rewarded=True),), {}, 0)


def first_word(example, text):
    """Right is every other word at the beginning."""
    return Verdict(float(sum(map(ord, (text.split() or [""])[0])) % 2))


def experiment(turns, **changes):
    values = {"steps": STEPS, "prompts": 4, "evaluation": 0, "export": False, "save_every": 10, "log": (), **changes}
    shapes = Shapes(context=32, completion=4, rows=16, tokens_per_chunk=None)
    task = tiny.TASK._replace(verify=first_word)
    return Experiment(method(turns), task, tiny.pretrained(), optax.adam(3e-3), shapes, dtype=jnp.float32, **values)


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_run_that_collapses_is_noticed_and_one_that_learns_is_not(tmp_path):
    fit(experiment(False), tmp_path / "learns")
    learns = lines(tmp_path / "learns")
    assert not (tmp_path / "learns" / "alarms.jsonl").exists()
    assert np.mean([line["reward"] for line in learns[-10:]]) > 0.7
    folder = tmp_path / "collapses"
    fit(experiment(True, stop_on="collapse"), folder)
    alarm = next(a for a in lines(folder, "alarms.jsonl") if a["kind"] == "collapse")
    assert TURN < alarm["step"] == len(lines(folder)) < STEPS and "reward was" in alarm["says"]
    fit(experiment(True, stop_on="collapse"), folder, resume=True)  # whoever resumes wants to go on
    assert len(lines(folder)) == STEPS
    assert [a["kind"] for a in lines(folder, "alarms.jsonl")].count("collapse") == 1
