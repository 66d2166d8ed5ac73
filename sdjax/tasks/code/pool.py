"""Fork servers on all cores: jobs from any thread, each on a server of its own, and a job again alone."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sdjax.tasks.bounded import cores
from sdjax.tasks.code.confined import ServerEnded
from sdjax.tasks.code.sandbox import ForkServer, Mode, SandboxError

Result = TypeVar("Result")

MOST_ENDED = 3
"""Fork servers that may die under the same job before the run ends."""


class Pool:
    """As many fork servers as there are cores, each started when it is first needed and replaced when it has died.

    The first is started at once, so that a machine which cannot keep the mode's promise is refused before a run begins.
    After a fork of the trainer the child starts servers of its own.
    """

    def __init__(self, mode: Mode = "full", modules: Sequence[str] = (), size: int = 0):
        """Raises: `SandboxError` where this machine cannot keep what `mode` promises."""
        self.mode, self.modules, self.size = mode, tuple(modules), size or cores()
        self.turns = Turns()
        self._begin([ForkServer(mode, self.modules)])
        atexit.register(self.close)

    def _begin(self, servers: list[ForkServer]) -> None:
        self.owner, self.lock = os.getpid(), threading.Lock()
        self.free: queue.LifoQueue[ForkServer | None] = queue.LifoQueue()
        for server in [*[None] * (self.size - len(servers)), *servers]:
            self.free.put(server)

    def do(self, job: Callable[[ForkServer], Result], *, alone: bool = False) -> Result:
        """What `job` makes of a server; `alone` nothing else of this pool runs at the same time.

        A server that dies under a job is replaced and the job done again.  Raises: `SandboxError` when that goes on.
        """
        if self.owner != os.getpid():
            self.turns = Turns()
            self._begin([])
        with self.turns.alone() if alone else self.turns.shared():
            for _ in range(MOST_ENDED):
                server = self.free.get()
                try:
                    if server is None or not server.alive():
                        server = self._replaced(server)
                    return job(server)
                except ServerEnded:
                    server.end()
                    server = None
                finally:
                    self.free.put(server)
        raise SandboxError(
            f"{MOST_ENDED} fork servers of the sandbox died under one program: most likely the machine is out of memory or "
            "processes; free some, or run fewer things beside the training"
        )

    def _replaced(self, dead: ForkServer | None) -> ForkServer:
        if dead is not None:
            dead.end()
        return ForkServer(self.mode, self.modules)

    def close(self) -> None:
        """Ends the servers that are free; those at work end with this process."""
        if self.owner != os.getpid():
            return
        for _ in range(self.free.qsize()):
            with contextlib.suppress(queue.Empty):
                server = self.free.get_nowait()
                if server is not None:
                    server.end()
                self.free.put(None)


class Turns:
    """Many at once, or one alone; who wants to be alone goes before those that come after."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.running = self.waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others."""
        with self.condition:
            self.condition.wait_for(lambda: self.waiting == 0)
            self.running += 1
        try:
            yield
        finally:
            with self.condition:
                self.running -= 1
                self.condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody else."""
        with self.condition:
            self.waiting += 1
            self.condition.wait_for(lambda: self.running == 0)
            self.running = 1
        try:
            yield
        finally:
            with self.condition:
                self.waiting -= 1
                self.running = 0
                self.condition.notify_all()
