"""Confined processes from outside: bytes go in and come out, and each is ended when it must not go on.

What they write is bytes until it has been capped; nothing that a program wrote is parsed but by `checker.py`, which is
confined itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.tasks.code import values

_GRACE_S = 1.0
_SILENT_S = 10.0


class ServerEnded(Exception):
    """A fork server has died or fallen silent; another one can be started."""


class Limits(NamedTuple):
    """What one program may use: seconds of processor time, bytes of memory, bytes per stream of output."""

    seconds: int = 6
    memory: int = 1 << 30
    output: int = 1 << 20

    @property
    def wall(self) -> float:
        """Seconds by the clock, for programs that wait: generous, since the machine may be busy."""
        return 2.0 * self.seconds + 1.0


USUAL = Limits()


class Ended(NamedTuple):
    """How a process ended, and what it wrote.

    `kind` is "ok" (exit status 0), "error" (another status or a signal), "time", "memory" or "output" (which limit), or
    "over" (killed because it was no longer needed).
    """

    kind: str
    output: str
    errors: str
    status: int
    seconds: float
    control: bytes = b""


class Connection:
    """The trainer's end of a fork server's socket: requests go out, lines of JSON come in."""

    def __init__(self, end: socket.socket):
        self.socket, self.unread = end, b""

    def message(self) -> dict[str, Any]:
        """The next message of the server.  Raises: `ServerEnded` if none comes."""
        while b"\n" not in self.unread:
            try:
                data = self.socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise ServerEnded
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Sends a request, with descriptors."""
        try:
            socket.send_fds(self.socket, [json.dumps(request).encode() + b"\n"], descriptors)
        except OSError:
            raise ServerEnded from None

    def start(self, descriptors: Sequence[int], limits: Limits) -> int:
        """Starts a process with these descriptors as its 0, 1, 2, ... and returns its id."""
        self.ask({"run": {"memory": limits.memory, "seconds": limits.seconds}}, descriptors)
        said = self.message()
        while "process" not in said:  # the end of one that was killed before
            said = self.message()
        if said["process"] is None:
            raise ServerEnded(said["why"])
        return said["process"]


# ---- processes ----------------------------------------------------------------------------------------------------


class Process:
    """One confined process from outside: what is still to be written to it, what it has written, how it ended."""

    def __init__(
        self,
        server: Connection,
        job: Mapping[str, Any],
        limits: Limits,
        *,
        given: bytes = b"",
        calls: int = -1,
        heard: bool = True,
    ):
        """Starts it with a job, with `given` as standard input, and a socket to another one as descriptor 4.

        What one that is not `heard` prints is thrown away, however much it is.
        """
        self.limits, self.heard = limits, heard
        self.ending: dict[str, Any] | None = None
        self.killed = ""
        pipes = [os.pipe() for _ in range(3)]
        control, far = socket.socketpair()
        self.control = control.detach()
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1], far.detach()]
        self.stdin, self.stdout, self.stderr = pipes[0][1], pipes[1][0], pipes[2][0]
        self.open = {self.stdin, self.stdout, self.stderr, self.control}
        self.written = {self.stdout: bytearray(), self.stderr: bytearray(), self.control: bytearray()}
        self.unwritten = {self.stdin: memoryview(given), self.control: memoryview(values.frame(job))}
        try:
            self.id = server.start(theirs + ([calls] if calls >= 0 else []), limits)
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        for descriptor in self.open:
            os.set_blocking(descriptor, False)

    def events(self, descriptor: int) -> int:
        """What to wait for on one of its descriptors."""
        reading = selectors.EVENT_READ if descriptor in self.written else 0
        return reading | (selectors.EVENT_WRITE if len(self.unwritten.get(descriptor, b"")) else 0)

    def write(self, descriptor: int) -> None:
        """Writes what fits; standard input is closed after its last byte."""
        left = self.unwritten[descriptor]
        try:
            left = left[os.write(descriptor, left[:65536]) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more
            left = left[:0]
        self.unwritten[descriptor] = left
        if not left and descriptor == self.stdin:
            self.close_one(descriptor)

    def read(self, descriptor: int) -> bool:
        """Reads what there is; `False` at the end or when there is nothing now."""
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close_one(descriptor)
        elif self.heard and len(self.written[descriptor]) <= self.limits.output:
            self.written[descriptor] += data
        return bool(data)

    def overflowed(self) -> bool:
        """Whether it has written more than it may."""
        return any(len(data) > self.limits.output for data in self.written.values())

    def drain(self) -> None:
        """Reads the rest of what a process that has ended wrote, and closes everything."""
        for descriptor in (self.stdout, self.stderr, self.control):
            while descriptor in self.open and not self.overflowed() and self.read(descriptor):
                pass
        self.close()

    def close_one(self, descriptor: int) -> None:
        """Closes one of its descriptors."""
        self.open.discard(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        """Closes all of them."""
        for descriptor in list(self.open):
            self.close_one(descriptor)

    def ended(self) -> Ended:
        """How it ended."""
        text = lambda descriptor: self.written[descriptor].decode("utf-8", "replace")
        status, seconds = self.ending["status"], self.ending["seconds"]
        output, errors = text(self.stdout), text(self.stderr)
        kind = self.killed or kind_of(status, seconds, errors, self.limits)
        if kind == "over" and used_up(
            status, seconds, self.limits
        ):  # its end and that of its leader were told together
            kind = "time"
        if kind == "error" and os.WIFSIGNALED(status):
            errors += f"\nThe program was ended by {signal_name(os.WTERMSIG(status))}."
        return Ended(kind, output, errors, status, seconds, bytes(self.written[self.control]))


def kind_of(status: int, seconds: float, errors: str, limits: Limits) -> str:
    """What a wait status means (see `Ended`)."""
    if os.WIFSIGNALED(status):
        if used_up(status, seconds, limits):
            return "time"
        return "memory" if os.WTERMSIG(status) == signal.SIGKILL else "error"  # the kernel kills when memory runs out
    if os.WEXITSTATUS(status) == 0:
        return "ok"
    last = errors.strip().rpartition("\n")[2]
    return "memory" if last.startswith("MemoryError") else "error"


def used_up(status: int, seconds: float, limits: Limits) -> bool:
    """Whether a process was killed because its processor time was over."""
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
    return killed and seconds > limits.seconds - 0.5  # the kernel's two clocks differ: one counts ticks


def signal_name(number: int) -> str:
    """SIGSEGV for 11."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def watch(server: Connection, processes: Sequence[Process], leader: Process, wall: float) -> None:
    """Moves bytes until all processes have ended; kills those that must not go on.

    After `wall` seconds the first one is killed, a second later the next; when the leader has ended, all others are.

    Raises: `ServerEnded`.
    """
    by_id = {process.id: process for process in processes}
    with selectors.DefaultSelector() as selector:
        selector.register(server.socket, selectors.EVENT_READ)
        for process in processes:
            for descriptor in list(process.open):
                if process.events(descriptor):
                    selector.register(descriptor, process.events(descriptor), process)
                else:
                    process.close_one(descriptor)
        deadline = time.monotonic() + wall
        while living := [process for process in processes if process.ending is None]:
            left = deadline - time.monotonic()
            if left <= 0:
                late = next((process for process in living if not process.killed), None)
                if late is None and -left > _SILENT_S:
                    raise ServerEnded
                if late is not None:
                    kill(server, late, "time")
                    deadline = time.monotonic() + _GRACE_S
            for key, events in selector.select(max(left, 0.05)):
                if key.data is None:
                    heard(server, by_id, leader)
                else:
                    moved(selector, server, key.data, key.fd, events)
    for process in processes:
        process.drain()


def heard(server: Connection, by_id: Mapping[int, Process], leader: Process) -> None:
    """Takes in what the server tells of ends."""
    while True:
        said = server.message()
        if said.get("ended") in by_id:
            by_id[said["ended"]].ending = said
        if b"\n" not in server.unread:
            break
    if leader.ending is not None:
        for process in by_id.values():
            if process.ending is None and not process.killed:
                kill(server, process, "over")


def moved(selector: Any, server: Connection, process: Process, descriptor: int, events: int) -> None:
    """Writes and reads one descriptor that is ready."""
    if events & selectors.EVENT_WRITE:
        process.write(descriptor)
    if events & selectors.EVENT_READ:
        process.read(descriptor)
    wanted = process.events(descriptor) if descriptor in process.open else 0
    if not wanted or (process.overflowed() and wanted):
        selector.unregister(descriptor)
        if process.overflowed() and not process.killed:
            kill(server, process, "output")
    elif wanted != selector.get_key(descriptor).events:
        selector.modify(descriptor, wanted, process)


def kill(server: Connection, process: Process, why: str) -> None:
    """Has a process killed; its end is told later."""
    process.killed = why
    server.ask({"kill": process.id})


# ---- jobs ---------------------------------------------------------------------------------------------------------


def run(server: Connection, program: str, given: str = "", *, limits: Limits = USUAL) -> Ended:
    """Runs a program as a script with `given` as its standard input.  Raises: `ServerEnded`."""
    job = {"role": "run", "program": program}
    process = Process(server, job, limits, given=given.encode("utf-8", "replace"))
    watched(server, [process], process, limits.wall)
    return process.ended()


def call(
    server: Connection, program: str, check: Mapping[str, Any], *, given: str = "", limits: Limits = USUAL
) -> tuple[Ended, Ended]:
    """Runs a program in one process and `check`, the job of `checker.check`, in another that calls it.

    Returns how both ended; what the checker says is its `control`.  `given` is code that the program finds executed.
    Raises: `ServerEnded`.
    """
    one, other = socket.socketpair()
    with one, other:
        job = {"role": "answer", "program": program, "entry": check["entry"], "given": given}
        candidate = Process(server, job, limits, calls=one.fileno(), heard=False)
        try:
            checker = Process(server, {"role": "check", **check}, limits, calls=other.fileno())
        except BaseException:
            candidate.close()
            raise
    watched(server, [candidate, checker], checker, limits.wall)
    return candidate.ended(), checker.ended()


def watched(server: Connection, processes: Sequence[Process], leader: Process, wall: float) -> None:
    """`watch`, whose failure leaves no descriptor open."""
    try:
        watch(server, processes, leader, wall)
    except BaseException:
        for process in processes:
            process.close()
        raise
