"""Programs against tests: which pass, and what was seen of those that fail.

A program that reads standard input passes a test when it ends with exit status 0 and prints the expected tokens, line by
line; they are compared here, as text.  A function is called from another sandboxed process (`checker.py`), and its results
are compared there, as plain values.  Nothing that a program says of itself counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from decimal import Decimal
from typing import Any, NamedTuple

from sdjax.tasks.code import confined
from sdjax.tasks.code.confined import Ended, Limits
from sdjax.tasks.code.pool import Pool
from sdjax.tasks.code.sandbox import ForkServer


@dataclasses.dataclass(frozen=True)
class ScriptTests:
    """Inputs and the outputs that they must give; of the first `shown` of them feedback may speak."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shown: int


@dataclasses.dataclass(frozen=True)
class FunctionTests:
    """Tests that call the function `entry` (of the module, or of its class `Solution`).

    Either `suite`, a text of assertions that may define `check(candidate)`, or `cases`: arguments, and results that are right.
    `given` is code that both the program and the tests find executed: imports, helpers.  Feedback may speak of the first
    `shown` assertions or cases.
    """

    entry: str
    shown: int
    suite: str | None = None
    cases: tuple[tuple[list, list], ...] | None = None
    given: str = ""


Tests = ScriptTests | FunctionTests


class Failure(NamedTuple):
    """One test that failed.

    `kind` is "wrong", "error", "time", "memory", "output" (its limit), "ended" (before it answered) or "malformed" (no
    plain value came back).  `case` counts from 0; feedback may speak of it where it is `shown`.  `input` and `expected`
    come from the tests, `got` and `trace` from the program.
    """

    kind: str
    case: int
    shown: bool
    input: str = ""
    got: str = ""
    expected: str = ""
    trace: str = ""


class Judgement(NamedTuple):
    """How many of all tests a program passes; `retried` says that a time limit was hit and it ran again, alone."""

    passed: int
    total: int
    failures: tuple[Failure, ...]
    retried: bool = False

    @property
    def solved(self) -> bool:
        """Every test ran and passed, and there was one."""
        return self.passed == self.total > 0 and not self.failures

    @property
    def timed_out(self) -> bool:
        """Whether a time limit was hit."""
        return any(failure.kind == "time" for failure in self.failures)


def judge(pool: Pool, program: str, tests: Tests, limits: Limits) -> Judgement:
    """Runs a program against its tests.

    When a time limit is hit, the machine may have been busy: the program is judged once more with nothing else in the pool,
    and that counts.
    """
    by_kind = judge_script if isinstance(tests, ScriptTests) else judge_function
    first = pool.do(lambda server: by_kind(server, program, tests, limits))
    if not first.timed_out:
        return first
    return pool.do(lambda server: by_kind(server, program, tests, limits), alone=True)._replace(retried=True)


# ---- standard input and output ------------------------------------------------------------------------------------


def judge_script(server: ForkServer, program: str, tests: ScriptTests, limits: Limits) -> Judgement:
    """One run for each input; after a run that exceeded a limit of time or output the rest counts as failed, unrun."""
    failures, passed = [], 0
    for case, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
        ended = confined.run(server, program, given, limits=limits)
        kind = ended.kind
        if kind == "ok":
            kind = "" if same_output(ended.output, expected) else "wrong"
        if not kind:
            passed += 1
            continue
        trace = ended.errors if kind in ("error", "memory") else ""
        failures.append(Failure(kind, case, case < tests.shown, given, ended.output, expected, trace))
        if kind in ("time", "output"):
            break
    return Judgement(passed, len(tests.inputs), tuple(failures))


_DECIMAL = re.compile(r"[-+]?\d{1,40}(?:\.\d{0,40})?")


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs have the same tokens line by line; `1.50` is `1.5`, spacing and empty ends do not count."""
    lines = lambda text: [line.split() for line in text.strip().splitlines()]
    one, other = lines(printed), lines(expected)
    if one == other:
        return True
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(same_token, a, b)) for a, b in zip(one, other, strict=True)
    )


def same_token(one: str, other: str) -> bool:
    """Equal texts, or equal decimals of which one at least has a point ("007" is not "7")."""
    if one == other:
        return True
    numbers = "." in one + other and _DECIMAL.fullmatch(one) and _DECIMAL.fullmatch(other)
    return bool(numbers) and Decimal(one) == Decimal(other)


# ---- functions ----------------------------------------------------------------------------------------------------


def judge_function(server: ForkServer, program: str, tests: FunctionTests, limits: Limits) -> Judgement:
    """All calls in one process of the program; the process of the tests says which hold."""
    job = {"entry": tests.entry, "suite": tests.suite, "cases": tests.cases, "given": tests.given}
    candidate, checker = confined.call(server, program, job, given=tests.given, limits=limits)
    said = verdict_of(checker)
    total = said["total"] or len(tests.cases or ()) or 1
    failures = [failure_of(each, tests) for each in said["failures"]]
    passed = len({*said["right"]})
    if said["ended"] is not None or passed + len(failures) < total:
        # Why a test has not run: the program, or else the tests, ended before it.
        ended = said["ended"] or {"kind": "ended" if checker.kind == "ok" else checker.kind, "call": None}
        kind = candidate.kind if candidate.kind in ("time", "memory", "output") else ended["kind"]
        ended = {**ended, "kind": kind, "case": passed + len(failures)}
        failures.append(failure_of(ended, tests))
    return Judgement(min(passed, total), total, tuple(failures))


def verdict_of(checker: Ended) -> dict[str, Any]:
    """What the process of the tests wrote, in the form it must have; where it wrote none, no test ran."""
    try:
        (length,) = struct.unpack("!I", checker.control[:4])
        said = json.loads(checker.control[4 : 4 + length])
        numbers = all(type(number) is int for number in (said["total"], *said["right"]))
        entries = [*said["failures"], *([said["ended"]] if said["ended"] is not None else [])]
        if numbers and all(type(entry["kind"]) is str for entry in entries):
            return said
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {"total": 0, "right": [], "failures": [], "ended": None}


def failure_of(said: dict[str, Any], tests: FunctionTests) -> Failure:
    """A failure as the process of the tests tells it; of tests that are not shown it tells the kind alone."""
    text = lambda name: str(said.get(name) or "")
    kind = "memory" if text("type") == "MemoryError" else text("kind")
    asked = text("call") or text("test").replace("candidate(", f"{tests.entry}(")
    return Failure(kind, said["case"], said["case"] < tests.shown, asked, text("got"), text("expected"), text("trace"))
