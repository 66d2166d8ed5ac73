"""The model that a run starts with: a frozen snapshot is that model, in memory once, and in no checkpoint."""

import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from run.test_fit import experiment, method

from sdjax.engine.policies import ema, frozen
from sdjax.methods.opsd import opsd
from sdjax.run.fit import fit
from sdjax.run.folder import RunError
from sdjax.run.interrupts import Interrupts
from sdjax.run.loop import Run
from sdjax.run.storage.mirror import Mirror

pytestmark = pytest.mark.usefixtures("cached")
SNAPSHOTS = {"initial": frozen(), "reference": frozen(), "average": ema(0.5)}


def own(steps=4, snapshots=SNAPSHOTS, seed=0, **changes):
    """A run with two frozen policies and one that averages; every second step is saved."""
    student = tiny.pretrained(seed)._replace(tokenizer=tiny.tokenizer())
    return experiment(method(snapshots=snapshots), steps=steps, save_every=2, student=student, **changes)


def size_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), *jax.device_get((a, b)))


def test_the_start_is_in_memory_once(tmp_path):
    """Parameters, two moments, an average, and one start for both frozen policies: five copies of weights from a file."""
    made = own()
    loaded = made.student._replace(params=jax.device_get(made.student.params))
    gc.collect()
    there = jax.live_arrays()  # kept, so that none of other tests goes meanwhile
    run = Run(dataclasses.replace(made, student=loaded), Mirror(tmp_path), Interrupts())
    gc.collect()
    held = sum(x.nbytes for x in jax.live_arrays()) - sum(x.nbytes for x in there)
    size = size_of(tiny.pretrained().params)
    assert held == pytest.approx(5 * size, rel=0.01)
    policies = run.parameters()
    assert policies.keys() == {*SNAPSHOTS}
    same(policies["initial"], tiny.pretrained().params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (policies["initial"], policies["reference"])), strict=True))


def test_weights_that_lie_on_the_device_are_the_frozen_policy(tmp_path):
    """Nothing is copied but what is trained."""
    placed = jax.device_put(tiny.pretrained().params)
    student = tiny.pretrained()._replace(params=placed)
    run = Run(dataclasses.replace(own(), student=student), Mirror(tmp_path), Interrupts())
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (run.parameters()["initial"], placed)), strict=True))
    assert not {id(x) for x in jax.tree.leaves(run.state)} & {id(x) for x in jax.tree.leaves(placed)}


def test_a_rate_of_nothing_is_frozen():
    assert ema(0.0) is frozen() and opsd().snapshots["teacher"] is frozen()


def test_a_checkpoint_does_not_hold_the_start_and_goes_on_with_it(tmp_path):
    whole = fit(own(), tmp_path / "whole").state
    assert whole.snapshots.keys() == {"average"}
    manifest = json.loads((tmp_path / "whole" / "checkpoints" / "4.json").read_text())
    assert {path.split("/")[1] for path in manifest["arrays"] if path.startswith("snapshots/")} == {"average"}
    assert manifest["host"]["start"]["names"] == ["initial", "reference"]
    files = [p.stat().st_size for p in (tmp_path / "whole" / "checkpoints" / "4").rglob("*") if p.is_file()]
    assert sum(files) < 4.9 * size_of(tiny.pretrained().params)  # parameters, two moments, the average, and indices

    fit(own(2), tmp_path / "halves")
    with pytest.raises(
        RunError, match="its policy initial and reference is the model that it began with, and the weights"
    ):
        fit(own(seed=1), tmp_path / "halves", resume=True)
    resumed = fit(own(), tmp_path / "halves", resume=True).state
    same((resumed.params, resumed.opt_state, resumed.snapshots), (whole.params, whole.opt_state, whole.snapshots))


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_saved_with_the_run_that_begins_with_it(tmp_path):
    """It may be gone when the run is resumed; the run then goes on all the same, with the frozen policy that it had."""
    first = fit(own(2), tmp_path / "first").state
    source = f"{tmp_path / 'first'}@2"
    whole = fit(own(), tmp_path / "whole", start=source).state
    same(whole.snapshots["initial"], first.params)
    fit(own(2), tmp_path / "halves", start=source)
    shutil.rmtree(tmp_path / "first")
    resumed = fit(own(), tmp_path / "halves", resume=True, start=source).state
    same((resumed.params, resumed.snapshots), (whole.params, whole.snapshots))
