"""The referee's arms: which methods, with which teachers, on which grammar; each run once per base and seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdjax.collect.controls import with_teacher_context
from sdjax.engine.policies import Policy
from sdjax.engine.train import Experiment
from sdjax.methods.antisd import antisd
from sdjax.methods.dasd import dasd
from sdjax.methods.egrsd import egrsd
from sdjax.methods.grpo import grpo
from sdjax.methods.mixsd import mixsd
from sdjax.methods.opd import opd
from sdjax.methods.opsd import opsd
from sdjax.methods.pbsd import pbsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdpo import sdpo
from sdjax.methods.stable_opd import stable_opd
from sdjax.methods.vopd import vopd
from sdjax.methods.vpd import vpd
from sdjax.models import pretrained
from sdjax.models.pretrained import Pretrained
from sdjax.run.settings import Settings
from sdjax.study import referee, searchers
from sdjax.study.arms import arm
from sdjax.study.bases import identity
from sdjax.study.searchers import ANSWERS, INTERVAL, SOLUTION
from sdjax.study.short_runs import ShortRuns
from sdjax.tasks import search
from sdjax.tasks.search import BARE, FILLER, MARKED, SILENT, Grammar
from sdjax.types import Example, Method

BASES = (0, 1, 2)
SEEDS = (0, 1, 2, 3)
PROBES = (0, 1, 2, 3, 5, 8, 12, 20, 30, 60)
"""After so many batches every arm is measured, as far as it goes."""

FORCED_AT = 20
"""After so many batches some arms are measured with forced words, too."""

GROUP = 8
SDPO = {"alpha": 0.5, "top_k": None, "ema_rate": 0.0}
"""Jensen-Shannon over the whole vocabulary, a frozen teacher."""

GRPO = {"normalised": False, "clip": (0.2, 0.28)}
"""As Kim et al. 2026 (arXiv:2603.24472) compare with."""

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""OPSD's and EGRSD's sampling without their filters."""

Arm = Callable[[Grammar], Method]


def distilled(context: searchers.Context, control: str = "matched") -> Arm:
    """SDPO whose teacher reads a context, or what a control puts in its place."""
    made = lambda g: sdpo(group_size=GROUP, **SDPO, lesson=searchers.lesson(context, g))
    return lambda grammar: with_teacher_context(made(grammar), control)


def taught(factory: Callable[..., Method], **options: Any) -> Arm:
    """A method whose teacher reads the answer and leaves no misses."""
    return lambda grammar: factory(**options, lesson=searchers.lesson(ANSWERS[0], grammar))


HUB: dict[str, Arm] = {
    "GRPO": lambda _: grpo(group_size=GROUP, **GRPO),
    **{f"SDPO, answer, keep {c.dose:g}": distilled(c) for c in ANSWERS},
    "SDPO, answer, keep 0, mismatched": distilled(ANSWERS[0], "mismatched"),
}
CONTEXTS: dict[str, Arm] = {
    "SDPO, interval": distilled(INTERVAL),
    "SDPO, solution, keep 0": distilled(SOLUTION),
    "SDPO, answer, keep 0, no lesson": distilled(ANSWERS[0], "none"),
}
SYSTEMS: dict[str, Arm] = {
    "RLRT": taught(rlrt, group_size=GROUP),
    "EGRSD": taught(egrsd, group_size=GROUP, **PLAIN),
    "EGRSD, no gate": taught(egrsd, group_size=GROUP, strength=0.0, **PLAIN),
    "AntiSD": taught(antisd, group_size=GROUP),
    "AntiSD, sign reversed": taught(antisd, group_size=GROUP, coef=-0.5),
    "OPSD": taught(opsd, group_size=GROUP, **PLAIN),
    "OPSD, no clip": taught(opsd, group_size=GROUP, clip=None, **PLAIN),
    "MixSD": taught(mixsd, temperature=1.0, top_k=0),
    "MixSD, informed texts only": taught(mixsd, naive=0.0, temperature=1.0, top_k=0),
    "VPD": taught(vpd, group_size=GROUP),
    "VPD, teacher not trained": taught(vpd, group_size=GROUP, every=0),
    "DASD": taught(dasd, group_size=GROUP),
    "DASD, attracts only": taught(dasd, group_size=GROUP, repelled=0.0),
    "DASD, repels only": taught(dasd, group_size=GROUP, repelled=1.0),
    "OPD": taught(opd, group_size=GROUP),
    "vOPD": taught(vopd, group_size=GROUP),
    "StableOPD": taught(stable_opd, group_size=GROUP),
    "PBSD": taught(pbsd, pairs=GROUP // 2),
}
ONLY_SEARCHERS = ("GRPO", "SDPO, answer, keep 0")
"""What a grammar without trials can be asked."""

FORCED = ("SDPO, answer, keep 0",)
"""Arms that are measured with words forced after every miss, where the grammar has words."""

ARMS: dict[str, dict[str, Arm]] = {
    MARKED.name: HUB | CONTEXTS | SYSTEMS,
    SILENT.name: HUB,
    FILLER.name: HUB,
    BARE.name: {name: HUB[name] for name in ONLY_SEARCHERS},
}
"""The arms of each grammar."""


class Sizes(NamedTuple):
    """How much is done in every run."""

    prompts: int = 4
    lr: float = 1e-3
    train_size: int = 512
    problems: int = 40
    """Held-out problems of each family that every measurement answers, once each."""


SETTINGS = Settings(
    model="",
    context=referee.SHAPES.context,
    completion=referee.SHAPES.completion,
    rows=referee.SHAPES.rows,
    tokens_per_chunk=None,
    log="",
)


def experiment(method: Method, student: Pretrained, sizes: Sizes) -> Experiment:
    """The run of a method, to be repeated with other students, problems and seeds: AdamW, gradients clipped at norm 1."""
    chosen = {"prompts": sizes.prompts, "lr": sizes.lr, "steps": max(PROBES)}
    task = search.search(train_size=sizes.train_size, test_size=1)
    return dataclasses.replace(SETTINGS, **chosen).experiment(method=method, task=task, student=student, export=False)


class Block:
    """The arms of one grammar, its base models, and the folder of their results."""

    def __init__(self, folder: str | Path, grammar: Grammar, sizes: Sizes, steps: int, cache: str = ""):
        self.folder, self.grammar, self.sizes = Path(folder), grammar, sizes
        self.probes = tuple(step for step in PROBES if step <= steps)
        self.bases = {seed: searchers.base(grammar, seed=seed, cache=cache) for seed in BASES}

    def run(self, name: str) -> list[list[dict[str, Any]]]:
        """What an arm measured, `[base][seed]`; what is in the folder is read, the rest is run."""
        runs = functools.cache(
            lambda: ShortRuns(experiment(ARMS[self.grammar.name][name](self.grammar), self.student(0), self.sizes))
        )
        return [[self.one(name, base, seed, runs) for seed in SEEDS] for base in BASES]

    @functools.cache  # noqa: B019
    def student(self, base: int) -> Pretrained:
        """A base model."""
        return pretrained.load(self.bases[base])

    def one(self, name: str, base: int, seed: int, runs: Callable[[], ShortRuns]) -> dict[str, Any]:
        """One run of an arm."""
        told = {"grammar": self.grammar.name, "arm": name, "base": identity(self.bases[base]), "seed": seed}
        told |= {**self.sizes._asdict(), "probes": self.probes}
        forced = bool(self.grammar.words) and name in FORCED
        return arm(self.folder, "run", told, lambda _: self.measured(runs(), self.student(base), seed, forced))

    def measured(self, runs: ShortRuns, student: Pretrained, seed: int, forced: bool) -> dict[str, Any]:
        """The rows of a run, and what it does with forced words where they are asked for."""
        task = search.search(train_size=self.sizes.train_size, test_size=1, seed=seed)
        problems, key = referee.held_out(self.sizes.problems, seed), jax.random.key(1000 + seed)
        steps, ends = iter(self.probes), []

        def looked(policy: Policy) -> dict[str, Any]:
            if next(steps) == FORCED_AT and forced:
                ends.append(self.forced(policy, problems["more_options"], key))
            return referee.behaviour(policy, problems, key)

        rows = runs.measured(student, task, seed, looked, self.probes)
        return {"rows": rows, "forced": ends[0] if ends else None}

    def forced(self, policy: Policy, examples: Sequence[Example], key: jax.Array) -> dict[str, float]:
        """What a policy does where a word is forced after its misses."""
        policy = dataclasses.replace(policy, shapes=dataclasses.replace(policy.shapes, rows=len(examples)))
        texts = referee.with_forced_words(policy, examples, self.grammar.words[0], key)
        return referee.summary(examples, texts, [len(t.split()) for t in texts])


def with_forced(results: Mapping[str, list[list[dict]]]) -> Iterator[tuple[str, list[list[list[dict]]]]]:
    """Every arm's rows, and beside some what they do with forced words as an arm of its own: `NAME, words forced`."""
    for name, bases in results.items():
        yield name, [[run["rows"] for run in seeds] for seeds in bases]
        if all(run["forced"] for seeds in bases for run in seeds):
            then = lambda run: [{"step": FORCED_AT, "more_options": run["forced"]}]
            yield f"{name}, words forced", [[then(run) for run in seeds] for seeds in bases]
