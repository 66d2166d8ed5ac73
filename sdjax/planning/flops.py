"""Floating-point operations of a traced program, on any number of devices together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""cuDNN's attention as JAX names it, and how many products of the size of the scores each computes."""


def product_flops(jaxpr: Any, trips: int = 1) -> float:
    """FLOP of all matrix products in a jaxpr: two per multiply-add, recomputation included, loops counted.

    Of the branches of a condition the dearest counts; the body of a loop of unknown length counts `trips` times.  Scores
    that a mask skips count, too.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inner = equation.primitive.name, [product_flops(j, trips) for j in inner_jaxprs(equation.params)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        elif name == "ragged_dot_general":
            total += grouped_flops(*(x.aval.shape for x in (*equation.invars[:2], equation.outvars[0])))
        elif name in ATTENTION:
            (batch, asked, heads, width), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            total += ATTENTION[name] * 2.0 * batch * heads * asked * keys * width
        elif name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * runs(equation, trips)
    return total


def grouped_flops(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """FLOP of a grouped product: each of the `m` rows `[m, k]` meets one group's matrix `[k, n]` (or makes a part of it)."""
    return 2.0 * left[0] * left[1] * (out[-1] if len(out) == 2 else right[-1])


def runs(equation: Any, trips: int) -> int:
    """How often an equation's inner jaxprs run: once, or as often as a loop turns, a kernel has tiles, a mesh devices."""
    name, params = equation.primitive.name, equation.params
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)  # tiles that a mask skips are counted, too
    if name == "shard_map":
        return params["mesh"].size
    return {"scan": params.get("length", 1), "while": trips}.get(name, 1)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Every jaxpr among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield one
