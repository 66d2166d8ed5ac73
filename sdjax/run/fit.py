"""A run from its start to its end: what could end it later is checked first, and every way out has its sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import heapq
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdjax.collect.contexts import question
from sdjax.devices import processes, sharding
from sdjax.devices.memory import MemoryShortage, exhausted
from sdjax.engine import train
from sdjax.engine.chats import check_view, encode_text
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.tokens import LengthError, encode_context, refuse
from sdjax.engine.train import Experiment
from sdjax.run import data, memory
from sdjax.run.folder import RunError, check_folder, claim, held
from sdjax.run.interrupts import Interrupts, SharedInterrupts
from sdjax.run.logs import trackers
from sdjax.run.logs.log import NoLog, RunLog
from sdjax.run.loop import Result, Run
from sdjax.run.memory import settled
from sdjax.run.starting import source
from sdjax.run.storage import checkpoint, places
from sdjax.run.storage.mirror import Mirror
from sdjax.run.storage.owner import Owner
from sdjax.types import Task


def fit(
    experiment: Experiment,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    arguments: Mapping[str, Any] | None = None,
    start: str = "",
) -> Result:
    """Runs an experiment in a folder, on a disk or in a bucket (`gs://`), and returns its final state and accuracies.

    The folder gets `arguments.json`, `metrics.jsonl`, `tensorboard/`, `rollouts.txt`, `rollouts.jsonl`, `checkpoints/`,
    `data.json` (marks of the problems), `memory.json` (how much is done at a time), `verdicts.jsonl` (with a judge) and, when the run is over, `result.json` and `model/`.  SIGINT or SIGTERM save after the current step and return;
    `resume=True` goes on from the newest checkpoint, bit for bit as if nothing had happened.  `start`, "RUN@STEP", is a
    checkpoint of another run, whose parameters this one begins with.

    Raises:
      PlaceError: the folder cannot be reached or written.
      RunError: the folder cannot be used, holds another run or none to resume, the arguments of a resumed run differ,
        its problems have changed, or too many updates were skipped.
      LengthError, ExperimentError: a prompt or the model's context is too short for the experiment's shapes.
      MemoryShortage: the run does not fit the memory there is, or could not get it.
      CheckpointError: a checkpoint cannot be written or read.
      Interrupted: a signal came before the run had begun.
    """
    folder, arguments = places.place(folder), dict(arguments or {})
    task = experiment.task
    shared, mesh = processes.many(), train.mesh_of(experiment)
    with SharedInterrupts() if shared else Interrupts() as interrupts, sharding.on(mesh), contextlib.ExitStack() as own:
        processes.by_first(lambda: places.try_writing(folder))
        processes.by_first(lambda: check_folder(folder, resume, arguments))
        processes.by_first(lambda: data.check(folder, task))
        check_contexts(experiment)
        lengths = check_lengths(experiment)
        experiment, record, said = settled(with_teacher_context(experiment, lengths), lengths.prompt, folder)
        if processes.first():
            print(*task.read.get("said", ()), said, sep="\n", flush=True)
        mirror = Mirror(folder)
        try:
            processes.by_first(lambda: own.enter_context(taken(mirror.owner, arguments, resume)))
            processes.by_first(lambda: prepare(folder, task, record))
            processes.by_first(mirror.fetch)
            processes.by_first(lambda: keep_verdicts(task, mirror.own))
            run = Run(experiment, mirror, interrupts)
            del experiment  # and with it, where nobody else holds them, the parameters that the state is a copy of
            step = begun(run, start)
            recorded = processes.by_first(lambda: steps_recorded(mirror.own))
            run.log = opened(mirror, run.experiment, arguments, step) if processes.first() else NoLog()
            if resume:
                run.log.say(going_on(step, recorded))
            try:
                return run.go(step)
            except Exception:
                run.saver.abandon()
                raise
            finally:
                run.log.close()
                mirror.close()
        except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
            if exhausted(error):
                raise out_of_memory(folder, error, record["sizes"]) from error
            if not processes.lost(error):
                raise
            time.sleep(3)  # whoever ended on purpose has said so, and is then named
            raise RunError(
                f"another process has ended, or cannot be reached ({str(error).splitlines()[0][:200]}): start all of "
                "them again with --resume"
            ) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(f"{folder}: {error.strerror}: free some space and go on with --resume") from error
            raise


def begun(run: Run, start: str) -> int:
    """Restores the newest checkpoint, or takes the parameters of another run's; returns the step that is reached."""
    if processes.by_first(lambda: checkpoint.steps(run.folder / "checkpoints")):
        return run.restore()
    if start:
        run.start_from(source(start))
    return 0


def check_contexts(experiment: Experiment) -> None:
    """Raises `ChatError` if a view's chats do not end where a completion can begin (`sdjax.engine.chats.check_view`)."""
    for name, view in train.all_views(experiment.method).items():
        check_view(experiment.student.tokenizer, name, view.template)


@contextlib.contextmanager
def taken(owner: Owner, arguments: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Inside, the run's folder is there, with its arguments, and this run's alone."""
    with held(owner.folder):
        claim(owner.folder, arguments, resume)
        owner.take()
        yield


def prepare(folder: Path, task: Task, sizes: Mapping[str, Any]) -> None:
    """Writes what a resumed run must find: its problems, its sizes."""
    data.write(folder, task)
    memory.write(folder, sizes)


def keep_verdicts(task: Task, folder: Path) -> None:
    """Lets a verifier that remembers its verdicts (`sdjax.tasks.judges`) keep them with the run."""
    if hasattr(task.verify, "keep_in"):
        task.verify.keep_in(folder)


def out_of_memory(folder: Path, error: Exception, sizes: Mapping[str, Any]) -> MemoryShortage:
    """What is said when memory cannot be had in the middle of a run."""
    saved = checkpoint.steps(folder / "checkpoints")
    kept = f"what came up to step {saved[-1]} is saved" if saved else "nothing was saved yet"
    rows, chunk = max(1, sizes["rows"] // 2), max(1, (sizes["rows_per_chunk"] or sizes["rows"]) // 2)
    said = " ".join(str(error).split())[:160] or type(error).__name__
    return MemoryShortage(
        f"memory ran out ({said}): {kept}.  Go on with --resume and smaller sizes, such as --rows {rows} --rows-per-chunk "
        f"{chunk} --remat, or end other programs that take memory"
    )


def opened(mirror: Mirror, experiment: Experiment, arguments: Mapping[str, Any], step: int) -> RunLog:
    """The log of a run that goes on after `step` steps."""
    run = trackers.Run(mirror.own, mirror.folder.name, experiment.log_project, arguments, step)
    told = functools.partial(trackers.Trackers, experiment.log, run)
    return RunLog(mirror.own, experiment.steps, step, trackers=told)


def steps_recorded(folder: Path) -> int:
    """The last step whose numbers are in the folder."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def going_on(step: int, recorded: int) -> str:
    """Where a resumed run goes on, and what was lost."""
    lost = f"; steps {step + 1} to {recorded} were not saved and are done again" if recorded > step else ""
    return f"going on after step {step}{lost}" if step else f"no checkpoint yet: from the beginning{lost}"


class Lengths(NamedTuple):
    """The most tokens of a prompt, and of what a teacher may be told of an example."""

    prompt: int
    told: int


WORDING = 256
"""Tokens of what stands around a question and a lesson: headers, instructions, the chat template."""


def check_lengths(experiment: Experiment, most: int = 20_000) -> Lengths:
    """Raises before the first step what would end the run at some later one: a question that does not fit.

    Only the `most` longest texts are tokenised, so that millions of examples take no minutes.

    Raises:
      LengthError: a question exceeds `shapes.context`, and `shapes.too_long` cannot help.
      ExperimentError: the shapes exceed what a model was made for.
    """
    shapes, student = experiment.shapes, experiment.student
    for name, model in {"the student": student, **experiment.teachers}.items():
        for option, length in (("context", shapes.context), ("teacher-context", shapes.teacher_context or 0)):
            if length + shapes.completion > model.config.max_context:
                raise ExperimentError(
                    f"--{option} {length} and --completion {shapes.completion} exceed the {model.config.max_context} "
                    f"tokens that {name} was made for: lower one of them"
                )
    examples = itertools.chain(experiment.task.train, experiment.task.test[: experiment.evaluation])
    length = lambda example: sum(len(turn["content"]) for turn in example.prompt)
    prompt, template = 0, train.template_of(experiment.method, "live")
    for example in heapq.nlargest(most, examples, length):
        try:
            prompt = max(prompt, len(encode_context(student.tokenizer, question(example), shapes, template)))
        except LengthError as error:
            more = "" if shapes.too_long is not refuse else ", or let --shorten-prompts cut it"
            raise LengthError(f"example {example.id!r}: {error}{more}") from None
    told = heapq.nlargest(20, (f"{e.solution or ''}\n{e.feedback or ''}" for e in experiment.task.train), len)
    count = lambda text: len(encode_text(student.tokenizer, text))
    return Lengths(prompt, max(map(count, told)))


def with_teacher_context(experiment: Experiment, lengths: Lengths) -> Experiment:
    """The experiment with a limit for what teachers read: a question, two texts as long as any, and the words around them.

    As much as the models were made for, and never less than `shapes.context`.
    """
    shapes, models = experiment.shapes, (experiment.student, *experiment.teachers.values())
    if shapes.teacher_context is not None:
        return experiment
    wanted = max(shapes.context, lengths.prompt + 2 * max(shapes.completion, lengths.told) + WORDING)
    limit = min(wanted, min(model.config.max_context for model in models) - shapes.completion)
    return dataclasses.replace(experiment, shapes=dataclasses.replace(shapes, teacher_context=limit))
