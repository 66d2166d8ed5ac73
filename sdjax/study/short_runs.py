"""Many short runs of one method in one process: what is compiled for the first serves them all."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sdjax.engine.policies import Policy
from sdjax.engine.train import Experiment
from sdjax.models.pretrained import Pretrained
from sdjax.run.learner import Learner, as_restored, programs_of
from sdjax.run.logs.log import NoLog
from sdjax.run.storage.mirror import Mirror
from sdjax.types import Task


class ShortRuns:
    """Runs of an experiment with other students of the same shape, other problems and other seeds.

    Nothing is saved: a run takes seconds, and what it measured is kept by `sdjax.study.arms.arm`.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.programs = experiment, programs_of(experiment)

    def measured(
        self,
        student: Pretrained,
        task: Task,
        seed: int,
        probe: Callable[[Policy], Mapping[str, Any]],
        at: Sequence[int],
    ) -> list[dict[str, Any]]:
        """What `probe(live policy)` says before a run and after so many of its batches: rows that begin with `step`."""
        experiment = dataclasses.replace(self.experiment, student=student, task=task, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            learner = Learner(experiment, Mirror(Path(folder)), self.programs)
            learner.log = NoLog()
            rows = []
            for step in range(max(at) + 1):
                if step in at:
                    rows.append({"step": step, **probe(learner.environment().live)})
                if step < max(at):
                    one_batch(learner, step)
        return rows


def one_batch(learner: Learner, step: int) -> None:
    """Collects a batch, trains on it and renews the snapshots, as `sdjax.run.loop` does."""
    key, method = jax.random.fold_in(learner.state.key, step), learner.experiment.method
    rollouts, memory = method.collect(learner.environment(), learner.prompts.take(), key, learner.memory)
    learner.memory = as_restored(memory)
    if rollouts:
        learner.train_on(step, learner.batch(rollouts, step))
    learner.state = learner.state.replace(step=learner.state.step + 1)
    learner.renew("batch")
    learner.renew_gated()
