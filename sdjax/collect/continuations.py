"""Whose continuation of the student's text solves the problem: how far into an answer a teacher still helps."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.collect.rollouts import judge
from sdjax.devices.sharding import place_rows, rows_multiple, to_host
from sdjax.engine.generate import Completions, Sampling, generate
from sdjax.engine.policies import Environment, Policy, Sample, one_sample, row_keys
from sdjax.engine.tokens import decode_text, encode_context, left_pad, thinking_opened
from sdjax.types import Messages, Rollout

GAIN = "continuation_gain"
"""Extras: `continuation_gain/64` is the gain of a row at a prefix of 64 tokens; 0 where the row is not longer."""


def continued_after(
    policy: Policy,
    chats: Sequence[Messages],
    prefixes: Sequence[Sequence[int]],
    key: Array,
    *,
    limit: int,
    slots: int,
    sampling: Sampling,
) -> list[Sample]:
    """One continuation of at most `limit` tokens after each chat and the first tokens of its answer.

    Rows are padded to a multiple of `slots`, so that numbers and depths that differ from call to call compile once;
    row `i` draws from `fold_in(fold_in(key, i), 0)`.
    """
    rows = [
        [*encode_context(policy.tokenizer, c, policy.shapes, policy.template), *p]
        for c, p in zip(chats, prefixes, strict=True)
    ]
    slots, found = rows_multiple(slots), []
    for start in range(0, len(rows), slots):
        count = len(rows[start : start + slots])
        places = np.minimum(np.arange(slots), count - 1) + start
        # Two buckets' worth of room whatever the depth: one compiled shape per bucket of the longest row.
        context = left_pad([rows[i] for i in places], policy.shapes.context + policy.shapes.completion)
        done = generate(
            (policy.model,),
            (policy.params,),
            place_rows((context,)),
            row_keys(key, jnp.asarray(np.arange(slots) + start), 1),
            sampling,
            jnp.asarray(policy.stop, jnp.int32),
            limit,
            length=policy.shapes.completion,
        )
        done = Completions(*to_host(tuple(done)))
        found += [one_sample(done, i, policy.tokenizer) for i in range(count)]
    return found


def with_continuation_gains(
    environment: Environment,
    rollouts: Sequence[Rollout],
    key: Array,
    depths: Sequence[int],
    *,
    teacher: str,
    sampling: Sampling | None = None,
    success: float = 0.5,
) -> list[Rollout]:
    """The rollouts with the gain of every depth `d`: the teacher, after their first `d` tokens, is right - they are.

    So +1 where the teacher finds what the student did not, -1 the other way round, else 0: the attempt itself is the
    student's continuation.  Only rows of more than `d` tokens whose teacher has something to read (context "teacher")
    are continued; the mean over them is the continuation gain.  Costs one sampling of the teacher per depth.
    Source: Li et al. 2026 (Rethinking OPD), arXiv:2604.13016, section on prefix depth.
    """
    policy, gains = environment.policies[teacher], {}
    for number, depth in enumerate(depths):
        long = [r for r in rollouts if len(r.tokens) > depth and r.contexts.get("teacher") is not None]
        if not long:
            continue
        said = continued_after(
            policy,
            [r.contexts["teacher"] for r in long],
            [r.tokens[:depth] for r in long],
            row_keys(key, jnp.asarray([number]), 1)[0],
            limit=max(environment.live.shapes.completion - depth, 1),
            slots=len(rollouts),
            sampling=sampling or Sampling(),
        )
        written = [joined(r, depth, s, policy) for r, s in zip(long, said, strict=True)]
        for own, other in zip(long, judge(environment, written), strict=True):
            gains[id(own), depth] = float(other.reward >= success) - float(own.reward >= success)
    of = lambda r: {f"{GAIN}/{depth}": gains.get((id(r), depth), 0.0) for depth in depths}
    return [r.with_extras(**of(r)) for r in rollouts]


def joined(rollout: Rollout, depth: int, new: Sample, policy: Policy) -> Rollout:
    """The first `depth` tokens of a rollout and what the teacher wrote after them, not judged yet."""
    tokens = (*rollout.tokens[:depth], *new.tokens)
    read = encode_context(policy.tokenizer, rollout.contexts["teacher"], policy.shapes)
    text = decode_text(policy.tokenizer, tokens, thinking_opened(policy.tokenizer, read))
    return Rollout(rollout.example, tokens, (0.0,) * len(tokens), text, rollout.group, finished=new.finished)
