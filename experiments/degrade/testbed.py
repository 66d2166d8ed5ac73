"""The study's base model and its facts: what it can do alone, what each context adds, and what its hedges are worth.

    python experiments/degrade/testbed.py

The first call pre-trains the model (minutes) and keeps it in the user's cache folder, or in `SDJAX_TESTBED`.
"""

from __future__ import annotations

import time
from functools import partial

import jax

from sdjax.cli.options import from_command_line
from sdjax.collect.contexts import question, with_solution, without_thinking
from sdjax.engine.generate import GREEDY
from sdjax.engine.policies import Policy
from sdjax.study import testbed
from sdjax.study.arms import behaviour, every_seed, forbidding
from sdjax.study.settings import StudySettings
from sdjax.study.tables import table
from sdjax.tasks import scratchpad
from sdjax.tasks.scratchpad import FAMILIES, HEDGES, Family

CONTEXTS = {
    "none": question,
    "answer": lambda e: with_solution(question(e), testbed.answer_only(e)),
    "steps": lambda e: with_solution(question(e), without_thinking(e.solution)),
    "full solution": lambda e: with_solution(question(e), e.solution),
}
"""What a context says, from nothing to the whole reference."""


def facts(policy: Policy, problems: int, seed: int, families: tuple[Family, ...] = FAMILIES) -> dict:
    """Every way of decoding on the families' held-out problems: `{way: {family: behaviour}}`."""
    ids = policy.tokenizer.convert_tokens_to_ids(list(HEDGES))
    ways = {name: {"context": context} for name, context in CONTEXTS.items()}
    ways |= {"none, hedges forbidden": {"choose": forbidding(ids)}, "none, greedy": {"sampling": GREEDY}}
    found = {}
    for name, examples in testbed.held_out_problems(problems, seed, families).items():
        measure = partial(behaviour, policy, examples, scratchpad.verify, jax.random.key(seed))
        for way, how in ways.items():
            found.setdefault(way, {})[name] = measure(**how)
    return found


def study(*, settings: StudySettings = StudySettings(problems=128)) -> str:
    """Makes the base model and measures it."""
    chosen = settings.shortened()
    problems = 4 if chosen.smoke else chosen.problems
    families = FAMILIES[:1] if chosen.smoke else FAMILIES
    started = time.perf_counter()
    if not (chosen.model or chosen.smoke):
        testbed.base(report=lambda step, loss: print(f"step {step}: loss {loss:.3f}", flush=True))
    base, identity = testbed.student(chosen.model, chosen.smoke)
    print(f"base model {identity} after {time.perf_counter() - started:.0f} s", flush=True)
    policy = testbed.policy_of(base)

    def prepared(_: str, seed: int):
        arguments = {"model": identity, "problems": problems, "seed": seed}
        return arguments, lambda _: facts(policy, problems, seed, families)

    runs = every_seed(chosen.out, "facts", ("base",), chosen.seeds, prepared)["base"]
    return table(
        [
            {"problems": family.name.replace("_", " "), "context": way, **testbed.behaves(runs, way, family.name)}
            for family in families
            for way in runs[0]
        ]
    )


if __name__ == "__main__":
    print(from_command_line(study))
