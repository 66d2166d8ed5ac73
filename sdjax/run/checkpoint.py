"""Saving and restoring a run: Orbax for arrays, JSON for the host, a manifest that says a checkpoint is whole.

A step is saved to `checkpoints/<step>/` and counts only once `checkpoints/<step>.json` lies beside it, written last
and atomically: sizes and checksums of all files, the arrays' shapes, the host's half, and a checksum of all that.  A
checkpoint that was being written when the process died has none and is ignored; one that does not match it is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sdjax.devices.processes import ProcessError, by_each, by_first, first
from sdjax.engine.train import State
from sdjax.errors import InputError


class CheckpointError(InputError, RuntimeError):
    """A checkpoint cannot be written or read."""


def save(folder: str | Path, state: State, host: Any, keep: int = 2) -> Path:
    """Writes the state and the JSON-able `host`, then removes all but the newest `keep` checkpoints.

    Raises `CheckpointError` when the disk is too full, before anything is written where that can be known; older
    checkpoints stay.
    """
    folder = Path(folder).absolute()
    step, tree = int(state.step), arrays_of(state)
    target = folder / str(step)
    try:
        by_first(lambda: make_room(folder, step, tree))
        by_each(lambda: write_arrays(target, tree))
        by_first(lambda: finish(folder, step, tree, host, keep))
    except (OSError, ProcessError) as error:
        if first():
            shutil.rmtree(target, ignore_errors=True)
            if folder.is_dir():
                remove_unfinished(folder, but=target)
        raise CheckpointError(f"cannot write {target}: {error}; earlier checkpoints are untouched") from error
    return target


def make_room(folder: Path, step: int, tree: Any) -> None:
    """Makes the folder, without what was there of this step.  Raises `CheckpointError` if the disk is too full."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder, but=folder / str(step))
    check_space(folder, tree)
    (folder / f"{step}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / str(step), ignore_errors=True)


def finish(folder: Path, step: int, tree: Any, host: Any, keep: int) -> None:
    """Declares a step's checkpoint whole, and removes all but the newest `keep`."""
    write_manifest(folder, step, {"files": checksums(folder / str(step)), "arrays": described(tree), "host": host})
    for old in steps(folder)[:-keep]:
        (folder / f"{old}.json").unlink()
        shutil.rmtree(folder / str(old), ignore_errors=True)


def steps(folder: str | Path) -> list[int]:
    """The steps of all complete checkpoints in a folder, oldest first."""
    return sorted(int(p.stem) for p in Path(folder).glob("*.json") if p.stem.isdigit())


def restore(folder: str | Path, like: State, step: int | None = None) -> tuple[State, Any]:
    """The newest complete checkpoint (or that of `step`): the state, laid out as `like`, and the host's half.

    Raises `CheckpointError` naming the path if there is none, if it is damaged (with the last good one), or if it holds
    another model, method or optimizer.
    """
    folder, tree = Path(folder).absolute(), arrays_of(like)
    step, host = by_first(lambda: newest(folder, tree, step))
    target = folder / str(step)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(target, wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{target} cannot be read: {first_line(error)}; {offer(folder, step)}") from error
    return State(**{**tree, "key": jax.random.wrap_key_data(tree["key"])}), host


def newest(folder: Path, tree: Any, step: int | None) -> tuple[int, Any]:
    """The newest step (or `step`) that can be restored into `tree`, and its host's half; else raises."""
    found = steps(folder)
    if not found or (step is not None and step not in found):
        raise CheckpointError(f"{folder} holds no complete checkpoint{'' if step is None else f' of step {step}'}")
    step = found[-1] if step is None else step
    target = folder / str(step)
    manifest = damage_free(folder, step)
    if manifest is None:
        raise CheckpointError(f"{target} is damaged (a file does not match its checksum); {offer(folder, step)}")
    if differs := difference(manifest["arrays"], described(tree)):
        raise CheckpointError(f"{target} is of another model, method or optimizer: {differs}")
    return step, manifest["host"]


def offer(folder: Path, step: int) -> str:
    """What to do instead of going on from a bad checkpoint."""
    good = next((s for s in reversed(steps(folder)) if s != step and damage_free(folder, s)), None)
    if good is None:
        return "there is no other: start a new run"
    return f"the last good one is {folder / str(good)}; to go on from there, remove {folder / f'{step}.json'}"


def arrays_of(state: State) -> dict[str, Any]:
    """The state as a tree of plain arrays: the random key as its data."""
    tree = {name: getattr(state, name) for name in ("step", "params", "opt_state", "snapshots", "key")}
    return jax.tree.map(jnp.asarray, {**tree, "key": jax.random.key_data(state.key)})


def described(tree: Any) -> dict[str, str]:
    """`{path: "dtype[shape]"}` of every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first array that is not the same in both, in words, a parameter if there is one; empty if all are."""
    for name in sorted({*saved, *wanted}, key=lambda name: (not name.startswith("params"), name)):
        if saved.get(name) != wanted.get(name):
            return f"{name} is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
    return ""


def write_arrays(target: Path, tree: Any) -> None:
    """Writes a tree of arrays.  Raises `OSError`, whatever the storage library makes of a full disk."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)
            checkpointer.wait_until_finished()
    except Exception as error:
        # Orbax leaves a failed task per array behind, each of which would be reported at length when it is collected.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        if isinstance(error, OSError | ValueError | RuntimeError):
            raise OSError(first_line(error)) from error
        raise


def write_manifest(folder: Path, step: int, manifest: Mapping[str, Any]) -> None:
    """Writes `<step>.json` so that it is there whole or not at all."""
    unfinished = folder / f"{step}.json.unfinished"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps({**manifest, "checksum": checksum_of(manifest)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / f"{step}.json")


def checksum_of(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest's text."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def checksums(folder: Path) -> dict[str, list[int]]:
    """`{relative path: [bytes, CRC-32]}` of every file below a folder."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        crc = 0
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        sums[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return sums


def damage_free(folder: Path, step: int) -> dict | None:
    """The manifest of a step if it and every file match their checksums, else `None`."""
    try:
        manifest = json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))
        good = manifest.pop("checksum") == checksum_of(manifest)
        return manifest if good and manifest["files"] and manifest["files"] == checksums(folder / str(step)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_unfinished(folder: Path, but: Path) -> None:
    """Removes what earlier processes were writing when they died."""
    whole = {str(s) for s in steps(folder)}
    for path in folder.iterdir():
        if path.is_dir() and path != but and path.name not in whole:
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".unfinished":
            path.unlink(missing_ok=True)


def check_space(folder: Path, tree: Any) -> None:
    """Raises `CheckpointError` unless the disk holds another copy of `tree`, with a tenth to spare."""
    needed = sum(x.nbytes for x in jax.tree.leaves(tree)) * 11 // 10
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; earlier checkpoints "
            "are untouched: free some space and run the same command with --resume"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0][:300]
