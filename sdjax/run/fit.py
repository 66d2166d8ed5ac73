"""A run from its start to its end: what could end it later is checked first, and every way out has its sentence."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sdjax.collect.contexts import question
from sdjax.devices import processes, sharding
from sdjax.engine import train
from sdjax.engine.chats import check_view
from sdjax.engine.tokens import encode_context
from sdjax.engine.train import Experiment, ExperimentError
from sdjax.run import checkpoint
from sdjax.run.folder import RunError, check_folder, claim
from sdjax.run.interrupts import Interrupts, SharedInterrupts
from sdjax.run.log import NoLog, RunLog
from sdjax.run.loop import Result, Run


def fit(
    experiment: Experiment, folder: str | Path, *, resume: bool = False, arguments: Mapping[str, Any] | None = None
) -> Result:
    """Runs an experiment in a folder and returns its final state and accuracies.

    The folder gets `arguments.json`, `metrics.jsonl`, `tensorboard/`, `rollouts.txt`, `rollouts.jsonl`, `checkpoints/`
    and, when the run is over, `result.json` and `model/`.  SIGINT or SIGTERM save after the current step and return;
    `resume=True` goes on from the newest checkpoint, bit for bit as if nothing had happened.

    Raises:
      RunError: the folder cannot be used, holds another run or none to resume, the arguments of a resumed run differ,
        or too many updates were skipped.
      LengthError, ExperimentError: a prompt or the model's context is too short for the experiment's shapes.
      CheckpointError: a checkpoint cannot be written or read.
      Interrupted: a signal came before the run had begun.
    """
    folder, arguments = Path(folder), dict(arguments or {})
    shared, mesh = processes.many(), train.mesh_of(experiment)
    with SharedInterrupts() if shared else Interrupts() as interrupts, sharding.on(mesh):
        processes.by_first(lambda: check_folder(folder, resume, arguments))
        check_contexts(experiment)
        check_lengths(experiment)
        try:
            processes.by_first(lambda: claim(folder, arguments))
            run = Run(experiment, folder, interrupts)
            del experiment  # and with it, where nobody else holds them, the parameters that the state is a copy of
            step = run.restore() if processes.by_first(lambda: checkpoint.steps(folder / "checkpoints")) else 0
            run.log = RunLog(folder, run.experiment.steps, step) if processes.first() else NoLog()
            if resume:
                run.log.say(f"going on after step {step}" if step else "no checkpoint yet: from the beginning")
            try:
                return run.go(step)
            finally:
                run.log.close()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
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


def check_contexts(experiment: Experiment) -> None:
    """Raises `ChatError` if a view's chats do not end where a completion can begin (`sdjax.engine.chats.check_view`)."""
    for name, view in train.all_views(experiment.method).items():
        check_view(experiment.student.tokenizer, name, view.template)


def check_lengths(experiment: Experiment, most: int = 20_000) -> None:
    """Raises before the first step what would end the run at some later one: a question that does not fit.

    Only the `most` longest texts are tokenised, so that millions of examples take no minutes.

    Raises:
      LengthError: a question exceeds `shapes.context`, and `shapes.too_long` cannot help.
      ExperimentError: the shapes exceed what a model was made for.
    """
    shapes, student = experiment.shapes, experiment.student
    for name, model in {"the student": student, **experiment.teachers}.items():
        if shapes.context + shapes.completion > model.config.max_context:
            raise ExperimentError(
                f"context={shapes.context} and completion={shapes.completion} exceed the {model.config.max_context} "
                f"tokens that {name} was made for"
            )
    examples = [*experiment.task.train, *experiment.task.test[: experiment.evaluation]]
    length = lambda example: sum(len(turn["content"]) for turn in example.prompt)
    for example in sorted(examples, key=length, reverse=True)[:most]:
        encode_context(student.tokenizer, question(example), shapes, train.template_of(experiment.method, "live"))
