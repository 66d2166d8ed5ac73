"""Sampling after prefixes of token ids: a wave continues many conversations at once, in few compiled programs.

What a policy has read and written is never rendered again: its next turn begins after exactly those ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.devices.sharding import place_rows, rows_multiple, to_host
from sdjax.engine.generate import Completions, Sampling, generate
from sdjax.engine.policies import Policy, Sample, one_sample, row_keys
from sdjax.engine.tokens import ROWS, Shapes, left_pad, thinking_opened

SHRINK = 4
"""A wave of fewer rows than a program has takes one of so many times fewer rows, where they fit."""


def reach(shapes: Shapes, prefixes: Sequence[Sequence[int]]) -> int:
    """The most tokens of a prefix: `shapes.context`, or where one is longer also a whole completion."""
    longest = max(map(len, prefixes), default=0)
    return shapes.context if longest <= shapes.context else shapes.context + shapes.completion


def continued(
    policy: Policy, prefixes: Sequence[Sequence[int]], keys: Array, *, sampling: Sampling, limit: int
) -> list[Sample]:
    """One completion of at most `limit` tokens after each prefix; row `i` draws from `fold_in(keys[i], 0)`.

    Prefixes are sorted by length and read in parts of `shapes.rows`, or of a fourth, sixteenth, ... of that, padded to a
    power of two: a program is compiled for each pair of sizes.
    """
    if policy.writer is not None:
        return [s for (s,) in policy.writer(policy, prefixes, keys, n=1, sampling=sampling, limit=limit)]
    found: list[Sample | None] = [None] * len(prefixes)
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    every = row_keys(keys, jnp.arange(len(prefixes)), 1)
    for part, size in parts(order, policy.shapes.rows or ROWS):
        padded = [part[min(i, len(part) - 1)] for i in range(size)]
        done = generate(
            (policy.model,),
            (policy.params,),
            place_rows((widened(*left_pad([prefixes[i] for i in padded], 1), policy.shapes),)),
            every[np.asarray(padded)],
            sampling,
            jnp.asarray(policy.stop, jnp.int32),
            limit,
            length=policy.shapes.completion,
        )
        done = Completions(*to_host(tuple(done)))
        for row, i in enumerate(part):
            found[i] = one_sample(done, row, policy.tokenizer, thinking_opened(policy.tokenizer, prefixes[i]))
    return found


def parts(order: Sequence[int], most: int) -> Iterator[tuple[Sequence[int], int]]:
    """Rows in parts of at most `most`, each with the number of rows of its program."""
    for start in range(0, len(order), most):
        part, size = order[start : start + most], most
        while size > SHRINK and -(-size // SHRINK) >= len(part):
            size = -(-size // SHRINK)
        yield part, rows_multiple(size)


def widened(tokens: np.ndarray, mask: np.ndarray, shapes: Shapes) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded rows with a power of two of columns, or as many as a prompt and a completion may have."""
    most, width = shapes.context + shapes.completion, 32
    used = mask.any(0).sum()
    while width < used:
        width *= 2
    width = max(used, min(width, most))
    pad = lambda x: np.pad(x[:, x.shape[1] - used :], ((0, 0), (width - used, 0)))
    return pad(tokens), pad(mask)
