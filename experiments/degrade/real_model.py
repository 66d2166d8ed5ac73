"""The same question for a real model: SmolLM2-135M on sums, and what it does on problems that were not trained on.

    python experiments/degrade/real_model.py

Four methods with one budget of rows on `experiments/chain_sum.py`'s problems: self-distillation from demonstrations and
the solution (SDPO, OPSD), rewards alone (GRPO), and the worked solutions themselves (SFT).  Longer sums, larger numbers and
GSM-Symbolic are never trained on; how far the model has moved on the latter is KL(base||student) per token, of one sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.cli.options import Choice, from_command_line, load_experiment
from sdjax.collect import rollouts
from sdjax.collect.contexts import question
from sdjax.engine import policies
from sdjax.engine.generate import GREEDY
from sdjax.engine.policies import Environment, Policy
from sdjax.engine.tokens import Shapes
from sdjax.kernels.distributions import logprob
from sdjax.methods.grpo import grpo
from sdjax.methods.opsd import opsd
from sdjax.methods.sdpo import sdpo
from sdjax.methods.sft import sft
from sdjax.models.transformer import Transformer
from sdjax.study.arms import behaviour, every_seed, trained
from sdjax.study.settings import StudySettings
from sdjax.study.tables import across, changes, gains, shares, table
from sdjax.tasks.reasoning_gym import chain_sum, reasoning_gym
from sdjax.types import Rollout, Task, View

SUMS = load_experiment(str(Path(__file__).parent.parent / "chain_sum.py"))
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
ARMS = {
    "SDPO": Choice(sdpo, SUMS.OPTIONS["sdpo"]),
    "OPSD": Choice(opsd, {"group_size": 4, **PLAIN}),
    "OPSD without its clip": Choice(opsd, {"group_size": 4, "clip": None, **PLAIN}),
    "GRPO": Choice(grpo, SUMS.OPTIONS["grpo"]),
    "SFT": Choice(sft),
}
"""Name to method; four attempts at a problem, or, for SFT, four problems' solutions in their place."""

LONGER = Shapes(context=512, completion=160, rows=64, tokens_per_chunk=256)
"""For GSM-Symbolic, whose answers are sentences."""

READERS = {"student": View()}


def said(dist, token):
    """The signal of `moved`."""
    return {"logprobs": logprob(dist["student"], token)}


def moved(policy: Policy, written: Sequence[Rollout]) -> float:
    """KL(base||student) per token, estimated by the base model's samples: `mean of log base - log student`, in nats."""
    environment = Environment({"live": policy}, verify=None, more=None)
    scored = policies.score(environment, written, READERS, said)
    differences = [np.asarray(r.logprobs) - r.extras["logprobs"] for r in scored]
    return float(np.concatenate(differences).mean())


def probed(policy: Policy, tasks: Mapping[str, Task], written: Sequence[Rollout]) -> dict[str, Any]:
    """Greedy answers to the held-out problems of every task, and how far the policy has moved."""
    shapes = lambda name: LONGER if name == "GSM-Symbolic" else policy.shapes
    read = lambda name, task: behaviour(
        dataclasses.replace(policy, shapes=shapes(name)), task.test, task.verify, jax.random.key(0), sampling=GREEDY
    )
    far = moved(dataclasses.replace(policy, shapes=LONGER), written)
    return {**{name: read(name, task) for name, task in tasks.items()}, "moved": far}


def held_out(trained_on: Task, problems: int, seed: int) -> dict[str, Task]:
    """Problems of the kind that is trained on, longer and larger ones, and word problems."""
    more = {"train_size": 1, "test_size": problems, "seed": seed}
    return {
        "sums": trained_on,
        "three terms": chain_sum(terms=(3, 3), **more),
        "two digits": chain_sum(digits=(2, 2), **more),
        "GSM-Symbolic": reasoning_gym("gsm_symbolic", size=1, test_size=problems // 2, seed=seed),
    }


def study(
    *,
    settings: StudySettings = StudySettings(model="smollm2", problems=64),
    arms: tuple[str, ...] = tuple(ARMS),
    steps: int = 30,
    prompts: int = 4,
    lr: float = 2e-5,
) -> str:
    """Trains with every method and seed, and shows how the model fares where it was trained and where not.

    Args:
      arms: which of the arms; the base model stands above them.
      steps: batches.
      prompts: problems per batch, four attempts at each.
      lr: learning rate of AdamW, after five steps of linear rise.
    """
    chosen = settings.shortened()
    if chosen.smoke:
        chosen, steps, prompts, arms = dataclasses.replace(chosen, problems=4), 2, 2, ("SDPO", "SFT")
    model, problems = chosen.model, chosen.problems
    shared = {"model": model, "steps": steps, "prompts": prompts, "lr": lr, "problems": problems}
    sums = dataclasses.replace(SUMS.SETTINGS, model=model, steps=steps, lr=lr, evaluation=problems, save_every=0)

    def prepared(name: str, seed: int):
        def run(folder: Path):
            rows = prompts * (4 if name == "SFT" else 1)
            own = dataclasses.replace(sums, prompts=rows, seed=seed)
            experiment = SUMS.experiment(method=ARMS.get(name, ARMS["SFT"]), settings=own)
            tasks, start = held_out(experiment.task, problems, seed), experiment.student
            base = Policy(
                Transformer(start.config), start.params, start.tokenizer, experiment.shapes, origin=start.origin
            )
            texts = rollouts.sample(
                dataclasses.replace(base, shapes=LONGER), tasks["GSM-Symbolic"].test, jax.random.key(seed)
            )
            probe = partial(probed, tasks=tasks, written=[r.read_by(student=question(r.example)) for r in texts])
            if name == "base":
                return [{"step": 0, **probe(base)}]
            told = {"experiment": "real-model", "arm": name, "seed": seed}
            return trained(dataclasses.replace(experiment, evaluation=0, export=False), folder, probe, 0, told)

        return {**shared, "arm": name, "seed": seed}, run

    runs = every_seed(chosen.out, "real-model", ("base", *arms), chosen.seeds, prepared)
    last = {name: [r[-1] for r in some] for name, some in runs.items()}
    fares = [{"arm": name, "seeds": str(len(some)), **cells(some)} for name, some in last.items()]
    pairs = [(name, "base") for name in arms] + [("SDPO", "GRPO")] * ({"SDPO", "GRPO"} <= {*arms})
    moves = [{"arm": name, "against": other, **against(last[name], last[other])} for name, other in pairs]
    return f"{table(fares)}\n\n{table(moves)}"


def against(results: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Differences seed by seed: accuracy in points, lengths in tokens."""
    kinds = [name for name, value in results[0].items() if isinstance(value, Mapping)]
    lengths = {f"length, {kind}": changes(results, before, kind, "length") for kind in (kinds[0], kinds[-1])}
    return {**{f"{kind}, points": gains(results, before, kind) for kind in kinds}, **lengths}


def cells(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the table says of one arm."""
    kinds = [name for name, value in results[0].items() if isinstance(value, Mapping)]
    solved = {f"{kind}, %": shares(results, kind) for kind in kinds}
    lengths = {f"length, {kind}": across(results, kind, "length") for kind in (kinds[0], kinds[-1])}
    return {**solved, **lengths, "KL(base, student)": across(results, "moved", digits=3)}


if __name__ == "__main__":
    print(from_command_line(study))
