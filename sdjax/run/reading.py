"""Which rows of a file or data set a command reads, and what an experiment holds out: options of everything with `--data`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sdjax.run.settings import option
from sdjax.tasks.data import problems
from sdjax.types import Task


@dataclasses.dataclass(frozen=True)
class Rows:
    """How `--data` is read."""

    split: str = option(
        "",
        "problems",
        "the split of a folder or hub data set; by default train to learn from, and test, else validation, to measure on",
    )
    config: str = option("", "problems", "the configuration of a hub data set, where it has several")
    fields: str = option(
        "",
        "problems",
        "columns by field where no layout is recognised, as prompt=question,answer=reward_model.ground_truth",
    )
    first_rows: int = option(0, "problems", "read no more than so many rows; 0 reads all")
    skip_bad_rows: bool = option(False, "problems", "leave bad rows out and say how many, instead of refusing the data")
    keep_duplicates: bool = option(False, "problems", "keep rows that say the same as an earlier one")

    def how(self) -> dict[str, Any]:
        """The arguments of `problems.problems`."""
        return {
            "split": self.split,
            "config": self.config,
            "fields": self.fields,
            "first": self.first_rows,
            "skip_bad_rows": self.skip_bad_rows,
            "duplicates": self.keep_duplicates,
        }


@dataclasses.dataclass(frozen=True)
class Reading(Rows):
    """How `--data` is read and what is held out.  An experiment file takes it as `reading: Reading = Reading()`."""

    test_data: str | None = option(None, "problems", "problems that are held out: a file, a folder or a hub data set")
    test_split: str = option("", "problems", "the split that is held out, of --test-data or else of --data")
    test_fraction: float | None = option(
        None,
        "problems",
        "without test data, the share of the questions that is held out, by a hash of each question (0.1)",
    )

    def task(self, data: str, **how: Any) -> Task:
        """The task of `data`; `how` is as in `problems.task`.  Raises: `TaskError`."""
        return problems.task(
            data,
            test=self.test_data,
            test_split=self.test_split,
            test_fraction=self.test_fraction,
            **self.how(),
            **how,
        )
