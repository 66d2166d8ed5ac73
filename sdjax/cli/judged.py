"""Problems that are only measured on, and how their answers are judged: for `sdjax evaluate` and `sdjax verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from sdjax.run.programs import Programs
from sdjax.run.reading import Rows
from sdjax.tasks import exact, maths
from sdjax.tasks.code import tasks as code
from sdjax.tasks.code.problems import code_example
from sdjax.tasks.data.problems import problems
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Verdict

Verifier = Literal["maths", "exact", "tests"]
Known = Literal["file", "humaneval"]
"""What `--data` names, or a task that needs none."""


class Judged(NamedTuple):
    """Problems, what they are called, what was read, who judges their answers, which answers are the same, and how that is recorded.

    `same` is `None` where answers are programs: no two of them are compared.
    """

    examples: Sequence[Example]
    name: str
    read: str
    verify: Callable[[Example, str], Verdict]
    same: Callable[[str, str], bool] | None
    about: dict[str, Any]


def judged(data: str, task: Known, verifier: Verifier, rows: Rows, programs: Programs) -> Judged:
    """The problems that `--data` or `--task` name.  Raises: `TaskError`, `SandboxError`."""
    if bool(data) == (task != "file"):
        raise TaskError("Name the problems: --data FILE, or --task humaneval, one of the two.")
    if task != "file":
        examples = code.humaneval_examples()[: rows.first_rows or None]
        return by_tests(examples, task, f"{task}: {len(examples)} problems", programs)
    form = code_example if verifier == "tests" else None
    found = problems(data, **rows.how(), read=form, prefer=("test", "validation", "train"))
    if verifier == "tests":
        return by_tests(found.examples, data, found.said, programs)
    verify, same = {"maths": (maths.verify, maths.equal), "exact": (exact.verify, str.__eq__)}[verifier]
    return Judged(found.examples, data, found.said, verify, same, {"verifier": verifier})


def by_tests(examples: Sequence[Example], name: str, read: str, programs: Programs) -> Judged:
    """Problems whose answers are programs, judged in the sandbox."""
    about = {"verifier": "tests", **dataclasses.asdict(programs)}
    return Judged(examples, name, read, code.verifier(**programs.how()), None, about)
