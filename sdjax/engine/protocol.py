"""How problems are answered when a model is measured: samples, temperature, filters."""

from __future__ import annotations

import dataclasses

from sdjax.engine.generate import Sampling
from sdjax.errors import InputError


class ProtocolError(InputError, ValueError):
    """A way to answer problems that makes no sense; the message says which value and why."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How problems are answered when a model is measured.

    Args:
      samples: answers to each problem.
      temperature: 0 is greedy.
      top_p: only the likeliest tokens with so much probability together.
      top_k: only so many of the likeliest tokens; 0 does not filter.
      min_p: only tokens with so much of the likeliest one's probability.
      seed: seed of the samples.

    Raises: `ProtocolError` for values that make no sense.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1:
            raise ProtocolError(f"samples={self.samples}: expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ProtocolError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p < 1 and self.top_k >= 0):
            raise ProtocolError(
                f"top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: expected 0 < top_p <= 1, top_k >= 0 and 0 <= "
                "min_p < 1"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ProtocolError(
                f"samples={self.samples} at temperature 0 are all the same: give a temperature, such as --temperature 0.6"
            )

    def sampling(self) -> Sampling:
        """What the sampler is told."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p)

    def __str__(self) -> str:
        filters = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k, 0), "min_p": (self.min_p, 0.0)}
        said = [f"{name} {value:g}" for name, (value, none) in filters.items() if value != none]
        drawn = ", ".join([f"temperature {self.temperature:g}", *said]) if self.temperature else "greedy"
        return f"{self.samples} sample{'s' * (self.samples > 1)} of each problem, {drawn}"
