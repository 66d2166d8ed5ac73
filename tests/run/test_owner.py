"""Of several processes that go on with one run, the last one that took its folder saves; the others end themselves."""

import os

import pytest
from states import assert_same, state

from sdjax.run.storage import checkpoint, manifest, places
from sdjax.run.storage.mirror import Mirror
from sdjax.run.storage.owner import FILE, Owner, TakenError
from sdjax.run.storage.places import place
from sdjax.run.storage.saving import Saver


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else place(request.getfixturevalue("bucket"))


def taken(folder) -> tuple[Owner, Saver]:
    """A process that has taken the folder, and what it saves with."""
    owner = Owner(folder)
    owner.take()
    return owner, Saver(folder / "checkpoints", check=owner.check)


def test_the_last_one_keeps_it_whatever_the_clock_says(folder):
    owners = [taken(folder)[0] for _ in range(3)]
    if not places.in_bucket(folder):
        os.utime(folder / FILE, (0, 0))
    for other in owners[:2]:
        with pytest.raises(TakenError, match=rf"process {os.getpid()} on \S+ goes on with this run: this process ends"):
            other.check()
    owners[2].check()
    owners[0].take()
    owners[0].check()
    assert owners[2].other()


def test_nobody_is_held_up_by_what_cannot_be_read(folder):
    owner, _ = taken(folder)
    for content in (b"", b'{"token"', b"[]"):
        (folder / FILE).write_bytes(content)
        owner.check()
    places.remove(folder / FILE)
    owner.check()


def test_who_has_lost_the_folder_saves_nothing_and_removes_nothing(folder):
    """Neither with the next save, nor with one under way, nor where a save fails, nor at the end."""
    (_, first), (second, later) = taken(folder), taken(folder)
    with pytest.raises(TakenError):
        first.start(state(1), None)
    assert later.ensure(state(2), {"by": 2}, {})
    third, last = taken(folder)
    (folder / "checkpoints" / "9").mkdir(exist_ok=True)
    (folder / "checkpoints" / "9" / "being written").write_bytes(b"by the third")
    with pytest.raises(TakenError):
        later.ensure(state(2), {"by": 2}, {})  # saved long ago
    with pytest.raises(TakenError):
        later.failed(OSError("no longer there"))
    assert places.names(folder / "checkpoints") == ["2", "2.json", "9"]
    third.check()
    assert second.other() and last.ensure(state(3), {"by": 3}, {})
    assert checkpoint.steps(folder / "checkpoints") == [2, 3]
    assert_same(checkpoint.restore(folder / "checkpoints", state())[0], state(3))


def test_a_save_under_way_is_not_declared(folder, monkeypatch):
    """The folder is taken between the arrays and the manifest."""
    _, saver = taken(folder)
    complete = Saver.complete
    monkeypatch.setattr(Saver, "complete", lambda *rest: taken(folder) and complete(*rest))
    saver.start(state(1), None)
    with pytest.raises(TakenError):
        saver.finish()
    assert manifest.steps(folder / "checkpoints") == [] and saver.failures == 0


def test_logs_are_not_copied_over_those_of_the_successor(bucket):
    folder = place(bucket)
    one, two = Mirror(folder), Mirror(folder)
    one.owner.take()
    (one.own / "metrics.jsonl").write_text("one\n")
    one.push()
    two.owner.take()
    (one.own / "metrics.jsonl").write_text("one\nand more\n")
    one.push()
    assert places.read_bytes(folder / "metrics.jsonl") == b"one\n"
    two.fetch()
    assert (two.own / "metrics.jsonl").read_text() == "one\n"
    one.close()
    two.close()
    assert places.read_bytes(folder / "metrics.jsonl") == b"one\n"
