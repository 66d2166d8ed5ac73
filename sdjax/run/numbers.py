"""The numbers of a step: what its updates did, and what its batch looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdjax.engine.train import Outcome
from sdjax.types import STUDENT, Batch


def mean_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean numbers of a step's updates; a term's under its own name."""
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        own = {**outcome.terms, "loss": outcome.loss, "grad_norm": outcome.grad_norm, "trained": outcome.useful}
        for name, value in own.items():
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(v)) for name, v in values.items()}


def describe(batch: Batch) -> dict[str, float]:
    """What a batch looks like: mean reward, length in tokens, share finished, share of rows each view speaks about.

    Of the student's own rows where there are any: references and teachers' texts would blur how the student does.
    """
    own = batch.valid & (batch.source == STUDENT)
    rows = own if own.any() else batch.valid
    lengths = batch.present.sum(-1)
    taught = {f"read_by_{name}": float(c.valid[rows].mean()) for name, c in batch.contexts.items()}
    return {
        "reward": float(batch.reward[rows].mean()),
        "length": float(lengths[rows].mean()),
        "finished": float(batch.finished[rows].mean()),
        **taught,
    }
