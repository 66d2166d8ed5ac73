"""On-policy self-distillation against GRPO (Kim et al. 2026, arXiv:2603.24472, section 5, Figures 3-5 and 16-18).

    python experiments/degrade/on_policy.py                                  all arms, all seeds, one table
    sdjax train experiments/degrade/on_policy.py --method sdpo --thinking    one run

Trained on in-domain problems only.  The teacher reads a correct answer of the group, with or without its thinking, and is
frozen, a moving average, or the student itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from sdjax.cli.options import Choice, from_command_line
from sdjax.engine.train import Experiment
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.run.settings import Settings
from sdjax.study import testbed
from sdjax.study.arms import every_seed
from sdjax.study.settings import TrainingSettings
from sdjax.study.tables import shares, table
from sdjax.tasks import scratchpad

METHOD = "sdpo"
SETTINGS = dataclasses.replace(testbed.SETTINGS, steps=30, prompts=8, evaluation=128, save_every=15)
OPTIONS = {
    "sdpo": {"group_size": 8, **testbed.SDPO, "ema_rate": 0.0},
    "grpo": {"group_size": 8, **testbed.GRPO},
}
TEACHERS = {"frozen": 0.0, "EMA": 0.05, "live": 1.0}
KINDS = {"c = s": True, "c = s without thinking": False}
ARMS = {
    "GRPO": partial(grpo, **testbed.GRPO),
    **{
        f"SDPO, {kind}, {name}": partial(sdpo, **testbed.SDPO, ema_rate=rate, lesson=testbed.peer(thinking))
        for kind, thinking in KINDS.items()
        for name, rate in TEACHERS.items()
    },
}
"""Name to method: whether the teacher reads the thinking, and how it follows the student."""


def experiment(
    *, method: Choice, settings: Settings = SETTINGS, thinking: bool = False, train_size: int = 512
) -> Experiment:
    """In-domain scratchpads.

    Args:
      thinking: the teacher reads a peer's thinking, too.
      train_size: distinct training problems.
    """
    settings = settings.shortened()
    own = settings.method(method, testbed.peer(thinking))
    base, _ = testbed.student(settings.model, settings.smoke)
    size = 8 if settings.smoke else train_size
    task = scratchpad.scratchpad(train_size=size, test_size=settings.evaluation, seed=settings.seed)
    return settings.experiment(method=own, task=task, student=base)


def study(
    *,
    settings: TrainingSettings = TrainingSettings(),
    arms: tuple[str, ...] = tuple(ARMS),
    every: int = 15,
    train_size: int = 512,
) -> str:
    """Runs every arm with every seed, and shows how all families fare.

    Args:
      arms: which of the arms.
      every: batches between two measurements.
      train_size: distinct training problems.
    """
    chosen = settings.shortened()
    if chosen.smoke:
        every, train_size, arms = 1, 4, ("GRPO", "SDPO, c = s without thinking, EMA")
    families = scratchpad.FAMILIES[:1] if chosen.smoke else scratchpad.FAMILIES
    base, identity = testbed.student(chosen.model, chosen.smoke)
    sizes = {"steps": chosen.steps, "every": every, "prompts": chosen.prompts, "lr": chosen.lr}
    sizes["train_size"] = train_size

    def prepared(name: str, seed: int):
        own = {**sizes, "problems": chosen.problems, "seed": seed}
        run = testbed.on_policy(ARMS[name](group_size=chosen.group), base, families, **own, arm=name)
        return {"model": identity, "group": chosen.group, "arm": name, **own}, run

    runs = every_seed(chosen.out, "on-policy", arms, chosen.seeds, prepared)
    before = next(iter(runs.values()))  # at step 0 all arms are the base model
    rows = [line("base", before, 0), *(line(n, r, at) for n, r in runs.items() for at in range(1, len(r[0])))]
    caps = [capped("base", before, 0), *(capped(name, some, -1) for name, some in runs.items())]
    return f"{table(rows)}\n\n{table(caps)}"


def line(name: str, runs: list[list[dict]], at: int) -> dict[str, str]:
    """A row of the table: all seeds of an arm at one of the measured steps."""
    rows = [run[at] for run in runs]
    return {"arm": name, "seeds": str(len(rows)), "step": str(rows[0]["step"]), **testbed.fares(rows)}


def capped(name: str, runs: list[list[dict]], at: int) -> dict[str, str]:
    """In-domain accuracy by generation cap, of all seeds of an arm at one of the measured steps."""
    rows = [run[at] for run in runs]
    caps = [what for what in rows[0]["in_domain"] if what.startswith("accuracy@")]
    return {"arm": name, **{f"{cap}, %": shares(rows, "in_domain", what=cap) for cap in caps}}


if __name__ == "__main__":
    print(from_command_line(study))
