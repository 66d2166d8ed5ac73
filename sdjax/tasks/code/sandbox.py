"""Running a stranger's Python: fork servers as the trainer sees them, and what a confined process did.

Three modes, by name.  `full`: one process, no files, no network, by a seccomp allow-list, with Landlock as a second wall.
`seccomp`: the first wall alone, for kernels without Landlock.  `weak`: limits of time, memory and output, an empty environment
and an empty folder; programs can read your files and reach the network, so use it only for programs that you trust.
All work as root and as an ordinary user, in unprivileged containers too; a mode that this machine cannot keep is refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sdjax.errors import InputError, nearest
from sdjax.tasks.code import system_calls
from sdjax.tasks.code.confined import Connection, Limits, ServerEnded, run

Mode = Literal["full", "seccomp", "weak"]
MODES = ("full", "seccomp", "weak")

PROGRAM = pathlib.Path(__file__).with_name("fork_server.py")
START_S = 120.0
"""Seconds a fork server may take to start: its imports are slow on a busy machine."""

_END_S = 2.0
_SILENT_S = 10.0

_SELF_TEST = """
import os, socket
def tried(action):
    try:
        action()
    except OSError:
        return "denied"
    return "allowed"
def fork():
    if os.fork() == 0:
        os._exit(0)
print("files", tried(lambda: os.listdir("/")), "sockets", tried(socket.socket), "processes", tried(fork))
"""


class SandboxError(InputError, RuntimeError):
    """Programs cannot be run on this machine as was asked for: what is missing, and which mode to choose."""


# ---- fork servers -------------------------------------------------------------------------------------------------


class ForkServer(Connection):
    """One fork server: starts confined processes, one job at a time."""

    def __init__(self, mode: Mode = "full", modules: Sequence[str] = ()):
        """Starts the server.

        Raises: `SandboxError` where this machine cannot keep what `mode` promises, or for a module that is not
        installed.
        """
        refuse_unknown(mode)
        here, there = socket.socketpair()
        self.folder = tempfile.TemporaryDirectory(prefix="sandbox-") if mode == "weak" else None
        if self.folder:
            os.chmod(self.folder.name, 0o755)  # root's server becomes nobody
        start = {"descriptor": there.fileno(), "mode": mode, "modules": modules, "folders": folders_of(modules)}
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", str(PROGRAM), json.dumps(start)],
            pass_fds=[there.fileno()],
            env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder.name if self.folder else os.sep,
            start_new_session=True,  # Ctrl-C is the trainer's to answer
        )
        there.close()
        super().__init__(here)
        try:
            self.socket.settimeout(START_S)
            able = self.message()
            refuse_missing(mode, able)
            self.socket.settimeout(_SILENT_S)
            if mode != "weak":
                self.test_itself()
        except ServerEnded:
            self.end()
            raise SandboxError(
                f"the sandbox's fork server did not start; to see why: {sys.executable} -s -S -P -B {PROGRAM}"
            ) from None
        except BaseException:
            self.end()
            raise

    def alive(self) -> bool:
        """Whether the server still runs."""
        return self.process.poll() is None

    def test_itself(self) -> None:
        """Runs a program that tries what no program may.  Raises: `SandboxError` if it succeeds."""
        ended = run(self, _SELF_TEST, limits=Limits(seconds=20))
        if ended.output.split() != ["files", "denied", "sockets", "denied", "processes", "denied"]:
            raise SandboxError(
                "the sandbox failed its own test at start: a program that tries to list files, make a socket and fork "
                f"ended with {ended.kind!r} and said {ended.output.strip()!r}, {ended.errors.strip()[-300:]!r}"
            )

    def end(self) -> None:
        """Ends the server and with it every process that it started."""
        self.socket.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.folder:
            self.folder.cleanup()


def refuse_unknown(mode: str) -> None:
    """Raises `SandboxError` for a mode that does not exist, or that this system cannot have."""
    if mode not in MODES:
        raise SandboxError(f"there is no sandbox {mode!r}{nearest(mode, MODES)}: choose one of {', '.join(MODES)}")
    if mode != "weak" and not system_calls.supported():
        raise SandboxError(
            f"the sandbox {mode!r} needs Linux on {' or '.join(system_calls.NUMBERS)}, and this is {platform.system()} on "
            f"{platform.machine()}: run there, or choose the sandbox 'weak' for programs that you trust with your files"
        )


def refuse_missing(mode: str, able: Mapping[str, Any]) -> None:
    """Raises `SandboxError` where the kernel lacks what a mode promises."""
    if mode != "weak" and not able["seccomp"]:
        raise SandboxError(
            f"the sandbox {mode!r} needs seccomp filters, which this kernel or container refuses: allow them "
            "(CONFIG_SECCOMP_FILTER), or choose the sandbox 'weak' for programs that you trust with your files"
        )
    if mode == "full" and not able["landlock"]:
        raise SandboxError(
            "the sandbox 'full' needs Landlock, which this kernel lacks or has switched off (Linux 5.13 with "
            "lsm=landlock has it): choose the sandbox 'seccomp', which keeps programs in by the other wall alone"
        )


def folders_of(modules: Sequence[str]) -> list[str]:
    """Where further modules are installed.  Raises: `SandboxError` for one that is not."""
    folders = []
    for name in modules:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise SandboxError(f"the module {name!r} that programs may import is not installed: pip install {name}")
        folders.append(str(pathlib.Path(found.origin).parents[1 if found.submodule_search_locations else 0]))
    return folders
