"""Numbers of an experiment that make no sense, refused by name before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.errors import InputError


class ExperimentError(InputError, ValueError):
    """An experiment cannot be run as it is described; the message says which value and why."""


AT_LEAST_1 = (
    "steps prompts rounds minibatches epochs most_skipped completions_every keep context teacher_context completion"
)
AT_LEAST_1 += " rows rows_per_chunk tokens_per_chunk lengths train_size"
AT_LEAST_0 = (
    "evaluation evaluate_every save_every keep_every grace seed warmup temperature most slots lag router_aux router_z"
)
LEAST = {**dict.fromkeys(AT_LEAST_1.split(), 1), **dict.fromkeys(AT_LEAST_0.split(), 0)}
"""The least sensible values of numbers that go by these names, in `Experiment` and on the command line."""

POSITIVE = ("lr", "learning_rate")
"""Numbers by these names must be above 0."""


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises `ExperimentError` for a number that makes no sense, such as `steps=0`; other names are left alone."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for name, value in numbers.items():
        # Not the other way round: NaN is below nothing.
        if name in LEAST and not value >= LEAST[name]:
            raise ExperimentError(f"{name}={value}: expected at least {LEAST[name]}")
        if name in POSITIVE and not 0 < value < float("inf"):
            raise ExperimentError(f"{name}={value}: expected a number above 0")
    if numbers.get("prompts", 0) % numbers.get("minibatches", 1):
        prompts, parts = numbers["prompts"], numbers["minibatches"]
        raise ExperimentError(f"minibatches={parts} does not divide prompts={prompts}: a minibatch holds whole groups")
