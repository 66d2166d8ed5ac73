"""How rich a context is and what the teacher does with it (Kim et al. 2026, arXiv:2603.24472, section 3 and Table 1).

    python experiments/degrade/richness.py

Contexts are the base model's own correct answers, as in the paper: for problems it solves sometimes, the first correct of
eight, with and without its thinking, and what it writes when it has read that (regeneration).
"""

from __future__ import annotations

import jax

from sdjax.cli.options import from_command_line
from sdjax.collect.contexts import question, with_solution, without_thinking
from sdjax.engine.policies import Policy
from sdjax.study import testbed
from sdjax.study.arms import behaviour, every_seed
from sdjax.study.settings import StudySettings
from sdjax.study.tables import table
from sdjax.tasks import scratchpad

LEVELS = ("none", "answer", "steps", "regeneration", "full solution")


def sweep(policy: Policy, problems: int, samples: int, seed: int) -> dict:
    """Behaviour at every level on problems with some, but not all but one, correct answers: `{level: behaviour}`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    examples = list(scratchpad.scratchpad(train_size=1, test_size=problems, seed=100 + seed).test)
    tried = testbed.first_correct(policy, examples, keys[0], samples)
    kept = [(e, text) for e, (good, text) in zip(examples, tried, strict=True) if 1 <= good <= 3 * samples // 4]
    kept = kept or [(e, e.solution) for e in examples]  # a model that knows nothing
    examples, peer = [e for e, _ in kept], {e.id: text for e, text in kept}
    full = lambda e: with_solution(question(e), peer[e.id])
    again = {
        e.id: t
        for e, (_, t) in zip(examples, testbed.first_correct(policy, examples, keys[1], samples, full), strict=True)
    }
    contexts = {
        "none": question,
        "answer": lambda e: with_solution(question(e), testbed.answer_only(e)),
        "steps": lambda e: with_solution(question(e), without_thinking(peer[e.id])),
        "regeneration": lambda e: with_solution(question(e), again[e.id]),
        "full solution": full,
    }
    measure = lambda context: behaviour(policy, examples, scratchpad.verify, keys[2], n=samples, context=context)
    return {"kept": len(kept), **{level: measure(context) for level, context in contexts.items()}}


def study(*, settings: StudySettings = StudySettings(), samples: int = 8) -> str:
    """Measures the teacher at every level of context.

    Args:
      samples: answers per problem and level; of the problems those that are solved sometimes are kept.
    """
    chosen = settings.shortened()
    problems, samples = (3, 2) if chosen.smoke else (chosen.problems, samples)
    base, identity = testbed.student(chosen.model, chosen.smoke)
    policy = testbed.policy_of(base)

    def prepared(_: str, seed: int):
        arguments = {"model": identity, "problems": problems, "samples": samples, "seed": seed}
        return arguments, lambda _: sweep(policy, problems, samples, seed)

    runs = every_seed(chosen.out, "richness", ("base",), chosen.seeds, prepared)["base"]
    return table([{"context": level, **testbed.behaves(runs, level)} for level in LEVELS])


if __name__ == "__main__":
    print(from_command_line(study))
