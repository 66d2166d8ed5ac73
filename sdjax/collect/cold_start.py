"""A cold start: texts of the teacher that the student imitates before it is distilled on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import judge, sample
from sdjax.collect.synthesis import repetitive
from sdjax.engine.policies import Environment
from sdjax.types import TEACHER, Example, Messages, Rollout


def teacher_texts(
    environment: Environment,
    teacher: str,
    examples: Sequence[Example],
    key: Array,
    *,
    before: Callable[[Example], Messages | None] = question,
    **how: Any,
) -> list[Rollout]:
    """Judged texts of the policy `teacher` that the student may imitate: cut, empty and repetitive ones are left out.

    The teacher reads `before(example)`, and writes nothing where that is `None`; the student reads the question.  `how`
    goes to `sdjax.collect.rollouts.sample`.
    Source: Li et al. 2026 (Rethinking OPD), arXiv:2604.13016, recipe; it does not say what counts as degenerate.
    """
    asked = [e for e in examples if before(e) is not None]
    written = sample(environment.policies[teacher], asked, key, context=before, source=TEACHER, **how) if asked else []
    whole = [r for r in written if r.finished and r.text and not repetitive(r.text)]
    return [r.read_by(student=question(r.example), teacher=None) for r in judge(environment, whole)]
