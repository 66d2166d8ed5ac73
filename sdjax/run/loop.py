"""One run under way, on the host: collect, update, record, evaluate, save, restore."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Sequence
from signal import Signals
from typing import Any

import jax

from sdjax.collect import remembered
from sdjax.devices import processes
from sdjax.engine import train
from sdjax.engine.protocol import Protocol
from sdjax.engine.train import Experiment, State
from sdjax.run.export import export
from sdjax.run.folder import RunError
from sdjax.run.interrupts import Interrupted, Interrupts
from sdjax.run.learner import Learner
from sdjax.run.logs import records
from sdjax.run.logs.sentinels import Alarm, Watch, watched
from sdjax.run.measuring.evaluate import Accuracy, accuracy, by_cap
from sdjax.run.measuring.measures import sampled_accuracy
from sdjax.run.storage import checkpoint
from sdjax.run.storage.mirror import Mirror
from sdjax.run.storage.places import replace_text
from sdjax.run.storage.saving import Keep, Saver
from sdjax.tasks import bounded, maths


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `before` and `after` are held-out accuracies, `interrupted` is the signal that ended it, if any.

    An accuracy that was not measured is `None`.
    """

    state: State
    before: Accuracy | None
    after: Accuracy | None
    interrupted: Signals | None = None


class Run(Learner):
    """One run under way."""

    def __init__(self, experiment: Experiment, mirror: Mirror, interrupts: Interrupts):
        super().__init__(experiment, mirror)
        self.interrupts = interrupts
        self.before: Accuracy | None = None
        self.scores: dict[int, float] = {}
        keep = Keep(experiment.keep, experiment.keep_every, experiment.keep_best)
        check = mirror.owner.check
        self.saver = Saver(self.folder / "checkpoints", keep, lambda message: self.log.say(message), mirror.push, check)
        self.watch, self.stop = Watch(), False

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
                self.saver.look()
                due = e.save_every and (step + 1) % e.save_every == 0
                if due or self.stop or step + 1 == e.steps or self.saver.due_again():
                    self.save()
            self.interrupts.check()
            if self.stop and step + 1 < e.steps:
                self.log.say(f"stopped after step {step + 1} of {e.steps} (--stop-on {e.stop_on}): saved")
                return

    def leave(self, number: Signals) -> None:
        """Saves what is not yet saved, within the time that there is, and says how to go on."""
        step, grace = int(self.state.step), self.experiment.grace
        if step == 0:
            self.log.say(f"{number.name} before the first step: nothing to save; start again with --resume")
            return
        self.log.flush()
        if self.saver.ensure(self.state, self.host(), self.scores, self.interrupts.left(grace)):
            self.log.say(f"{number.name} after step {step}: saved; go on with --resume")
            return
        kept = (
            f"the last checkpoint is of step {self.saver.saved}" if self.saver.saved else "there is no checkpoint yet"
        )
        self.log.say(
            f"{number.name} after step {step}: it cannot be saved within the {grace:g} s of --grace; {kept}: go on with "
            "--resume"
        )

    def step(self, step: int) -> None:
        """One batch: collect, update with every objective that is due, refresh the snapshots, record."""
        started = time.perf_counter()
        late = bounded.out_of_time()
        rollouts = self.collect(step)
        if processes.many():
            written = zlib.crc32(repr([(r.tokens, r.reward, r.group, r.contexts) for r in rollouts]).encode())
            processes.agree(written, f"rollouts in step {step + 1}: collect depends on more than its arguments")
        collected = time.perf_counter()
        values = self.learn(step, rollouts)
        jax.block_until_ready(self.state.params)
        tokens = sum(len(r.tokens) for r in rollouts)
        values |= {"rollout_seconds": collected - started, "update_seconds": time.perf_counter() - collected}
        values |= records.hedging(rollouts) | records.measured(rollouts) | (self.lengths if rollouts else {})
        values |= watched(rollouts) | self.late_verdicts(step + 1, late)
        self.log.metrics(step + 1, values | {"tokens_per_second": tokens / (collected - started)})
        self.alarm(step + 1, self.watch.step(values))
        if not rollouts:
            self.log.say(f"step {step + 1}: no rollouts were kept: not trained")
        if step % self.experiment.completions_every == 0 or step + 1 == self.experiment.steps:
            self.log.rollouts(step + 1, rollouts)
            self.log.tokens(
                step + 1, rollouts, self.experiment.student.tokenizer, train.all_views(self.experiment.method)
            )

    def alarm(self, step: int, alarms: Sequence[Alarm], **where: bool) -> None:
        """Records alarms; one of the kind that `stop_on` names ends the run after this step or the next."""
        self.log.alarm(step, alarms, **where)
        self.stop |= any(alarm.kind == self.experiment.stop_on for alarm in alarms)

    def late_verdicts(self, step: int, before: int) -> dict[str, float]:
        """How many verdicts since `before` were given because the time was over, of all processes; says so if any were."""
        late = sum(processes.everyone(bounded.out_of_time() - before))
        if late:
            many = "verdict counts" if late == 1 else "verdicts count"
            self.log.say(f"step {step}: {late} {many} as wrong because judging took more than {bounded.LIMIT_S:g} s")
        return {"late_verdicts": float(late)}

    def evaluate(self, step: int) -> Accuracy | None:
        """Accuracy on held-out examples by the experiment's protocol; a signal ends it at once."""
        self.interrupts.agree()
        self.interrupts.check()
        examples = self.experiment.task.test[: self.experiment.evaluation]
        if not examples:
            return None
        late = bounded.out_of_time()
        verify, e = self.interrupts.noticed_by(self.experiment.task.verify), self.experiment
        live = self.environment().live
        if e.protocol == Protocol():
            found, more = accuracy(live, examples, verify), {}
        else:
            found, more = sampled_accuracy(live, examples, verify, e.protocol, votes=e.task.verify is maths.verify)
        self.interrupts.agree()
        self.interrupts.check()
        caps = by_cap([len(r.tokens) for r in found.rollouts], found.right, e.shapes.completion)
        values = {"accuracy": found.solved, "low": found.low, "high": found.high, **more, **caps}
        self.scores[step] = found.solved
        self.log.evaluation(step, values | self.late_verdicts(step, late))
        self.log.say(f"held-out accuracy after {step} steps: {found}")
        self.alarm(step, self.watch.evaluation(found.solved, found.low, found.high), evaluation=True)
        return found

    def close(self, after: Accuracy | None) -> None:
        """Waits for the last checkpoint, writes `result.json` and `model/`, and prints the closing table."""
        self.saver.ensure(self.state, self.host(), self.scores)
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
        protocol = self.experiment.protocol
        what = "greedy accuracy" if protocol == Protocol() else f"accuracy, {protocol}"
        self.log.table(
            f"{self.experiment.task.name}: held-out {what}, 95 % interval",
            ("", "accuracy", "interval", "examples"),
            [
                (name, f"{100 * a.solved:.1f} %", f"{100 * a.low:.1f} to {100 * a.high:.1f} %", str(a.examples))
                for name, a in rows
                if a is not None
            ],
        )

    # ---- saving -------------------------------------------------------------------------------------------------

    def host(self) -> dict[str, Any]:
        """What the next step depends on besides the state, as JSON has it, but for what is remembered by key."""
        return {
            "memory": self.memory,
            "position": self.prompts.position(),
            "skipped": [self.skipped, self.skipped_in_a_row],
            "before": None if self.before is None else list(self.before[:4]),
            "base": self.base_checksum,
            "start": {"names": sorted(self.start), "checksum": self.start_checksum},
            "scores": sorted(self.scores.items()),
            "watch": self.watch.remembered(),
        }

    def save(self) -> None:
        """Begins to save everything that the next step depends on."""
        self.log.flush()
        self.saver.start(self.state, self.host(), self.scores)

    def restore(self) -> int:
        """Goes back to the newest checkpoint; returns its step."""
        if self.start and checkpoint.has_snapshots(self.folder / "checkpoints", self.start):
            self.save_start(self.state.params)
        self.state, host = checkpoint.restore(self.folder / "checkpoints", self.state)
        if host.get("base") != self.base_checksum:
            raise RunError(
                f"{self.folder}: its adapters were trained on other weights, or with other options of Lora, than those "
                "given now: resume with the model and the options that it began with"
            )
        if host.get("start", {}).get("checksum") != self.start_checksum:
            raise RunError(
                f"{self.folder}: its policy {' and '.join(sorted(self.start))} is the model that it began with, and the "
                "weights given now are others: resume with the model that it began with"
            )
        self.memory = remembered.like(host["memory"], self.memory)
        self.prompts.go_to(host["position"])
        self.skipped, self.skipped_in_a_row = host["skipped"]
        self.before = None if host["before"] is None else Accuracy(*host["before"])
        self.scores = dict(map(tuple, host.get("scores", ())))
        self.watch = Watch(host.get("watch"))
        self.saver.saved = int(self.state.step)
        return self.saver.saved
