"""Where a teacher hedges: how likely a hedge is after a right and after a wrong result of the student, by who reads what.

    python experiments/degrade/hedging.py

The student's own attempts are scored under its own context and under a teacher's, a correct peer with and without its
thinking.  Distillation moves the student's hedges towards the teacher's: where the student cannot tell right from wrong,
towards an average over both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.cli.options import from_command_line
from sdjax.collect.contexts import question
from sdjax.collect.rollouts import attempts
from sdjax.engine.policies import Environment, Policy, score
from sdjax.study import testbed
from sdjax.study.arms import every_seed
from sdjax.study.settings import StudySettings
from sdjax.study.tables import across, table
from sdjax.tasks import scratchpad
from sdjax.types import Rollout, View

READERS = {"question": None, "s without thinking": False, "s": True}
"""What is read: nothing more, or a correct peer without or with its thinking."""


def first_results(words: list[str], left: int, digits: int) -> list[tuple[int, bool]]:
    """Where the token after each step's first result stands, and whether that result is right."""
    found, at = [], 0
    while at < len(words) and words[at] != "</think>":
        if words[at] in scratchpad.LABELS and "=" in words[at:]:
            equals = words.index("=", at)
            place, said = equals + 1 + digits, "".join(words[equals + 1 : equals + 1 + digits])
            right = "".join(words[at + 2 : equals])
            if place >= len(words) or not (said.isdigit() and right.isdigit()):
                return found
            correct = scratchpad.applied(left, words[at + 1], int(right), digits)
            found.append((place, int(said) == correct))
            end = words.index(";", place) if ";" in words[place:] else len(words)
            last = "".join(words[end - digits : end])
            left, at = int(last) if last.isdigit() else int(said), end
        at += 1
    return found


def measured(policy: Policy, problems: int, group: int, seed: int) -> dict:
    """Mean probability of a hedge after right and after wrong results: `{reader: {"right": ..., "wrong": ...}}`."""
    examples = scratchpad.scratchpad(train_size=problems, test_size=1, seed=seed).train
    environment = Environment({"live": policy}, scratchpad.verify)
    rollouts = attempts(environment, examples, jax.random.key(seed), n=group)
    hedges = jnp.asarray(policy.tokenizer.convert_tokens_to_ids(list(scratchpad.HEDGES)))
    signals = lambda dist, token: {"hedge": jnp.exp(dist["reader"])[..., hedges].sum(-1)}
    tell = {name: testbed.peer(bool(told)) for name, told in READERS.items()}
    taught = [r for r in rollouts if tell["s"](r, rollouts)]
    found = {}
    for name, told in READERS.items():
        context = lambda r, name=name, told=told: question(r.example) if told is None else tell[name](r, rollouts)
        read = [r.read_by(reader=context(r)) for r in taught]
        scored = score(environment, read, {"reader": View(per_rollout=True)}, signals) if read else []
        found[name] = by_result(scored, policy.tokenizer)
    return found


def by_result(rollouts: list[Rollout], tokenizer) -> dict[str, float]:
    """The mean `hedge` after right and wrong first results, and the share of wrong ones."""
    chances: dict[bool, list[float]] = {True: [], False: []}
    for r in rollouts:
        digits, words = r.example.meta["digits"], tokenizer.convert_ids_to_tokens(list(r.tokens))
        start = int(r.example.prompt[0]["content"].split(" a ")[0].replace(" ", ""))
        for place, right in first_results(words, start, digits):
            chances[right].append(float(r.extras["hedge"][place]))
    mean = lambda values: float(np.mean(values)) if values else 0.0
    count = max(len(chances[True]) + len(chances[False]), 1)
    return {"right": mean(chances[True]), "wrong": mean(chances[False]), "share wrong": len(chances[False]) / count}


def study(*, settings: StudySettings = StudySettings(problems=64), group: int = 8) -> str:
    """Measures the chance of a hedge after right and wrong results.

    Args:
      group: attempts at each of the problems, which are training problems.
    """
    chosen = settings.shortened()
    problems, group = chosen.problems, 2 if chosen.smoke else group
    base, identity = testbed.student(chosen.model, chosen.smoke)
    policy = testbed.policy_of(base)

    def prepared(_: str, seed: int):
        arguments = {"model": identity, "problems": problems, "group": group, "seed": seed}
        return arguments, lambda _: measured(policy, problems, group, seed)

    runs = every_seed(chosen.out, "hedging", ("base",), chosen.seeds, prepared)["base"]
    columns = {"after a right result, %": "right", "after a wrong one, %": "wrong", "wrong, %": "share wrong"}
    cells = lambda name: {column: across(runs, name, kind, scale=100) for column, kind in columns.items()}
    return table([{"reads besides the question": name, **cells(name)} for name in READERS])


if __name__ == "__main__":
    print(from_command_line(study))
