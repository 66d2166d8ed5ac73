"""Runs of `tiny_run.py`, or of another file of an experiment, as a person starts them, and what they leave behind."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sdjax.__main__ import main
from sdjax.cli.options import Choice, load_experiment, method_factory
from sdjax.engine import train
from sdjax.run.storage import checkpoint

FILE = Path(__file__).parent / "tiny_run.py"
ROOT = Path(__file__).parents[1]
STEPS = 10
OPTIONS = ("--steps", str(STEPS), "--save-every", "2", "--evaluate-every", "3")


def arguments(folder, *more, file=FILE) -> list[str]:
    """The command line of a run that takes `STEPS` steps."""
    return ["train", str(file), "--out", str(folder), *OPTIONS, *more]


def start(folder, *more, programs, file=FILE, stdout=subprocess.PIPE, cwd=None, **environment) -> subprocess.Popen:
    """Starts a run as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdjax", *arguments(folder, *more, file=file)],
        stdin=subprocess.DEVNULL if stdout == subprocess.PIPE else stdout,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={**os.environ, **kept_in(programs), "COLUMNS": "100", "PYTHONPATH": str(ROOT), **environment},
    )


def joining(count: int) -> list[dict[str, str]]:
    """The environments of processes that join one another on a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # These programs are compiled by every process and hardly run.
    common = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return [{**common, "JAX_PROCESS_ID": str(p)} for p in range(count)]


def start_all(folder, count, programs, *more, file=FILE, **environment) -> list[subprocess.Popen]:
    """Starts a run as `count` processes."""
    return [start(folder, *more, programs=programs, file=file, **own, **environment) for own in joining(count)]


def kept_in(programs) -> dict[str, str]:
    """An environment in which nothing is compiled twice, Python's own modules included."""
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(programs), "PYTHONPYCACHEPREFIX": str(programs / "python")}
    return {**compiled, "PYTHONDONTWRITEBYTECODE": ""}


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output of a process that ends by itself."""
    output = process.communicate(timeout=300)[0]
    return process.returncode, output.decode()


def wait_for(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()` while the process lives."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(folder, name: str = "metrics.jsonl") -> list[dict]:
    """The objects of a JSON-lines file; none if there is no file.  A line that is being written counts for nothing."""
    file = Path(folder) / name
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in whole]


def refuse(constant: str):
    """JSON has no NaN."""
    raise ValueError(constant)


def repeatable(folder) -> list[dict]:
    """The metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if not re.search("second", k)} for line in lines(folder)]


def saved(folder, step: int = STEPS, file=FILE):
    """A checkpoint's arrays and host half."""
    module = load_experiment(str(file))
    method = Choice(method_factory("sdpo"), module.OPTIONS["sdpo"])
    experiment = module.experiment(method=method)
    like = train.initial_state(experiment, experiment.student.params)
    state, host = checkpoint.restore(Path(folder) / "checkpoints", like, step)
    return {k: np.asarray(v) for k, v in flat(checkpoint.arrays_of(state)).items()}, host


def flat(tree) -> dict:
    """Leaves by path."""
    import jax

    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_same_end(folder, reference, **which) -> None:
    """Both runs ended with the same parameters, optimizer, snapshots, keys, memory, numbers and texts, bit for bit."""
    (arrays, host), (expected, expected_host) = saved(folder, **which), saved(reference, **which)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], strict=True, err_msg=name)
    assert host == expected_host
    assert repeatable(folder) == repeatable(reference)
    for name in ("rollouts.txt", "rollouts.jsonl", "result.json"):
        assert (Path(folder) / name).read_text() == (Path(reference) / name).read_text()


def assert_same_run(folder, reference) -> None:
    """Both runs ended with the same state and numbers, up to rounding, and each step was recorded once."""
    (arrays, host), (expected, expected_host) = saved(folder), saved(reference)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], atol=2e-3, rtol=1e-3, err_msg=name)
    assert host["position"] == expected_host["position"]
    assert host["memory"]["batches"] == expected_host["memory"]["batches"]
    assert [line["step"] for line in lines(folder)] == [line["step"] for line in lines(reference)]
    for line, other in zip(repeatable(folder), repeatable(reference), strict=True):
        assert line.keys() == other.keys()
        if "evaluation" not in line:
            assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)


@contextlib.contextmanager
def compiled_into(folder):
    """Programs are kept in, and read from, a folder: those that this process has made before are forgotten.

    What was compiled elsewhere, in another process or test, may round differently.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    old = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run_here(*command) -> int:
    """Runs a command in this process."""
    return main([str(c) for c in command])
