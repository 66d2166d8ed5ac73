"""Runs that are killed, interrupted, or find their checkpoints damaged, and go on: bit for bit, or with one sentence."""

import os
import pty
import random
import re
import select
import shutil
import signal
import time

import pytest
import whole_runs
from whole_runs import STEPS, arguments, assert_same_end, ended, lines, run_here, start, wait_for

from sdjax.run.storage import checkpoint


def batches(folder) -> list[int]:
    """The steps that were recorded."""
    return [line["step"] for line in lines(folder) if "evaluation" not in line]


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


def test_killed_anywhere_and_resumed(tmp_path, reference, programs):
    """Killed at a random moment, while arrays are being written, and before the manifest is: the same end each time."""
    folder, slow = tmp_path / "run", {"TINY_SLOW": "0.03", "programs": programs}
    killed = start(folder, **slow)
    wanted = random.SystemRandom().randint(1, 5)
    wait_for(lambda: len(batches(folder)) >= wanted, killed)
    time.sleep(random.SystemRandom().uniform(0, 0.2))
    killed.kill()
    assert ended(killed)[0] == -signal.SIGKILL
    first = checkpoint.steps(folder / "checkpoints")

    assert ended(start(folder, "--resume", TINY_KILL="arrays:8", programs=programs))[0] == -signal.SIGKILL
    assert checkpoint.steps(folder / "checkpoints") == [4, 6]
    assert any("tmp" in path.name for path in (folder / "checkpoints").iterdir())

    assert ended(start(folder, "--resume", TINY_KILL="manifest:8", programs=programs))[0] == -signal.SIGKILL
    assert checkpoint.steps(folder / "checkpoints") == [4, 6]
    assert (folder / "checkpoints" / "8").is_dir()

    status, output = ended(start(folder, "--resume", programs=programs))
    assert status == 0, output
    assert "going on after step 6" in output
    assert not re.search(r"warn|error|^[EW]\d{4} ", output, re.IGNORECASE | re.MULTILINE), output
    assert checkpoint.steps(folder / "checkpoints") == [8, 10], first
    assert not any("tmp" in path.name for path in (folder / "checkpoints").iterdir())
    assert batches(folder) == list(range(1, STEPS + 1))
    assert_same_end(folder, reference)


# ---- SIGTERM and SIGINT ---------------------------------------------------------------------------------------------


def test_sigterm_in_the_first_step_and_resumed(tmp_path, reference, programs, cached, capfd):
    folder = tmp_path / "run"
    process = start(folder, programs=programs)
    wait_for(lambda: lines(folder), process)  # the evaluation before the first step is over
    time.sleep(0.2)
    process.terminate()
    status, output = ended(process)
    assert status == 143, output
    assert re.search(r"SIGTERM after step \d+: saved; go on with --resume", output)
    assert "Traceback" not in output
    assert checkpoint.steps(folder / "checkpoints")
    assert run_here(*arguments(folder, "--resume")) == 0
    assert batches(folder) == list(range(1, STEPS + 1))
    assert_same_end(folder, reference)


@pytest.mark.slow
def test_sigint_in_the_first_evaluation_ends_at_once(tmp_path, programs, cached, capfd):
    folder = tmp_path / "run"
    process = start(folder, "--evaluation", "8", TINY_SLOW="20", programs=programs)
    wait_for((folder / "tensorboard").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    status, output = ended(process)
    assert status == 130, output
    assert time.monotonic() - asked < 20
    assert "SIGINT before the first step: nothing to save; start again with --resume" in output
    assert "Traceback" not in output
    assert checkpoint.steps(folder / "checkpoints") == []
    assert run_here(*arguments(folder, "--evaluation", "8", "--resume")) == 0
    assert "no checkpoint yet: from the beginning" in capfd.readouterr().out
    assert batches(folder) == list(range(1, STEPS + 1))


def test_ctrl_c_at_a_terminal_with_a_live_line(tmp_path, programs):
    """The bar shows every number that it promises; Ctrl-C, typed, saves and exits."""
    controller, terminal = pty.openpty()
    folder = tmp_path / "run"
    process = start(folder, programs=programs, stdout=terminal, TERM="xterm", TINY_SLOW="0.15")
    os.close(terminal)
    shown, typed, deadline = "", False, time.monotonic() + 300
    while time.monotonic() < deadline:
        if not typed and len(batches(folder)) >= 3:
            os.kill(process.pid, signal.SIGINT)
            typed = True
        if select.select([controller], [], [], 0.05)[0]:
            try:
                shown += os.read(controller, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    os.close(controller)
    assert process.wait(60) == 130, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    line = r"step [1-9]/10 .*\d+:\d\d.* reward \d\.\d\d  divergence \d\.\d{3}  loss \S+  \d+ tokens  \d+ tok/s"
    assert re.search(line, text), text
    assert "\x1b[" in shown
    assert re.search(r"SIGINT after step \d+: saved; go on with --resume", text)
    assert "Traceback" not in text
    assert checkpoint.steps(folder / "checkpoints")[-1] == batches(folder)[-1]


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, reference):
    """A finished run whose checkpoints may be damaged."""
    return shutil.copytree(reference, tmp_path / "run")


def largest(folder):
    """The largest file of a checkpoint."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_manifest(folder):
    """Another data position, say: a digit is still JSON."""
    file = folder.with_suffix(".json")
    text = file.read_text()
    assert '"next_index": 10' in text
    file.write_text(text.replace('"next_index": 10', '"next_index": 11'))


DAMAGES = {
    "a flipped bit": lambda folder: flip(largest(folder)),
    "a truncated file": lambda folder: os.truncate(largest(folder), 100),
    "a missing file": lambda folder: largest(folder).unlink(),
    "a missing folder": shutil.rmtree,
    "a changed manifest": flip_manifest,
    "a truncated manifest": lambda folder: os.truncate(folder.with_suffix(".json"), 100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_the_last_good_one_offered(copy, damage, capfd):
    saves = copy / "checkpoints"
    DAMAGES[damage](saves / "10")
    with pytest.raises(checkpoint.CheckpointError) as caught:
        whole_runs.saved(copy)
    assert str(saves / "10") + " is damaged" in str(caught.value)
    assert f"the last good one is {saves / '8'}; to go on from there, remove {saves / '10.json'}" in str(caught.value)


def test_following_the_offer_works(copy, reference, cached, capfd):
    flip(largest(copy / "checkpoints" / "10"))
    assert run_here(*arguments(copy, "--resume")) == 2
    said = capfd.readouterr().err
    assert said.startswith("sdjax: ") and said.count("\n") == 1
    os.unlink(re.search(r"remove (\S+)", said)[1])
    assert run_here(*arguments(copy, "--resume")) == 0
    assert_same_end(copy, reference)


def test_nothing_good_is_left(copy):
    for step in ("8", "10"):
        flip(largest(copy / "checkpoints" / step))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged .* there is no other: start a new run"):
        whole_runs.saved(copy)


def test_arguments_that_changed_are_named(copy, capfd):
    """Which, the old and the new value; nothing is touched."""
    before = (copy / "metrics.jsonl").read_bytes()
    assert run_here(*arguments(copy, "--resume", "--lr", "0.5", "--method.alpha", "0.25")) == 2
    said = capfd.readouterr().err
    assert "lr was 0.01 and is 0.5" in said and "method.alpha was 0.5 and is 0.25" in said and "steps" not in said
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_another_method_is_named(copy, capfd):
    assert run_here(*arguments(copy, "--resume", "--method", "grpo")) == 2
    assert "method was 'sdpo' and is 'grpo'" in capfd.readouterr().err
