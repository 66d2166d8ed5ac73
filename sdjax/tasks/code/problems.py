"""Problems of programming from rows of data: which tests a row has, in the forms that data sets use.

`tests` is one of
- inputs and outputs: `{"inputs": [...], "outputs": [...]}`, with `"fn_name"` where a function is called (TACO, APPS);
- cases: `[{"input": ..., "output": ...}, ...]`, with `"testtype": "functional"` where a function is called
  (LiveCodeBench);
- assertions: a text, or a list of texts (HumanEval, MBPP), that call a function.
The function's name stands in the tests or in the row: `fn_name`, `func_name`, `entry_point`, or `metadata.func_name`.
`hidden_tests`, of the same form, count for the reward and are never shown.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sdjax.tasks.code.checker import AssertsToCases
from sdjax.tasks.code.judging import FunctionTests, ScriptTests, Tests
from sdjax.tasks.data.fields import FIELDS
from sdjax.tasks.data.rows import example_of
from sdjax.tasks.errors import TaskError
from sdjax.types import Example

SHOWN = ("tests", "input_output", "public_test_cases", "test_list", "test")
"""The fields that tests are taken from; the first that a row has."""

HIDDEN = ("hidden_tests", "private_test_cases", "challenge_test_list")
NAMES = ("fn_name", "func_name", "entry_point")
QUESTIONS = ("question_content", "question", "text")
SOLUTIONS = ("canonical_solution", "code")

ASK = "Write a Python program that solves the problem. Put all of your code inside one ```python ... ``` block."

USUAL_IMPORTS = """import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, chain, combinations, permutations, product
from typing import *
"""
"""What the judges of contests import before a program whose function they call, LiveCodeBench's among them."""


def code_example(row: Mapping[str, Any], where: str, default_id: str) -> Example:
    """The example of a row, its tests under `meta["tests"]`.  Raises: `TaskError`."""
    row = dict(row)
    if "prompt" not in row and "messages" not in row:
        question = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str)), None)
        if question is not None:
            starter = row.get("starter_code") or ""
            begun = f"\n\nBegin with this code:\n\n```python\n{starter}\n```" if starter else ""
            row["prompt"] = f"{question}{begun}\n\n{ASK}"
    solution = next((row[name] for name in SOLUTIONS if isinstance(row.get(name), str)), None)
    if solution and row.get("solution") is None:
        row["solution"] = f"```python\n{solution.strip()}\n```"
    kept = {name: row[name] for name in FIELDS if name in row}
    example = example_of({**kept, "answer": "-"}, where, default_id)
    return dataclasses.replace(example, answer="", meta={"tests": tests_of(row, where)})


def tests_of(row: Mapping[str, Any], where: str) -> Tests:
    """The tests of a row.  Raises: `TaskError`."""
    field = next((name for name in SHOWN if row.get(name)), None)
    if field is None:
        raise TaskError(f"{where}: `tests` is missing; found {', '.join(sorted(row)) or 'an empty object'}.")
    shown = field_of(row, field, where)
    hidden_field = next((name for name in HIDDEN if row.get(name)), None)
    hidden = field_of(row, hidden_field, where) if hidden_field else None
    name = entry_of(row, shown)
    if isinstance(shown, str) or (isinstance(shown, list) and all(isinstance(each, str) for each in shown)):
        return assertions(row, shown, hidden, name, f"{where}: `{field}`")
    public = pairs(shown, f"{where}: `{field}`")
    private = pairs(hidden, f"{where}: `{hidden_field}`") if hidden is not None else []
    if name:
        cases = tuple(called(given, out, f"{where}: `{field}`") for given, out in [*public, *private])
        imports = USUAL_IMPORTS + str(row.get("given") or "")
        return FunctionTests(name, len(public), cases=cases, given=imports)
    inputs, outputs = zip(*[(lines(i, where), lines(o, where)) for i, o in [*public, *private]], strict=True)
    return ScriptTests(inputs, outputs, len(public))


def field_of(row: Mapping[str, Any], field: str, where: str) -> Any:
    """A field's value; a text that is JSON of an object or a list is read as that."""
    value = row[field]
    if isinstance(value, str) and (value.lstrip()[:1] in ("[", "{") or field == "private_test_cases"):
        try:
            return json.loads(value)
        except ValueError:
            if field == "private_test_cases":
                expected = "is compressed; write it as JSON, a list of objects with `input` and `output`"
                raise TaskError(f"{where}: `{field}` {expected}.") from None
    return value


def entry_of(row: Mapping[str, Any], shown: Any) -> str:
    """The name of the function that is tested, as far as the row says it; empty for programs."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    cases = shown if isinstance(shown, list) else []
    if any(isinstance(case, dict) and case.get("testtype") == "stdin" for case in cases):
        return ""
    places = [row, metadata, shown, *cases[:1]]
    found = [place[name] for place in places if isinstance(place, dict) for name in NAMES if place.get(name)]
    return str(found[0]) if found else ""


def pairs(tests: Any, where: str) -> list[tuple[Any, Any]]:
    """Inputs with outputs, of both forms.  Raises: `TaskError`."""
    if isinstance(tests, dict):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0:
            return list(zip(inputs, outputs, strict=True))
        raise TaskError(f"{where} must have `inputs` and `outputs`, two lists of the same length that are not empty.")
    if isinstance(tests, list) and tests:
        for number, case in enumerate(tests, start=1):
            if not isinstance(case, dict) or "input" not in case or "output" not in case:
                raise TaskError(f"{where}, test {number}: expected an object with `input` and `output`.")
        return [(case["input"], case["output"]) for case in tests]
    raise TaskError(f"{where} must be assertions, an object with `inputs` and `outputs`, or a list of cases.")


def called(given: Any, out: Any, where: str) -> tuple[list, list]:
    """Arguments of a call, and the results that are right.

    LiveCodeBench writes one JSON value a line; TACO lists arguments, and wraps results in a list or does not.
    """
    try:
        arguments = (
            [json.loads(line) for line in given.split("\n") if line.strip()] if isinstance(given, str) else given
        )
        results = [json.loads(out)] if isinstance(given, str) and isinstance(out, str) else [out]
    except ValueError:
        raise TaskError(f"{where}: the input and output of a call must be JSON, one value a line.") from None
    if not isinstance(arguments, list):
        raise TaskError(f"{where}: the input of a call must be a list of arguments.")
    wrapped = not isinstance(given, str) and isinstance(out, list) and len(out) == 1
    return arguments, [*results, *(out if wrapped else [])]


def lines(value: Any, where: str) -> str:
    """An input or output as text; some data sets list its lines."""
    if isinstance(value, list):
        return "\n".join(lines(each, where) for each in value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise TaskError(f"{where}: inputs and outputs of a program must be texts, or lists of lines.")


def assertions(row: Mapping[str, Any], shown: Any, hidden: Any, name: str, where: str) -> FunctionTests:
    """Assertions as tests.  Raises: `TaskError` for those that are no Python, or that test nothing."""
    text = lambda part: "\n".join(part) if isinstance(part, list) else part or ""
    public, suite = text(shown), "\n".join([text(shown), text(hidden)])
    try:
        total, visible = count(suite), count(public)
    except SyntaxError as error:
        raise TaskError(f"{where} is no Python: {error.msg} in line {error.lineno}.") from None
    name = name or first_called(public)
    if not total or not name:
        raise TaskError(f"{where} must assert something of a function; name it in `entry_point`.")
    given = "\n".join(text(row.get(field)) for field in ("given", "test_imports", "test_setup_code"))
    return FunctionTests(name, visible, suite=suite, given=given.strip())


def count(suite: str) -> int:
    """How many assertions a text has that are no constants."""
    transform = AssertsToCases()
    transform.visit(ast.parse(suite))
    return transform.total


def first_called(suite: str) -> str:
    """The first name that an assertion calls and that is none of Python's or the suite's own; empty without one."""
    tree = ast.parse(suite)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        for alias in getattr(node, "names", [])
        if hasattr(alias, "name")
    }
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.Assert)):
        names = [n.func.id for n in ast.walk(statement) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        found = next((n for n in names if n not in own and not hasattr(builtins, n)), None)
        if found:
            return found
    return ""
