"""How many distinct problems are trained on (Kim et al. 2026, arXiv:2603.24472, section 6: task coverage).

    python experiments/degrade/coverage.py

The same batches and steps for every size, SDPO with `c = s` and a frozen teacher against GRPO.  Where a batch holds more
problems than there are, it holds each several times, and each copy is a group of its own (the paper's copies, too).
512 problems are an arm of `on_policy.py`, and taken from its results where its arguments are the same.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from sdjax.cli.options import from_command_line, load_experiment
from sdjax.study import testbed
from sdjax.study.arms import every_seed
from sdjax.study.settings import TrainingSettings
from sdjax.study.tables import table
from sdjax.tasks import scratchpad

SIZES = (1, 8, 64, 128, 512)
ON_POLICY = load_experiment(str(Path(__file__).with_name("on_policy.py")))
ARMS = {name: ON_POLICY.ARMS[name] for name in ("GRPO", "SDPO, c = s, frozen")}


def study(
    *,
    settings: TrainingSettings = TrainingSettings(),
    every: int = 15,
    sizes: tuple[int, ...] = SIZES,
) -> str:
    """Trains on few and on many problems, and shows how all families fare.

    Args:
      every: batches between two measurements.
      sizes: numbers of distinct training problems.
    """
    chosen = settings.shortened()
    every, sizes = (2, (1, 3)) if chosen.smoke else (every, sizes)
    families = scratchpad.FAMILIES[:1] if chosen.smoke else scratchpad.FAMILIES
    base, identity = testbed.student(chosen.model, chosen.smoke)
    shared = {"steps": chosen.steps, "every": every, "prompts": chosen.prompts, "lr": chosen.lr}
    shared["problems"] = chosen.problems

    def prepared(of: tuple[str, int], seed: int):
        name, size = of
        own = {**shared, "train_size": size, "seed": seed}
        run = testbed.on_policy(ARMS[name](group_size=chosen.group), base, families, **own, arm=name)
        return {"model": identity, "group": chosen.group, "arm": name, **own}, run

    runs = every_seed(chosen.out, "on-policy", tuple(itertools.product(ARMS, sizes)), chosen.seeds, prepared)
    end = lambda some: {"seeds": str(len(some)), **testbed.fares([r[-1] for r in some])}
    return table([{"arm": name, "problems": str(size), **end(some)} for (name, size), some in runs.items()])


if __name__ == "__main__":
    print(from_command_line(study))
