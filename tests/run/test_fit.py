"""The loop: what is skipped, what is said, what ends a run, and that the data come in order."""

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil
import signal
import sys
import threading

import jax
import numpy as np
import optax
import pytest
import tiny
from whole_runs import lines

from sdjax.collect.rollouts import attempts
from sdjax.engine import train
from sdjax.engine.policies import ema, refresh
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.tokens import LengthError, Shapes, shorten
from sdjax.engine.train import Experiment
from sdjax.kernels.distributions import logprob
from sdjax.methods.vpd import vpd
from sdjax.models.pretrained import Pretrained
from sdjax.run import loop
from sdjax.run.fit import check_lengths, fit
from sdjax.run.folder import RunError
from sdjax.run.interrupts import Interrupts
from sdjax.run.logs.log import RunLog
from sdjax.run.prompts import Prompts
from sdjax.run.storage.checkpoint import CheckpointError
from sdjax.run.storage.mirror import Mirror
from sdjax.types import Method, Objective, Term, Verdict, View

pytestmark = pytest.mark.usefixtures("cached")
ADAMW = optax.adamw(1e-2, weight_decay=0.1)
SHAPES = Shapes(context=32, completion=4, rows=8, tokens_per_chunk=None)


def method(factor=lambda step, rollout: 1.0, *, snapshots=None, memory=0, remember=lambda memory: memory + 1):
    """A method whose loss is the rows' negative log-likelihood times `factor(step, rollout)`; its memory counts."""

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=2)
        step = memory if isinstance(memory, int) else 0
        return [r.with_extras(factor=factor(step, r)) for r in rollouts], remember(memory)

    signals = lambda dist, token: {"logprobs": logprob(dist["student"], token)}
    terms = lambda batch, sig, step: {"nll": Term(-sig["logprobs"] * batch.extras["factor"][:, None])}
    objective = Objective({"student": View(trainable=True)}, signals, terms)
    return Method(collect, (objective,), snapshots or {}, memory)


def experiment(own=None, **changes):
    values = {"shapes": SHAPES, "steps": 3, "prompts": 2, "evaluation": 0, "export": False, **changes}
    task = tiny.TASK._replace(verify=tiny.parity)
    return Experiment(**{"method": own or method(), "task": task, "optimizer": ADAMW, "student": STUDENT} | values)


STUDENT = Pretrained(tiny.config(), tiny.pretrained().params, tiny.tokenizer())


def leaves(*trees):
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---- updates that are not applied -----------------------------------------------------------------------------------


def test_a_run_that_is_not_finite_stops_with_its_batch(tmp_path, capsys, monkeypatch):
    """Steps 2, 4, 5 are not finite, step 3 resets the count; parameters and optimizer move in steps 1 and 3 only."""
    bad = {1, 3, 4, 5}
    own = method(lambda step, rollout: float("nan") if step in bad else 1.0)
    states, step_of = [], loop.Run.step

    def step(run, number):
        states.append(leaves(run.state.params, run.state.opt_state))
        step_of(run, number)

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(
        RunError, match=r"3 updates in a row were not finite, the last at step 6; its batch is in \S+npz"
    ):
        fit(experiment(own, steps=10, most_skipped=3), tmp_path / "run")
    assert len(states) == 6
    moved = [not same(a, b) for a, b in itertools.pairwise(states)]
    assert moved == [True, False, True, False, False]
    said = capsys.readouterr().out
    assert said.count("update skipped") == 4 and "step 2: loss nan, gradient norm nan: update skipped" in said
    with np.load(tmp_path / "run" / "skipped-batch-6.npz") as found:
        assert np.isnan(found["extras/factor"]).all()
        assert found["completion"].shape == found["present"].shape and found["contexts/student/tokens"].ndim == 2
    assert [line["loss"] for line in lines(tmp_path / "run")][1] is None
    assert [line["trained"] for line in lines(tmp_path / "run")] == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_skipped_updates_are_counted_in_the_result(tmp_path, capsys):
    own = method(lambda step, rollout: float("inf") if step == 1 else 1.0)
    result = fit(experiment(own), tmp_path / "run")
    assert all(np.isfinite(x).all() for x in leaves(result.state.params))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_updates"] == 1
    assert result.interrupted is None and result.before is None and result.after is None


def test_a_batch_without_signal_is_said(tmp_path, capsys):
    own = method(lambda step, rollout: float(step != 1 or rollout.group == 0))
    fit(experiment(own, minibatches=2), tmp_path / "run")
    said = capsys.readouterr().out
    assert "step 2: 1 of 2 updates had no signal (equal rewards, or no lesson for any row): not trained" in said
    assert said.count("no signal") == 1
    assert [line["trained"] for line in lines(tmp_path / "run")] == [1.0, 0.5, 1.0]

    own = method(lambda step, rollout: 0.0)
    result = fit(experiment(own), tmp_path / "silent")
    assert "step 3: no signal" in capsys.readouterr().out
    assert same(leaves(result.state.params), leaves(tiny.pretrained().params))  # in spite of weight decay


def test_a_step_without_rollouts(tmp_path, capsys):
    own = method()

    def collect(environment, examples, key, memory):
        rollouts, memory = own.collect(environment, examples, key, memory)
        return rollouts if memory != 2 else [], memory

    fit(experiment(own._replace(collect=collect)), tmp_path / "run")
    assert "step 2: no rollouts were kept: not trained" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_snapshots_follow_updates_and_not_what_was_skipped(tmp_path, capsys, monkeypatch):
    """Step 2 is not finite: averages stay, whether they move after batches or updates; a copy by the clock is made."""
    rules = {"each": ema(0.5, every_update=True), "batch": ema(0.5), "clock": refresh(2)}
    own = method(lambda step, rollout: float("nan") if step == 1 else 1.0, snapshots=rules)
    updates, update = [], loop.Run.update

    def watched(run, *rest):
        outcome = update(run, *rest)
        updates.append((bool(outcome.finite), np.asarray(run.state.params["embed"])))
        return outcome

    monkeypatch.setattr(loop.Run, "update", watched)
    result = fit(experiment(own, steps=3, minibatches=2, epochs=2, most_skipped=9), tmp_path / "run")
    assert [finite for finite, _ in updates] == [True] * 4 + [False] * 4 + [True] * 4
    average = {"each": np.asarray(STUDENT.params["embed"]), "batch": np.asarray(STUDENT.params["embed"])}
    for number, (finite, live) in enumerate(updates):
        if finite:
            average["each"] = (average["each"] + live) / 2
        if number in (3, 11):
            average["batch"] = (average["batch"] + live) / 2
    for name, expected in {**average, "clock": updates[3][1]}.items():
        np.testing.assert_allclose(result.state.snapshots[name]["embed"], expected, atol=1e-6)
    assert np.abs(average["each"] - average["batch"]).max() > 1e-4


# ---- the loop's parts -----------------------------------------------------------------------------------------------


def test_epochs_minibatches_objectives_and_programs(tmp_path, capsys, monkeypatch):
    """Two epochs of two minibatches; the second objective every other step; one program each for the whole run."""
    calls = collections.Counter()
    make = train.make_update

    def counted(objective, *rest):
        update = make(objective, *rest)

        def call(*arguments):
            calls[objective.every] += 1
            return update(*arguments)

        return call

    monkeypatch.setattr(train, "make_update", counted)
    own = method()
    own = own._replace(objectives=(own.objectives[0], own.objectives[0]._replace(every=2)))
    # Long answers all, so that every batch has one shape.
    task = tiny.TASK._replace(verify=lambda example, text: Verdict(float(len(text))))
    before = tiny.programs("update")
    fit(experiment(own, task=task, steps=4, prompts=4, epochs=2, minibatches=2), tmp_path / "run")
    assert calls == {1: 4 * 4, 2: 2 * 4}
    assert tiny.programs("update") == before + 2


@pytest.mark.slow
def test_two_objectives_in_minibatches_and_epochs(tmp_path, capsys, monkeypatch):
    """VPD: the E-step on every second batch, all of its updates first; its constants are those of the whole batch."""
    calls, make = [], train.make_update

    def counted(objective, *rest):
        update, name = make(objective, *rest), "M" if "student" in objective.views else "E"

        def call(*arguments):
            result = update(*arguments)
            extras = {n: np.asarray(x) for n, x in arguments[3].extras.items()}
            calls.append((name, int(arguments[4]), extras, bool(result[2].useful)))
            return result

        return call

    monkeypatch.setattr(train, "make_update", counted)
    own = vpd(group_size=4, every=2, feedback="environment", ema_rate=0.5)
    roomy = Shapes(context=128, completion=4, rows=16, tokens_per_chunk=None)
    result = fit(experiment(own, steps=3, prompts=4, minibatches=2, epochs=2, shapes=roomy), tmp_path / "run")
    assert [(name, step) for name, step, *_ in calls] == [
        (name, step) for step, names in enumerate(("EM", "M", "EM")) for name in names for _ in range(4)
    ]
    for _, step, extras, useful in calls:
        assert useful and len({*extras["midpoint"].tolist()}) == 1
        assert (extras["class_weight"] > 0.0).any() == (step != 1)
    same = [extras["midpoint"][0] for _, step, extras, _ in calls if step == 0]
    assert len(same) == 8 and len(set(same)) == 1
    found = lines(tmp_path / "run")
    assert [{"right", "wrong", "margin"} <= set(line) for line in found] == [True, False, True]
    assert int(result.state.step) == 3 and all(np.isfinite(line["loss"]) for line in found)


def test_an_objective_before_and_after_a_schedule(tmp_path, capsys, monkeypatch):
    """`until` and `since` are counted in batches, `every` from the first one: what has ended is not run any more."""
    calls = collections.defaultdict(list)
    train_on, make = loop.Run.train_on, train.make_update
    steps = []

    def counted(objective, *rest):
        update = make(objective, *rest)
        return lambda *arguments: calls[objective[3:6]].append(steps[-1]) or update(*arguments)

    monkeypatch.setattr(train, "make_update", counted)
    monkeypatch.setattr(loop.Run, "train_on", lambda run, step, batch: steps.append(step) or train_on(run, step, batch))
    own = method()
    times = [{"until": 2}, {"since": 2}, {"every": 2, "since": 1, "until": 4}, {}]
    own = own._replace(objectives=tuple(own.objectives[0]._replace(**when) for when in times))
    fit(experiment(own, steps=5), tmp_path / "run")
    assert calls == {
        (1, 0, 2): [0, 1],
        (1, 2, None): [2, 3, 4],
        (2, 1, 4): [2],
        (1, 0, None): [0, 1, 2, 3, 4],
    }


def test_nothing_crosses_to_the_device_unasked(tmp_path, capsys):
    """After compilation, an update takes the batch and gives its outcome: no parameters travel."""
    run = loop.Run(experiment(teachers={"coach": tiny.pretrained(1)}), Mirror(tmp_path), Interrupts())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(run.parameters()))
    run.log = RunLog(tmp_path, 3)
    rollouts, _ = run.experiment.method.collect(run.environment(), run.prompts.take(), run.state.key, 0)
    with jax.transfer_guard("disallow"):
        for step in range(2):
            values = run.train_on(step, run.batch(rollouts))
    assert values["trained"] == 1.0
    run.log.close()


def test_memory_must_be_json_and_is_read_back_in_every_step(tmp_path, capsys):
    """A run that is never interrupted sees what a resumed one sees: lists, not tuples."""
    seen = []

    def remember(memory):
        seen.append(memory)
        return {"pair": (1, 2), 3: "three"}

    fit(experiment(method(memory=(0,), remember=remember)), tmp_path / "run")
    assert seen == [[0], *2 * [{"pair": [1, 2], "3": "three"}]]
    with pytest.raises(RunError, match="the method's memory cannot be saved as JSON: Object of type"):
        fit(experiment(method(remember=lambda _: {"x": np.ones(2)})), tmp_path / "other")


def test_prompts_are_shuffled_and_go_on_from_a_position():
    examples = list(range(7))
    prompts = Prompts(examples, 3, seed=5)
    first = [prompts.take() for _ in range(4)]
    position = json.loads(json.dumps(prompts.position()))
    later = [prompts.take() for _ in range(10)]
    again = Prompts(examples, 3, seed=5)
    again.go_to(position)
    assert [again.take() for _ in range(10)] == later
    stream = [x for taken in first + later for x in taken]
    epochs = [stream[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == examples for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Prompts(examples, 3, seed=6).take() != first[0] or Prompts(examples, 3, seed=7).take() != first[0]


def test_batches_of_one_and_a_handful_of_examples():
    for count, size in ((7, 1), (1, 1), (1, 3), (2, 5)):
        prompts = Prompts(list(range(count)), size, seed=5)
        stream = [x for _ in range(20) for x in prompts.take()]
        epochs = [stream[i : i + count] for i in range(0, len(stream) - count, count)]
        assert len(stream) == 20 * size and all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_each_batch_is_taken_again_in_every_round():
    once, thrice = (Prompts(list(range(7)), 3, seed=5, rounds=rounds) for rounds in (1, 3))
    for _ in range(6):
        batch = once.take()
        assert [thrice.take() for _ in range(3)] == 3 * [batch]
    position = json.loads(json.dumps(thrice.position()))
    thrice.take()
    rest = [thrice.take() for _ in range(3)]
    again = Prompts(list(range(7)), 3, seed=5, rounds=3)
    again.go_to(position)
    again.take()
    assert [again.take() for _ in range(3)] == rest


def test_further_examples_are_no_part_of_any_batch():
    """What `more` gives is neither the batch under way nor a later one, in any round, and shifts no rounds."""
    for rounds in (1, 2, 3):
        prompts, order = Prompts(list(range(100)), 4, seed=0, rounds=rounds), Prompts(list(range(100)), 4, seed=0)
        steps, extra = [], []
        for step in range(5 * rounds):
            steps.append(prompts.take())
            extra += [prompts.more() for _ in range(step % 2)]
            position = json.loads(json.dumps(prompts.position()))
            prompts = Prompts(list(range(100)), 4, seed=0, rounds=rounds)
            prompts.go_to(position)
        taken = steps[::rounds]
        assert steps == [batch for batch in taken for _ in range(rounds)]
        seen = [x for batch in [*taken, *extra] for x in batch]
        assert extra and len(seen) == len(set(seen))  # within one epoch nothing comes twice
        assert sorted(seen) == sorted(x for _ in range(len(seen) // 4) for x in order.take())


# ---- refused before the first step ----------------------------------------------------------------------------------


@pytest.fixture
def no_steps(monkeypatch):
    """A step is an error."""
    monkeypatch.setattr(loop.Run, "step", None)


def test_a_question_that_does_not_fit(tmp_path, no_steps):
    example = tiny.TASK.train[5]
    long = dataclasses.replace(example, prompt=({"role": "user", "content": "key " * 40},))
    task = tiny.TASK._replace(train=(*tiny.TASK.train, long))
    with pytest.raises(LengthError, match="a prompt of 42 tokens exceeds the 32 of --context"):
        fit(experiment(task=task), tmp_path / "run")
    with pytest.raises(LengthError, match="a prompt of 42 tokens exceeds"):
        fit(experiment(task=tiny.TASK._replace(test=(long,)), evaluation=1), tmp_path / "run")
    turns = tuple({"role": role, "content": "key " * 20} for role in ("user", "assistant", "user"))
    shapes = dataclasses.replace(SHAPES, too_long=shorten)
    chat = dataclasses.replace(example, prompt=turns)
    check_lengths(experiment(task=tiny.TASK._replace(train=(chat,)), shapes=shapes))
    with pytest.raises(LengthError):
        check_lengths(experiment(task=tiny.TASK._replace(train=(long,)), shapes=shapes))
    assert not (tmp_path / "run").exists()


def test_shapes_beyond_the_model(tmp_path, no_steps):
    with pytest.raises(
        ExperimentError, match="--context 250 and --completion 8 exceed the 256 tokens that the student"
    ):
        fit(experiment(shapes=Shapes(context=250, completion=8)), tmp_path / "run")


def test_no_space_for_a_checkpoint(tmp_path, no_steps, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(CheckpointError, match="GB are free"):
        fit(experiment(), tmp_path / "run")


def test_disk_full_while_writing_numbers(tmp_path, monkeypatch, capsys):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "write", write)
    with pytest.raises(RunError, match="No space left on device: free some space and go on with --resume"):
        fit(experiment(), tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_is_lost(tmp_path, capsys, number):
    """As in a callback of the garbage collector: the evaluation ends all the same, before its next verdict."""
    asked, handler = [], signal.getsignal(signal.SIGINT)

    def verify(example, text):
        asked.append(example)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        return Verdict(1.0)

    result = fit(experiment(task=tiny.TASK._replace(verify=verify), evaluation=4), tmp_path / "run")
    assert result.interrupted == number and result.before is None and int(result.state.step) == 0
    assert len(asked) == 1
    assert f"{number.name} before the first step: nothing to save" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_lost_signal_leaves_no_traceback_and_other_exceptions_do(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: said.append(lost.exc_type))

    class Last:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    with Interrupts() as interrupts:
        Last(lambda: 1 / 0)
        Last(lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert said == [ZeroDivisionError]
    Last(lambda: {}["nothing"])
    assert said == [ZeroDivisionError, KeyError]


def test_in_a_thread_signals_are_left_alone(tmp_path, capsys):
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(experiment(steps=1), tmp_path / "run")))
    thread.start()
    thread.join(120)
    assert done and int(done[0].state.step) == 1
