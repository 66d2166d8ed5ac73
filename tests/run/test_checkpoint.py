"""Checkpoints: what goes in comes out, whole ones only, and a full disk harms no earlier one."""

import collections
import os
import re
import shutil
import subprocess
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from states import assert_same, state

from sdjax.run.storage import checkpoint, digests, manifest, saving
from sdjax.run.storage.checkpoint import CheckpointError
from sdjax.run.storage.saving import Keep, Saver


def save(folder, state, host, keep=2, scores=None):
    """Saves, and waits until it is done."""
    Saver(folder, Keep(keep)).ensure(state, host, scores or {})


def test_saved_and_restored(tmp_path):
    host = {"memory": {"a": [1, 0.1 + 0.2, None, "ü"]}, "position": {"next_index": 3}, "odd": float("inf")}
    saved = state()
    save(tmp_path, saved, host)
    restored, found = checkpoint.restore(tmp_path, state(0))
    assert_same(restored, saved)
    assert found == host
    draw = lambda s: np.asarray(jax.random.normal(s.key, (3,)))
    np.testing.assert_array_equal(draw(restored), draw(saved))


def test_a_clock_that_was_set_back_changes_nothing(tmp_path):
    """The later a step, the older its files say they are: what is restored, and what stays, goes by the step."""
    for step in range(1, 5):
        save(tmp_path, state(step), {"at": step})
        for path in [tmp_path, *tmp_path.rglob("*")]:
            os.utime(path, (2e9 - 1e8 * step, 2e9 - 1e8 * step))
    assert checkpoint.steps(tmp_path) == [3, 4]
    restored, host = checkpoint.restore(tmp_path, state(0))
    assert_same(restored, state(4))
    assert host == {"at": 4}


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, state(step), {"at": step}, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "4.json", "5", "5.json"]
    assert checkpoint.restore(tmp_path, state())[1] == {"at": 5}
    assert checkpoint.restore(tmp_path, state(), 4)[1] == {"at": 4}
    assert int(checkpoint.restore(tmp_path, state(), 4)[0].step) == 4


def test_half_written_is_ignored_and_later_removed(tmp_path):
    save(tmp_path, state(1), None)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.json.unfinished").write_text("{")
    assert int(checkpoint.restore(tmp_path, state())[0].step) == 1
    save(tmp_path, state(4), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json", "4", "4.json"]


def test_none_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint$"):
        checkpoint.restore(tmp_path, state())
    save(tmp_path, state(1), None)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of step 2: there are 1$"):
        checkpoint.restore(tmp_path, state(), 2)


Other = collections.namedtuple("Other", "like says")
OTHERS = {
    "width": Other({"width": 5}, r"params/layer/kernel is float32\[4, 3\] there and float32\[5, 3\] here"),
    "optimizer": Other({"optimizer": optax.sgd(0.1)}, r"opt_state/\S+ is \S+ there and missing here"),
    "snapshot": Other({"snapshots": ("initial",)}, r"snapshots/initial/layer/bias is missing there and bfloat16\[3\]"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_of_something_else(tmp_path, kind):
    """Another model, optimizer or method: named by the first array that differs."""
    save(tmp_path, state(), None)
    with pytest.raises(CheckpointError, match="is of another model, method or optimizer: " + OTHERS[kind].says):
        checkpoint.restore(tmp_path, state(**OTHERS[kind].like))


# ---- no space -------------------------------------------------------------------------------------------------------


def untouched(folder):
    assert checkpoint.steps(folder) == [1]
    assert_same(checkpoint.restore(folder, state())[0], state(1))


def test_no_space_is_known_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, state(1), None)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "save", None)
    with pytest.raises(CheckpointError, match="0.00 GB are free; earlier checkpoints are untouched: free some"):
        save(tmp_path, state(2), None)
    monkeypatch.undo()
    untouched(tmp_path)


@pytest.mark.parametrize("function", ["save", "wait_until_finished"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: disk\nmore")]
)
def test_writing_fails_in_the_middle(tmp_path, monkeypatch, error, function):
    """Before the arrays are copied, or in the thread: said, made again, and after the third time the run ends."""
    save(tmp_path, state(1), None)

    def fail(*_, **__):
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir(exist_ok=True)
        raise error

    said = []
    saver = Saver(tmp_path, say=said.append)
    monkeypatch.setattr(saving.ocp.AsyncCheckpointer, function, fail)
    for number in (2, 3):
        saver.start(state(number), None)
        assert saver.finish() and saver.due_again()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json"]
    assert len(said) == 2
    for line in said:
        assert re.match(
            r"cannot write .*\d: .*(No space|RESOURCE).*earlier checkpoints are unt.*tried again after the", line
        )
    with pytest.raises(CheckpointError, match=r"cannot write .*4: .*(No space|RESOURCE).*earlier checkpoints are unt"):
        saver.ensure(state(4), None, {})
    monkeypatch.undo()
    untouched(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json"]
    saver.start(state(5), None)
    assert saver.finish() and not saver.due_again() and checkpoint.steps(tmp_path) == [1, 5]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where that is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        permitted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        permitted = False
    if not permitted:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, monkeypatch):
    """The space is gone between the look and the writing."""
    folder = small_disk / "checkpoints"
    save(folder, state(1), None)
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        file.write(b"x" * (shutil.disk_usage(small_disk).free - os.sysconf("SC_PAGE_SIZE")))
    monkeypatch.setattr(saving, "check_space", lambda *_: None)
    with pytest.raises(CheckpointError, match="cannot write .* earlier checkpoints are untouched"):
        save(folder, state(2), None)
    untouched(folder)
    filler.unlink()
    # Orbax's threads may have left something behind after the folder was cleared: the next checkpoint clears it.
    save(folder, state(2), None)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "1.json", "2", "2.json"]


# ---- while training goes on -----------------------------------------------------------------------------------------


def test_donated_buffers_change_nothing(tmp_path):
    """The next updates begin at once, in place: what is saved is the state as it was."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    params = {f"layer_{n}": jax.random.normal(jax.random.key(n), (256, 512)) for n in range(8)}
    own = state().replace(params=params, opt_state=(), snapshots={})
    expected = jax.tree.map(np.array, params)
    let, host = threading.Event(), {"at": 3, "seen": [1]}
    saver = Saver(tmp_path, before=lambda: let.wait(60))
    saver.start(own, host)
    for _ in range(4):
        params = update(params)
    host["seen"].append(2)  # what a method remembers, too
    let.set()
    assert saver.finish() and checkpoint.steps(tmp_path) == [3]
    restored, host = checkpoint.restore(tmp_path, own.replace(params=params))
    for name, array in expected.items():
        np.testing.assert_array_equal(restored.params[name], array)
        assert not np.array_equal(params[name], array)
    assert host == {"at": 3, "seen": [1]}


def test_nothing_counts_before_the_manifest(tmp_path):
    """What `before` does is done by then; a run looks between steps, and never waits for it there."""
    let, seen = threading.Event(), []
    saver = Saver(tmp_path, before=lambda: (let.wait(60), seen.append(checkpoint.steps(tmp_path))))
    saver.start(state(3), None)
    saver.look()
    assert saver.under_way is not None and saver.saved == 0 and not saver.finish(0.05)
    assert not saver.ensure(state(4), None, {}, seconds=0.05) and saver.step == 3
    let.set()
    assert saver.finish() and saver.saved == 3 and seen == [[]] and saver.seconds > 0


KEPT = {
    Keep(): [5, 6],
    Keep(1): [6],
    Keep(1, every=2): [2, 4, 6],
    Keep(1, best=True): [3, 6],
    Keep(2, every=4, best=True): [3, 4, 5, 6],
}


@pytest.mark.parametrize("keep", KEPT, ids=str)
def test_which_stay(keep):
    """Of equal scores the first; a score of a step that was not saved counts for nothing."""
    there = []
    for step in range(1, 7):
        there.append(step)
        gone = keep.superseded(there, {0: 0.9, 2: 0.1, 3: 0.5, 4: 0.5, 9: 1.0})
        there = [step for step in there if step not in gone]
    assert there == KEPT[keep]


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"])
def test_a_digest_sees_every_bit(dtype):
    """Against whole numbers of any size; one bit or two neighbours exchanged change it."""
    array = np.random.default_rng(0).integers(0, 2, (3, 5, 4)).astype(bool) if dtype == "bool" else None
    if array is None:
        array = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)) * 9).astype(dtype))
    size = array.dtype.itemsize
    bits = array.view(f"uint{8 * size}").ravel()
    expected = sum(int(b) * ((p * digests.ODD % 2**32) | 1) for p, b in enumerate(bits)) % 2**32
    assert int(digests.digest(array)) == expected
    for bit in range(8 * size if dtype != "bool" else 1):
        changed = bits.copy()
        changed[17] ^= 1 << bit
        assert int(digests.digest(changed.view(array.dtype).reshape(array.shape))) != expected
    assert int(digests.digest(array[::-1])) != expected and int(digests.digest(array.ravel())) == expected


def test_every_flipped_bit_of_the_arrays_is_found(tmp_path):
    """Wherever it is in the largest file; the array is named, or the file that cannot be read."""
    save(tmp_path, state(1), None)
    save(tmp_path, state(2, width=400), None)
    file = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole, found, places = file.read_bytes(), 0, range(7, file.stat().st_size, file.stat().st_size // 12)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 16
        file.write_bytes(changed)
        try:
            restored = checkpoint.restore(tmp_path, state(width=400))[0]
        except CheckpointError as error:
            assert re.search(r"2 is damaged \((\S+ does not have the digest|it cannot be read)", str(error))
            found += 1
        else:  # a byte of the file that no array is read from
            assert_same(restored, state(2, width=400))
    assert found >= len(places) - 2
    file.write_bytes(whole)
    assert_same(checkpoint.restore(tmp_path, state(width=400))[0], state(2, width=400))


def written_by_an_earlier_version(folder, own, host):
    """Compressed arrays, no digests, a checksum of each file's bytes."""
    step, tree = int(own.step), checkpoint.arrays_of(own)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / str(step), tree)
    files = {
        path.relative_to(folder / str(step)).as_posix(): [path.stat().st_size, zlib.crc32(path.read_bytes())]
        for path in sorted((folder / str(step)).rglob("*"))
        if path.is_file()
    }
    manifest.write(folder, step, {"files": files, "arrays": checkpoint.described(tree), "host": host})


def test_checkpoints_of_earlier_versions(tmp_path):
    written_by_an_earlier_version(tmp_path, state(3), {"at": 3})
    restored, host = checkpoint.restore(tmp_path, state(0))
    assert_same(restored, state(3))
    assert host == {"at": 3}
    assert {*checkpoint.saved_parameters(tmp_path)[0]} == {"live", "teacher"}
    save(tmp_path, state(4), {"at": 4})
    assert checkpoint.restore(tmp_path, state(0))[1] == {"at": 4}
    file = max((p for p in (tmp_path / "3").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    with pytest.raises(
        CheckpointError, match=rf"3 is damaged \(\S*{file.name} does not match its checksum\); the last good"
    ):
        checkpoint.restore(tmp_path, state(0), 3)
