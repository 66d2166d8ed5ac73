"""What a checkpoint holds, and how it is read: Orbax for arrays, JSON for the host, a manifest that says it is whole.

A step lies in `checkpoints/<step>/` and counts only once `checkpoints/<step>.json` lies beside it (`sdjax.run.storage.manifest`).
One that was being written when the process died has none and is ignored; one that does not match it is refused.
`sdjax.run.storage.saving` writes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sdjax.collect.remembered import together
from sdjax.devices.processes import by_first
from sdjax.engine.train import State
from sdjax.errors import InputError
from sdjax.run.storage import manifest, places, segments
from sdjax.run.storage.digests import digests, named
from sdjax.run.storage.places import first_line


class CheckpointError(InputError, RuntimeError):
    """A checkpoint cannot be written or read."""


class DamageError(CheckpointError, InputError):
    """The bytes of a checkpoint are not those that were written."""


def steps(folder: str | os.PathLike) -> list[int]:
    """The steps of all complete checkpoints in a folder, oldest first."""
    return manifest.steps(places.place(folder))


def restore(folder: str | os.PathLike, like: State, step: int | None = None) -> tuple[State, Any]:
    """The newest complete checkpoint (or that of `step`): the state, laid out as `like`, and the host's half.

    Raises `CheckpointError` naming the path if there is none, if it is damaged (with the last good one), or if it holds
    another model, method or optimizer.
    """
    folder, tree = absolute(folder), arrays_of(like)
    step = by_first(lambda: found(folder, step))
    try:
        content = by_first(lambda: matching(folder, step, tree))
        tree = arrays(folder, step, content, tree)
        by_key = by_first(lambda: entries(folder, step, content))
    except CheckpointError as error:
        if not damaged(error):
            raise
        raise CheckpointError(f"{error}; {offer(folder, step, tree)}") from error
    host = together(content["host"], segments.mappings(content.get(segments.FOLDER, segments.NONE), by_key))
    return State(**{**tree, "key": jax.random.wrap_key_data(tree["key"])}), host


def has_snapshots(folder: str | os.PathLike, names: Collection[str]) -> bool:
    """Whether the newest checkpoint, if it is whole, holds one of these snapshots."""
    folder = absolute(folder)

    def look() -> bool:
        try:
            paths = whole(folder, found(folder, None))["arrays"]
        except CheckpointError:
            return False
        return any(path.startswith(f"snapshots/{name}/") for path in paths for name in names)

    return by_first(look)


def found(folder: Path, step: int | None) -> int:
    """The newest step, or `step` if it is there."""
    whole = manifest.steps(folder)
    if not whole or (step is not None and step not in whole):
        others = f": there are {', '.join(map(str, whole))}" if whole else ""
        raise CheckpointError(
            f"{folder} holds no complete checkpoint{'' if step is None else f' of step {step}'}{others}"
        )
    return whole[-1] if step is None else step


def whole(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a step whose files are all there.  Raises `DamageError`."""
    try:
        content = manifest.read(folder, step)
        wrong = manifest.difference(folder, step, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = first_line(error)
    if wrong:
        raise DamageError(f"{folder / str(step)} is damaged ({wrong})")
    return content


def matching(folder: Path, step: int, tree: Any) -> dict[str, Any]:
    """The manifest of a whole checkpoint that can be restored into `tree`."""
    content = whole(folder, step)
    if differs := difference(content["arrays"], described(tree)):
        raise CheckpointError(f"{folder / str(step)} is of another model, method or optimizer: {differs}")
    return content


def arrays(folder: Path, step: int, content: Mapping[str, Any], tree: Any) -> Any:
    """The arrays of a checkpoint, laid out as those of `tree`, which may be a part of it.

    Every process must call it.  Raises `DamageError`: after loading, the digest of each array must be what it was when it
    was saved, so that disk, network and decoding are covered.
    """
    target, own = folder / str(step), lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    wanted = jax.tree.map(own, tree)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            how = ocp.checkpoint_utils.construct_restore_args(wanted)
            part = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            tree = checkpointer.restore(target, args=part)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # what Orbax makes of a damaged file may be anything
        raise DamageError(f"{target} is damaged (it cannot be read: {first_line(error)})") from error
    saved = content.get("digests")
    for name, number in jax.device_get(digests(tree)).items():
        if saved is not None and saved.get(name) != int(number):
            raise DamageError(f"{target} is damaged ({name} does not have the digest that it was saved with)")
    return tree


def entries(folder: Path, step: int, content: Mapping[str, Any]) -> list[list]:
    """What a checkpoint remembers by key.  Raises `DamageError`."""
    try:
        return segments.entries(folder, content.get(segments.FOLDER, segments.NONE))
    except (OSError, ValueError) as error:
        raise DamageError(f"{folder / str(step)} is damaged ({first_line(error)})") from error


def damaged(error: CheckpointError) -> bool:
    """Whether an error, perhaps of the first process, says that a checkpoint is damaged."""
    return isinstance(error, DamageError) or " is damaged (" in str(error)


def offer(folder: Path, step: int, tree: Any) -> str:
    """What to do instead of going on from a bad checkpoint."""
    for other in by_first(lambda: manifest.steps(folder))[::-1]:
        if other == step:
            continue
        try:
            content = by_first(lambda other=other: matching(folder, other, tree))
            arrays(folder, other, content, tree)
            by_first(lambda other=other, content=content: entries(folder, other, content))
        except CheckpointError:
            continue
        remove = folder / f"{step}.json"
        return f"the last good one is {folder / str(other)}; to go on from there, remove {remove}"
    return "there is no other: start a new run"


def saved_parameters(
    folder: Path, step: int | None = None, parts: Sequence[str] = ("params", "snapshots")
) -> tuple[dict[str, Any], int, Any]:
    """Parameters by policy of a checkpoint, on one device; its step; and the host's half.

    Only these parts of the state are read.  Raises: CheckpointError.
    """
    folder = absolute(folder)
    step = found(folder, step)
    content, target = whole(folder, step), folder / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            known = checkpointer.metadata(target).item_metadata.tree
    except Exception as error:
        raise DamageError(f"{target} is damaged (it cannot be read: {first_line(error)})") from error
    wanted = {name: known[name] for name in parts if name in known}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), wanted)
    tree = arrays(folder, step, content, like)
    return {**(tree.get("snapshots") or {}), "live": tree["params"]}, step, content["host"]


def arrays_of(state: State) -> dict[str, Any]:
    """The state as a tree of plain arrays: the random key as its data."""
    tree = {name: getattr(state, name) for name in ("step", "params", "opt_state", "snapshots", "key")}
    return jax.tree.map(jnp.asarray, {**tree, "key": jax.random.key_data(state.key)})


def described(tree: Any) -> dict[str, str]:
    """`{path: "dtype[shape]"}` of every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {named(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first array that is not the same in both, in words, a parameter if there is one; empty if all are."""
    for name in sorted({*saved, *wanted}, key=lambda name: (not name.startswith("params"), name)):
        if saved.get(name) != wanted.get(name):
            return f"{name} is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
    return ""


def check_space(folder: Path, tree: Any) -> None:
    """Raises `CheckpointError` unless the disk holds another copy of `tree`, with a tenth to spare."""
    if places.in_bucket(folder):
        return
    needed = sum(x.nbytes for x in jax.tree.leaves(tree)) * 11 // 10
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; earlier checkpoints "
            "are untouched: free some space and run the same command with --resume"
        )


def absolute(folder: str | os.PathLike) -> Path:
    """A folder's path as Orbax wants it."""
    path = places.place(folder)
    return path if places.in_bucket(path) else path.absolute()
