"""The study's base model: a small decoder pre-trained on scratchpads, alone and with every kind of context."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array

from sdjax.collect.contexts import (
    question,
    with_demonstration,
    with_feedback,
    with_reference,
    with_solution,
    without_thinking,
)
from sdjax.collect.plans import with_plan
from sdjax.engine.policies import Policy, sample
from sdjax.engine.train import Experiment
from sdjax.methods.sdpo import peer_or_feedback
from sdjax.models import pretrained
from sdjax.models.configs import ModelConfig
from sdjax.models.pretrained import Pretrained
from sdjax.models.transformer import Transformer
from sdjax.run.settings import Settings
from sdjax.study.arms import behaviour, trained
from sdjax.study.bases import Texts, decoder, identity, made_once
from sdjax.study.pretrain import batches, pretrain, rows
from sdjax.study.tables import across, changes, gains, shares
from sdjax.tasks import scratchpad
from sdjax.tasks.scratchpad import FAMILIES, Author, Problem
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Example, Messages, Method, Task

LONGEST = 384
"""Most tokens of a chat and its answer together in pre-training."""

SHARES = (0.5, 0.15, 0.15, 0.2)
"""How much of the pre-training texts is of each of the families."""

AUTHORS = {
    "alone": scratchpad.ALONE,
    "plan": Author(0.9, 0.9),
    "feedback": Author(0.9, 0.9),
    "answer": scratchpad.ALONE,
    "steps": Author(0.1, 0.1),
    "solution": Author(0.05, 0.03),
}
"""Who writes after which context: the more the context says, the fewer slips and hedges."""

KINDS = {
    "drill": 0.2,
    "alone": 0.45,
    "plan": 0.03,
    "feedback": 0.03,
    "answer": 0.08,
    "steps": 0.08,
    "solution": 0.13,
}
"""How much of the pre-training texts has each context; a drill is a single step, done with care."""


def answer_only(example: Example) -> str:
    """What a context that gives away the answer says: `answer 0 6`."""
    return f"answer {example.answer}"


def told(example: Example, problem: Problem, kind: str, rng: random.Random) -> Messages:
    """The chat of one pre-training text."""
    asked = question(example)
    if kind == "alone":
        return asked
    if kind == "plan":
        return with_plan(asked, example.meta["plan"])
    if kind == "feedback":
        return with_feedback(asked, feedback=scratchpad.remark(rng.randrange(len(problem.steps))))
    full = example.solution if rng.random() < 0.4 else scratchpad.peer(problem, rng)
    text = {"answer": answer_only(example), "steps": without_thinking(full), "solution": full}[kind]
    form = rng.choices((with_solution, with_reference, with_demonstration), (0.7, 0.15, 0.15))[0]
    return form(asked, text)


def texts(seed: int) -> Texts:
    """Endless pre-training texts, `(chat, answer)`; no held-out question among them."""
    rng = random.Random(f"texts:{seed}")
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "drill":
            request, answer = scratchpad.drill(rng)
            yield ({"role": "user", "content": request},), answer
            continue
        family = rng.choices(FAMILIES, SHARES)[0]
        problem = scratchpad.draw(family, rng)
        if scratchpad.held_out(problem):
            continue
        example = scratchpad.example(problem, family.name)
        sure = (len(problem.steps) - 1,) if kind == "answer" else ()
        yield told(example, problem, kind, rng), scratchpad.trace(problem, AUTHORS[kind], rng, sure)


def words() -> tuple[str, ...]:
    """The vocabulary: the task's and that of all contexts' wordings."""
    asked = ({"role": "user", "content": ""},)
    forms = [f(asked, "") for f in (with_solution, with_reference, with_demonstration)]
    chats = [*forms, with_feedback(asked, solution="", feedback=""), with_plan(asked, "0")]
    said = [word for chat in chats for word in chat[-1]["content"].split()]
    return tuple(dict.fromkeys((*scratchpad.vocabulary(), *said)))


def shape(size: int, *, width: int, layers: int) -> ModelConfig:
    """A decoder with a vocabulary of `size`, Qwen3's family."""
    return decoder(size, width=width, layers=layers, units=width * 5 // 2, head_dim=32, positions=1024)


def base(
    *,
    width: int = 64,
    layers: int = 3,
    steps: int = 1000,
    tokens: int = 4096,
    lr: float = 2e-2,
    seed: int = 0,
    cache: str = "",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """The folder of the base model, pre-trained on the first call with these arguments and kept under their hash.

    Args:
      width, layers: of the decoder.
      steps: batches of about `tokens` tokens, the contexts' included.
      lr: peak learning rate.
      seed: of the parameters and of the texts.
      cache: the folder of all base models; by default `sdjax/testbed` in the user's cache folder.
      report: called with the step and its loss now and then.
    """
    arguments = {"width": width, "layers": layers, "steps": steps, "tokens": tokens, "lr": lr, "seed": seed}

    def make() -> Pretrained:
        tokenizer = word_tokenizer(words())
        config = shape(len(tokenizer), width=width, layers=layers)
        data = batches(rows(tokenizer, texts(seed), LONGEST), tokens, LONGEST)
        return Pretrained(config, pretrain(config, data, steps=steps, lr=lr, seed=seed, report=report), tokenizer)

    return made_once("scratchpad", arguments, words(), lambda: texts(seed), make, cache)


# ---- what the study's experiments share -----------------------------------------------------------------------------

SMOKE = {"width": 32, "layers": 1, "steps": 1, "tokens": 512}
"""A base model of seconds, which knows nothing."""

SETTINGS = Settings(model="", lr=3e-4, context=320, completion=192, rows=128, tokens_per_chunk=None)
"""The study's runs: sizes that hold every family's problems and every context.  No model is the study's own."""

SHAPES = SETTINGS.shapes()


def student(model: str = "", smoke: bool = False) -> tuple[Pretrained, str]:
    """The base model, or the one in a folder, and a hash of its parameters."""
    folder = Path(model) if model else base(**(SMOKE if smoke else {}))
    loaded = pretrained.load(folder)
    return loaded, identity(folder)


def policy_of(base: Pretrained) -> Policy:
    """The base model as a policy."""
    return Policy(Transformer(base.config), base.params, base.tokenizer, SHAPES, origin=base.origin)


def first_correct(
    policy: Policy, examples: Sequence[Example], key: Array, n: int, context: Callable[[Example], Messages] = question
) -> list[tuple[int, str]]:
    """For each example: how many of `n` answers are correct, and the first of them (else the first)."""
    found = []
    written = sample(policy, [context(e) for e in examples], key, n=n)
    for example, some in zip(examples, written, strict=True):
        good = [s.text for s in some if scratchpad.verify(example, s.text).reward >= 0.5]
        found.append((len(good), (good or [s.text for s in some])[0]))
    return found


def held_out_problems(
    size: int, seed: int = 0, families: Sequence[scratchpad.Family] = FAMILIES
) -> dict[str, tuple[Example, ...]]:
    """`size` held-out examples of each family, by its name."""
    return {f.name: scratchpad.scratchpad(train_size=1, test_size=size, seed=seed, family=f).test for f in families}


def everywhere(
    policy: Policy, problems: Mapping[str, Sequence[Example]], key: Array, n: int = 1
) -> dict[str, dict[str, float]]:
    """The policy's `behaviour` at temperature 1 on every set of problems."""
    keys = zip(problems.items(), jax.random.split(key, len(problems)), strict=True)
    return {name: behaviour(policy, some, scratchpad.verify, own, n=n) for (name, some), own in keys}


def behaves(results: Sequence[Mapping[str, Any]], *path: Any) -> dict[str, str]:
    """Cells of a table: the `behaviour` that stands at `path` in the results of all seeds."""
    of = lambda what: across(results, *path, what)
    cells = {"accuracy, %": shares(results, *path), "length": of("length"), "E(y)": of("epistemic")}
    return {**cells, "E(y) per 1,000 tokens": of("density")}


def fares(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Cells of a table: how `everywhere` came out over seeds; accuracy of every set, length and hedges where trained."""
    sets = [name for name, value in results[0].items() if isinstance(value, Mapping)]
    cells = {f"{name.replace('_', ' ')}, %": shares(results, name) for name in sets}
    cells |= {"length": across(results, "in_domain", "length"), "E(y)": across(results, "in_domain", "epistemic")}
    further = across(results, "more_steps", "epistemic") if "more_steps" in sets else ""
    return cells | ({"E(y), more steps": further} if further else {})


def differs(results: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Cells of a table: what `everywhere` gained against the results of the same seeds `before`, in points."""
    sets = [name for name, value in results[0].items() if isinstance(value, Mapping)]
    cells = {f"{name.replace('_', ' ')}, points": gains(results, before, name) for name in sets}
    return cells | {"length": changes(results, before, "in_domain", "length")}


# ---- runs -----------------------------------------------------------------------------------------------------------

SDPO = {"alpha": 0.5, "top_k": None}
"""The study's SDPO: Jensen-Shannon over the whole vocabulary."""

GRPO = {"normalised": False, "clip": (0.2, 0.28)}
"""Of the GRPO that Kim et al. 2026 (arXiv:2603.24472) compare with: no deviation, an asymmetric clip.  Theirs also has a dual clip
of 3 and truncated importance weights of 2, which do not act at one update per batch."""


def peer(thinking: bool = True) -> Callable:
    """The lesson `c = s`: a correct answer of the group, with or without its thinking, and no feedback."""
    return peer_or_feedback(thinking=thinking, use_feedback=False)


def run(
    method: Method,
    base: Pretrained,
    task: Task,
    *,
    steps: int,
    prompts: int,
    lr: float,
    seed: int,
    evaluation: int = 0,
    save_every: int = 0,
    export: bool = False,
) -> Experiment:
    """One run of the study: AdamW with gradients clipped at norm 1."""
    chosen = {"steps": steps, "prompts": prompts, "lr": lr, "seed": seed}
    settings = dataclasses.replace(SETTINGS, **chosen, evaluation=evaluation, save_every=save_every)
    return settings.experiment(method=method, task=task, student=base, export=export)


def on_policy(
    method: Method,
    base: Pretrained,
    families: Sequence[scratchpad.Family],
    *,
    steps: int,
    every: int,
    prompts: int,
    lr: float,
    train_size: int,
    problems: int,
    seed: int,
    **known: Any,
) -> Callable[[Path], list[dict[str, Any]]]:
    """A run of `study.arm` on `train_size` in-domain problems, measured on `problems` of them and of every family.

    Where there are fewer to train on, each is read several times; `known` are the arm's further arguments.
    """
    task = scratchpad.scratchpad(train_size=train_size, test_size=1, seed=seed)
    experiment = run(method, base, task, steps=steps, prompts=prompts, lr=lr, seed=seed, save_every=every)
    sets = {"train": tuple(itertools.islice(itertools.cycle(task.train), problems))}
    sets |= held_out_problems(problems, seed, families)
    probe = functools.partial(everywhere, problems=sets, key=jax.random.key(1000 + seed))
    told = {"experiment": "on-policy", **known, "train_size": train_size, "lr": lr, "seed": seed}
    return lambda folder: trained(experiment, folder, probe, every, told)
