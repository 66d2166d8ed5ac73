"""What a run trains: the state on the devices, the policies that are read, and the updates that change it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.collect import remembered
from sdjax.devices import processes, sharding
from sdjax.engine import train
from sdjax.engine.lengths import fitted
from sdjax.engine.policies import OCCASIONS, Environment, Policy, occasion, unchanged
from sdjax.engine.snapshots import frozen_snapshots, refresh_snapshots
from sdjax.engine.tokens import collate
from sdjax.engine.train import Experiment, Outcome
from sdjax.models import adapters, pretrained
from sdjax.run.folder import RunError, as_json
from sdjax.run.logs.log import NoLog, RunLog
from sdjax.run.numbers import describe, mean_of
from sdjax.run.prompts import Prompts
from sdjax.run.starting import Source, parameters
from sdjax.run.storage import checkpoint, digests
from sdjax.run.storage.mirror import Mirror
from sdjax.types import Batch, Rollout


class Compiled(NamedTuple):
    """What is compiled for a method: its updates, its snapshots' rules by occasion, and those that wait for a gate."""

    updates: list[Callable]
    rules: dict[str, Callable]
    gates: dict[str, tuple[Callable[[Any], bool], Callable]]


def programs_of(experiment: Experiment) -> Compiled:
    """The programs of an experiment, and of every other with the same method, optimizer, shapes and models' shapes."""
    method, models = experiment.method, train.models(experiment)
    how = experiment.optimizer, experiment.shapes, experiment.reduce, experiment.router
    moving = {n: rule for n, rule in method.snapshots.items() if rule is not unchanged}
    occasions = {when: [n for n, rule in moving.items() if occasion(rule) == when] for when in OCCASIONS}
    gated = {n: rule for n, rule in moving.items() if occasion(rule) == "gate"}
    return Compiled(
        [train.make_update(o, models, *how) for o in method.objectives],
        {when: refresh_snapshots(method, names) for when, names in occasions.items() if names},
        {n: (rule.open, refresh_snapshots(method, [n])) for n, rule in gated.items()},
    )


class Learner:
    """The state, the host's memory, and the compiled programs, which several learners may share."""

    log: RunLog | NoLog

    def __init__(self, experiment: Experiment, mirror: Mirror, programs: Compiled | None = None):
        self.mirror, self.folder = mirror, mirror.folder
        self.memory = as_restored(experiment.method.memory)
        self.models = train.models(experiment)
        self.base, start = train.frozen_and_trained(experiment)
        self.base_checksum = adapters.fingerprint(experiment.student.params, experiment.lora) if self.base else None
        self.start = frozen_snapshots(experiment.method, start)
        start = next(iter(self.start.values()), start)  # what lies in files is read once
        self.state = train.initial_state(experiment, start)
        arrays = checkpoint.arrays_of(self.state)
        processes.by_first(lambda: checkpoint.check_space(self.folder, arrays))
        # Once, not in every step: published parameters lie on the host.
        kept = lambda teacher: pretrained.kept_in(teacher.params, experiment.teacher_dtype)
        self.teachers = {
            name: sharding.place_parameters(kept(teacher)) for name, teacher in experiment.teachers.items()
        }
        without = lambda model: model._replace(params=None)
        self.experiment = dataclasses.replace(
            experiment,
            student=without(experiment.student),
            teachers={name: without(teacher) for name, teacher in experiment.teachers.items()},
        )
        self.prompts = Prompts(experiment.task.train, experiment.prompts, experiment.seed, experiment.rounds)
        self.programs = programs or programs_of(experiment)
        self.skipped_in_a_row, self.skipped = 0, 0
        self.lengths: dict[str, float] = {}

    def start_from(self, start: Source) -> None:
        """Begins with the parameters of another run's checkpoint; snapshots begin as copies of them."""
        params = parameters(start, self.state.params, self.base_checksum)
        self.state = train.initial_state(self.experiment, params)
        self.save_start(params)

    def save_start(self, params: Any) -> None:
        """Makes the frozen snapshots copies of `params` and saves them from now on: they are not the model's own weights."""
        own = {name: jax.tree.map(jnp.array, params) for name in self.start}
        self.start, self.state = {}, self.state.replace(snapshots={**self.state.snapshots, **own})

    @functools.cached_property
    def start_checksum(self) -> int | None:
        """A number that changes with any bit of the frozen snapshots that are not saved; `None` where there are none."""
        if not self.start:
            return None
        marks = digests.digests(next(iter(self.start.values())))
        return zlib.crc32(repr(sorted((name, int(x)) for name, x in jax.device_get(marks).items())).encode())

    # ---- policies -----------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """Parameters of every policy but the live one."""
        return {**self.base, **self.teachers, **self.start, **self.state.snapshots}

    def environment(self) -> Environment:
        """What `collect` may use now."""
        params = adapters.completed({**self.parameters(), "live": self.state.params})
        policies = {name: self.policy(name, own) for name, own in params.items()}
        return Environment(policies, self.experiment.task.verify, self.prompts.more)

    def policy(self, name: str, params: Any) -> Policy:
        """A policy with these parameters."""
        e = self.experiment
        source, template = e.teachers.get(name, e.student), train.template_of(e.method, name)
        own = {"origin": source.origin, "template": template, "world": e.task.world}
        return Policy(self.models[name], params, source.tokenizer, e.shapes, **own)

    # ---- updates ------------------------------------------------------------------------------------------------

    def collect(self, step: int) -> list[Rollout]:
        """The rollouts of the next batch; what the method remembers is kept."""
        key = jax.random.fold_in(sharding.own_key(self.state.key), step)
        method = self.experiment.method
        rollouts, memory = method.collect(self.environment(), self.prompts.take(), key, self.memory)
        # As restored, in every step: what a method remembers is then the same in a run that was never interrupted.
        self.memory = as_restored(memory)
        return rollouts

    def learn(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Trains on a batch of rollouts, if there are any, and renews the snapshots; returns the numbers of `train_on`."""
        values = self.train_on(step, self.batch(rollouts, step)) if rollouts else {}
        # The device's step counts batches: rules such as `refresh(every)` see 1 after the first.
        self.state = self.state.replace(step=self.state.step + 1)
        self.renew("batch")
        self.renew_gated()
        return values

    def batch(self, rollouts: Sequence[Rollout], step: int = 0) -> Batch:
        """The padded batch of a step: what does not fit is cut or left out, counted and said."""
        e = self.experiment
        views = train.all_views(e.method)
        rollouts, cut, left_out = fitted(rollouts, views, e.student.tokenizer, e.shapes)
        unread = sum(not r.tokens and not r.finished for r in rollouts)
        self.lengths = {"contexts_cut": float(cut), "rows_left_out": float(left_out + unread)}
        if left_out + unread:
            self.log.say(
                f"step {step + 1}: {left_out + unread} rows are not trained: what is read there does not fit the "
                f"{e.shapes.lesson} tokens of --teacher-context, even without the lesson"
            )
        # Every device of the data axis gets equally many groups of every minibatch.
        multiple = 1 if sharding.current() is None else sharding.axis_size(sharding.DATA) * e.minibatches
        return collate(rollouts, views, e.student.tokenizer, e.shapes, e.method.groups(e.prompts), multiple)

    def train_on(self, step: int, batch: Batch) -> dict[str, float]:
        """All updates of one batch; returns what the batch looks like and the updates' mean numbers."""
        e, outcomes = self.experiment, []
        due = [(o, u) for o, u in zip(e.method.objectives, self.programs.updates, strict=True) if o.due(step)]
        for (_, update), _ in itertools.product(due, range(e.epochs)):
            for part in train.minibatches(batch, e.minibatches):
                outcomes.append(self.update(update, part))
                self.guard(step, outcomes[-1], part)
                if outcomes[-1].finite:
                    self.renew("update")
        if any(o.finite for o in outcomes):
            self.renew("trained")
        silent = sum(bool(o.finite) and not o.useful for o in outcomes)
        if silent:
            many = f"{silent} of {len(outcomes)} updates had " if silent < len(outcomes) else ""
            self.log.say(f"step {step + 1}: {many}no signal (equal rewards, or no lesson for any row): not trained")
        seen = describe(batch)
        # A term that goes by the name of a fact about the batch does not hide it.
        return {**seen, **{f"term_{n}" if n in seen else n: v for n, v in mean_of(outcomes).items()}}

    def update(self, update: Any, part: Batch) -> Outcome:
        """One update; its outcome on the host."""
        state = self.state
        params, opt_state, outcome = update(
            state.params, state.opt_state, self.parameters(), sharding.place_rows(part), state.step
        )
        self.state = state.replace(params=params, opt_state=opt_state)
        return jax.device_get(outcome)

    def renew(self, when: str) -> None:
        """Applies the rules of the snapshots that are due on an occasion."""
        if when in self.programs.rules:
            snapshots = self.programs.rules[when](self.state.params, self.state.snapshots, self.state.step)
            self.state = self.state.replace(snapshots=snapshots)

    def renew_gated(self) -> None:
        """Applies the rules of the snapshots whose gate is open; the others stay what they are, bit for bit."""
        for is_open, rule in self.programs.gates.values():
            if is_open(self.memory):
                snapshots = rule(self.state.params, self.state.snapshots, self.state.step)
                self.state = self.state.replace(snapshots=snapshots)

    def guard(self, step: int, outcome: Outcome, batch: Batch) -> None:
        """Counts updates that were skipped; ends the run after too many in a row, with the batch saved."""
        if outcome.finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.say(f"step {step + 1}: loss {outcome.loss:g}, gradient norm {outcome.grad_norm:g}: update skipped")
        if self.skipped_in_a_row >= self.experiment.most_skipped:
            name = f"skipped-batch-{step + 1}.npz"
            leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
            if processes.first():
                np.savez(self.mirror.own / name, **{digests.named(path): x for path, x in leaves})
            raise RunError(
                f"{self.skipped_in_a_row} updates in a row were not finite, the last at step {step + 1}; its batch is "
                f"in {self.folder / name}: lower the learning rate or look at that batch"
            )


def as_restored(memory: Any) -> Any:
    """What a method remembers as a checkpoint gives it back; values remembered by key are so already.

    Raises: RunError.
    """
    bare, found = remembered.apart(memory)
    return remembered.together(as_json(bare, "the method's memory"), found)
