"""Which wrong lines the tests do not see: one-line mutants of modules against the tests of these modules.

    python tests/mutate.py sdjax/kernels/weights.py --most 20 --seed 0
    python tests/mutate.py sdjax/kernels --most 10 --jobs 2

Prints every mutant that survives, with its line, and exits with 1 if there is one.  `mutants.py` says what is made wrong.

- **Which tests**: `tests/ROOM/test_NAME.py`, the other files of `tests/ROOM` that import the module, `MORE`, and the
  room's table of defaults.  Of a method, those of them that name it: `test_value_and_gradient[rlcsd]`.
- **Nothing is left behind**: mutants are written into a copy of the package in a temporary folder that stands first on
  the path.
- **Fast**: third-party packages are imported once, and a process is forked for each mutant; compiled programs are kept
  for all of them.  The tests of all modules run once as they are, and say which lines each of them runs; a mutant meets only
  those that run its line, the quick ones first, and the first failure ends a run.  What is wrong when the module is imported
  (a default, a constant) meets all tests of the module.
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
import builtins
import collections
import compileall
import contextlib
import json
import os
import py_compile
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
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
    "methods/atmanrl": ("collect/test_saliency.py",),
    "methods/mixsd": ("collect/test_synthesis.py",),
    "methods/tessy": ("collect/test_synthesis.py",),
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


def marked(text: str, file: str) -> str:
    """A module's text in which every statement and every lambda says that it runs: `line_runs(file, line)`."""
    tree = ast.parse(text)
    # In processes that tests start nobody listens; `slice` takes any two arguments.
    listener = 'vars(__import__("builtins")).get("line_runs", slice)'
    mark = lambda node: ast.parse(f"{listener}({file!r}, {node.lineno})").body[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            both = ast.Tuple([mark(node.body).value, node.body], ast.Load())
            node.body = ast.Subscript(both, ast.Constant(1), ast.Load())
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                block[:] = [x for part in block for x in ([part] if stands_first(part) else [mark(part), part])]
    return ast.unparse(ast.fix_missing_locations(tree))


def stands_first(node: ast.stmt) -> bool:
    """Whether nothing may come before a statement: a docstring, or an import from the future."""
    said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return said or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


class Plugin:
    """Chooses and orders tests, says which one runs which lines, and remembers what failed and how long each took."""

    def __init__(self, seconds: Mapping[str, float] | None = None, names: Sequence[str] = ()):
        self.chosen, self.names = seconds, names
        self.test, self.failed, self.seconds = "", "", collections.Counter()
        self.lines: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))

    def line_runs(self, file: str, line: int) -> None:
        """What marked lines call; the test's name is empty for what runs at import."""
        self.lines[file][line].add(self.test)

    def pytest_collection_modifyitems(self, items):
        if self.names:
            names = re.compile(rf"(?<![a-z])({'|'.join(self.names)})(?![a-z])")
            items[:] = [item for item in items if names.search(item.nodeid)]
        if self.chosen is not None:
            files = collections.Counter()
            for name, seconds in self.chosen.items():
                files[file_of(name)] += seconds
            items[:] = [item for item in items if item.nodeid in self.chosen]
            items.sort(key=lambda item: (files[file_of(item.nodeid)], self.chosen[item.nodeid]))

    def pytest_runtest_logstart(self, nodeid):
        self.test = nodeid

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report):
        self.failed = self.failed or (report.nodeid if report.failed else "")


def file_of(test: str) -> str:
    """The file of a test, from the repository's root."""
    return test.split("::")[0]


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
    """Modules with their tests, a copy of the package to write mutants into, and what a run without a mutant says."""

    def __init__(self, found: list[Path], tests: list[Path], folder: Path):
        self.modules, self.tests, self.folder, self.copy = found, tests, folder, folder / "package"
        shutil.copytree(ROOT / "sdjax", self.copy / "sdjax", ignore=shutil.ignore_patterns("__pycache__"))
        # By content: a mutant of the same size in the same second would be taken for what was compiled before it.
        compileall.compile_dir(self.copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)

    def place(self, module: Path) -> Path:
        """Where a module lies in the copy."""
        return self.copy / module.relative_to(ROOT)

    def measure(self) -> None:
        """Runs the tests on the modules as they are, marked.  Raises SystemExit if they fail."""

        def work() -> dict:
            methods = [module.stem for module in self.modules if module.parent.name == "methods"]
            plugin = Plugin(names=methods if len(methods) == len(self.modules) else ())
            builtins.line_runs = plugin.line_runs
            status = run_tests(self.copy, self.tests, plugin, self.folder / "programs")
            loaded = getattr(sys.modules.get("sdjax"), "__file__", "")
            lines = {file: {n: sorted(tests) for n, tests in own.items()} for file, own in plugin.lines.items()}
            return {
                "status": status,
                "failed": plugin.failed,
                "seconds": plugin.seconds,
                "lines": lines,
                "loaded": loaded,
            }

        for module in self.modules:
            self.place(module).write_text(marked(module.read_text(encoding="utf-8"), str(module)), encoding="utf-8")
        log = self.folder / "log"
        report = in_a_fork(work, log, None)
        if report.get("status") != 0 or report["failed"]:
            raise SystemExit(f"{log.read_text()[-3000:]}\nthe tests fail as it is")
        if not report["loaded"].startswith(str(self.copy)):
            raise SystemExit(f"the tests import sdjax from {report['loaded']}, not from the copy")
        for module in self.modules:
            shutil.copy(module, self.place(module))
        self.seconds, self.lines = report["seconds"], report["lines"]

    def meets(self, module: Path, mutant: Mutant) -> dict[str, float]:
        """The tests that a mutant is run against, with their seconds."""
        first, last = mutant.lines
        lines = self.lines.get(str(module), {})
        reached = set().union(*(lines.get(str(line), ()) for line in range(first, last + 1)))
        if "" in reached:
            own = {path.relative_to(ROOT).as_posix() for path in tests_of(module)}
            reached |= {test for test in self.seconds if file_of(test) in own}
        return {test: self.seconds[test] for test in reached if test}

    def fate(self, module: Path, mutant: Mutant) -> tuple[str, str]:
        """What becomes of a mutant, and the test that kills it."""
        met = self.meets(module, mutant)
        if not met:
            return NOT_REACHED, ""

        def work() -> dict:
            plugin = Plugin(met)
            files = [ROOT / file for file in dict.fromkeys(map(file_of, met))]
            status = run_tests(self.copy, files, plugin, self.folder / "programs")
            return {"failed": plugin.failed or ("" if status == 0 else f"exit status {status}")}

        self.place(module).write_text(mutant.text, encoding="utf-8")
        report = in_a_fork(work, self.folder / "log", 60.0 + 5.0 * sum(met.values()))
        shutil.copy(module, self.place(module))
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


def report(module: Path, options: argparse.Namespace, bench: Bench) -> collections.Counter:
    """Tries a sample of a module's mutants and prints those that survive.  Returns how many met which fate."""
    sample, total = chosen(module, options.most, options.seed)
    name, fates = module.relative_to(ROOT).as_posix(), collections.Counter()
    for mutant in sample:
        fate, by = bench.fate(module, mutant)
        fates[fate] += 1
        if options.verbose or fate in (SURVIVED, NOT_REACHED):
            print(f"{name}:{mutant.line}: {fate} {by}\n  - {mutant.key[0]}\n  + {mutant.key[1]}", flush=True)
    lived = fates[SURVIVED] + fates[NOT_REACHED]
    said = f"{name}: {lived} of {len(sample)} mutants survive, {fates[NOT_REACHED]} of them not reached"
    print(f"{said}; {total} mutants in all", flush=True)
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
    found, fates = modules(options.paths), collections.Counter()
    tests = [test for module in found for test in tests_of(module)]
    tests = [p.resolve() for p in options.tests] or list(dict.fromkeys(tests))
    if not tests:
        raise SystemExit("no tests")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(found, tests, Path(folder))
        bench.measure()
        print(f"the tests take {sum(bench.seconds.values()):.0f} s", flush=True)
        for module in found:
            fates += report(module, options, bench)
    lived = fates[SURVIVED] + fates[NOT_REACHED]
    print(f"{lived} of {fates.total()} survive")
    return int(lived > 0)


if __name__ == "__main__":
    sys.exit(main())
