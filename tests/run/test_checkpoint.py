"""Checkpoints: what goes in comes out, whole ones only, and a full disk harms no earlier one."""

import collections
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.engine.train import State
from sdjax.run import checkpoint
from sdjax.run.checkpoint import CheckpointError

OPTIMIZER = optax.adamw(1e-3)


def state(step=3, width=4, optimizer=OPTIMIZER, snapshots=("teacher",)):
    """A small state of every kind of array."""
    params = {
        "layer": {"kernel": jnp.arange(float(width * 3)).reshape(width, 3) / 7, "bias": jnp.ones(3, jnp.bfloat16)}
    }
    return State(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        snapshots={name: jax.tree.map(lambda x: x + 1, params) for name in snapshots},
        key=jax.random.key(7),
    )


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(checkpoint.arrays_of(a)), jax.tree.leaves(checkpoint.arrays_of(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_saved_and_restored(tmp_path):
    host = {"memory": {"a": [1, 0.1 + 0.2, None, "ü"]}, "position": {"next_index": 3}, "odd": float("inf")}
    saved = state()
    checkpoint.save(tmp_path, saved, host)
    restored, found = checkpoint.restore(tmp_path, state(0))
    assert_same(restored, saved)
    assert found == host
    draw = lambda s: np.asarray(jax.random.normal(s.key, (3,)))
    np.testing.assert_array_equal(draw(restored), draw(saved))


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, state(step), {"at": step}, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "4.json", "5", "5.json"]
    assert checkpoint.restore(tmp_path, state())[1] == {"at": 5}
    assert checkpoint.restore(tmp_path, state(), 4)[1] == {"at": 4}
    assert int(checkpoint.restore(tmp_path, state(), 4)[0].step) == 4


def test_half_written_is_ignored_and_later_removed(tmp_path):
    checkpoint.save(tmp_path, state(1), None)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.json.unfinished").write_text("{")
    assert int(checkpoint.restore(tmp_path, state())[0].step) == 1
    checkpoint.save(tmp_path, state(4), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json", "4", "4.json"]


def test_none_there(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint$"):
        checkpoint.restore(tmp_path, state())
    checkpoint.save(tmp_path, state(1), None)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of step 2"):
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
    checkpoint.save(tmp_path, state(), None)
    with pytest.raises(CheckpointError, match="is of another model, method or optimizer: " + OTHERS[kind].says):
        checkpoint.restore(tmp_path, state(**OTHERS[kind].like))


# ---- no space -------------------------------------------------------------------------------------------------------


def untouched(folder):
    assert checkpoint.steps(folder) == [1]
    assert_same(checkpoint.restore(folder, state())[0], state(1))


def test_no_space_is_known_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), None)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    monkeypatch.setattr(checkpoint, "write_arrays", None)
    with pytest.raises(CheckpointError, match="0.00 GB are free; earlier checkpoints are untouched: free some"):
        checkpoint.save(tmp_path, state(2), None)
    monkeypatch.undo()
    untouched(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: disk\nmore")]
)
def test_writing_fails_in_the_middle(tmp_path, monkeypatch, error):
    checkpoint.save(tmp_path, state(1), None)

    def fail(*_, **__):
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
        raise error

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*2: .*(No space|RESOURCE).*earlier checkpoints are unt"):
        checkpoint.save(tmp_path, state(2), None)
    monkeypatch.undo()
    untouched(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json"]


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
    checkpoint.save(folder, state(1), None)
    filler = small_disk / "filler"
    with open(filler, "wb") as file:
        file.write(b"x" * (shutil.disk_usage(small_disk).free - os.sysconf("SC_PAGE_SIZE")))
    monkeypatch.setattr(checkpoint, "check_space", lambda *_: None)
    with pytest.raises(CheckpointError, match="cannot write .* earlier checkpoints are untouched"):
        checkpoint.save(folder, state(2), None)
    untouched(folder)
    filler.unlink()
    # Orbax's threads may have left something behind after the folder was cleared: the next checkpoint clears it.
    checkpoint.save(folder, state(2), None)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "1.json", "2", "2.json"]
