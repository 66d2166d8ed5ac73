"""Many short runs of one method in one process: what is compiled for the first serves them all."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.engine.policies import Policy
from sdjax.engine.train import Experiment
from sdjax.models.pretrained import Pretrained
from sdjax.run.learner import Learner, programs_of
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
                    learner.learn(step, learner.collect(step))
        return rows
