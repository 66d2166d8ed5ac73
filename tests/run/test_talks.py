"""Whole runs on conversations: killed in the middle of one and resumed bit for bit, and on two processes as on one."""

import signal
import time
from pathlib import Path

import pytest
from whole_runs import assert_same_end, ended, lines, start, start_all, wait_for

FILE = Path(__file__).parents[1] / "talking_run.py"
SHORT = ("--steps", "3", "--save-every", "1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, programs):
    folder = tmp_path_factory.mktemp("talks") / "run"
    status, output = ended(start(folder, *SHORT, file=FILE, programs=programs, JAX_DISABLE_MOST_OPTIMIZATIONS="1"))
    assert status == 0, output
    turns = [line["turns"] for line in lines(folder)]
    assert len(turns) == 3 and 1 < min(turns) < 2  # some were cut off in their first turn, none of them all
    return folder


def test_killed_between_two_turns_and_resumed_bit_for_bit(undisturbed, tmp_path, programs):
    """The world of the step that was lost is spoken to again, and says the same to the same."""
    folder, how = tmp_path / "run", {"file": FILE, "programs": programs, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = start(folder, *SHORT, TINY_SLOW="1", **how)
    wait_for(lambda: len(lines(folder)) == 2, process)
    time.sleep(2)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL and len(lines(folder)) == 2
    status, output = ended(start(folder, *SHORT, "--resume", **how))
    assert status == 0 and "going on after step 2" in output, output
    assert_same_end(folder, undisturbed, step=3, file=FILE)


def test_two_processes_hold_the_conversations_of_one(undisturbed, tmp_path, programs):
    """Each asks the world about its part; texts and rewards are those of one process, losses up to rounding."""
    folder = tmp_path / "run"
    for status, output in map(ended, start_all(folder, 2, programs, *SHORT, file=FILE)):
        assert status == 0, output
    assert (folder / "rollouts.txt").read_text() == (undisturbed / "rollouts.txt").read_text()
    for line, other in zip(lines(folder), lines(undisturbed), strict=True):
        assert [line[n] for n in ("reward", "turns", "heard")] == [other[n] for n in ("reward", "turns", "heard")]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
