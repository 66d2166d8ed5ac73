"""Whole runs and their checkpoints: saved while they train, made again, kept, begun from and exported."""

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny
import whole_runs
from whole_runs import FILE, arguments, assert_same_end, lines, run_here

from sdjax.models import pretrained
from sdjax.run import loop
from sdjax.run.folder import RunError
from sdjax.run.storage import checkpoint, saving

pytestmark = pytest.mark.usefixtures("cached")


def test_a_save_that_fails_is_said_at_the_next_step_and_made_again(tmp_path, reference, monkeypatch, capfd):
    """The run does not wait for it, and ends bit for bit as one whose saves all succeeded."""
    folder, waited, steps = tmp_path / "run", saving.ocp.AsyncCheckpointer.wait_until_finished, []
    take = loop.Run.step

    def fails_once(checkpointer):
        waited(checkpointer)
        if 3 not in steps:
            deadline = time.monotonic() + 60
            while 3 not in steps and time.monotonic() < deadline:  # the third step begins while this save is under way
                time.sleep(0.01)
            raise OSError("the disk is full")

    def step(run, number):
        take(run, number)
        steps.append(number + 1)
        if number + 1 == 3:
            time.sleep(0.3)

    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "wait_until_finished", fails_once)
    monkeypatch.setattr(loop.Run, "step", step)
    assert run_here(*arguments(folder)) == 0
    said = capfd.readouterr().out
    pattern = (
        rf"cannot write {folder}/checkpoints/2: the disk is full; earlier checkpoints are untouched; it is tried again"
    )
    assert len(re.findall(pattern, said.replace("\n", ""))) == 1, said
    assert_same_end(folder, reference)


@pytest.mark.slow
def test_which_checkpoints_stay(tmp_path, capfd):
    """The newest, every sixth, and the best by held-out accuracy."""
    folder = tmp_path / "run"
    keep = (
        "--keep",
        "1",
        "--keep-every",
        "6",
        "--keep-best",
        "--evaluate-every",
        "2",
        "--evaluation",
        "8",
        "--lr",
        "0.03",
    )
    assert run_here(*arguments(folder, *keep)) == 0
    scores = {line["step"]: line["evaluation"]["accuracy"] for line in lines(folder) if "evaluation" in line}
    best = max((s for s in scores if s), key=lambda step: (scores[step], -step))
    # The last evaluation comes after the last checkpoint has taken its place.
    kept = {*checkpoint.steps(folder / "checkpoints")}
    earlier = max((s for s in scores if 0 < s < 10), key=lambda step: (scores[step], -step))
    assert kept == {6, 10, earlier} and (best in kept)
    assert dict(map(tuple, whole_runs.saved(folder)[1]["scores"])).keys() == {0, 2, 4, 6, 8}
    assert run_here(*arguments(tmp_path / "other", "--keep-best", "--evaluate-every", "0")) == 2
    assert "keep_best needs evaluation, evaluate_every and save_every" in capfd.readouterr().err


@pytest.mark.parametrize("grace", ["0", "0.2", "30"])
def test_a_signal_saves_within_its_grace(tmp_path, monkeypatch, capfd, grace):
    """Or says what is saved; the run then goes on from there."""
    folder, take, complete = tmp_path / "run", loop.Run.step, saving.Saver.complete

    def step(run, number):
        take(run, number)
        if number + 1 == 3:
            run.saver.finish()
            signal.raise_signal(signal.SIGTERM)

    def slowly(saver, *rest):
        time.sleep(1.0 if saver.step == 3 else 0.0)
        return complete(saver, *rest)

    monkeypatch.setattr(loop.Run, "step", step)
    monkeypatch.setattr(saving.Saver, "complete", slowly)
    started = time.monotonic()
    assert run_here(*arguments(folder, "--grace", grace, "--evaluation", "0")) == 143
    said = capfd.readouterr().out
    if grace == "0.2":
        assert (
            "SIGTERM after step 3: it cannot be saved within the 0.2 s of --grace; the last checkpoint is of step 2"
            in said
        )
        assert checkpoint.steps(folder / "checkpoints") == [2]
    else:
        assert "SIGTERM after step 3: saved; go on with --resume" in said and time.monotonic() - started > 1
        assert checkpoint.steps(folder / "checkpoints") == [2, 3]


def test_an_error_ends_the_run_after_the_save_under_way(tmp_path, monkeypatch, capfd):
    folder, take, complete = tmp_path / "run", loop.Run.step, saving.Saver.complete

    def step(run, number):
        if number + 1 == 3:
            raise RunError("that is enough")
        take(run, number)

    def slowly(saver, *rest):
        time.sleep(0.5)
        return complete(saver, *rest)

    monkeypatch.setattr(loop.Run, "step", step)
    monkeypatch.setattr(saving.Saver, "complete", slowly)
    assert run_here(*arguments(folder, "--evaluation", "0")) == 2
    assert "that is enough" in capfd.readouterr().err
    assert checkpoint.steps(folder / "checkpoints") == [2]


# ---- RUN@STEP -------------------------------------------------------------------------------------------------------


def seen_at_first(monkeypatch) -> list:
    """Parameters and snapshots before the first step of runs that begin from now on."""
    seen, take = [], loop.Run.step

    def step(run, number):
        if number == 0:
            seen.append(jax.device_get((run.state.params, run.state.snapshots, run.state.step)))
        take(run, number)

    monkeypatch.setattr(loop.Run, "step", step)
    return seen


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another(tmp_path, reference, monkeypatch, capfd):
    """Its snapshots are copies of them; everything else is new.  It goes on from its own checkpoints."""
    seen, folder, start = seen_at_first(monkeypatch), tmp_path / "run", f"{reference}@8"
    command = [
        "train",
        FILE,
        "--out",
        folder,
        "--from",
        start,
        "--steps",
        "2",
        "--save-every",
        "1",
        "--evaluation",
        "0",
    ]
    assert run_here(*command) == 0
    expected, _ = whole_runs.saved(reference, 8)
    (params, snapshots, step) = seen[0]
    for path, x in whole_runs.flat({"params": params}).items():
        np.testing.assert_array_equal(x, expected[path], strict=True)
    for own in snapshots.values():
        jax.tree.map(np.testing.assert_array_equal, own, params)
    assert int(step) == 0 and json.loads((folder / "arguments.json").read_text())["from"] == start
    whole = {name: whole_runs.saved(folder, 2)[0][name] for name in expected}
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "checkpoints" / "2.json").unlink()
    assert run_here(*command, "--resume") == 0 and len(seen) == 1
    for name, x in whole_runs.saved(folder, 2)[0].items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
    capfd.readouterr()
    assert run_here(*[x for x in command if x not in ("--from", start)], "--resume") == 2
    assert f"from was '{start}' and is None" in capfd.readouterr().err


NO_STARTS = {
    "{}": "expected RUN@STEP, a run's folder and one of its checkpoints, such as runs/mine@100",
    "{}@x": "expected RUN@STEP",
    "{}@7": "checkpoints holds no complete checkpoint of step 7: there are 8, 10",
    "{}-none@8": "checkpoints holds no complete checkpoint of step 8",
    "s3://b/run@8": "not in s3://",
}


@pytest.mark.parametrize("text", NO_STARTS)
def test_what_is_no_checkpoint_is_said_before_a_model_is_loaded(tmp_path, reference, monkeypatch, capfd, text):
    monkeypatch.setattr(tiny, "pretrained", None)
    text_ = text.format(reference)
    for command in (("train", FILE, "--out", tmp_path / "run", "--from", text_), ("export", text_)):
        assert run_here(*command) == 2
        said = capfd.readouterr().err
        assert NO_STARTS[text] in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_exported_checkpoint(tmp_path, reference, capfd):
    """The parameters of that step, as the transformers library has them."""
    base, out = tmp_path / "base", tmp_path / "exported"
    pretrained.save(base, *tiny.pretrained())
    assert run_here("export", f"{reference}@8", "--model", base, "--out", out) == 0
    assert f"{reference}@8: model written to {out}" in capfd.readouterr().out
    expected = whole_runs.saved(reference, 8)[0]
    for path, x in whole_runs.flat({"params": pretrained.load(out).params}).items():
        np.testing.assert_array_equal(np.asarray(x), expected[path])
    assert run_here("export", f"{reference}@8", "--model", base, "--out", out) == 2
    assert f"{out} is not empty: name another folder with --out" in capfd.readouterr().err


@pytest.mark.slow
def test_exported_adapters_are_what_the_run_itself_exports(tmp_path, capfd):
    """Folded into the weights that they were trained on, and no others; they begin no run that trains whole weights."""
    base = tmp_path / "base"
    pretrained.save(base, *tiny.pretrained())
    run = tmp_path / "lora"
    assert run_here("train", FILE, "--out", run, "--smoke", "--export", "--lora-rank", "2") == 0
    assert run_here("export", f"{run}@2", "--model", base) == 0
    own, folded = pretrained.load(run / "model").params, pretrained.load(run / "model-2").params
    jax.tree.map(np.testing.assert_array_equal, own, folded)
    assert any(
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (own, tiny.pretrained().params)), strict=True)
    )
    pretrained.save(tmp_path / "other", *tiny.pretrained(1))
    capfd.readouterr()
    assert run_here("export", f"{run}@2", "--model", tmp_path / "other", "--out", tmp_path / "none") == 2
    assert f"{run}@2 was trained from another model than {tmp_path}/other" in capfd.readouterr().err
    assert run_here("train", FILE, "--out", tmp_path / "whole", "--smoke", "--from", f"{run}@2") == 2
    said = capfd.readouterr().err
    assert f"--from {run}@2: it holds other parameters than this run trains: params/" in said
    assert f"make a model of it (sdjax export {run}@2) and name that with --model" in said
