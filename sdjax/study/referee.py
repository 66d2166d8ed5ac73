"""What the referee measures: what a policy does with a search, what a teacher reads in a student's, and forced words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import attempts
from sdjax.engine.chats import encode_text
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment, Policy, sample, score
from sdjax.engine.tokens import Shapes, encode_context
from sdjax.engine.waves import continued
from sdjax.study import searchers
from sdjax.study.searchers import Context
from sdjax.tasks import search
from sdjax.tasks.search import Family, Grammar
from sdjax.types import Example, Messages, View

SHAPES = Shapes(context=64, completion=96, rows=256)
"""Sizes that hold every family's problems and every context."""


def held_out(size: int, seed: int, families: Sequence[Family] = search.FAMILIES) -> dict[str, tuple[Example, ...]]:
    """`size` held-out problems of each family, by its name."""
    return {f.name: search.search(train_size=1, test_size=size, seed=seed, family=f).test for f in families}


def summary(examples: Sequence[Example], texts: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
    """What answers come to: accuracy, length, and how they search.

    `goes_on` and `words` are per miss (1 without any miss), `honest` per trial, the others per answer.
    """
    counted = [search.counts(e, t) for e, t in zip(examples, texts, strict=True)]
    total = {name: sum(c[name] for c in counted) for name in counted[0]}
    per = lambda name, of: total[name] / total[of] if total[of] else 1.0
    mean = lambda name: total[name] / len(counted)
    return {
        "accuracy": float(np.mean([search.verify(e, t).reward for e, t in zip(examples, texts, strict=True)])),
        "length": float(np.mean(lengths)),
        "trials": mean("trials"),
        "misses": mean("misses"),
        "words": per("words", "misses"),
        "goes_on": per("goes_on", "misses"),
        "honest": per("honest", "trials"),
        "confirmed": mean("confirmed"),
        "first_right": mean("first_right"),
        "answers": len(counted),
    }


def behaviour(
    policy: Policy,
    problems: Mapping[str, Sequence[Example]],
    key: Array,
    *,
    context: Callable[[Example], Messages] = question,
    **how,
) -> dict[str, dict[str, float]]:
    """The `summary` of one answer to every problem, by set of problems; all are written in one call."""
    examples = [e for some in problems.values() for e in some]
    written = [s for (s,) in sample(policy, [context(e) for e in examples], key, **how)]
    found, start = {}, 0
    for name, some in problems.items():
        own = written[start : start + len(some)]
        found[name] = summary(some, [s.text for s in own], [len(s.tokens) for s in own])
        start += len(some)
    return found


# ---- what a teacher reads -------------------------------------------------------------------------------------------


def read_by_teacher(
    policy: Policy, grammar: Grammar, contexts: Sequence[Context], problems: int, seed: int
) -> dict[str, dict[str, float]]:
    """How a teacher, the same model told a context, goes on in the attempts of the student: `{context: {...}}`.

    `stops`: the probability of answering after a miss that is not the last trial's; `honest`: of the right result after
    a wrong candidate; `wishful`: of the target there.
    """
    examples = search.search(train_size=problems, test_size=1, seed=seed).train
    environment = Environment({"live": policy}, search.verify)
    rollouts = attempts(environment, examples, jax.random.key(seed), n=4)
    return {
        f"{c.kind} {c.dose:g}": at_misses(environment, rollouts, lambda r, c=c: searchers.told(r.example, c, grammar))
        for c in contexts
    }


def every_number(dist: Mapping[str, Array], token: Array) -> dict[str, Array]:
    """The log-probability of every word, one signal each (the vocabulary is that of a toy)."""
    return {str(v): dist["reader"][..., v] for v in range(dist["reader"].shape[-1])}


def at_misses(environment: Environment, rollouts, context: Callable) -> dict[str, float]:
    """The means over all misses of what `read_by_teacher` lists."""
    policy = environment.live
    read = [r.read_by(reader=context(r)) for r in rollouts]
    scored = score(environment, read, {"reader": View(per_rollout=True)}, every_number)
    known = {word: policy.tokenizer.convert_tokens_to_ids(word) for word in search.vocabulary()}
    chance = lambda r, word, place: float(np.exp(r.extras[str(known[str(word)])][place]))
    stops, honest, wishful = [], [], []
    for r in scored:
        problem = search.problem_of(r.example)
        for trial in search.trials(r.text):
            if trial.candidate not in problem.letters:
                continue
            right = search.comes_to(problem, trial.candidate)
            if problem.goal in (right, trial.result) or trial.end >= len(r.tokens):
                continue
            stops.append(chance(r, "answer", trial.end))
            honest.append(chance(r, right, trial.end - 1))
            wishful.append(chance(r, problem.goal, trial.end - 1))
    return {name: float(np.mean(x)) for name, x in (("stops", stops), ("honest", honest), ("wishful", wishful)) if x}


# ---- forced words ---------------------------------------------------------------------------------------------------


def with_forced_words(policy: Policy, examples: Sequence[Example], word: str, key: Array, most: int = 10) -> list[str]:
    """One answer to each problem in which `word` stands after every miss, at most `most` times.

    An answer that stops after a miss is cut there, the word is put in its place, and the policy goes on from there.
    """
    chats = [question(e) for e in examples]
    prompts = [encode_context(policy.tokenizer, c, policy.shapes) for c in chats]
    texts = [s.text for (s,) in sample(policy, chats, key)]
    for turn in range(most):
        cut = [stopped(e, t) for e, t in zip(examples, texts, strict=True)]
        if not any(cut):
            break
        said = [f"{t} {word}" if t else "" for t in cut]
        # All rows, those that need nothing too: one size of program.
        prefixes = [[*p, *encode_text(policy.tokenizer, t)] for p, t in zip(prompts, said, strict=True)]
        keys = jax.random.split(jax.random.fold_in(key, turn), len(prefixes))
        more = continued(policy, prefixes, keys, sampling=Sampling(), limit=policy.shapes.completion)
        texts = [f"{s} {m.text}" if s else t for s, m, t in zip(said, more, texts, strict=True)]
    return texts


def stopped(example: Example, text: str) -> str | None:
    """The text up to its first miss after which it does not search on, unless every option was tried; else `None`."""
    problem = search.problem_of(example)
    found = list(search.trials(text))
    for number, trial in enumerate(found):
        if trial.result == problem.goal:
            return None
        if not trial.goes_on:
            tried = {t.candidate for t in found[: number + 1]}
            return " ".join(text.split()[: trial.end]) if tried < set(problem.letters) else None
    return None
