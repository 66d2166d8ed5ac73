"""What every study lets its user choose: once, each option with its help text."""

from __future__ import annotations

import dataclasses
from typing import Self

from sdjax.run.settings import option


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """The options of a study that measures a model."""

    out: str = option("runs/degrade", "study", "the folder of results; what is finished there is not run again")
    model: str = option("", "study", "a model's folder or name instead of the study's own base model")
    problems: int = option(96, "study", "problems of each kind on which the model is measured")
    seeds: int = option(3, "study", "seeds of problems, order and samples: 0, 1, ...")
    smoke: bool = option(False, "study", "a quick form with a base model that knows nothing, to see that it works")

    def shortened(self) -> Self:
        """The same settings, or with `smoke` a few problems and one seed."""
        return dataclasses.replace(self, problems=2, seeds=1) if self.smoke else self


@dataclasses.dataclass(frozen=True)
class TrainingSettings(StudySettings):
    """The options of a study that trains in several arms; an interrupted arm goes on where it was."""

    steps: int = option(30, "training", "batches")
    prompts: int = option(8, "training", "problems per batch")
    group: int = option(8, "training", "attempts per problem")
    lr: float = option(3e-4, "training", "learning rate of AdamW")

    def shortened(self) -> Self:
        """The same settings, or with `smoke` two steps on a few problems and one seed."""
        few = {"steps": 2, "prompts": 2, "group": 2}
        return dataclasses.replace(super().shortened(), **few) if self.smoke else self
