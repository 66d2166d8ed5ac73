"""A run's folder before the run begins: whether it can be used, and the arguments in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdjax.errors import InputError, nearest
from sdjax.run.storage import places

ELSEWHERE = ("mesh", "memory", "rows", "rows_per_chunk", "tokens_per_chunk", "lengths", "remat")
ELSEWHERE += ("judge", "grace", "keep", "keep_every", "keep_best", "log", "log_project", "completions_every", "stop_on")
"""Options that change where and how a run computes, what stays and is told of it: a resumed run may be given others."""


class RunError(InputError, RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


def check_folder(folder: Path, resume: bool, arguments: Mapping[str, Any]) -> None:
    """Raises `RunError` unless a run with these arguments can start, or go on, in the folder.  Changes nothing."""
    file, arguments = folder / "arguments.json", as_json(arguments, "the arguments")
    try:
        found = [name for name in places.names(folder) if not name.endswith(places.UNFINISHED)]
        used, there = bool(found), file.name in found
        old = places.read_json(file) if there else None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}): name another folder with --out") from error
    if old is None and used:
        raise RunError(
            f"{folder} is not empty and holds no run ({file.name} is missing): name another folder with --out"
        )
    if old is None and resume:
        beside = [folder.parent / name for name in places.names(folder.parent)]
        others = [str(path) for path in beside if (path / file.name).exists()]
        raise RunError(f"{folder} holds no run to resume{nearest(str(folder), others)}: start it without --resume")
    if old is not None and not resume:
        raise RunError(f"{folder} already holds a run: go on with --resume, or name another folder with --out")
    old, arguments = ({k: v for k, v in (some or {}).items() if k not in ELSEWHERE} for some in (old, arguments))
    if there and old != arguments:
        changed = [
            f"{name} was {old.get(name)!r} and is {arguments.get(name)!r}"
            for name in sorted({*old, *arguments})
            if old.get(name) != arguments.get(name)
        ]
        raise RunError(
            f"{folder} was started with other arguments: {'; '.join(changed)}: resume with the old values, or start a "
            "new run with --out"
        )


def as_begun(folder: Path, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without the options that did not exist when the folder's run began and have their default.

    A run can then go on with a later version of the code.  A file that cannot be read is left to `check_folder`.
    """
    try:
        begun = places.read_json(folder / "arguments.json").keys()
    except (OSError, ValueError, AttributeError):
        return dict(arguments)
    added = {name for name in defaults if name not in begun and arguments.get(name) == defaults[name]}
    return {name: value for name, value in arguments.items() if name not in added}


def claim(folder: Path, arguments: Mapping[str, Any], resume: bool) -> None:
    """Makes the run folder and writes `arguments.json`, which one of several runs that begin there can do.

    Raises `RunError` if the folder cannot be written, or if another run has begun there meanwhile.
    """
    file, text = folder / "arguments.json", json.dumps(as_json(arguments, "the arguments"), indent=1)
    try:
        places.make(folder)
        places.replace_text(file, text) if resume else places.create_text(file, text)
    except FileExistsError as error:
        raise RunError(f"{folder}: another run has begun there just now: name another folder with --out") from error
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> RunError:
    """What is said of a folder that a run cannot use."""
    return RunError(f"{folder} cannot be written ({error.strerror or error}): name another folder with --out")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is there, and no other process on this machine can go on with the run in it.

    However the process ends, the folder is free again.  Nothing is held in a bucket.  Raises: RunError.
    """
    if places.in_bucket(folder):
        yield
        return
    try:
        places.make(folder)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder}: another process is at this run: wait for its end, or end it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def as_json(value: Any, what: str) -> Any:
    """A value as it comes back from a JSON file.  Raises `RunError` if it cannot."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise RunError(f"{what} cannot be saved as JSON: {error}") from error
