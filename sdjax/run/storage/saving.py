"""Checkpoints are written while the run goes on: arrays are copied off the devices, and the rest happens in a thread.

One save is under way at a time.  What it writes last, on process 0, is the manifest: until then the step does not count.
"""

from __future__ import annotations

import concurrent.futures
import copy
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sdjax.collect import remembered
from sdjax.devices.processes import ProcessError, by_each, by_first, everyone, first, many
from sdjax.engine.train import State
from sdjax.run.storage import manifest, places, segments
from sdjax.run.storage.checkpoint import CheckpointError, absolute, arrays_of, check_space, described
from sdjax.run.storage.digests import digests
from sdjax.run.storage.places import first_line
from sdjax.run.storage.segments import Segments

SECONDS = 600
"""After which a save that does not come to its end has failed: a disk or a bucket that no longer answers."""

MOST_FAILURES = 3
"""So many saves in a row that fail end the run."""


class Keep(NamedTuple):
    """Which checkpoints stay: the `newest`, those of every `every` steps (0: none), and that of the best score."""

    newest: int = 2
    every: int = 0
    best: bool = False

    def superseded(self, steps: list[int], scores: Mapping[int, float]) -> list[int]:
        """Which of these steps, oldest first, go; of equal scores the first is the best."""
        scored = [step for step in steps if step in scores] if self.best else []
        stay = {*steps[-self.newest :], *(step for step in steps if self.every and step % self.every == 0)}
        stay |= {max(scored, key=lambda step: (scores[step], -step))} if scored else set()
        return [step for step in steps if step not in stay]


NEWEST = Keep()


class Saver:
    """Saves a run's state into a folder; every process must call each function, in the same order.

    `say` tells of a save that failed.  `before` runs in the thread of the first process before a manifest is written: what
    the manifest promises must be in its place by then.  `check` raises an error where this process may not save any more.
    """

    def __init__(
        self,
        folder: Path,
        keep: Keep = NEWEST,
        say: Callable[[str], None] = lambda message: None,
        before: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep, self.say, self.before, self.check = absolute(folder), keep, say, before, check
        self.segments = Segments(self.folder)
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "saving")
        self.under_way: concurrent.futures.Future | None = None
        self.step = self.saved = 0  # of the last save that was begun, and of the last one that is whole
        self.failures, self.seconds, self.blocked = 0, 0.0, 0.0

    def start(self, state: State, host: Any, scores: Mapping[int, float] | None = None) -> None:
        """Begins to save the state and `host`, JSON-able or remembered by key; returns once the state may change.

        Waits for the save under way first.  A failure is said; the third in a row raises `CheckpointError`.  Earlier
        checkpoints stay until the new one is whole.
        """
        self.finish()
        by_first(self.check)
        started, step, tree = time.perf_counter(), int(state.step), arrays_of(state)
        self.step, target = step, self.folder / str(step)
        # A copy: methods may change in place what they remember, while it is being written.
        bare, by_key = remembered.apart(host)
        content = {"arrays": described(tree), "host": copy.deepcopy(bare)}
        # Under way on the devices, before any program that changes the state.
        marks = digests(tree)
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        checkpointer = ocp.AsyncCheckpointer(handler, async_options=ocp.options.AsyncOptions(timeout_secs=SECONDS))
        try:
            by_first(lambda: make_room(self.folder, step, tree))
            by_each(lambda: checkpointer.save(target, args=ocp.args.PyTreeSave(tree)))
        except (CheckpointError, OSError, ProcessError, ValueError, RuntimeError) as error:
            self.failed(error)
            return
        finally:
            self.blocked = time.perf_counter() - started
        rest = (marks, dict(scores or {}), started)
        self.under_way = self.thread.submit(self.complete, checkpointer, content, by_key, *rest)

    def complete(
        self,
        checkpointer: Any,
        content: dict[str, Any],
        by_key: Mapping[remembered.Path, remembered.Remembered],
        marks: Any,
        scores: Mapping[int, float],
        started: float,
    ) -> float:
        """What happens in the thread: waits for the arrays, then declares the checkpoint whole; returns seconds."""
        try:
            with checkpointer:
                checkpointer.wait_until_finished()
        except Exception:
            # Orbax leaves a failed task per array behind, each of which would be reported at length when it is collected.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise
        content["digests"] = {name: int(number) for name, number in jax.device_get(marks).items()}
        if first():
            self.check()
            if by_key:
                content[segments.FOLDER] = self.segments.write(self.step, by_key)
            self.before()
            declare(self.folder, self.step, content, self.keep, scores)
            self.segments.prune(manifest.steps(self.folder))
        return time.perf_counter() - started

    def look(self) -> None:
        """Between two steps: notices that the save under way has ended, or failed, on all processes."""
        if self.under_way is not None and all(everyone(self.under_way.done())):
            self.settle()

    def finish(self, seconds: float | None = None) -> bool:
        """Waits for the save under way, at most so many seconds; whether there is none any more."""
        if self.under_way is None:
            return True
        concurrent.futures.wait([self.under_way], seconds)
        if seconds is not None and not all(everyone(self.under_way.done())):
            return False
        self.settle()
        return True

    def abandon(self) -> None:
        """Lets the save under way come to its end, without asking the other processes, where a run ends by an error."""
        if self.under_way is not None:
            concurrent.futures.wait([self.under_way], 15 if many() else 60)

    def ensure(self, state: State, host: Any, scores: Mapping[int, float], seconds: float | None = None) -> bool:
        """Saves the state if it is not saved, and waits, at most so many seconds; whether it is.

        Raises `CheckpointError` after three failures in a row.
        """
        by_first(self.check)
        step, deadline = int(state.step), None if seconds is None else time.monotonic() + seconds
        left = lambda: None if deadline is None else max(0.0, deadline - time.monotonic())
        while self.saved != step:
            if self.under_way is None or self.step != step:
                if not self.finish(left()):
                    return False
                # By the first process's clock, and the time that the last save took.
                if not by_first(lambda: deadline is None or self.seconds <= left()):
                    return False
                self.start(state, host, scores)
            if not self.finish(left()):
                return False
        return True

    def due_again(self) -> bool:
        """Whether the last save failed: it is made again after the next step."""
        return self.failures > 0 and self.under_way is None

    def settle(self) -> None:
        """Notes how the save under way has ended."""
        under_way, self.under_way = self.under_way, None
        error = under_way.exception()
        said = everyone([0.0 if error else under_way.result(), first_line(error) if error else None])
        wrong = next((message for _, message in said if message is not None), None)
        if wrong is not None:
            self.failed(OSError(wrong))
            return
        self.saved, self.failures, self.seconds = self.step, 0, max(seconds for seconds, _ in said)

    def failed(self, error: Exception) -> None:
        """Says that a save has failed and removes what it left; raises `CheckpointError` the third time in a row."""
        by_first(self.check)  # what is unfinished there may be another process's
        self.failures += 1
        said = str(error) if isinstance(error, CheckpointError) else f"cannot write {self.folder / str(self.step)}: "
        said += "" if isinstance(error, CheckpointError) else first_line(error)
        try:
            by_first(lambda: remove_unfinished(self.folder))
        except (OSError, ProcessError):  # the disk or the bucket may be gone
            pass
        if "earlier checkpoints are untouched" not in said:
            said += "; earlier checkpoints are untouched"
        if self.failures >= MOST_FAILURES:
            raise CheckpointError(said) from error
        self.say(f"{said}; it is tried again after the next step")


def make_room(folder: Path, step: int, tree: Any) -> None:
    """Makes the folder, without what was there of this step.  Raises `CheckpointError` if the disk is too full."""
    places.make(folder)
    places.remove(folder / f"{step}.json")
    remove_unfinished(folder)
    check_space(folder, tree)


def declare(folder: Path, step: int, content: Mapping[str, Any], keep: Keep, scores: Mapping[int, float]) -> None:
    """Declares a step's checkpoint whole, and removes those that need not stay."""
    manifest.write(folder, step, {**content, "files": places.listing(folder / str(step))})
    for old in keep.superseded(manifest.steps(folder), scores):
        places.remove(folder / f"{old}.json")
        places.remove(folder / str(old))


def remove_unfinished(folder: Path) -> None:
    """Removes what was being written when a process died or a save failed."""
    stay = {segments.FOLDER, *map(str, manifest.steps(folder))}
    for name in places.names(folder):
        if name.removesuffix(".json") not in stay:
            places.remove(folder / name)
