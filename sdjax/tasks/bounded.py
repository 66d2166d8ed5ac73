"""Judging within a time limit, in as many processes as there are cores, from any thread and without signals."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
from typing import Any

from sdjax.tasks.errors import TaskError

LIMIT_S = 5.0
"""Seconds of processor time one judgement may take; then the answer counts as wrong.

Not seconds of the clock: a verdict does not depend on what else the machine does.
"""

PATIENCE = 12.0
"""How many times as long by the clock: for a judge that neither answers nor computes."""

START_S = 120.0
"""Seconds the judging program may take to start: its imports are slow on a busy machine."""

PROGRAM = pathlib.Path(__file__).with_name("bounded_worker.py")


def cores() -> int:
    """How many processors this process may use, and so how many judges work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_late = [0]
_counting = threading.Lock()


def note_out_of_time() -> None:
    """Counts a verdict that was given because the time was over."""
    with _counting:
        _late[0] += 1


def out_of_time() -> int:
    """How many verdicts of this process were given because the time was over."""
    return _late[0]


class Judge:
    """Judging processes, one answer at a time each, started when first needed and again after one had to be ended."""

    def __init__(self, name: str, warm_up: list[Any]):
        """`name`: a judge of `bounded_worker.py`; `warm_up`: arguments to call it with once before the clock runs."""
        self.arguments = [name, json.dumps(warm_up)]
        atexit.register(self._end)
        self._begin()

    def _begin(self) -> None:
        self.free = threading.BoundedSemaphore(cores())
        self.lock = threading.Lock()
        self.idle: list[_Channel] = []
        self.program: subprocess.Popen | None = None
        self.control: socket.socket | None = None
        self.owner = os.getpid()

    def score(self, *arguments: Any) -> float | None:
        """What the judge says of JSON-able arguments, 0 if it fails; `None` if the time or the memory was over."""
        if self.owner != os.getpid():  # after a fork: two readers would steal each other's replies
            self._begin()
        request = json.dumps([LIMIT_S, arguments]).encode() + b"\n"
        with self.free:
            channel = self._channel()
            reply = channel.ask(request, PATIENCE * LIMIT_S)
            if reply is None:
                channel.close()
                return None
            with self.lock:
                self.idle.append(channel)
            return float(reply)

    def _channel(self) -> _Channel:
        """An idle process, or a new one."""
        with self.lock:
            if self.program is not None and self.program.poll() is not None:
                self._end()
            if self.idle:
                return self.idle.pop()
            if self.program is None:
                self._start()
            own, other = socket.socketpair()
            socket.send_fds(self.control, [b"+"], [other.fileno()])
            other.close()
            return _Channel(own)

    def _start(self) -> None:
        self.control, other = socket.socketpair()
        # -P: else the module names of this folder would hide libraries of the same name.
        command = [sys.executable, "-P", str(PROGRAM), *self.arguments]
        nowhere = subprocess.DEVNULL
        self.program = subprocess.Popen(command, stdin=other, stdout=nowhere, stderr=nowhere)
        other.close()
        if _Channel(self.control).ask(b"", START_S) != b"ready":
            self._end()
            raise TaskError(
                f"The judging process did not start; run `python -P {PROGRAM} ...` with the arguments "
                f"{self.arguments} to see why."
            )

    def _end(self) -> None:
        if self.program is None or self.owner != os.getpid():
            return
        self.program.kill()
        self.program.wait()
        for channel in self.idle:
            channel.close()
        self.control.close()
        self.idle, self.program, self.control = [], None, None


class _Channel:
    """A socket to a judging process."""

    def __init__(self, own: socket.socket):
        self.own = own

    def ask(self, request: bytes, limit_s: float) -> bytes | None:
        """The next line after a request; `None` if the process ended or the time is over."""
        self.own.settimeout(limit_s)
        reply = b""
        try:
            self.own.sendall(request)
            while not reply.endswith(b"\n"):
                piece = self.own.recv(4096)
                if not piece:
                    return None
                reply += piece
        except OSError:
            return None
        return reply.strip() or None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.own.close()
