"""What the process of a program does: run it once on its input, or load it and answer calls of one function.

Everything here lies within the program's reach.  It knows no expected output, and nobody believes what it says of
itself: its exit status, its output and the values it answers with are compared elsewhere.
"""

from __future__ import annotations

import atexit
import linecache
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from sdjax.tasks.code import values

FILE = "solution.py"
CALLS = 4
"""The descriptor over which the tests call."""

_FRAMES, _LONGEST_MESSAGE, _LONGEST_TRACE = 4, 500, 2000


def run(job: Mapping[str, Any]) -> None:
    """Runs `job["program"]` as a script and ends this process as Python would have ended."""
    status = 0
    try:
        exec(_compiled(job["program"]), _module("__main__", job).__dict__)
    except SystemExit as ending:
        status = _status(ending)
    except BaseException as error:
        status = 1
        _say(described(error)["trace"])
    for close in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        try:
            close()
        except SystemExit as ending:
            status = status or _status(ending)
        except BaseException as error:
            status = status or 1
            _say(described(error)["trace"])
    os._exit(status & 0xFF)


def answer(job: Mapping[str, Any]) -> None:
    """Loads `job["program"]` and answers calls of `job["entry"]` until nobody calls any more.

    First it says that it is loaded; a call is `{"arguments", "names"}`, an answer `{"value"}` or `{"error"}`.
    """
    send, receive, encoded, decoded, tell = values.send, values.receive, values.encoded, values.decoded, described
    try:
        module = _module("solution", job)
        exec(_compiled(job["program"]), module.__dict__)
        function = _entry(module, job["entry"])
    except BaseException as error:
        send(CALLS, {"error": tell(error)})
        return
    send(CALLS, {"value": None})
    while True:
        try:
            call = receive(CALLS)
        except EOFError:
            return
        arguments, names = decoded(call["arguments"]), decoded(call["names"])
        try:
            said = {"value": encoded(function(*arguments, **names))}
        except values.ValueCannotCross as error:
            said = {
                "error": {"type": "TypeError", "bases": [], "message": "", "trace": f"{job['entry']} returned {error}"}
            }
        except BaseException as error:
            said = {"error": tell(error)}
        send(CALLS, said)


def described(error: BaseException) -> dict[str, Any]:
    """An exception as JSON: its type, the built-in types it derives from, its message, the program's last frames."""
    try:
        message = str(error)[:_LONGEST_MESSAGE]
    except BaseException:
        message = "(its message cannot be read)"
    kind = type(error).__name__[:100]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == FILE][-_FRAMES:]
    if isinstance(error, SyntaxError) and error.filename == FILE:
        lines = traceback.format_exception_only(type(error), error)
    else:
        lines = [f"{kind}: {message}" if message else kind]
    if frames:
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames), *lines]
    bases = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
    return {"type": kind, "bases": bases, "message": message, "trace": "".join(lines)[-_LONGEST_TRACE:].strip()}


def _module(name: str, job: Mapping[str, Any]) -> types.ModuleType:
    """The program's module, with what the problem gave it (imports, helpers) already in it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    module = types.ModuleType(name)
    sys.modules[name] = sys.modules["__main__"] = module
    exec(compile(job.get("given", ""), "given.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _compiled(program: str) -> types.CodeType:
    linecache.cache[FILE] = (len(program), None, program.splitlines(True), FILE)
    return compile(program, FILE, "exec", dont_inherit=True)


def _entry(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """The function of that name, else the method of a class `Solution`, made anew for every call."""
    found = getattr(module, name, None)
    solution = getattr(module, "Solution", None)
    if found is None and hasattr(solution, name):
        return lambda *arguments, **names: getattr(solution(), name)(*arguments, **names)
    if found is None:
        raise NameError(f"the program defines no function {name!r}")
    return found


def _status(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return int(ending.code or 0)
    _say(str(ending.code))
    return 1


def _say(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except BaseException:
        os.write(2, text.encode("utf-8", "replace"))
