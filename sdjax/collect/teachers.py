"""Several teachers, one for each example: what a method that has one teacher needs besides a view that chooses."""

from __future__ import annotations

import dataclasses

import jax

from sdjax.engine.policies import reading
from sdjax.engine.tokens import member_of
from sdjax.types import ByField, Method, Rollout


def taught_by_field(method: Method, teacher: str, chosen: ByField) -> Method:
    """The method whose policy `teacher` is, for each example, the one of `chosen` that a field of the example names.

    Views that read `teacher` choose row by row.  Where the host half writes with the teacher, it runs once for each
    teacher on its own examples: batch-wide choices (a coin, say) are then made for each part.
    """
    method = reading(method, teacher, chosen)
    if teacher not in method.writers:
        return method

    def collect(environment, examples, key, memory):
        rows: list[Rollout] = []
        for number, name in enumerate(chosen.policies):
            own = [e for e in examples if member_of(e, chosen) == number]
            if not own:
                continue
            policies = {**environment.policies, teacher: environment.policies[name]}
            part, memory = method.collect(
                environment._replace(policies=policies), own, jax.random.fold_in(key, number), memory
            )
            start = 1 + max((r.group for r in rows), default=-1)
            rows += [dataclasses.replace(r, group=start + r.group) for r in part]
        return rows, memory

    writers = tuple(dict.fromkeys(n for w in method.writers for n in (chosen.policies if w == teacher else (w,))))
    return method._replace(collect=collect, writers=writers)
