"""A calculator: arithmetic of whole numbers and decimals, read from a syntax tree and never evaluated by Python."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any

from sdjax.tasks.tools.tool import CallError, Tool

MOST_CHARACTERS, MOST_BITS = 500, 4096
"""Of an expression, and of a whole number on the way."""

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
NAMES = {"pi": math.pi, "e": math.e}
FUNCTIONS = {"sqrt": math.sqrt, "abs": abs, "round": round, "min": min, "max": max, "floor": math.floor}
FUNCTIONS |= {name: getattr(math, name) for name in ("ceil", "sin", "cos", "tan", "exp", "log", "log10", "gcd")}
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def calculated(expression: str) -> str:
    """The value of an expression with `+ - * / // % ** ^`, brackets, `sqrt` and the like, as text.

    Raises: `CallError` for anything else, for numbers that are too large, and where there is no value.
    """
    text = expression.translate(SIGNS).strip().removesuffix("=").strip()
    if len(text) > MOST_CHARACTERS:
        raise CallError(f"the expression has {len(text)} characters; at most {MOST_CHARACTERS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
        value = value_of(tree.body)
        return shown(value)
    except (SyntaxError, RecursionError, MemoryError):
        raise CallError(f"{expression[:80]!r} is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise CallError("division by zero") from None
    except (ValueError, OverflowError, TypeError) as error:
        raise CallError(f"{expression[:80]!r} has no value: {error}") from None


def value_of(node: ast.expr) -> int | float:
    """The value of a syntax tree.  Raises: `CallError`, or what Python's arithmetic raises."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return bounded(value)
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](value_of(operand))
        case ast.BinOp(left=left, op=ast.Pow() | ast.BitXor(), right=right):
            return power(value_of(left), value_of(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return bounded(BINARY[type(op)](value_of(left), value_of(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS and args:
            return bounded(FUNCTIONS[name](*map(value_of, args)))
    raise CallError(f"{ast.unparse(node)[:80]!r} is not arithmetic; there are {', '.join(sorted(FUNCTIONS))}")


def power(base: float, exponent: float) -> int | float:
    """A power that cannot become too large.  Raises: `CallError`, `OverflowError`."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > MOST_BITS:
            raise CallError("the power is too large")
        return base**exponent
    return bounded(float(base) ** float(exponent))


def bounded(value: Any) -> int | float:
    """A real number of a size that can be shown.  Raises: `CallError`."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise CallError("a number on the way is too large")
    if not isinstance(value, int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise CallError("the result is no real number")
    return value


def shown(value: float) -> str:
    """Whole numbers exactly, others with twelve digits."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _run(arguments: Mapping[str, Any]) -> str:
    return calculated(arguments["expression"])


CALCULATOR = Tool(
    "calculator",
    "Works out an arithmetic expression, such as (12 + 3.5) * 4.",
    {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "the expression"}},
        "required": ["expression"],
    },
    _run,
)
