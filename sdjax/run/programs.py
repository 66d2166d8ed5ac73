"""How programs are run that models write: options of every command that judges them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from sdjax.run.settings import option
from sdjax.tasks.code.confined import Limits
from sdjax.tasks.errors import TaskError


@dataclasses.dataclass(frozen=True)
class Programs:
    """How programs are confined.  An experiment file takes it as an argument `programs: Programs = Programs()`.

    Raises: `TaskError` for limits in which no program can run.
    """

    sandbox: Literal["full", "seccomp", "weak"] = option(
        "full",
        "programs",
        "how programs are confined; full needs seccomp and Landlock, seccomp needs the former, weak keeps no files safe",
    )
    program_seconds: int = option(6, "programs", "processor seconds of one run of a program")
    program_memory: int = option(1024, "programs", "MiB of one run of a program")
    modules: str = option(
        "", "programs", "what programs may import beside the standard library, separated by commas: numpy, say"
    )

    def __post_init__(self):
        if self.program_seconds < 1 or self.program_memory < 128:
            raise TaskError("--program-seconds must be at least 1, and --program-memory at least 128 (MiB).")

    def how(self) -> dict[str, Any]:
        """The arguments of `sdjax.tasks.code.tasks.verifier`."""
        return {
            "sandbox": self.sandbox,
            "limits": Limits(seconds=self.program_seconds, memory=self.program_memory << 20),
            "modules": tuple(filter(None, self.modules.replace(" ", "").split(","))),
        }
