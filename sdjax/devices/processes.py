"""Several processes, one run: joining, agreeing, sharing work, and ending together.

Every process runs the same program on the same prompts.  A program on the mesh is run by all of them, each on its own
devices and rows, so they must call the same programs in the same order; whatever `collect` does is therefore a function
of its arguments.  What is not (an external server, a verifier with a time limit) goes through `divided`: every item is
asked for by one process, and all get its answer.  With one process every function here is the plain call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from sdjax.errors import InputError

Item = TypeVar("Item")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SILENCE = 25.0
"""Seconds without a sign of life after which a process counts as dead; jax's own limit comes later."""


class ProcessError(InputError, RuntimeError):
    """The processes of a run do not agree, or one of them has ended; the message says which."""


# ---- joining --------------------------------------------------------------------------------------------------------


def join(how: str = "") -> None:
    """Joins the other processes of this job, before anything has touched a device.

    `how` is "auto" where jax can find out by itself (TPU pods, Slurm, Open MPI, Kubernetes), else the environment says:
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or none of them.
    Raises `ProcessError` if that makes no sense.
    """
    values = [os.environ.get(name) for name in VARIABLES]
    if how not in ("", "auto"):
        raise ProcessError(f"processes={how}: expected auto, or nothing and the variables {', '.join(VARIABLES)}")
    if how != "auto" and not any(values):
        return
    # jax would take SIGTERM for itself; on a CPU processes need this library to talk to one another.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limits = {"heartbeat_timeout_seconds": 50, "shutdown_timeout_seconds": 30}
    try:
        if how == "auto":
            jax.distributed.initialize(**limits)
        else:
            address, count, number = checked(*values)
            jax.distributed.initialize(address, count, number, initialization_timeout=120, **limits)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ProcessError):
            raise
        said = str(error).splitlines()[0]
        if "should be defined" in said or "must be defined" in said:
            said = f"jax finds no cluster here; set {', '.join(VARIABLES)} in place of --processes auto"
        raise ProcessError(f"this process cannot join the others: {said}") from error
    if many():
        watch()
        sys.excepthook = failing(sys.excepthook)


def checked(address: str | None, count: str | None, number: str | None) -> tuple[str, int, int]:
    """Address, number of processes and own number as they should be.  Raises `ProcessError` naming the variable."""
    for name, value in zip(VARIABLES, (address, count, number), strict=True):
        if not value:
            raise ProcessError(f"{name} is not set, and another of {', '.join(VARIABLES)} is: set all three or none")
        if name != VARIABLES[0] and not value.isdigit():
            raise ProcessError(f"{name}={value}: expected a number")
    if ":" not in address:
        raise ProcessError(f"{VARIABLES[0]}={address}: expected host:port")
    if not int(number) < int(count):
        raise ProcessError(f"{VARIABLES[2]}={number} of {VARIABLES[1]}={count}: expected 0 to {int(count) - 1}")
    return address, int(count), int(number)


def many() -> bool:
    """Whether there are other processes."""
    # Asked first, because counting processes starts the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return not many() or jax.process_index() == 0


# ---- agreeing -------------------------------------------------------------------------------------------------------


def everyone(value: Any) -> list[Any]:
    """What each process says, JSON-able, in their order, to all.  Every process must call it."""
    if not many():
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(process_allgather(np.asarray(len(text), np.int32)))
    # In powers of two: each size is a program of its own.
    padded = np.zeros(max(1024, 1 << int(sizes.max()).bit_length()), np.uint8)
    padded[: len(text)] = text
    rows = process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(value: Any, what: str) -> None:
    """Raises `ProcessError` on every process unless all say the same JSON-able value."""
    said = everyone(value)
    for number, other in enumerate(said):
        if other != said[0]:
            raise ProcessError(f"processes 0 and {number} have different {what}: {difference(said[0], other)}")


def difference(one: Any, other: Any) -> str:
    """How two values differ, in words."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return f"checksums {one} and {other}"
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    pairs = [f"{name} is {one.get(name)!r} in one and {other.get(name)!r} in the other" for name in names]
    return "; ".join(pairs) + "; start all processes with the same command"


def by_first(action: Callable[[], Any]) -> Any:
    """What `action` returns (JSON-able) on the first process, which alone runs it, on every process.

    What it raises, the others raise as a `ProcessError` of the same words.
    """
    if not many():
        return action()
    return by_each(lambda: action() if first() else None)[0]


def by_each(action: Callable[[], Any]) -> list[Any]:
    """What `action` returns (JSON-able) on every process, to all; if it raises on one, all raise."""
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        if not many():
            raise
        error = raised
    said = everyone([result, None if error is None else str(error)])
    if error is not None:
        raise error
    for number, (_, message) in enumerate(said):
        if message is not None:
            raise ProcessError(f"process {number}: {message}")
    return [result for result, _ in said]


def divided(function: Callable[[Item], Any], items: Sequence[Item]) -> list[Any]:
    """`[function(item) for item in items]`, each by one process: the results must be JSON-able, and all get all.

    Process `p` of `n` takes the `p`-th n-th of the items, as its devices have the `p`-th n-th of a batch's rows.
    """
    return divided_parts(lambda some: [function(item) for item in some], items)


def divided_parts(function: Callable[[Sequence[Item]], Sequence[Any]], items: Sequence[Item]) -> list[Any]:
    """`function(items)`, a result for each, as `divided`: each process gives the function its part of the items."""
    if not many():
        return list(function(items))
    bounds = [p * len(items) // jax.process_count() for p in range(jax.process_count() + 1)]
    start, end = bounds[jax.process_index() : jax.process_index() + 2]
    return [result for part in by_each(lambda: list(function(items[start:end]))) for result in part]


# ---- ending together ------------------------------------------------------------------------------------------------


def watch() -> None:
    """Starts a thread that ends this process, with a sentence, when another one has ended or fallen silent."""
    threading.Thread(target=keep_watching, args=(service(),), daemon=True).start()


def service() -> Any:
    """The key-value store of the job, on process 0."""
    from jax._src import distributed  # jax has no public name for it; orbax uses this one too

    return distributed.global_state.client


def keep_watching(store: Any) -> None:
    """Says every second that this process lives, and listens to the others."""
    own, others = jax.process_index(), [p for p in range(jax.process_count()) if p != jax.process_index()]
    heard = dict.fromkeys(others, (None, time.monotonic()))
    while True:
        try:
            if ended.is_set():
                return
            store.key_value_set(f"sdjax/alive/{own}", str(time.time()), allow_overwrite=True)
            said = dict(store.key_value_dir_get("sdjax/alive/"))
        except jax.errors.JaxRuntimeError:
            if not ended.is_set():
                end("process 0 cannot be reached: it has ended")
            return
        now = time.monotonic()
        for p in others:
            word = next((value for key, value in said.items() if key.split("/")[-1] == str(p)), None)
            if word is not None and word.startswith("failed: "):
                end(f"process {p} has ended: {word.removeprefix('failed: ')}")
            if word != heard[p][0] or word == "done":
                heard[p] = word, now
            elif now - heard[p][1] > SILENCE:
                end(f"process {p} has not been heard of for {SILENCE:.0f} s: it was killed or cannot be reached")
        time.sleep(1.0)


def lost(error: Exception) -> bool:
    """Whether an error means that another process no longer answers."""
    return many() and bool(re.search(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|coordination service|NCCL", str(error)))


def failing(hook: Callable[..., None]) -> Callable[..., None]:
    """An exception hook that tells the others too, and waits for none of them."""

    def report(kind: type, error: BaseException, trace: Any) -> None:
        hook(kind, error, trace)
        leave(f"{kind.__name__}: {error}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    return report


ended = threading.Event()
"""Set once this process is about to end: others may then end too."""


def leave(failure: str | None = None) -> None:
    """Tells the others that this process ends by itself: because it is done, or because of a failure."""
    if not many() or ended.is_set():
        return
    ended.set()
    try:
        word = "done" if failure is None else f"failed: {failure}"
        service().key_value_set(f"sdjax/alive/{jax.process_index()}", word, allow_overwrite=True)
    except jax.errors.JaxRuntimeError:  # there is nobody left to tell
        return
    if failure is not None and first():
        time.sleep(3.0)  # the store goes with this process


def disconnect() -> None:
    """Meets the others a last time after `leave`, where all end: whoever is still connected dies with process 0."""
    if not many() or not ended.is_set():
        return
    with contextlib.suppress(RuntimeError):  # somebody has gone already
        jax.distributed.shutdown()


def end(why: str) -> None:
    """Ends this process at once: it may wait for one that will never answer."""
    if ended.is_set():
        return
    message = f"\nsdjax: {why}; this process ends too: start all of them again with --resume\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(1)
