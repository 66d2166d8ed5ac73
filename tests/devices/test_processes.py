"""Several processes on this machine: one run, agreed on, ended and resumed together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_runs import (
    STEPS,
    arguments,
    assert_same_run,
    ended,
    joining,
    kept_in,
    lines,
    run_here,
    start,
    start_all,
    wait_for,
)

from sdjax.devices import processes
from sdjax.devices.processes import ProcessError
from sdjax.run.storage import checkpoint


def batches(folder) -> list[int]:
    return [line["step"] for line in lines(folder) if "evaluation" not in line]


# ---- joining --------------------------------------------------------------------------------------------------------

BAD = {
    (None, "2", "0"): "JAX_COORDINATOR_ADDRESS is not set, and another of .* is: set all three or none",
    ("here:1", None, "0"): "JAX_NUM_PROCESSES is not set",
    ("here:1", "2", "one"): "JAX_PROCESS_ID=one: expected a number",
    ("here", "2", "0"): "JAX_COORDINATOR_ADDRESS=here: expected host:port",
    ("here:1", "2", "2"): "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2: expected 0 to 1",
}


@pytest.mark.parametrize("values", BAD, ids=str)
def test_bad_variables_are_named(values, monkeypatch):
    for name, value in zip(processes.VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=BAD[values]):
        processes.join()


def test_one_process_is_the_plain_call(monkeypatch):
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    processes.join()
    assert not processes.many() and processes.first()
    assert processes.everyone({1: object}) == [{1: object}]
    assert processes.divided(lambda x: (x,), [1, 2]) == [(1,), (2,)]
    with pytest.raises(KeyError):
        processes.by_first(lambda: {}["a"])
    with pytest.raises(ProcessError, match="expected auto"):
        processes.join("2")


def test_without_a_cluster_the_variables_are_named(monkeypatch):
    def finds_none(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", finds_none)
    with pytest.raises(ProcessError, match="jax finds no cluster here; set JAX_COORDINATOR_ADDRESS, .* in place of"):
        processes.join("auto")


# ---- working together -----------------------------------------------------------------------------------------------


def test_two_processes_agree_and_share_the_work(tmp_path, programs):
    """Nothing is asked twice, errors are everybody's, and after two steps the parameters are the same bit for bit."""
    folder, script = tmp_path / "run", Path(__file__).parents[1] / "joined.py"
    run = lambda own: subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, **kept_in(programs), **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for status, output in map(ended, [run(own) for own in joining(2)]):
        assert status == 0, output
    found = [json.loads(Path(f"{folder}.{p}.json").read_text()) for p in (0, 1)]
    for p, checks in enumerate(found):
        assert checks["everyone"] and checks["divided"] and checks["by_first"] and checks["parameters"]
        assert checks["asked"] == [[0, 1, 2], [3, 4, 5, 6]][p]
        assert checks["by_each"] == ("no" if p == 1 else "process 1: no")
        assert checks["first_fails"] == ("there is none" if p == 0 else "process 0: there is none")
        assert "have different arguments: lr is 0 in one and 1 in the other; start all" in checks["agree"]
        assert checks["state"] == 2
    assert batches(folder) == [1, 2]


def test_different_arguments_are_refused(tmp_path, programs):
    own = joining(2)
    started = [start(tmp_path / "run", "--lr", f"0.{p + 1}", programs=programs, **own[p]) for p in (0, 1)]
    for status, output in map(ended, started):
        assert status == 2, output
        said = "processes 0 and 1 have different arguments: lr is 0.1 in one and 0.2 in the other; start all processes"
        assert said in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_ends_all_and_one_alone_goes_on(tmp_path, reference, programs, cached, capfd):
    """Saved by two processes at the same step, gone on with by one: the run of one process, up to rounding."""
    folder = tmp_path / "run"
    both = start_all(folder, 2, programs, TINY_SLOW="0.05")
    wait_for(lambda: len(batches(folder)) >= 2, both[0])
    both[1].send_signal(signal.SIGTERM)
    (status, output), (other, said) = map(ended, both)
    assert status == other == 143, output + said
    step = int(re.search(r"SIGTERM after step (\d+): saved; go on with --resume", output)[1])
    assert checkpoint.steps(folder / "checkpoints")[-1] == step == batches(folder)[-1]
    assert "saved; go on" not in said and "held-out accuracy" not in said  # one of them speaks
    assert run_here(*arguments(folder, "--resume")) == 0
    assert_same_run(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, said",
    [
        (2, r"sdjax: (another process|process \d).*(ended|killed).*--resume"),
        (
            0,
            r"the leader task was preempted/died|sdjax: another process has ended",
        ),  # jax itself ends who had joined it
    ],
)
def test_one_is_killed_and_all_are_resumed(tmp_path, reference, programs, victim, said):
    """Four processes; the death of one ends the others within a minute; two go on, on a mesh of another shape.

    Process 0 is the one that the others have joined, and that writes.
    """
    folder = tmp_path / "run"
    four = start_all(folder, 4, programs, "--mesh", "2x2", TINY_SLOW="0.05")
    wait_for(lambda: len(checkpoint.steps(folder / "checkpoints")) >= 1 and len(batches(folder)) >= 3, four[0])
    four[victim].kill()
    killed = time.monotonic()
    for p, (status, output) in enumerate(map(ended, four)):
        if p != victim:
            assert status not in (0, None), output
            assert re.search(said, output), output
    assert time.monotonic() - killed < 60
    for status, output in map(ended, start_all(folder, 2, programs, "--resume", "--mesh", "1x2")):
        assert status == 0, output
    assert batches(folder) == list(range(1, STEPS + 1))
    assert_same_run(folder, reference)


@pytest.mark.slow
def test_four_processes_make_the_run_of_one(tmp_path, reference, programs):
    folder = tmp_path / "run"
    for status, output in map(ended, start_all(folder, 4, programs, "--mesh", "2x2")):
        assert status == 0, output
    assert_same_run(folder, reference)
