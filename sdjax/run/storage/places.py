"""Where a run's folder is: on a disk, or in a Google Cloud Storage bucket (`gs://bucket/run`).

Everything that is read or written in a run's folder goes through a path of `place` and the functions below.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.errors import InputError

BUCKETS = "gs://"
SECONDS = 20.0
"""After which a bucket that does not answer the first question counts as out of reach."""

UNFINISHED = ".unfinished"
"""How a name ends while its file is being written."""


class PlaceError(InputError, OSError):
    """A folder cannot be where it was said to be; the message says why and what to do."""


def place(name: str | os.PathLike) -> Path:
    """A path on a disk, or in a bucket if it begins with `gs://`.  Raises `PlaceError` for what is neither."""
    text = os.fspath(name)
    scheme = re.match(r"(\w[\w+.-]*)://", text)
    if scheme is None:
        return Path(text)
    if not text.startswith(BUCKETS):
        raise PlaceError(
            f"{text}: runs are kept on a disk or in a bucket of Google Cloud Storage (gs://bucket/folder), not in "
            f"{scheme[1]}://: name another folder"
        )
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]*(/[^/]+)+/?", text):
        raise PlaceError(f"{text}: expected gs://bucket/folder")
    file_system()
    from etils import epath

    return epath.Path(text.rstrip("/"))


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKETS)


@functools.cache
def file_system() -> Any:
    """The client of Google Cloud Storage.  Raises `PlaceError` if it is not installed."""
    # etils would take TensorFlow's where that is installed.
    os.environ.setdefault("EPATH_USE_TF", "0")
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise PlaceError("gs:// needs a client of Google Cloud Storage: pip install 'sdjax[gcs]'") from error
    # TensorStore writes into the same folders: a listing that is remembered would lack its files, or cut them short.
    fsspec.config.conf["gcs"] = {**fsspec.config.conf.get("gcs", {}), "use_listings_cache": False}
    return fsspec.filesystem("gcs", requests_timeout=60)


# ---- one file -------------------------------------------------------------------------------------------------------


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one go: a process that dies leaves the old one or the new one, on a disk also when power fails."""
    if in_bucket(path):
        file_system().pipe_file(os.fspath(path), text.encode())
        return
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def create_text(path: Path, text: str) -> None:
    """Writes a file that is not there yet, in one go.  Raises `FileExistsError` if it is: one of several writers wins."""
    if in_bucket(path):
        file_system().pipe_file(os.fspath(path), text.encode(), mode="create")
        return
    # A name that no other writer has: neither another thread, nor a process of another host with the same number.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    unfinished.write_text(text, encoding="utf-8")
    try:
        os.link(unfinished, path)
    except PermissionError:  # a file system without links
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    finally:
        unfinished.unlink()


def read_json(path: Path) -> Any:
    """What a JSON file says.  Raises `OSError` or `ValueError`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of a bucket, in one go."""
    file_system().pipe_file(os.fspath(path), content)


def read_bytes(path: Path) -> bytes:
    """What a file of a bucket holds."""
    return file_system().cat_file(os.fspath(path))


def mark(path: Path) -> list | None:
    """What changes when a file does: its size and time, or its checksum in a bucket; `None` where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        if in_bucket(path):
            about = file_system().info(os.fspath(path))
            return [about["size"], about.get("crc32c")]
        about = path.stat()
        return [about.st_size, about.st_mtime_ns]
    return None


# ---- folders --------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, list]:
    """`{relative path: [bytes, CRC-32C or None]}` of every file below a folder; the checksum is the bucket's own."""
    if in_bucket(folder):
        root = os.fspath(folder).removeprefix(BUCKETS) + "/"
        found = file_system().find(root, detail=True)
        return {name.removeprefix(root): [about["size"], about.get("crc32c")] for name, about in sorted(found.items())}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, None] for path in files}


def names(folder: Path) -> list[str]:
    """What lies directly in a folder; nothing if there is none."""
    if in_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                path.rstrip("/").rsplit("/", 1)[1] for path in file_system().ls(os.fspath(folder), detail=False)
            )
        return []
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it; nothing happens if it is not there."""
    if in_bucket(path):
        with contextlib.suppress(FileNotFoundError):
            file_system().rm(os.fspath(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make(folder: Path) -> None:
    """Makes a folder on a disk; in a bucket they come with their files."""
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def to_read(folder: Path) -> Iterator[Path]:
    """Inside, a folder on this machine with what the folder holds: itself, or a copy of what is in the bucket."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        file_system().get(os.fspath(folder) + "/", copy + "/", recursive=True)
        yield Path(copy)


@contextlib.contextmanager
def to_write(folder: Path) -> Iterator[Path]:
    """Inside, a folder on this machine whose files are in the folder afterwards: itself, or one that is then copied."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as own:
        yield Path(own)
        for name in listing(Path(own)):
            file_system().put_file(os.path.join(own, name), f"{os.fspath(folder)}/{name}")


# ---- can it be used? ------------------------------------------------------------------------------------------------


def try_writing(folder: Path) -> None:
    """Raises `PlaceError`, within seconds, unless files can be written into the folder.  Leaves nothing behind."""
    if not in_bucket(folder):
        there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
        wrong = "" if os.access(there, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
        wrong = wrong if there.is_dir() else os.strerror(errno.ENOTDIR)
        if wrong:
            raise PlaceError(f"{folder} cannot be written ({wrong}): name another folder with --out")
        return
    probe = f"{os.fspath(folder)}/{secrets.token_hex(8)}{UNFINISHED}"
    asked(folder, "be written", "_pipe_file", probe, b"1")
    asked(folder, "be written", "_rm_file", probe)


def try_reading(folder: Path) -> None:
    """Raises `PlaceError`, within seconds, where the folder's bucket does not answer."""
    if in_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            asked(folder, "be read", "_ls", os.fspath(folder))


def asked(folder: Path, what: str, function: str, *arguments: Any) -> None:
    """Calls an asynchronous function of the bucket's client.  Raises `PlaceError` in place of whatever it raises."""
    client = file_system()
    from fsspec.asyn import sync

    try:
        sync(client.loop, getattr(client, function), *arguments, timeout=SECONDS)
    except TimeoutError as error:
        raise PlaceError(
            f"{folder} does not answer within {SECONDS:.0f} s: is there a network, and are there credentials (gcloud auth "
            "application-default login)?"
        ) from error
    except Exception as error:
        # Whatever the client makes of a wrong name, missing rights or a dead network.
        if what == "be read" and isinstance(error, FileNotFoundError):
            raise
        raise PlaceError(
            f"{folder} cannot {what} ({first_line(error)}): is the bucket's name right, and may this account use it?"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
