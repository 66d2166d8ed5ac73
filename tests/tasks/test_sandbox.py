"""The sandbox: what programs that mean harm can reach, and what becomes of them.  Witnesses stand outside."""

import contextlib
import ctypes
import os
import pathlib
import platform
import shutil
import signal
import site
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import hostile_programs
import pytest
from quick import slow_but

from sdjax.tasks.code import confined, feedback, judging, pool, sandbox, system_calls
from sdjax.tasks.code.confined import Limits
from sdjax.tasks.code.judging import FunctionTests, ScriptTests
from sdjax.tasks.code.sandbox import SandboxError

pytestmark = pytest.mark.skipif(not system_calls.supported(), reason="seccomp filters are for Linux")

NOBODY, SOMEBODY = 65534, 1234

LIMITS = Limits(seconds=1, memory=512 << 20)
MARK = "canary-of-the-trainer"
SUITE = """
def check(candidate):
    'EXPECTED-OUTPUT'
    assert candidate(2) == 3
    assert abs(candidate(10) - 11) < 1e-6
    assert True
"""
FUNCTION = FunctionTests("solve", 2, suite=SUITE)
SCRIPT = ScriptTests(("2\n",), ("3\nEXPECTED-OUTPUT",), 1)
NAMES = sorted([*hostile_programs.HOSTILE, *hostile_programs.ENDLESS])


def by(user) -> dict:
    """Options of a process that this user runs; none where this one cannot become another."""
    options = {"user": user, "group": user, "extra_groups": []}
    if user == 0:
        return {}
    with contextlib.suppress(OSError):
        if os.getuid() == 0 and subprocess.run(["true"], check=False, **options).returncode == 0:
            return options
    return {}


def python_for(user) -> tuple[str, dict[str, str]]:
    """An interpreter that a user may execute, with the environment in which it finds what these tests import."""
    found = {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(sandbox.__file__).parents[3]), *site.getsitepackages()])}
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for command in (sys.executable, shutil.which(minor, path="/usr/local/bin:/usr/bin") or sys.executable):
        with contextlib.suppress(OSError):
            run = subprocess.run([command, "-c", "import pytest, numpy"], env=found, check=False, **by(user))
            if run.returncode == 0:
                return command, found
    pytest.skip(f"user {user} may execute no Python that has these tests' libraries")


class World:
    """What lies around the sandbox, and what has become of it."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="canary-"))
        self.folder.chmod(0o777)
        self.sockets, self.reached = [], []
        self.ports = {
            "tcp": self.listen("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))[1],
            "udp": self.listen("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))[1],
            "abstract": f"canary-{os.getpid()}",
        }
        self.listen("path", socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "service"))
        (self.folder / "service").chmod(0o777)
        self.listen("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.ports["abstract"])
        self.bystander = None
        self.heal()
        self.programs = hostile_programs.sources(folder=self.folder, pid=self.bystander.pid, **self.ports)

    def listen(self, name, family, kind, address):
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()

        def hear():
            with contextlib.suppress(OSError):
                while True:
                    listener.accept() if kind == socket.SOCK_STREAM else listener.recv(100)
                    self.reached.append(name)

        threading.Thread(target=hear, daemon=True).start()
        self.sockets.append(listener)
        return listener.getsockname()

    def heal(self):
        """As it was at first."""
        for path in self.folder.iterdir():
            if path.name != "service":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in ("secret", "precious", "secret_module.py"):
            (self.folder / name).write_text(name)
            (self.folder / name).chmod(0o666)
            os.utime(self.folder / name, (1e9, 1e9))
        self.reached.clear()
        if self.bystander is None or self.bystander.poll() is not None:
            self.bystander = subprocess.Popen(["sleep", "1000"], **by(NOBODY))

    def harm(self) -> list[str]:
        """What the witnesses saw."""
        seen = [f"{name} reached" for name in set(self.reached)]
        seen += ["the bystander died"] if self.bystander.poll() is not None else []
        there = {path.name for path in self.folder.iterdir()}
        seen += sorted(there ^ {"secret", "precious", "secret_module.py", "service"})
        for name in {"secret", "precious"} & there:
            about = (self.folder / name).lstat()
            if (about.st_size, about.st_mode & 0o777, about.st_mtime) != (len(name), 0o666, 1e9):
                seen.append(f"{name} changed")
        return seen

    def close(self):
        self.bystander.kill()
        for listener in self.sockets:
            listener.close()
        shutil.rmtree(self.folder)


def of_session(sessions) -> list[int]:
    """Living processes of these sessions, their leaders included."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                found.append(int(name))
    return found


@pytest.fixture(scope="module")
def world():
    os.environ["HOSTILE_CANARY_KEY"] = MARK
    found = World()
    yield found
    found.close()
    del os.environ["HOSTILE_CANARY_KEY"]


@pytest.fixture(scope="module")
def servers(world):
    """A fork server of each mode that holds strangers, started when it is first asked for."""
    found = {}
    yield lambda mode: found.setdefault(mode, None) or found.update({mode: sandbox.ForkServer(mode)}) or found[mode]
    for server in found.values():
        server.end()


def harm_of(server, world, name) -> list[str]:
    """Everything that a program did although it must not, with both kinds of tests."""
    program, seen = world.programs[name], []
    for run, tests in ((judging.judge_function, FUNCTION), (judging.judge_script, SCRIPT)):
        for _ in range(2 if name == "state_left_behind" else 1):
            started = time.monotonic()
            judged = run(server, program, tests, LIMITS)
            seen += ["took too long"] if time.monotonic() - started > LIMITS.wall + 2.0 else []
            seen += ["passed"] if judged.solved or judged.passed else []
            told = feedback.feedback(judged)
            texts = "".join(failure.got + failure.trace for failure in judged.failures)
            seen += ["ESCAPED"] if "ESCAPED" in texts + told else []
            seen += ["much output"] if len(texts) > 3 * LIMITS.output + 10_000 else []
            seen += ["much feedback"] if not 0 < len(told) <= feedback.LONGEST + 200 else []
            seen += [f"{text!r} told" for text in (MARK, "<|", "\x1b", "\u202e", "[INST]", sys.prefix) if text in told]
            output = confined.run(server, program, "2\n", limits=LIMITS) if run is judging.judge_script else None
            seen += ["ESCAPED"] if output and "ESCAPED" in output.output + output.errors else []
    seen += [f"process {p}" for p in of_session({server.process.pid}) if p != server.process.pid]
    seen += ["the fork server died"] if not server.alive() else []
    seen += world.harm()
    world.heal()
    return seen


@pytest.mark.parametrize("name", slow_but({*NAMES} - {*hostile_programs.ENDLESS}, NAMES))
def test_a_hostile_program_reaches_nothing_and_earns_nothing(world, servers, name):
    assert harm_of(servers("full"), world, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_so_it_is_without_landlock(world, servers, name):
    assert harm_of(servers("seccomp"), world, name) == []


@pytest.mark.slow
def test_the_witnesses_see_what_a_plain_process_does(world):
    """The negative control: without a sandbox most of the programs are caught doing harm, or pass."""
    silent = {name for name in hostile_programs.HOSTILE if not harm_of_plain(world, name)}
    caught = len(hostile_programs.HOSTILE) - len(silent)
    assert caught >= 30, sorted(silent)


def harm_of_plain(world, name) -> list[str]:
    """The same program in a process of the same user that nothing holds."""
    tests = "\nassert solve(2) == 3\nassert abs(solve(10) - 11) < 1e-6\n"
    file = world.folder.parent / f"{world.folder.name}.py"
    file.write_text(world.programs[name] + tests)
    # A shell between: one of the programs attaches to its parent.
    process = subprocess.Popen(
        ["sh", "-c", f"{python_for(NOBODY)[0]} {file}; exit $?"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **by(NOBODY),
    )  # fmt: skip
    try:
        output = process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired:
        output = b""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2.5 if name == "daemon" else 0.05)
    seen = (
        world.harm() + (["ESCAPED"] if b"ESCAPED" in output else []) + (["passed"] if process.returncode == 0 else [])
    )
    world.heal()
    file.unlink()
    return seen


# ---- what is left of it


KILLED = """
import sys, threading, time
from sdjax.tasks.code.confined import Limits, run
from sdjax.tasks.code.pool import Pool
pool = Pool(size=2)
for _ in range(2):
    work = lambda server: print(server.process.pid, flush=True) or run(server, "while True: pass", limits=Limits(seconds=60))
    threading.Thread(target=pool.do, args=(work,), daemon=True).start()
time.sleep(100)
"""


def test_nothing_outlives_a_trainer_that_is_killed():
    trainer = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env={**os.environ, **on_path()})
    sessions = {int(trainer.stdout.readline()) for _ in range(2)}
    deadline = time.monotonic() + 60
    while len(of_session(sessions)) < 4:  # two fork servers, two programs
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while of_session(sessions):
        assert time.monotonic() < deadline, of_session(sessions)
        time.sleep(0.05)


def on_path() -> dict[str, str]:
    """An environment that finds the package of these tests."""
    return {"PYTHONPATH": str(pathlib.Path(sandbox.__file__).parents[3])}


@pytest.fixture
def small_pool():
    found = pool.Pool(size=1)
    yield found
    found.close()


def test_a_fork_server_that_dies_is_replaced_and_the_program_judged_again(small_pool):
    seen = []

    def job(server):
        seen.append(server.process.pid)
        if len(seen) == 1:
            server.process.kill()
        return confined.run(server, "print(1)").output

    assert small_pool.do(job) == "1\n"
    assert len(set(seen)) == 2
    small_pool.free.queue[-1].process.kill()  # between two jobs
    small_pool.free.queue[-1].process.wait()
    assert small_pool.do(job) == "1\n" and len(set(seen)) == 3


def test_servers_that_go_on_dying_end_the_run_with_a_sentence(small_pool):
    def job(server):
        server.process.kill()
        confined.run(server, "print(1)")

    with pytest.raises(SandboxError, match="died under one program"):
        small_pool.do(job)


def test_descriptors_do_not_leak(servers):
    server = servers("full")
    count = lambda: len(os.listdir("/proc/self/fd"))
    judging.judge_function(server, "def solve(x): return x + 1", FUNCTION, LIMITS)
    before = count()
    for _ in range(5):
        judging.judge_function(server, "def solve(x): return x + 1", FUNCTION, LIMITS)
        judging.judge_script(server, "print(3, input())", SCRIPT, LIMITS)
        confined.run(server, "print('x' * 3_000_000)", "y" * 3_000_000, limits=LIMITS)
    assert count() == before


def test_who_is_alone_has_nobody_beside_and_is_not_passed_by_others():
    turns, running, most = pool.Turns(), [], []

    def shared():
        with turns.shared():
            running.append(0)
            time.sleep(0.01)
            most.append(len(running))
            running.pop()

    def alone():
        with turns.alone():
            assert not running
            running.append(0)
            time.sleep(0.05)
            assert len(running) == 1
            running.pop()

    threads = [threading.Thread(target=alone if i == 10 else shared) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) > 1 and turns.running == turns.waiting == 0


# ---- modes


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(SandboxError, match=r"no sandbox 'ful'; did you mean full\?"):
        sandbox.ForkServer("ful")


@pytest.mark.parametrize(
    "able, mode, sentence",
    [
        ({"seccomp": False, "landlock": 7}, "full", "needs seccomp filters.*choose the sandbox 'weak'|'weak'"),
        ({"seccomp": True, "landlock": 0}, "full", "needs Landlock.*choose the sandbox 'seccomp'"),
        ({"seccomp": False, "landlock": 0}, "seccomp", "needs seccomp filters"),
    ],
)
def test_what_the_kernel_lacks_is_refused_in_a_sentence(able, mode, sentence):
    with pytest.raises(SandboxError, match=sentence):
        sandbox.refuse_missing(mode, able)


def test_an_unknown_machine_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="needs Linux on x86_64 or aarch64, and this is Linux on riscv64"):
        sandbox.ForkServer("full")


def test_a_server_whose_walls_are_open_fails_its_own_test(monkeypatch):
    server = sandbox.ForkServer("weak")
    with pytest.raises(SandboxError, match="failed its own test"):
        server.test_itself()
    server.end()


def test_weak_still_bounds_time_output_and_environment():
    server = sandbox.ForkServer("weak")
    try:
        assert confined.run(server, "print(input())", "2").output == "2\n"
        assert confined.run(server, "import time; time.sleep(100)", limits=LIMITS).kind == "time"
        assert confined.run(server, "while True: print('x' * 1000)", limits=LIMITS).kind == "output"
        assert confined.run(server, "x = bytearray(3 << 30)", limits=LIMITS).kind == "memory"
        assert confined.run(server, "import os; print(os.environ, os.listdir())").output == "environ({}) []\n"
        assert confined.run(server, "open('x', 'w').write('y')").kind == "error"
    finally:
        server.end()


def test_modules_beside_the_standard_library():
    server = sandbox.ForkServer("full", ("numpy",))
    try:
        ended = confined.run(
            server, "import numpy as np\nprint(np.linalg.det(np.eye(3)) + np.random.default_rng(0).random() * 0)"
        )
        assert (ended.output, ended.errors) == ("1.0\n", "")
    finally:
        server.end()
    with pytest.raises(SandboxError, match="'no_such_module' that programs may import is not installed"):
        sandbox.ForkServer("full", ("no_such_module",))


# ---- the filter


def outcome(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """What a filter returns for a call: a small interpreter of classic BPF."""
    words = struct.pack(
        "=iIQ6Q", number, system_calls.AUDIT_ARCHITECTURES[machine], 0, *arguments, *[0] * (6 - len(arguments))
    )
    at = accumulator = 0
    code = list(struct.iter_unpack("=HBBI", program))
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", words, value)
        elif operation == 0x54:
            accumulator &= value
        else:
            tests = {0x15: accumulator == value, 0x45: bool(accumulator & value), 0x35: accumulator >= value}
            at += yes if tests[operation] else no


ALLOWED, EPERM, ENOSYS, ENOTTY = 0x7FFF0000, 0x00050001, 0x00050026, 0x00050019


@pytest.mark.parametrize("machine", sorted(system_calls.NUMBERS))
def test_the_filter_decides_by_number_and_argument(machine):
    program, numbers = system_calls.filter_program(machine), system_calls.NUMBERS[machine]
    said = lambda name, *arguments: outcome(program, machine, numbers[name], *arguments)
    by_argument = {"clone", "clone3", "ioctl", "fcntl", "futex", "mmap", "mprotect", "prlimit64"}
    assert {said(name) for name in numbers if name not in by_argument} == {ALLOWED}
    others = set(range(600)) - set(numbers.values())
    assert {outcome(program, machine, number) for number in others} == {EPERM}
    assert said("clone3") == ENOSYS
    threads, process, vfork, namespace = 0x3D0F00, 0x11, 0x4111, 0x10000000
    assert said("clone", threads) == ALLOWED
    assert {said("clone", f) for f in (0, process, vfork, threads | namespace, threads | 0x11, threads & ~0x10000)} == {
        EPERM
    }
    assert [said("mmap", 0, 4096, p) for p in (0, 3, 4, 5, 7)] == [ALLOWED, ALLOWED, EPERM, EPERM, EPERM]
    assert [said("mprotect", 0, 4096, p) for p in (3, 7)] == [ALLOWED, EPERM]
    assert [said("fcntl", 0, c) for c in (0, 1, 2, 3, 1030, 4, 8, 10, 1031)] == [ALLOWED] * 5 + [EPERM] * 4
    assert [said("ioctl", 0, r) for r in (0x5401, 0x5412, 0x541B)] == [ALLOWED, ENOTTY, ENOTTY]
    assert [said("futex", 0, o) for o in (0, 129, 0x189, 6, 7, 13)] == [ALLOWED] * 3 + [ENOSYS] * 3
    assert said("prlimit64", 0, 9, 0, 1 << 40) == ALLOWED
    assert {said("prlimit64", *a) for a in ((1, 9, 0), (0, 9, 5), (0, 9, 1 << 40))} == {EPERM}


def test_other_architectures_are_killed():
    program = system_calls.filter_program("x86_64")
    assert outcome(program, "aarch64", 0) == outcome(program, "x86_64", 0x40000000 + 39) == 0x80000000


def test_the_numbers_are_those_of_this_machine():
    libc = ctypes.CDLL(None)
    own = system_calls.NUMBERS[platform.machine()]
    assert libc.syscall(own["getpid"]) == os.getpid() and libc.syscall(own["getuid"]) == os.getuid()


# ---- other surroundings


def hostile_tests_again(*prefix, user) -> None:
    """The quick hostile programs of this file in other surroundings."""
    python, environment = python_for(user)
    command = [
        *prefix,
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "hostile_program_reaches",
        __file__,
    ]
    environment |= {"PATH": os.environ["PATH"], "HOME": os.sep, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **by(user))
    assert done.returncode == 0 and f"{len(hostile_programs.HOSTILE)} passed" in done.stdout, (
        done.stdout[-3000:] + done.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_so_it_is_for_an_ordinary_user():
    hostile_tests_again(user=SOMEBODY)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize("form", [("--map-root-user", "--pid", "--fork", "--mount-proc"), ("--map-root-user", "--ipc")])
def test_so_it_is_for_root_of_a_user_namespace_without_other_users(form):
    if subprocess.run(["unshare", *form, "true"], capture_output=True, check=False, **by(SOMEBODY)).returncode:
        pytest.skip("this machine makes no user namespaces")
    hostile_tests_again("unshare", *form, user=SOMEBODY)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_so_it_is_for_root_without_capabilities():
    """As in a container started with all capabilities dropped: root that cannot become anybody else."""
    hostile_tests_again("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", user=0)
