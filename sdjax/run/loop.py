"""One run under way, on the host: collect, update, record, evaluate, save, restore."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import jax
import numpy as np

from sdjax.devices import processes, sharding
from sdjax.engine import train
from sdjax.engine.lengths import fitted
from sdjax.engine.policies import OCCASIONS, Environment, Policy, occasion
from sdjax.engine.tokens import collate
from sdjax.engine.train import Experiment, Outcome, State
from sdjax.models import adapters, pretrained
from sdjax.run import checkpoint, records
from sdjax.run.evaluate import Accuracy, accuracy, by_cap
from sdjax.run.export import export
from sdjax.run.folder import RunError, as_json
from sdjax.run.interrupts import Interrupted, Interrupts
from sdjax.run.log import NoLog, RunLog, replace_text
from sdjax.run.numbers import describe, mean_of
from sdjax.run.prompts import Prompts
from sdjax.tasks import bounded
from sdjax.types import Batch, Rollout


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `before` and `after` are held-out accuracies, `interrupted` is the signal that ended it, if any.

    An accuracy that was not measured is `None`.
    """

    state: State
    before: Accuracy | None
    after: Accuracy | None
    interrupted: Signals | None = None


class Run:
    """One run under way: the state, the host's memory, and the compiled programs."""

    def __init__(self, experiment: Experiment, folder: Path, interrupts: Interrupts):
        self.folder, self.interrupts = folder, interrupts
        self.memory = as_json(experiment.method.memory, "the method's memory")
        self.models = train.models(experiment)
        self.base, start = train.frozen_and_trained(experiment)
        self.base_checksum = adapters.fingerprint(experiment.student.params, experiment.lora) if self.base else None
        self.state = train.initial_state(experiment, start)
        arrays = checkpoint.arrays_of(self.state)
        processes.by_first(lambda: checkpoint.check_space(folder, arrays))
        # Once, not in every step: published parameters lie on the host.
        put = jax.device_put if sharding.current() is None else sharding.place_parameters
        kept = lambda teacher: pretrained.kept_in(teacher.params, experiment.teacher_dtype)
        self.teachers = {name: put(kept(teacher)) for name, teacher in experiment.teachers.items()}
        without = lambda model: model._replace(params=None)
        self.experiment = dataclasses.replace(
            experiment,
            student=without(experiment.student),
            teachers={name: without(teacher) for name, teacher in experiment.teachers.items()},
        )
        self.prompts = Prompts(experiment.task.train, experiment.prompts, experiment.seed, experiment.rounds)
        self.updates = [
            train.make_update(o, self.models, experiment.optimizer, experiment.shapes, experiment.reduce)
            for o in experiment.method.objectives
        ]
        occasions = {
            when: [n for n, r in experiment.method.snapshots.items() if occasion(r) == when] for when in OCCASIONS
        }
        self.rules = {
            when: train.refresh_snapshots(experiment.method, names) for when, names in occasions.items() if names
        }
        gated = {n: r for n, r in experiment.method.snapshots.items() if occasion(r) == "gate"}
        self.gates = {n: (r.open, train.refresh_snapshots(experiment.method, [n])) for n, r in gated.items()}
        self.skipped_in_a_row, self.skipped = 0, 0
        self.before: Accuracy | None = None
        self.saved = 0
        self.lengths: dict[str, float] = {}
        self.log: RunLog | NoLog

    # ---- policies -----------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """Parameters of every policy but the live one."""
        return {**self.base, **self.teachers, **self.state.snapshots}

    def environment(self) -> Environment:
        """What `collect` may use now."""
        params = adapters.completed({**self.parameters(), "live": self.state.params})
        policies = {name: self.policy(name, own) for name, own in params.items()}
        return Environment(policies, self.experiment.task.verify, self.prompts.more)

    def policy(self, name: str, params: Any) -> Policy:
        """A policy with these parameters."""
        e = self.experiment
        source, template = e.teachers.get(name, e.student), train.template_of(e.method, name)
        return Policy(self.models[name], params, source.tokenizer, e.shapes, origin=source.origin, template=template)

    # ---- the loop -----------------------------------------------------------------------------------------------

    def go(self, start: int) -> Result:
        """All steps from `start` on; a signal ends the run with everything saved."""
        after = None
        try:
            self.steps(start)
            after = self.evaluate(self.experiment.steps)
            with self.interrupts.held():
                self.close(after)
        except Interrupted as interrupted:
            with self.interrupts.held():
                self.leave(interrupted.number)
            return Result(self.state, self.before, after, interrupted.number)
        return Result(self.state, self.before, after)

    def steps(self, start: int) -> None:
        """Steps, the evaluations between them, and checkpoints."""
        e = self.experiment
        if not e.save_every and e.steps > 2:
            self.log.say(
                "nothing is saved before the last step (--save-every 0): a run that is killed has lost everything"
            )
        for step in range(start, e.steps):
            # Before the step, not after the last one: a resumed run then measures what it had not yet recorded.
            if step == 0:
                self.before = self.evaluate(0)
            elif e.evaluate_every and step % e.evaluate_every == 0:
                self.evaluate(step)
            with self.interrupts.held():
                self.step(step)
                self.interrupts.agree()
                due = e.save_every and (step + 1) % e.save_every == 0
                if due or step + 1 == e.steps or self.interrupts.asked:
                    self.save()
            self.interrupts.check()

    def leave(self, number: Signals) -> None:
        """Saves what is not yet saved, and says how to go on."""
        step = int(self.state.step)
        if step == 0:
            self.log.say(f"{number.name} before the first step: nothing to save; start again with --resume")
            return
        if self.saved < step:
            self.save()
        self.log.say(f"{number.name} after step {step}: saved; go on with --resume")

    def step(self, step: int) -> None:
        """One batch: collect, update with every objective that is due, refresh the snapshots, record."""
        started = time.perf_counter()
        key = jax.random.fold_in(sharding.own_key(self.state.key), step)
        method = self.experiment.method
        late = bounded.out_of_time()
        rollouts, memory = method.collect(self.environment(), self.prompts.take(), key, self.memory)
        # Through JSON in every step: what a method remembers is then the same in a run that was never interrupted.
        self.memory = as_json(memory, "the method's memory")
        if processes.many():
            written = zlib.crc32(repr([(r.tokens, r.reward, r.group, r.contexts) for r in rollouts]).encode())
            processes.agree(written, f"rollouts in step {step + 1}: collect depends on more than its arguments")
        collected = time.perf_counter()
        values = self.train_on(step, self.batch(rollouts, step)) if rollouts else {}
        # The device's step counts batches: rules such as `refresh(every)` see 1 after the first.
        self.state = self.state.replace(step=self.state.step + 1)
        self.renew("batch")
        self.renew_gated()
        jax.block_until_ready(self.state.params)
        tokens = sum(len(r.tokens) for r in rollouts)
        values |= {"rollout_seconds": collected - started, "update_seconds": time.perf_counter() - collected}
        values |= records.hedging(rollouts) | records.measured(rollouts) | (self.lengths if rollouts else {})
        values |= self.late_verdicts(step + 1, late)
        self.log.metrics(step + 1, values | {"tokens_per_second": tokens / (collected - started)})
        if not rollouts:
            self.log.say(f"step {step + 1}: no rollouts were kept: not trained")
        if step % 10 == 0 or step + 1 == self.experiment.steps:
            self.log.rollouts(step + 1, rollouts)
            self.log.tokens(step + 1, rollouts, self.experiment.student.tokenizer, train.all_views(method))

    def late_verdicts(self, step: int, before: int) -> dict[str, float]:
        """How many verdicts since `before` were given because the time was over, of all processes; says so if any were."""
        late = sum(processes.everyone(bounded.out_of_time() - before))
        if late:
            many = "verdict counts" if late == 1 else "verdicts count"
            self.log.say(f"step {step}: {late} {many} as wrong because judging took more than {bounded.LIMIT_S:g} s")
        return {"late_verdicts": float(late)}

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
        due = [(o, u) for o, u in zip(e.method.objectives, self.updates, strict=True) if o.due(step)]
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
        if when in self.rules:
            snapshots = self.rules[when](self.state.params, self.state.snapshots, self.state.step)
            self.state = self.state.replace(snapshots=snapshots)

    def renew_gated(self) -> None:
        """Applies the rules of the snapshots whose gate is open; the others stay what they are, bit for bit."""
        for is_open, rule in self.gates.values():
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
            path = self.folder / f"skipped-batch-{step + 1}.npz"
            leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
            if processes.first():
                np.savez(path, **{jax.tree_util.keystr(name, simple=True, separator="/"): x for name, x in leaves})
            raise RunError(
                f"{self.skipped_in_a_row} updates in a row were not finite, the last at step {step + 1}; its batch is "
                f"in {path}: lower the learning rate or look at that batch"
            )

    def evaluate(self, step: int) -> Accuracy | None:
        """Greedy accuracy on held-out examples; a signal ends it at once."""
        self.interrupts.agree()
        self.interrupts.check()
        examples = self.experiment.task.test[: self.experiment.evaluation]
        if not examples:
            return None
        late = bounded.out_of_time()
        found = accuracy(self.environment().live, examples, self.interrupts.noticed_by(self.experiment.task.verify))
        self.interrupts.agree()
        self.interrupts.check()
        caps = by_cap([len(r.tokens) for r in found.rollouts], found.right, self.experiment.shapes.completion)
        values = {"accuracy": found.solved, "low": found.low, "high": found.high, **caps}
        self.log.evaluation(step, values | self.late_verdicts(step, late))
        self.log.say(f"held-out accuracy after {step} steps: {found}")
        return found

    def close(self, after: Accuracy | None) -> None:
        """Writes `result.json` and `model/`, and prints the closing table."""
        rows = [("before", self.before), ("after", after)]
        numbers = {name: None if a is None else dict(zip(a._fields[:4], a[:4], strict=True)) for name, a in rows}
        result = {**numbers, "steps": self.experiment.steps, "skipped_updates": self.skipped}
        if processes.first():
            replace_text(self.folder / "result.json", json.dumps(result, indent=1))
        if self.experiment.export:
            whole, trained = self.environment().live.params, self.state.params
            for what, target in export(self.experiment, self.folder, whole, trained).items():
                self.log.say(f"{what} written to {target}")
        if self.before is None and after is None:
            return
        self.log.table(
            f"{self.experiment.task.name}: held-out greedy accuracy, 95 % interval",
            ("", "accuracy", "interval", "examples"),
            [
                (name, f"{100 * a.solved:.1f} %", f"{100 * a.low:.1f} to {100 * a.high:.1f} %", str(a.examples))
                for name, a in rows
                if a is not None
            ],
        )

    # ---- saving -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Saves everything the next step depends on."""
        host = {
            "memory": self.memory,
            "position": self.prompts.position(),
            "skipped": [self.skipped, self.skipped_in_a_row],
            "before": None if self.before is None else list(self.before[:4]),
            "base": self.base_checksum,
        }
        checkpoint.save(self.folder / "checkpoints", self.state, host)
        self.saved = int(self.state.step)

    def restore(self) -> int:
        """Goes back to the newest checkpoint; returns its step."""
        self.state, host = checkpoint.restore(self.folder / "checkpoints", self.state)
        if host.get("base") != self.base_checksum:
            raise RunError(
                f"{self.folder}: its adapters were trained on other weights, or with other options of Lora, than those "
                "given now: resume with the model and the options that it began with"
            )
        self.memory = host["memory"]
        self.prompts.go_to(host["position"])
        self.skipped, self.skipped_in_a_row = host["skipped"]
        self.before = None if host["before"] is None else Accuracy(*host["before"])
        self.saved = int(self.state.step)
        return self.saved
