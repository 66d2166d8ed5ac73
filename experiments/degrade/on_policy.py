"""On-policy self-distillation against GRPO (Kim et al. 2026, arXiv:2603.24472, section 5, Figures 3-5 and 16-18).

    python experiments/degrade/on_policy.py                                  all arms, all seeds, one table
    sdjax train experiments/degrade/on_policy.py --method sdpo --thinking    one run

Trained on in-domain problems only.  The teacher reads a correct answer of the group, with or without its thinking, and is
frozen, a moving average, or the student itself.
"""

from __future__ import annotations

from functools import partial

import jax
import optax
import tyro

from sdjax import testbed
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import peer_or_feedback, sdpo
from sdjax.models.pretrained import Pretrained
from sdjax.options import Choice
from sdjax.study import arm, shown, table, trained
from sdjax.tasks import scratchpad
from sdjax.train import Experiment
from sdjax.types import Method

METHOD = "sdpo"
OPTIONS = {
    "sdpo": {"group_size": 8, "alpha": 0.5, "top_k": None, "ema_rate": 0.0},
    "grpo": {"group_size": 8, "normalised": False, "clip": (0.2, 0.28)},
}
TEACHERS = {"frozen": 0.0, "EMA": 0.05, "live": 1.0}
ARMS = {
    "GRPO": ("grpo", {}),
    **{f"SDPO, c = s, {name}": ("sdpo", {"thinking": True, "ema_rate": rate}) for name, rate in TEACHERS.items()},
    **{
        f"SDPO, c = s without thinking, {name}": ("sdpo", {"thinking": False, "ema_rate": rate})
        for name, rate in TEACHERS.items()
    },
}
"""Name to method, whether the teacher reads the thinking, and how the teacher follows the student."""


def experiment(
    *,
    method: Choice,
    model: str = "",
    thinking: bool = False,
    steps: int = 30,
    prompts: int = 8,
    lr: float = 3e-4,
    train_size: int = 512,
    evaluation: int = 128,
    save_every: int = 15,
    seed: int = 0,
    smoke: bool = False,
) -> Experiment:
    """In-domain scratchpads.

    Args:
      model: a model's folder instead of the base model.
      thinking: the teacher reads a peer's thinking, too.
      steps: batches.
      prompts: problems per batch; the method's group size is attempts per problem.
      lr: learning rate of AdamW.
      train_size: distinct training problems.
      evaluation: held-out problems, read greedily before and after.
      save_every: steps between checkpoints.
      smoke: two steps on a few problems.
    """
    if smoke:
        steps, prompts, train_size, evaluation, save_every = 2, 2, 8, 4, 0
    lesson = peer_or_feedback(thinking=thinking, use_feedback=False)
    base, _ = testbed.student(model, smoke)
    return assembled(
        method(lesson=lesson), base, steps, prompts, lr, train_size, evaluation, save_every, seed, export=True
    )


def assembled(
    method: Method,
    base: Pretrained,
    steps: int,
    prompts: int,
    lr: float,
    train_size: int,
    evaluation: int,
    save_every: int,
    seed: int,
    export: bool = False,
) -> Experiment:
    """One run of a method from a base model."""
    return Experiment(
        method=method,
        task=scratchpad.scratchpad(train_size=train_size, test_size=max(evaluation, 1), seed=seed),
        student=base,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.01)),
        shapes=testbed.SHAPES,
        steps=steps,
        prompts=prompts,
        seed=seed,
        evaluation=evaluation,
        save_every=save_every,
        export=export,
    )


def method_of(name: str, group: int) -> Method:
    """The method of an arm."""
    kind, options = ARMS[name]
    if kind == "grpo":
        return grpo(**{**OPTIONS["grpo"], "group_size": group})
    lesson = peer_or_feedback(thinking=options["thinking"], use_feedback=False)
    return sdpo(**{**OPTIONS["sdpo"], "group_size": group, "ema_rate": options["ema_rate"]}, lesson=lesson)


def study(
    *,
    out: str = "runs/degrade",
    model: str = "",
    arms: tuple[str, ...] = tuple(ARMS),
    steps: int = 30,
    every: int = 15,
    prompts: int = 8,
    group: int = 8,
    lr: float = 3e-4,
    train_size: int = 512,
    problems: int = 96,
    seeds: int = 3,
    smoke: bool = False,
) -> str:
    """Runs every arm with every seed, and shows how all families fare.

    Args:
      out: the folder of results; finished arms are not run again, interrupted ones go on.
      model: a model's folder instead of the base model.
      arms: which of the arms.
      steps: batches; `every` so many of them the student is measured.
      prompts, group: problems per batch and attempts per problem.
      lr: learning rate of AdamW.
      train_size: distinct training problems.
      problems: of each family, held out, on which the student is measured, and of the training set.
      seeds: of problems, order and samples.
      smoke: two steps of two arms of a base model that knows nothing.
    """
    if smoke:
        steps, every, prompts, group, train_size, problems, seeds = 2, 1, 2, 2, 4, 2, 1
        arms = ("GRPO", "SDPO, c = s without thinking, EMA")
    families = scratchpad.FAMILIES[:1] if smoke else scratchpad.FAMILIES
    base, identity = testbed.student(model, smoke)
    common = {"model": identity, "steps": steps, "every": every, "prompts": prompts, "group": group, "lr": lr}
    common |= {"train_size": train_size, "problems": problems}
    runs: dict[str, list] = {name: [] for name in arms}
    for seed in range(seeds):
        for name in arms:
            e = assembled(method_of(name, group), base, steps, prompts, lr, train_size, 0, every, seed)
            measured = {"train": e.task.train[:problems], **testbed.held_out_problems(problems, seed, families)}
            probe = partial(testbed.everywhere, problems=measured, key=jax.random.key(1000 + seed))
            run = partial(trained, e, probe=probe, every=every)
            runs[name].append(arm(out, "on-policy", {**common, "arm": name, "seed": seed}, lambda f, run=run: run(f)))
    return shown_runs(runs)


def shown_runs(runs: dict[str, list]) -> str:
    """A table of every arm at every measured step: accuracy of every set of problems, in-domain length and hedges."""
    rows = []
    for name, seeds in runs.items():
        for at, row in enumerate(seeds[0]):
            of = lambda what, kind, scale=1.0, at=at, seeds=seeds: shown([s[at][kind][what] for s in seeds], scale)
            sets = [of("accuracy", kind, 100) for kind in row if kind != "step"]
            rows.append([name, str(row["step"]), *sets, of("length", "in_domain"), of("epistemic", "in_domain")])
    sets = [kind.replace("_", " ") for kind in seeds[0][0] if kind != "step"]
    return table(("arm", "step", *(f"{s}, %" for s in sets), "length", "E(y)"), rows)


if __name__ == "__main__":
    print(tyro.cli(study))
