"""What the process of the tests does: call a function that lives in the program's process, and count what holds.

The program never shares memory with its tests.  A call crosses as plain values, and so does its result: here it is
compared, by the tests' own `==` on built-in types.  The tests come with the data set; they are confined all the same.
"""

from __future__ import annotations

import ast
import builtins
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from sdjax.tasks.code import values

VERDICT, CALLS = 3, 4
"""Descriptors: to the trainer, and to the program's process."""

MOST_FAILURES = 50
_LONGEST = 4000


class Stopped(BaseException):
    """The program's process answers no more: `"ended"`, or `"malformed"` for what is no answer."""


class Remote:
    """The function under test, as its tests see it."""

    def __init__(self, name: str):
        self.__name__ = self.name = name
        self.last_call: str | None = None

    def __call__(self, *arguments: Any, **names: Any) -> Any:
        shown = [shortened(a) for a in arguments] + [f"{name}={shortened(a)}" for name, a in names.items()]
        self.last_call = f"{self.name}({', '.join(shown)})"
        return self.ask({"arguments": values.encoded(list(arguments)), "names": values.encoded(names)})

    def ask(self, call: Any | None = None) -> Any:
        """What the program's process answers; without a call, whether its own top level ran."""
        try:
            if call is not None:
                values.send(CALLS, call)
            said = values.receive(CALLS)
            return_value = values.decoded(said["value"]) if "error" not in said else None
        except (EOFError, ConnectionError):
            raise Stopped("ended") from None
        except Exception:
            raise Stopped("malformed") from None
        if "error" in said:
            raise raised(said["error"])
        return return_value


def raised(said: Any) -> Exception:
    """The exception of the program's process, as the nearest built-in type with the same message."""
    try:
        names, message, trace = list(said["bases"]), str(said["message"])[:500], str(said["trace"])[:_LONGEST]
        kinds = [getattr(builtins, name, None) for name in names if type(name) is str]
        kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, Exception)), RuntimeError)
    except Exception:
        raise Stopped("malformed") from None
    try:
        error = kind(message)
    except Exception:  # those of encodings take more
        error = RuntimeError(message)
    error.program_trace = trace
    error.program_type = str(said.get("type"))[:100]
    return error


def shortened(value: Any) -> str:
    """The text of a value, of bounded length."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class Case:
    """One test while it runs: `with` it, an exception is a failure of this test and the next one follows."""

    def __init__(self, record: Record, number: int, source: str):
        self.record, self.number, self.source = record, number, source

    def __enter__(self) -> Self:
        self.record.remote.last_call = None
        return self

    def equal(self, got: Any, expected: Any) -> None:
        """Counts the test as right where `got == expected`."""
        self.settle(bool(got == expected), got=shortened(got), expected=shortened(expected))

    def alike(self, got: Any, results: Sequence[Any]) -> None:
        """Counts the test as right where one of the results is the same answer by `values.alike`."""
        right = any(values.alike(got, result) for result in results)
        self.settle(right, got=shortened(got), expected=shortened(results[0]))

    def holds(self, truth: Any) -> None:
        """Counts the test as right where something is true."""
        self.settle(bool(truth))

    def settle(self, right: bool, **seen: str) -> None:
        """Counts the test; `seen` is what is shown of it where it is wrong."""
        self.record.ran.add(self.number)
        if not right:
            self.failed("wrong", **seen)

    def failed(self, kind: str, **seen: str) -> None:
        """Notes a failure, the first of each test."""
        if len(self.record.failures) < MOST_FAILURES or self.number in self.record.failures:
            failure = {"case": self.number, "kind": kind, "test": self.source, "call": self.record.remote.last_call}
            self.record.failures.setdefault(self.number, {**failure, **seen})
        self.record.wrong.add(self.number)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.record.ran.add(self.number)
        if hasattr(error, "program_trace"):
            self.failed("error", trace=error.program_trace, type=error.program_type)
        else:
            said = "".join(traceback.format_exception_only(type(error), error)).strip()
            self.failed("wrong", trace=f"the test ended with {said[:500]}")
        return True


class Record:
    """Which tests ran, which were wrong, and what was seen of them."""

    def __init__(self, remote: Remote, total: int):
        self.remote, self.total = remote, total
        self.ran: set[int] = set()
        self.wrong: set[int] = set()
        self.failures: dict[int, dict[str, Any]] = {}

    def verdict(self, ended: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the trainer reads: `right` and `wrong` are numbers of tests, `ended` why they ended early, if so."""
        right = sorted(self.ran - self.wrong)
        return {"total": self.total, "right": right, "failures": list(self.failures.values()), "ended": ended}


class AssertsToCases(ast.NodeTransformer):
    """Makes every `assert` a `Case`, so that one which fails ends nothing and its two sides are seen.

    An assertion of a constant is left alone: `assert True` is no test, and `assert False` ends the tests when reached.
    """

    def __init__(self) -> None:
        self.total = 0

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """`assert a == b` as `with __case__(n, text) as __it__: __it__.equal(a, b)`."""
        if isinstance(node.test, ast.Constant):
            return node
        both = node.test if isinstance(node.test, ast.Compare) and len(node.test.ops) == 1 else None
        equality = both is not None and isinstance(both.ops[0], ast.Eq)
        name, sides = ("equal", [both.left, both.comparators[0]]) if equality else ("holds", [node.test])
        it = lambda context: ast.Name("__it__", context)
        opened = ast.Call(ast.Name("__case__", ast.Load()), [ast.Constant(self.total), ast.Constant(text_of(node))], [])
        body = ast.Expr(ast.Call(ast.Attribute(it(ast.Load()), name, ast.Load()), sides, []))
        self.total += 1
        return ast.copy_location(ast.With([ast.withitem(opened, it(ast.Store()))], [body]), node)


def text_of(node: ast.Assert) -> str:
    """An assertion as one line."""
    return ast.unparse(node.test)[:_LONGEST]


def check(job: Mapping[str, Any]) -> None:
    """Runs the tests of a job against the program's process and writes the verdict."""
    random.seed(0)
    remote = Remote(job["entry"])
    record = Record(remote, 0)
    ended = None
    try:
        run = prepared(job, record)
        remote.ask()
        run()
    except Stopped as stop:
        ended = {"kind": stop.args[0], "call": remote.last_call}
    except Exception as error:
        trace = getattr(error, "program_trace", None)
        said = "".join(traceback.format_exception_only(type(error), error)).strip()[:500]
        seen = {"trace": f"the tests ended with {said}"} if trace is None else {"trace": trace}
        kind = "wrong" if trace is None else "error"
        ended = {"kind": kind, "call": remote.last_call, "type": getattr(error, "program_type", ""), **seen}
    values.send(VERDICT, record.verdict(ended))


def prepared(job: Mapping[str, Any], record: Record) -> Callable[[], None]:
    """The tests of a job, counted and ready to run."""
    if job.get("cases") is None:
        return suite(job, record)
    record.total = len(job["cases"])
    return lambda: check_cases(job["cases"], record)


def suite(job: Mapping[str, Any], record: Record) -> Callable[[], None]:
    """A text of assertions, and its function `check(candidate)` if it defines one."""
    transform = AssertsToCases()
    tree = ast.fix_missing_locations(transform.visit(ast.parse(job["suite"])))
    record.total = transform.total
    scope: dict[str, Any] = {"__name__": "tests", "__case__": lambda number, text: Case(record, number, text)}
    exec(compile(job["given"], "given.py", "exec", dont_inherit=True), scope)
    scope |= {job["entry"]: record.remote, "candidate": record.remote}
    code = compile(tree, "tests.py", "exec", dont_inherit=True)

    def run() -> None:
        exec(code, scope)
        if "check" in scope and job["entry"] != "check":
            scope["check"](record.remote)

    return run


def check_cases(cases: Sequence[Any], record: Record) -> None:
    """Calls the function with each case's arguments and compares with the results that are right."""
    for number, (arguments, results) in enumerate(cases):
        with Case(record, number, "") as case:
            case.alike(record.remote(*arguments), results)
