"""Runs that everything happens to: `make test-torture`.  Each goes on bit for bit, or says in one sentence why it does not."""

import builtins
import errno
import os
import random
import re
import shutil
import time

import pytest
import whole_runs
from whole_runs import FILE, STEPS, arguments, assert_same_end, ended, lines, run_here, start, wait_for

from sdjax.run.storage import checkpoint, manifest, places

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "12"))


def batches(folder) -> list[int]:
    return [line["step"] for line in lines(folder) if "evaluation" not in line]


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_killed_at_random_instants(where, request, reference, programs, tmp_path):
    """`KILLS` times, some of them inside a save; each time the run goes on from a whole checkpoint."""
    folder = tmp_path / "run" if where == "disk" else places.place(request.getfixturevalue("bucket"))
    chance, reached = random.SystemRandom(), 0
    for kill in range(KILLS):
        process = start(folder, *["--resume"] * (kill > 0), programs=programs, TINY_SLOW="0.02")
        deadline = time.monotonic() + 300
        # Mostly while it trains: when there is one more checkpoint, or the next one may be under way.
        while process.poll() is None and time.monotonic() < deadline:
            steps = manifest.steps(folder / "checkpoints")
            if steps and steps[-1] > reached or (kill == 0 and "arguments.json" in places.names(folder)):
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        ended(process)
        reached = min(max(manifest.steps(folder / "checkpoints"), default=0), STEPS - 2)
    status, output = ended(start(folder, "--resume", programs=programs))
    assert status == 0, output
    with places.to_read(folder) as copy:
        assert_same_end(copy, reference)


def test_sigterm_twice(tmp_path, reference, programs, cached):
    folder = tmp_path / "run"
    process = start(folder, programs=programs, TINY_SLOW="0.05")
    wait_for(lambda: len(batches(folder)) >= 2, process)
    process.terminate()
    time.sleep(0.05)
    process.terminate()
    status, output = ended(process)
    assert status == 143 and "Traceback" not in output, output
    assert re.search(r"SIGTERM after step \d+: saved; go on with --resume", output)
    assert run_here(*arguments(folder, "--resume")) == 0
    assert_same_end(folder, reference)


# ---- two runs in one folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--resume",)], ids=["begin", "resume"])
def test_two_runs_in_one_folder(tmp_path, reference, programs, more):
    """One of them trains, as if it were alone, and the other says that it does."""
    folder = tmp_path / "run"
    if more:
        shutil.copytree(reference, folder)
        for name in ("10", "10.json"):
            places.remove(folder / "checkpoints" / name)
    both = [start(folder, *more, programs=programs, TINY_SLOW="0.2") for _ in range(2)]
    outcomes = sorted(map(ended, both))
    assert [status for status, _ in outcomes] == [0, 2], outcomes
    said = outcomes[1][1]
    assert re.search(r"sdjax: \S+(: another (process is at this run|run has begun)| already holds a run)", said), said
    assert "Traceback" not in said
    assert_same_end(folder, reference)


# ---- no space -------------------------------------------------------------------------------------------------------

SHORT = ("train", FILE, "--steps", "2", "--save-every", "1", "--evaluation", "2", "--out")


@pytest.fixture(scope="module")
def short(tmp_path_factory, programs):
    """A run of two steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("short") / "run"
    with whole_runs.compiled_into(programs):
        assert run_here(*SHORT, folder) == 0
    return folder


def full_from(monkeypatch, folder, number: int) -> list[str]:
    """No file of the folder can be opened for writing from the `number`-th time on; returns the names, as they come."""
    opened, real = [], builtins.open

    def open_(file, mode="r", *rest, **named):
        if str(file).startswith(str(folder)) and set(mode) & set("wax"):
            opened.append(os.path.relpath(file, folder))
            if len(opened) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real(file, mode, *rest, **named)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr("io.open", open_)
    return opened


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 9, 11, 14, 18])
def test_disk_full_from_some_write_on(tmp_path, short, monkeypatch, cached, capfd, number):
    """One sentence; once there is space, the run goes on to the same end."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        opened = full_from(patch, folder, number)
        status = run_here(*SHORT, folder)
    said = capfd.readouterr().err
    assert status == (2 if len(opened) >= number else 0), said
    if status:
        last = said.strip().splitlines()[-1]
        assert last.startswith("sdjax: ") and re.search("No space left|earlier checkpoints are untouched", last), said
    resume = ["--resume"] if (folder / "arguments.json").exists() else []
    assert status == 0 or run_here(*SHORT, folder, *resume) == 0
    expected, own = (whole_runs.saved(some, 2) for some in (short, folder))
    for name, array in expected[0].items():
        assert array.tobytes() == own[0][name].tobytes(), name
    assert expected[1] == own[1] and whole_runs.repeatable(folder) == whole_runs.repeatable(short)


# ---- files that are cut or changed ----------------------------------------------------------------------------------


def kinds(folder) -> dict[str, str]:
    """One file of every kind in a run's folder, the largest, by what its name is without numbers and random letters."""
    found = {}
    for name, (size, _) in places.listing(folder).items():
        kind = re.sub(r"[0-9a-f]{16,}|(?<=events).*|\d+", "*", name)
        if name.startswith(("checkpoints/8", "model")):
            continue
        if kind not in found or size > places.listing(folder)[found[kind]][0]:
            found[kind] = name
    return found


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_every_kind_of_file_damaged(reference, tmp_path, cached, capfd, damage):
    """The run goes on to the same end, or is refused with a sentence that names the file or what it belongs to."""
    for kind, name in kinds(reference).items():
        folder = tmp_path / re.sub(r"\W+", "-", kind)
        shutil.copytree(reference, folder)
        file = folder / name
        content = bytearray(file.read_bytes())
        if not content:
            continue
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        file.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
        capfd.readouterr()
        status, said = run_here(*arguments(folder, "--resume")), capfd.readouterr().err
        if status == 0:
            expected, own = (whole_runs.saved(some)[0] for some in (reference, folder))
            assert all(array.tobytes() == own[path].tobytes() for path, array in expected.items()), kind
        else:
            assert status == 2 and said.startswith("sdjax: ") and said.count("\n") == 1, (kind, said)
            of = "checkpoints/10" if name.startswith("checkpoints") else ""
            assert str(folder / of) in said, (kind, said)
        shutil.rmtree(folder)
    assert checkpoint.steps(reference / "checkpoints") == [8, 10]


# ---- a disk that is read only ---------------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, cached, capfd):
    """As said by the system when a file is made, whatever it said when asked before."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert run_here(*arguments(tmp_path / "run")) == 2
    assert "run cannot be written (Read-only file system): name another folder with --out" in capfd.readouterr().err
