"""How many distinct problems are trained on (Kim et al. 2026, arXiv:2603.24472, section 6: task coverage).

    python experiments/degrade/coverage.py

The same batches and steps for every size, SDPO with `c = s` and a frozen teacher against GRPO.  Where a batch holds more
problems than there are, it holds each several times, and each copy is a group of its own (the paper's copies, too).
512 problems are an arm of `on_policy.py`, and taken from its results where its arguments are the same.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import tyro

from sdjax.cli.options import load_experiment
from sdjax.study import testbed
from sdjax.study.arms import every_seed, table
from sdjax.tasks import scratchpad

SIZES = (1, 8, 64, 128, 512)
ON_POLICY = load_experiment(str(Path(__file__).with_name("on_policy.py")))
ARMS = {name: ON_POLICY.ARMS[name] for name in ("GRPO", "SDPO, c = s, frozen")}


def study(
    *,
    out: str = "runs/degrade",
    model: str = "",
    sizes: tuple[int, ...] = SIZES,
    steps: int = 30,
    every: int = 15,
    prompts: int = 8,
    group: int = 8,
    lr: float = 3e-4,
    problems: int = 96,
    seeds: int = 3,
    smoke: bool = False,
) -> str:
    """Trains on few and on many problems, and shows how all families fare.

    Args:
      out: the folder of results; finished arms are not run again, interrupted ones go on.
      model: a model's folder instead of the base model.
      sizes: numbers of distinct training problems.
      steps: batches; `every` so many of them the student is measured.
      prompts, group: problems per batch and attempts per problem.
      lr: learning rate of AdamW.
      problems: of each family, held out, on which the student is measured, and answers to training problems.
      seeds: of problems, order and samples.
      smoke: two steps on one and on three problems with a base model that knows nothing.
    """
    if smoke:
        sizes, steps, every, prompts, group, problems, seeds = (1, 3), 2, 2, 2, 2, 2, 1
    families = scratchpad.FAMILIES[:1] if smoke else scratchpad.FAMILIES
    base, identity = testbed.student(model, smoke)
    shared = {"steps": steps, "every": every, "prompts": prompts, "lr": lr, "problems": problems}

    def prepared(of: tuple[str, int], seed: int):
        name, size = of
        own = {**shared, "train_size": size, "seed": seed}
        run = testbed.on_policy(ARMS[name](group_size=group), base, families, **own, arm=name)
        return {"model": identity, "group": group, "arm": name, **own}, run

    runs = every_seed(out, "on-policy", tuple(itertools.product(ARMS, sizes)), seeds, prepared)
    end = lambda some: {"seeds": str(len(some)), **testbed.fares([r[-1] for r in some])}
    return table([{"arm": name, "problems": str(size), **end(some)} for (name, size), some in runs.items()])


if __name__ == "__main__":
    print(tyro.cli(study))
