"""Which wrong lines the tests do not see: one-line mutants of modules against the tests of these modules.

    python tests/mutate.py sdjax/kernels/weights.py --most 20 --seed 0
    python tests/mutate.py sdjax/kernels --most 10 --jobs 2

Prints every mutant that survives, with its line, and exits with 1 if there is one.  `mutants.py` says what is made wrong.

- **Which tests**: `tests/ROOM/test_NAME.py`, the other files of `tests/ROOM` that import the module, `MORE`, and the
  room's table of defaults.
- **Nothing is left behind**: mutants are written into a copy of the package in a temporary folder that stands first on
  the path.
- **Fast**: third-party packages are imported once, and a process is forked for each mutant; compiled programs are kept
  for all of them; tests that run the wrong line come first, and the first failure ends a run.
- **Not reached** means that no test runs the line in its own process; such a mutant survives without being run.  Lines
  for several devices: `XLA_FLAGS=--xla_force_host_platform_device_count=8` and `--tests tests/eight_devices.py::test_NAME`.
- **Equivalent mutants**, wrong lines that are not wrong, stand in `equivalent_mutants.tsv` with the reason and are left out.

mutmut and cosmic-ray do less here.  mutmut replaces functions by trampolines, which hide their signatures from jax and from
the command line's options, and skips decorated functions; cosmic-ray edits the files in place and starts Python and JAX
anew for each mutant.  Neither drops a mask or a `stop_gradient`, or exchanges arguments.
"""

from __future__ import annotations

import argparse
import ast
import collections
import compileall
import contextlib
import json
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from mutants import Mutant, mutants

ROOT = Path(__file__).parent.parent
MORE = {
    "kernels/distributions": ("kernels/test_divergences.py",),
    "collect/critiques": ("collect/test_lessons.py", "methods/test_roles.py"),
    "collect/lessons": ("methods/test_roles.py",),
    "collect/plans": ("collect/test_lessons.py", "methods/test_host.py"),
    "collect/playbook": ("methods/test_host.py",),
    "collect/selection": ("collect/test_lessons.py", "methods/test_host.py"),
    "collect/continuations": ("methods/test_rethinking_opd.py",),
    "engine/needs": ("run/test_memory.py",),
    "engine/policies": ("collect/test_rollouts.py",),
    "engine/protocol": ("run/test_answering.py",),
    "engine/train": ("run/test_teachers.py",),
    "engine/waves": ("collect/test_conversations.py",),
}
"""Test files beyond those of a module's own room, by module."""
METHODS = (
    "methods/test_defaults.py",
    "methods/test_references.py",
    "methods/test_roles.py",
    "collect/test_every_control.py",
)
"""Test files that go over all methods."""
PRELOADED = (
    "jax",
    "jax.numpy",
    "numpy",
    "chex",
    "flax.linen",
    "optax",
    "transformers",
    "tokenizers",
    "pytest",
    "scipy",
)
KILLED, SURVIVED, NOT_REACHED, TIMED_OUT = "killed", "survived", "not reached", "timed out"


# ---- which tests ------------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Dotted names that a test file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return found | {n.module for n in froms} | {f"{n.module}.{alias.name}" for n in froms for alias in n.names}


def tests_of(module: Path) -> list[Path]:
    """The test files that are run against mutants of a module, its own first."""
    parts = module.resolve().relative_to(ROOT / "sdjax").with_suffix("").parts
    room, name = parts[0], module.stem
    own = ROOT / "tests" / room / f"test_{name}.py"
    beside = [p for p in sorted(own.parent.glob("test_*.py")) if ".".join(("sdjax", *parts)) in imported(p)]
    more = [ROOT / "tests" / p for p in (*MORE.get("/".join(parts), ()), *(METHODS if room == "methods" else ()))]
    return [p for p in dict.fromkeys([own, *beside, *more]) if p.exists()]


# ---- one process of tests ---------------------------------------------------------------------------------------------


class Lines:
    """Which tests run which lines of one file: `{line: {test}}`, the empty name for what runs at import."""

    def __init__(self, file: Path):
        self.file, self.test = str(file), ""
        self.found: dict[int, set[str]] = collections.defaultdict(set)

    def seen(self, frame, event, _):
        if event == "line":
            self.found[frame.f_lineno].add(self.test)
        return self.seen

    def called(self, frame, event, _):
        return self.seen if frame.f_code.co_filename == self.file else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        threading.settrace(self.called)
        sys.settrace(self.called)
        yield
        sys.settrace(None)


class Plugin:
    """Orders tests, says which one runs, and remembers what failed and how long each took."""

    def __init__(self, first: set[str], lines: Lines | None = None):
        self.first, self.lines = first, lines
        self.failed, self.seconds = "", collections.Counter()

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.nodeid not in self.first)

    def pytest_runtest_logstart(self, nodeid):
        if self.lines:
            self.lines.test = nodeid

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report):
        self.failed = self.failed or (report.nodeid if report.failed else "")


def run_tests(copy: Path, tests: list[Path], plugin: Plugin, programs: Path) -> int:
    """pytest in this process, with the copy of the package first on the path; its exit status."""
    import jax
    import pytest

    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:0] = [str(copy)]
    os.chdir(ROOT)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    return int(pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), *map(str, tests)], plugins=[plugin]))


def in_a_fork(work, log: Path, limit: float | None) -> dict | None:
    """What `work()` returns in a process of its own, whose output goes to a file; None if it takes too long."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            result.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    try:
        end = time.monotonic() + (limit or 1e9)
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return json.loads(result.read_text()) if result.exists() else {"failed": "the process died"}
            time.sleep(0.02)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


# ---- one module -------------------------------------------------------------------------------------------------------


class Bench:
    """A module with its tests, a copy of the package to write mutants into, and what a run without a mutant says."""

    def __init__(self, module: Path, tests: list[Path], folder: Path):
        self.module, self.tests, self.folder = module, tests, folder
        self.copy = folder / "package"
        self.wrong = self.copy / module.relative_to(ROOT)
        shutil.copytree(ROOT / "sdjax", self.copy / "sdjax", ignore=shutil.ignore_patterns("__pycache__"))
        # By content: a mutant of the same size in the same second would be taken for what was compiled before it.
        compileall.compile_dir(self.copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)

    def measure(self) -> None:
        """Runs the tests on the module as it is.  Raises SystemExit if they fail."""

        def work() -> dict:
            lines = Lines(self.wrong)
            plugin = Plugin(set(), lines)
            with lines.watched():
                status = run_tests(self.copy, self.tests, plugin, self.folder.parent / "programs")
            loaded = getattr(sys.modules.get("sdjax"), "__file__", "")
            found = {str(line): sorted(tests) for line, tests in lines.found.items()}
            return {"status": status, "failed": plugin.failed, "lines": found, "loaded": loaded}

        started = time.monotonic()
        log = self.folder / "log"
        report = in_a_fork(work, log, None)
        if report.get("status") != 0 or report["failed"]:
            raise SystemExit(f"{log.read_text()[-3000:]}\n{self.module.name}: its tests fail as it is")
        if not report["loaded"].startswith(str(self.copy)):
            raise SystemExit(f"the tests import sdjax from {report['loaded']}, not from the copy")
        self.seconds = time.monotonic() - started
        self.lines = {int(line): set(tests) for line, tests in report["lines"].items()}

    def fate(self, mutant: Mutant) -> tuple[str, str]:
        """What becomes of a mutant, and the test that kills it."""
        first, last = mutant.lines
        reached = set().union(*(self.lines.get(line, set()) for line in range(first, last + 1)))
        if not reached:
            return NOT_REACHED, ""

        def work() -> dict:
            plugin = Plugin(reached)
            status = run_tests(self.copy, self.tests, plugin, self.folder.parent / "programs")
            return {"failed": plugin.failed or ("" if status == 0 else f"exit status {status}")}

        self.wrong.write_text(mutant.text, encoding="utf-8")
        report = in_a_fork(work, self.folder / "log", 30.0 + 5.0 * self.seconds)
        if report is None:
            return TIMED_OUT, ""
        return (KILLED, report["failed"]) if report["failed"] else (SURVIVED, "")


def equivalent() -> set[tuple[str, str, str]]:
    """Module, old and new line of every mutant that is known to be none."""
    rows = (ROOT / "tests" / "equivalent_mutants.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return {tuple(row.split("\t")[:3]) for row in rows if row}


def chosen(module: Path, most: int | None, seed: int) -> tuple[list[Mutant], int]:
    """A sample of a module's mutants in the order of their lines, the same for the same seed, and how many there are."""
    name, known = module.relative_to(ROOT).as_posix(), equivalent()
    found = [m for m in mutants(module.read_text(encoding="utf-8")) if (name, *m.key) not in known]
    count = len(found) if most is None else min(most, len(found))
    picked = random.Random(f"{name} {seed}").sample(range(len(found)), count)
    return [found[i] for i in sorted(picked)], len(found)


def report(module: Path, options: argparse.Namespace, folder: Path) -> collections.Counter:
    """Tries a sample of a module's mutants and prints those that survive.  Returns how many met which fate."""
    sample, total = chosen(module, options.most, options.seed)
    tests = [p.resolve() for p in options.tests] or tests_of(module)
    name, fates = module.relative_to(ROOT).as_posix(), collections.Counter()
    if not tests or not sample:
        print(f"{name}: {'no tests' if sample else 'nothing to make wrong'}", flush=True)
        return fates
    bench = Bench(module, tests, folder)
    bench.measure()
    for mutant in sample:
        fate, by = bench.fate(mutant)
        fates[fate] += 1
        if options.verbose or fate in (SURVIVED, NOT_REACHED):
            print(f"{name}:{mutant.line}: {fate} {by}\n  - {mutant.key[0]}\n  + {mutant.key[1]}", flush=True)
    lived = fates[SURVIVED] + fates[NOT_REACHED]
    said = f"{name}: {lived} of {len(sample)} mutants survive, {fates[NOT_REACHED]} of them not reached"
    print(f"{said}; {total} mutants in all, tests take {bench.seconds:.0f} s", flush=True)
    return fates


def modules(paths: list[Path]) -> list[Path]:
    """Files, and the files of folders, with anything in them."""
    files = [f for p in paths for f in (sorted(p.resolve().rglob("*.py")) if p.is_dir() else [p.resolve()])]
    return [f for f in files if f.name != "__init__.py"]


def main() -> int:
    """The command; 1 if a mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="modules of sdjax, or folders of them")
    parser.add_argument("--most", type=int, help="how many mutants of each module are tried; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tests", nargs="+", type=Path, default=[], help="run these test files instead")
    parser.add_argument("--verbose", action="store_true", help="print those that are killed, and by which test, too")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    for name in PRELOADED:
        __import__(name)
    fates = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "programs").mkdir()
        for number, module in enumerate(modules(options.paths)):
            place = Path(folder) / str(number)
            place.mkdir()
            fates += report(module, options, place)
    lived = fates[SURVIVED] + fates[NOT_REACHED]
    print(f"{lived} of {fates.total()} survive")
    return int(lived > 0)


if __name__ == "__main__":
    sys.exit(main())
