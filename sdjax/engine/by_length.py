"""Rows in the order of their lengths, a few at a time, each few cut to the least of some lengths that holds them.

A batch is padded to its longest row.  Where lengths differ much, most products are then spent on padding.  Here every chunk of
rows runs the one of several programs, in one compiled loop, that was compiled for its length.  Results are those of all
rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

SHORTEST = 16
"""How many times shorter than the longest the shortest of the lengths is, about."""


def divisor_at_least(number: int, wanted: int) -> int:
    """The smallest divisor of `number` that is at least `wanted` (at most `number`)."""
    return next(d for d in range(1, number + 1) if number % d == 0 and d >= min(wanted, number))


def lengths_of(longest: int, count: int) -> tuple[int, ...]:
    """At most `count` lengths up to `longest`, ascending, each the same number of times the one before, about.

    They are multiples of a 64th of the longest, so that slices of positions divide them.
    """
    step = max(1, longest // 64)
    steps = (math.ceil(longest * SHORTEST ** (-i / count) / step - 1e-6) for i in range(count))
    return tuple(sorted({min(longest, n * step) for n in steps}))


def sorted_chunks(used: Array, rows: int | None, sizes: Sequence[int]) -> tuple[Array, Array]:
    """Rows of lengths `used [B]` in ascending order, `[N, B / N]`, and the place in `sizes` of each chunk's length, `[N]`.

    A chunk has at most about `rows` rows, and so few that there are two chunks for each length.
    """
    total = len(used)
    few = total // divisor_at_least(total, max(2 * len(sizes), math.ceil(total / (rows or total))))
    chunks = jnp.argsort(used).reshape(-1, few)
    return chunks, jnp.searchsorted(jnp.asarray(sizes), used[chunks].max(axis=1))


def positions_read(used: Array, longest: int, rows: int | None, lengths: int) -> int:
    """How many positions of rows of lengths `used [B]` in a batch of `longest` positions are read, padding included."""
    if lengths == 1:
        return len(used) * longest
    sizes = lengths_of(longest, lengths)
    chunks, kinds = sorted_chunks(jnp.asarray(used), rows, sizes)
    return int(jnp.asarray(sizes)[kinds].sum()) * chunks.shape[1]


def over_sorted_rows(
    function: Callable[[Any, Any], tuple[Any, Any]],
    same: Any,
    timed: Any,
    contexts: Any,
    live: Array,
    rows: int | None,
    lengths: int,
) -> tuple[Any, Any]:
    """`function` over few rows at a time, in the order of their lengths.

    Args:
      function: `(same, {**timed, "contexts": contexts}) -> (timed, rest)` of `R` rows, `timed` with leaves `[R, L, ...]`,
        `rest` with leaves `[R, ...]`.  It is computed again in the backward pass.
      same: what every chunk reads whole, parameters above all.
      timed: a dictionary of trees with leaves `[B, T, ...]`; `live [B, T]`: a row's length is that of its live positions.
      contexts: a tree with leaves `[C, ...]`, of which row `r` reads `r // (B / C)`; `C` may differ from leaf to leaf.
      rows: at most about so many at a time; always so few that there are two chunks for each length.
      lengths: to how many lengths chunks are cut.

    Returns:
      What `function` says of all rows, in their own order; 0 at positions that were cut off.
    """
    total, longest = live.shape
    sizes = lengths_of(longest, lengths)
    used = jnp.max(jnp.where(live, jnp.arange(1, longest + 1), 0), axis=1)
    chunks, kinds = sorted_chunks(used, rows, sizes)
    read = chosen([cut_to(function, size, longest) for size in sizes])

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        own, kind = chunk
        own_context = jax.tree.map(lambda x: x[own // (total // len(x))], contexts)
        return read(kind, (same, jax.tree.map(lambda x: x[own], timed), own_context))

    found, back = jax.lax.map(one, (chunks, kinds)), jnp.argsort(chunks.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:])[back], found)


def cut_to(function: Callable, length: int, longest: int) -> Callable[[Any], tuple[Any, Any]]:
    """`function` of rows that are cut to `length` positions; what it says of each is padded with zeros again."""

    def part(inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        same, timed, contexts = inputs
        timed = jax.tree.map(lambda x: x[:, :length], timed)
        said, rest = function(same, {**timed, "contexts": contexts})
        pad = lambda x: jnp.pad(x, ((0, 0), (0, longest - length), *((0, 0),) * (x.ndim - 2)))
        return jax.tree.map(pad, said), rest

    return part


def chosen(branches: Sequence[Callable[[Any], Any]]) -> Callable[[Array, Any], Any]:
    """`(i, x) -> branches[i](x)`, of which the backward pass keeps `x` alone and computes the rest of branch `i` again.

    A condition keeps otherwise what any of its branches needs backwards, all parameters once for each included.
    """

    @jax.custom_vjp
    def read(which: Array, x: Any) -> Any:
        return jax.lax.switch(which, branches, x)

    def forward(which: Any, x: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(x, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
        # What is differentiated, and what is not: None stands in the other's place.
        moving = jax.tree.unflatten(tree, [leaf.value if leaf.perturbed else None for leaf in leaves])
        fixed = jax.tree.unflatten(tree, [None if leaf.perturbed else leaf.value for leaf in leaves])
        return read(which.value, joined(moving, fixed)), (which.value, moving, fixed)

    def backward(kept: tuple[Array, Any, Any], cotangent: Any) -> tuple[None, Any]:
        which, moving, fixed = kept
        given = jax.tree.leaves(cotangent)
        heard = [not isinstance(leaf, SymbolicZero) for leaf in given]  # other outputs lead nowhere, or are integers
        of_heard = lambda leaves: [leaf for leaf, there in zip(leaves, heard, strict=True) if there]

        def pull(branch: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
            said = lambda x: of_heard(jax.tree.leaves(branch(joined(x, fixed))))
            return lambda moving, given: jax.vjp(said, moving)[1](given)[0]

        return None, jax.lax.switch(which, [pull(branch) for branch in branches], moving, of_heard(given))

    read.defvjp(forward, backward, symbolic_zeros=True)
    return read


def joined(moving: Any, fixed: Any) -> Any:
    """One tree of two that have None where the other has a leaf."""
    return jax.tree.map(lambda x, y: y if x is None else x, moving, fixed, is_leaf=lambda x: x is None)
