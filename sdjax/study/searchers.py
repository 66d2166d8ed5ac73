"""The referee's base models: small decoders that search in one of four grammars, alone and with every kind of context."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sdjax.collect.contexts import question, with_solution
from sdjax.models.configs import ModelConfig
from sdjax.models.pretrained import Pretrained
from sdjax.study.bases import Texts, decoder, made_once
from sdjax.study.pretrain import batches, pretrain, rows
from sdjax.tasks import search
from sdjax.tasks.search import Author, Grammar, Problem
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Example, Messages, Rollout

DOSES = (0.0, 0.1, 0.3, 0.6)
"""Shares of the misses of an uninformed search that an author who knows the answer may leave."""

SHARES = (0.5, 0.3, 0.2)
"""How much of the pre-training texts is of each of the learnt families."""

SHORTEST, LONGEST = 64, 128
"""Least and most tokens of a chat and its answer together in pre-training, with padding."""


class Context(NamedTuple):
    """What a teacher is told: half of the options, the answer, or a correct search; and how many misses it leaves."""

    kind: str
    dose: float = 0.0


NONE = Context("none")
INTERVAL = Context("interval")
ANSWERS = tuple(Context("answer", dose) for dose in DOSES)
SOLUTION = Context("solution")
CONTEXTS = (NONE, INTERVAL, *ANSWERS, SOLUTION)

OFTEN = (0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)
"""How much of the pre-training texts has each context."""


def half(problem: Problem, rng: random.Random) -> list[str]:
    """The letters of half of the programs, the solution's among them, in their order."""
    solution = search.solution_of(problem)
    others = rng.sample([x for x in problem.letters if x != solution], len(problem.letters) // 2 - 1)
    return [x for x in problem.letters if x == solution or x in others]


def said(example: Example, context: Context, grammar: Grammar, rng: random.Random) -> str:
    """What stands in a context: `one of B E`, `keep 0.3 : answer B`, or the same with the shortest search."""
    problem = search.problem_of(example)
    if context.kind == "interval":
        return f"one of {' '.join(half(problem, rng))}"
    shown = example.solution if context.kind == "solution" and grammar.tries else f"answer {example.answer}"
    return f"keep {context.dose:g} : {shown}"


def reads(example: Example, context: Context, grammar: Grammar, rng: random.Random) -> Messages:
    """The chat of somebody who is told that much."""
    asked = question(example)
    if context.kind == "none":
        return asked
    return with_solution(asked, said(example, context, grammar, rng), header="", instruction="")


def told(example: Example, context: Context, grammar: Grammar) -> Messages:
    """The same chat whenever it is asked for: chance comes from the example."""
    return reads(example, context, grammar, random.Random(f"{example.id}:{context}"))


def lesson(context: Context, grammar: Grammar) -> Callable[[Rollout, list[Rollout]], Messages]:
    """What a method's teacher reads about a rollout."""
    return lambda rollout, _: told(rollout.example, context, grammar)


def writes(problem: Problem, context: Context, chat: Messages, grammar: Grammar, rng: random.Random) -> str:
    """What an author who has read a context writes."""
    if context.kind == "none":
        return search.trace(problem, grammar, search.ALONE, rng)
    if context.kind == "interval":
        among = chat[-1]["privileged"].removeprefix("one of ").split()
        return search.trace(problem, grammar, search.ALONE, rng, among)
    return search.trace(problem, grammar, Author(kept=context.dose), rng)


def texts(grammar: Grammar, seed: int) -> Texts:
    """Endless pre-training texts; no held-out problem among them."""
    rng = random.Random(f"{grammar.name}:{seed}")
    while True:
        family = rng.choices(search.LEARNT, SHARES)[0]
        problem = search.draw(family, rng)
        if search.held_out(problem):
            continue
        context = rng.choices(CONTEXTS, OFTEN)[0]
        chat = reads(search.example(problem, family.name), context, grammar, rng)
        yield chat, writes(problem, context, chat, grammar, rng)


def words() -> tuple[str, ...]:
    """The vocabulary: the task's and that of the contexts."""
    return tuple(dict.fromkeys((*search.vocabulary(), "keep", "one", "of", *(f"{dose:g}" for dose in DOSES))))


def shape(size: int, *, width: int, layers: int) -> ModelConfig:
    """A decoder with a vocabulary of `size`, Qwen3's family, heads of 16."""
    return decoder(size, width=width, layers=layers, units=2 * width, head_dim=16, positions=256)


def base(
    grammar: Grammar,
    *,
    seed: int,
    width: int = 64,
    layers: int = 2,
    steps: int = 700,
    tokens: int = 4096,
    lr: float = 2e-2,
    cache: str = "",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """The folder of a grammar's base model: `seed` is that of its texts and of its first parameters.

    It is pre-trained on the first call with these arguments and kept; `width` to `lr` are as in `sdjax.study.testbed.base`.
    """
    arguments = {"grammar": grammar.name, "width": width, "layers": layers, "steps": steps, "tokens": tokens}
    arguments |= {"lr": lr, "seed": seed}

    def make() -> Pretrained:
        tokenizer = word_tokenizer(words())
        config = shape(len(tokenizer), width=width, layers=layers)
        data = batches(rows(tokenizer, texts(grammar, seed), LONGEST), tokens, LONGEST, SHORTEST)
        return Pretrained(config, pretrain(config, data, steps=steps, lr=lr, seed=seed, report=report), tokenizer)

    return made_once("search", arguments, words(), lambda: texts(grammar, seed), make, cache)
