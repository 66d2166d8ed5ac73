"""Judging within a time limit, from any thread and without signals."""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
from typing import Any

from sdjax.tasks.errors import TaskError

LIMIT_S = 5.0
"""Seconds one judgement may take; then the answer counts as wrong."""

START_S = 120.0
"""Seconds the judging process may take to start: its imports are slow on a busy machine."""

PROGRAM = pathlib.Path(__file__).with_name("bounded_worker.py")


class Judge:
    """A process that judges one answer at a time, started when first needed and again after it had to be ended."""

    def __init__(self, name: str, warm_up: list[Any]):
        """`name`: a judge of `bounded_worker.py`; `warm_up`: arguments to call it with once before the clock runs."""
        self.arguments = [name, json.dumps(warm_up)]
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0
        atexit.register(self._end)

    def score(self, *arguments: Any) -> float:
        """What the judge says of JSON-able arguments; 0 if it fails or takes longer than `LIMIT_S`."""
        request = json.dumps(arguments).encode() + b"\n"
        with self.lock:
            self._start()
            try:
                self.process.stdin.write(request)
                reply = self._reply(LIMIT_S)
            except OSError:
                reply = None
            if reply is None:
                self._end()
            return float(reply or 0.0)

    def _start(self) -> None:
        # After a fork the parent's process is not ours: two readers would steal each other's replies.
        if self.process is not None and self.process.poll() is None and self.owner == os.getpid():
            return
        # -P: else the module names of this folder would hide libraries of the same name.
        command = [sys.executable, "-P", str(PROGRAM), *self.arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        self.owner = os.getpid()
        if self._reply(START_S) != b"ready":
            self._end()
            raise TaskError(
                f"The judging process did not start; run `python -P {PROGRAM} ...` with the arguments "
                f"{self.arguments} to see why."
            )

    def _reply(self, limit_s: float) -> bytes | None:
        """The next line; `None` if the process ended or the time is over."""
        readable, _, _ = select.select([self.process.stdout], [], [], limit_s)
        return (self.process.stdout.readline().strip() or None) if readable else None

    def _end(self) -> None:
        if self.process is None or self.owner != os.getpid():
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
