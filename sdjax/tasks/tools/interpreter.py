"""Python as a tool: a policy's programs run in the sandbox of `sdjax.tasks.code`, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.tasks.code import confined
from sdjax.tasks.code.confined import Ended, Limits
from sdjax.tasks.code.pool import Pool
from sdjax.tasks.code.sandbox import Mode
from sdjax.tasks.tools.tool import CallError, Tool

LIMITS = Limits(seconds=4, memory=512 << 20, output=1 << 16)

_LIMITS = {
    "time": "it was ended after {0.seconds} seconds",
    "memory": "it wanted more than {1} MiB of memory",
    "output": "it printed more than {0.output} bytes",
}


def interpreter(*, sandbox: Mode = "full", limits: Limits = LIMITS, modules: Sequence[str] = ()) -> Tool:
    """A tool `python` that gives what a program prints; nothing is kept from call to call.

    A program that hits the limit of time runs once more, alone, so that a busy machine changes nothing.

    Raises: `SandboxError` where this machine cannot keep what `sandbox` promises.
    """
    pool = Pool(sandbox, modules)

    def run(arguments: Mapping[str, Any]) -> str:
        once = lambda server: confined.run(server, arguments["code"], limits=limits)
        ended = pool.do(once)
        return said(pool.do(once, alone=True) if ended.kind == "time" else ended, limits)

    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "a whole program; print what you want to see"}},
        "required": ["code"],
    }
    more = f", {', '.join(modules)}" if modules else ""
    text = f"Runs a Python program (standard library{more}; no files, no network) and returns what it prints."
    # Both runs, and the time until it is a program's turn.
    return Tool("python", text, parameters, run, seconds=20 * limits.wall)


def said(ended: Ended, limits: Limits) -> str:
    """What the policy reads of a program that has ended.  Raises: `CallError` for a limit that was hit."""
    if ended.kind in _LIMITS:
        raise CallError(_LIMITS[ended.kind].format(limits, limits.memory >> 20))
    printed, errors = ended.output.rstrip(), ended.errors.strip()
    if ended.kind != "ok":
        last = "\n".join(errors.splitlines()[-12:]) or f"it ended with status {ended.status}"
        raise CallError("\n".join(filter(None, [printed, last])))
    return printed or "(the program printed nothing)"
