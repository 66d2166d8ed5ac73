"""What compiling leaves behind: programs worth keeping, memory worth giving back."""

from __future__ import annotations

import ctypes
import os
import platform
import zlib
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` names another.

    A folder per kind of processor: programs made for one may use instructions that another, with which the home folder
    is shared, does not have.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        except (OSError, StopIteration):
            flags = platform.processor()
        kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / kind))


def user_cache() -> Path:
    """The package's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdjax"


def give_back_memory() -> None:
    """From now on, what the compiler has freed goes back to the system as soon as a program is compiled.

    glibc keeps it otherwise, 0.5 GB for the update of a model of 30 layers, beside the program's own temporaries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return

    def listener(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration") and seconds > 1:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listener)


def prepare_to_compile() -> None:
    """What every command that compiles does first."""
    keep_programs()
    give_back_memory()
