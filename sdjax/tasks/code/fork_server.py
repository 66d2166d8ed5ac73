"""A program, not a module to import: forks one confined process for each program that is to run.

It imports a fixed list of modules once, locks itself in, and then waits: `{"run": limits}` with the new process's
descriptors is answered by `{"process": id}`, `{"kill": id}` kills it, and its end is told by `{"ended": id, ...}`.  Its
messages are lines of JSON.  Programs, inputs and tests never pass through it, so nothing of one program lies in the
memory of the next.

The process that it forks reads its job from descriptor 3 after it is confined.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import pathlib
import select
import signal
import site
import socket
import sys
import traceback

ROOT = str(pathlib.Path(__file__).parents[3])
sys.path.append(ROOT)

from sdjax.tasks.code import candidate, checker, confinement, values

MODULES = tuple(
    """abc argparse array ast asyncio atexit base64 binascii bisect builtins bz2 calendar cmath collections
collections.abc contextlib copy copyreg csv ctypes dataclasses datetime _strptime decimal difflib encodings.ascii
encodings.idna encodings.latin_1 encodings.utf_16 enum errno fcntl fractions functools gc glob graphlib hashlib heapq
hmac html inspect io ipaddress itertools json keyword linecache locale logging lzma math mmap multiprocessing numbers
operator os os.path pathlib pickle pprint pwd queue random re resource secrets select shlex shutil signal socket
statistics stat string struct subprocess sys tempfile textwrap threading time timeit token tokenize traceback types
typing unicodedata unittest uuid warnings weakref zlib zoneinfo""".split()  # noqa: SIM905
)
"""What a program may import: the same on every machine.  Anything else is a `ModuleNotFoundError`."""

WARM = {"numpy": ("numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.testing")}
"""Parts that a module would import when first used, which is too late."""

JOB = 3
NEW_THREADS = 1000
ROLES = {"run": candidate.run, "answer": candidate.answer, "check": checker.check}


def main(descriptor: int, mode: str, modules: list[str], folders: list[str]) -> None:
    """Prepares, says what this machine can do, and serves until the trainer's end of the socket is gone.

    `modules` may be imported beside `MODULES`; they lie in `folders`.
    """
    trainer = socket.socket(fileno=descriptor)
    parent = os.getppid()
    sys.path.extend(folders)
    for name in [*MODULES, *modules, *(part for module in modules for part in WARM.get(module, ()))]:
        importlib.import_module(name)
    user = os.getuid() or confinement.NOBODY
    threads = confinement.threads_of(user) + NEW_THREADS
    forget_the_host()
    confinement.give_up_privileges()
    filtered = mode != "weak" and confinement.can_filter()
    fenced = confinement.landlock() if mode == "full" else 0
    tell(trainer, {"ready": True, "seccomp": filtered, "landlock": fenced})
    if not filtered and mode != "weak":
        return
    gc.collect()
    gc.freeze()
    Server(trainer, parent, mode, threads).serve()


def forget_the_host() -> None:
    """Closes the ways to further modules, and drops what names this machine."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, programs go first
    sys.path[:] = []
    sys.path_importer_cache.clear()
    frozen = ("BuiltinImporter", "FrozenImporter")
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") in frozen]
    os.environ.clear()
    sys.argv[:] = [candidate.FILE]
    sys.orig_argv[:] = ["python", candidate.FILE]
    sys.executable = sys._base_executable = ""
    os.umask(0o077)
    sys.setrecursionlimit(10_000)
    site.setquit()  # `exit` and `quit`, which scripts use
    atexit._clear()


class Server:
    """The loop: requests of the trainer, ends of children."""

    def __init__(self, trainer: socket.socket, parent: int, mode: str, threads: int):
        self.trainer, self.parent, self.mode, self.threads = trainer, parent, mode, threads
        self.filter = None if mode == "weak" else confinement.Filter()
        self.running: set[int] = set()
        self.unread = b""
        self.woken, self.waker = os.pipe()
        for end in (self.woken, self.waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the trainer has gone."""
        while os.getppid() == self.parent:
            ready, _, _ = select.select([self.trainer, self.woken], [], [], 1.0)
            if self.woken in ready:
                os.read(self.woken, 4096)
            self.reap()
            if self.trainer in ready and not self.obey():
                break
        for process in self.running:
            self.kill(process)

    def obey(self) -> bool:
        """Does what the trainer asks for; `False` when it has gone."""
        try:
            data, attached, _, _ = self.trainer.recvmsg(65536, socket.CMSG_SPACE(4 * 16))
        except ConnectionError:
            return False
        descriptors = array.array("i")
        for _, _, some in attached:
            descriptors.frombytes(some[: len(some) - len(some) % descriptors.itemsize])
        *requests, self.unread = (self.unread + data).split(b"\n")
        for request in map(json.loads, requests):
            if "run" in request:
                self.start(list(descriptors), request["run"])
            elif request["kill"] in self.running:
                self.kill(request["kill"])
        return bool(data)

    def start(self, descriptors: list[int], limits: dict[str, int]) -> None:
        """Forks a process with these descriptors as its 0, 1, 2, ..."""
        server = os.getpid()
        try:
            process = os.fork()
        except OSError as error:
            process, limits = None, {"error": str(error)}
        if process == 0:
            try:
                self.become(server, descriptors, limits)
            except BaseException:
                os.write(2, b"sandbox: " + traceback.format_exc()[-1000:].encode())
            finally:
                os._exit(121)
        for descriptor in descriptors:
            os.close(descriptor)
        if process is None:
            tell(self.trainer, {"process": None, "why": limits["error"]})
            return
        self.running.add(process)
        tell(self.trainer, {"process": process})

    def become(self, server: int, descriptors: list[int], limits: dict[str, int]) -> None:
        """What the new process does: it locks itself in, reads its job and does it."""
        confinement.end_with(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.mode == "weak":
            os.setsid()
        place(descriptors)
        confinement.limit(threads=self.threads, **limits)
        if self.mode == "full":
            confinement.landlock()
        if self.filter is not None:
            self.filter.install()
        job = values.receive(JOB)
        if job["role"] != "check":
            os.close(JOB)
        for name in [name for name in sys.modules if name.split(".")[0] == "sdjax"]:
            del sys.modules[name]
        ROLES[job["role"]](job)
        sys.stdout.flush()
        os._exit(0)

    def reap(self) -> None:
        """Tells the trainer which processes have ended, how, and what they used."""
        for process in list(self.running):
            ended, status, used = os.wait4(process, os.WNOHANG)
            if ended:
                self.running.discard(process)
                if self.mode == "weak":
                    self.kill_group(process)
                seconds = used.ru_utime + used.ru_stime
                tell(self.trainer, {"ended": process, "status": status, "seconds": seconds, "memory": used.ru_maxrss})

    def kill(self, process: int) -> None:
        """Kills a process that is not yet reaped, so that its number is still its own."""
        if self.mode == "weak":
            self.kill_group(process)
        os.kill(process, signal.SIGKILL)

    def kill_group(self, leader: int) -> None:
        """Without a filter a program may have made processes; those that did not leave its group end with it."""
        with contextlib.suppress(OSError):
            os.killpg(leader, signal.SIGKILL)


def place(descriptors: list[int]) -> None:
    """Makes these descriptors 0, 1, 2, ... of this process, closes all others, and opens the standard streams anew."""
    high = 200
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, high + number)
    for number in range(len(descriptors)):
        os.dup2(high + number, number, inheritable=False)
    os.closerange(len(descriptors), 1 << 16)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def tell(trainer: socket.socket, message: dict) -> None:
    """Sends a message; a trainer that has gone is noticed by the loop."""
    with contextlib.suppress(ConnectionError):
        trainer.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
