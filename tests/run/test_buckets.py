"""Runs whose folder is in a bucket: killed, resumed, damaged, and on a server that stops answering."""

import random
import re
import signal
import time

import pytest
import whole_runs
from states import assert_same, state
from whole_runs import STEPS, arguments, assert_same_end, assert_same_run, ended, joining, lines, run_here, start

from sdjax.run.storage import checkpoint, manifest, places, saving
from sdjax.run.storage.checkpoint import CheckpointError
from sdjax.run.storage.places import place
from sdjax.run.storage.saving import Saver


def assert_same_as(folder: str, reference) -> None:
    """The run in the bucket ended as the other did, bit for bit; what is read is a copy on this machine."""
    with places.to_read(place(folder)) as copy:
        assert_same_end(copy, reference)


def batches(folder: str) -> list[int]:
    """The steps that were recorded."""
    with places.to_read(place(folder)) as copy:
        return [line["step"] for line in lines(copy) if "evaluation" not in line]


def wait_for_step(folder: str, step: int, process) -> None:
    """Waits until a checkpoint of the step, or of a later one, is whole."""
    deadline = time.monotonic() + 300
    while not [s for s in manifest.steps(place(folder) / "checkpoints") if s >= step]:
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_before_a_manifest_resumed_read_and_damaged(bucket, reference, programs, cached, tmp_path, capfd):
    """The same end as on a disk, bit for bit; then the report, and what is said of an object that is gone or changed."""
    assert ended(start(bucket, TINY_KILL="manifest:8", programs=programs))[0] == -signal.SIGKILL
    folder = place(bucket)
    assert checkpoint.steps(folder / "checkpoints") == [4, 6] and "8" in places.names(folder / "checkpoints")
    assert [*range(1, 7)] == batches(bucket)[:6]  # mirrored before the manifest of step 6
    assert run_here(*arguments(bucket)) == 2
    assert f"{bucket} already holds a run: go on with --resume, or name" in capfd.readouterr().err
    assert run_here(*arguments(bucket, "--resume")) == 0
    said = capfd.readouterr().out
    assert "going on after step 6" in said and f"run folder {bucket}" in said
    assert batches(bucket) == list(range(1, STEPS + 1))
    assert_same_as(bucket, reference)
    names = {"arguments.json", "checkpoints", "data.json", "memory.json", "metrics.jsonl", "result.json"}
    assert {*places.names(folder)} == names | {"owner.json", "rollouts.jsonl", "rollouts.txt", "tensorboard"}
    assert sorted(places.names(folder / "checkpoints")) == ["10", "10.json", "8", "8.json", "remembered"]
    page = tmp_path / "report.html"
    assert run_here("report", bucket, "--out", page) == 0
    assert "reward" in page.read_text()
    damaged(folder, capfd)


def damaged(folder, capfd) -> None:
    """A changed object of the same size, and one that is gone, are named with the last good checkpoint."""
    saves = folder / "checkpoints"
    sizes = places.listing(saves / "10")
    largest = max(sizes, key=lambda name: sizes[name][0])
    whole = places.read_bytes(saves / "10" / largest)
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 1
    offer = f"; the last good one is {saves}/8; to go on from there, remove {saves}/10.json"
    for content, says in ((bytes(changed), "does not match its checksum"), (None, "is missing")):
        places.remove(saves / "10" / largest)
        if content is not None:
            places.write_bytes(saves / "10" / largest, content)
        capfd.readouterr()
        assert run_here(*arguments(folder, "--resume")) == 2
        assert f"{saves}/10 is damaged ({largest} {says}){offer}" in capfd.readouterr().err
    places.write_bytes(saves / "10" / largest, whole)


@pytest.mark.slow
def test_a_model_in_a_bucket_is_written_and_measured(bucket, cached, tmp_path, capfd):
    assert run_here("train", whole_runs.FILE, "--out", bucket, "--smoke", "--export") == 0
    assert f"model written to {bucket}/model" in capfd.readouterr().out
    data = tmp_path / "problems.jsonl"
    data.write_text('{"prompt": "ask key 1 ->", "answer": "1"}\n')
    for model in (bucket, f"{bucket}/model"):
        assert run_here("evaluate", model, "--data", data, "--completion", 4, "--context", 32) == 0
        assert re.search(r"problems\.jsonl: \d+\.\d % .* of 1", capfd.readouterr().out)
    exported = tmp_path / "exported"
    assert run_here("export", f"{bucket}@2", "--model", f"{bucket}/model", "--out", exported) == 2
    with places.to_read(place(bucket) / "model") as copy:
        assert run_here("export", f"{bucket}@2", "--model", copy, "--out", exported) == 0
        assert (copy / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    capfd.readouterr()
    assert run_here("evaluate", f"{bucket}/none", "--data", data) == 2
    assert f"{bucket}/none" in capfd.readouterr().err


# ---- a server that stops answering ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_stops_answering_during_a_save(bucket, bucket_server, monkeypatch):
    """Said after the time that a save may take, made again, and the checkpoint before is untouched."""
    said, folder = [], place(bucket)
    saver = Saver(folder, say=said.append)
    assert saver.ensure(state(1), {"at": 1}, {})
    monkeypatch.setattr(saving, "SECONDS", 3)
    begun = saving.ocp.AsyncCheckpointer.save

    def stopped(checkpointer, *rest, **named):
        """The server falls silent as soon as the arrays are copied."""
        begun(checkpointer, *rest, **named)
        bucket_server[0].send_signal(signal.SIGSTOP)

    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "save", stopped)
    started = time.monotonic()
    saver.start(state(2, width=3000), {"at": 2})
    assert time.monotonic() - started < 3  # training goes on
    try:
        time.sleep(4)
        saver.look()
    finally:
        bucket_server[0].send_signal(signal.SIGCONT)
    saver.finish()
    assert saver.due_again() and len(said) == 1
    assert re.match(
        rf"cannot write {bucket}/2: .*; earlier checkpoints are untouched; it is tried again after", said[0]
    )
    monkeypatch.undo()
    assert saver.ensure(state(3), {"at": 3}, {})
    assert checkpoint.steps(folder) == [1, 3] and places.names(folder) == ["1", "1.json", "3", "3.json"]
    assert_same(checkpoint.restore(folder, state(), 1)[0], state(1))
    assert_same(checkpoint.restore(folder, state())[0], state(3))


def test_a_bucket_that_is_gone_ends_the_run_after_three_saves(bucket, monkeypatch):
    saver = Saver(place(bucket.replace("bucket/", "gone/", 1)))
    for number in (1, 2):
        saver.start(state(number), None)
        saver.finish()
        assert saver.due_again()
    with pytest.raises(CheckpointError, match=r"cannot write gs://gone/\S+/3: .*earlier checkpoints are untouched$"):
        saver.ensure(state(3), None, {})


# ---- many hosts without a shared disk -------------------------------------------------------------------------------


def start_hosts(bucket, tmp_path, count, programs, *more) -> list:
    """Starts a run as processes with working folders of their own."""
    hosts = [tmp_path / str(host) for host in range(count)]
    for host in hosts:
        host.mkdir(exist_ok=True)
    joined = zip(joining(count), hosts, strict=True)
    return [start(bucket, *more, programs=programs, cwd=host, TINY_SLOW="0.05", **own) for own, host in joined]


@pytest.mark.slow
def test_two_hosts_train_into_a_bucket_and_one_goes_on(bucket, reference, programs, cached, tmp_path):
    """A signal to one saves all; what both have written is restored by one process."""
    both = start_hosts(bucket, tmp_path, 2, programs)
    wait_for_step(bucket, 2, both[0])
    both[1].send_signal(signal.SIGTERM)
    for status, output in map(ended, both):
        assert status == 143, output
    assert run_here(*arguments(bucket, "--resume")) == 0
    with places.to_read(place(bucket)) as copy:
        assert_same_run(copy, reference)
    assert [*tmp_path.rglob("*.json*")] == []  # nothing of the run lies on a host


@pytest.mark.slow
def test_four_hosts_are_killed_at_random_and_go_on(bucket, reference, programs, tmp_path):
    """One of them, then two, process 0 among them: bit for bit the run that nothing interrupted; then on another mesh."""
    chance, mesh = random.SystemRandom(), ("--mesh", "2x2")
    for status, output in map(ended, start_hosts(f"{bucket}-whole", tmp_path, 4, programs, *mesh)):
        assert status == 0, output
    resume = ()
    for victims in ((chance.choice([1, 2, 3]),), (0, chance.choice([1, 2, 3]))):
        four = start_hosts(bucket, tmp_path, 4, programs, *mesh, *resume)
        wait_for_step(bucket, 2 + 2 * len(resume), four[0])
        time.sleep(chance.uniform(0, 1))
        for victim in victims:
            four[victim].kill()
        for host, (status, output) in enumerate(map(ended, four)):
            assert status not in (0, None) or host in victims, output
        resume = ("--resume",)
    for status, output in map(ended, start_hosts(bucket, tmp_path, 4, programs, *mesh, *resume)):
        assert status == 0, output
    with places.to_read(place(bucket)) as copy, places.to_read(place(f"{bucket}-whole")) as whole:
        assert_same_end(copy, whole)
        assert_same_run(copy, reference)
    for saved in ("10", "10.json"):
        places.remove(place(bucket) / "checkpoints" / saved)
    for status, output in map(ended, start_hosts(bucket, tmp_path, 2, programs, "--mesh", "1x2", "--resume")):
        assert status == 0, output
    with places.to_read(place(bucket)) as copy:
        assert_same_run(copy, reference)
