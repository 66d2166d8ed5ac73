"""DAPO: GRPO with wider clipping upwards, a token mean, and only groups that have something to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from sdjax.collect.rollouts import attempts, resample
from sdjax.engine.generate import Sampling
from sdjax.kernels.policy_gradient import overlong_penalty
from sdjax.kernels.reductions import token_mean
from sdjax.methods.grpo import grpo
from sdjax.ranges import NonNegative, Positive, PositiveInt, Rising, Share, check_ranges
from sdjax.types import Card, Method, Rollout

CARD = Card(
    paper="Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arxiv="2503.14476",
    equation="max(-r A, -clip(r, 0.8, 1.28) A), r = p/b, A = (R - mean R) / std R, groups with unequal R only",
    student="question",
    teacher="none",
    reduction="token mean",
    differences=(
        "groups are dropped by the verifier's reward, before the penalty for length, as in verl (metric acc)",
        "the paper's buffer of 4096 of 20480 tokens is a share of the completion limit here, overlong=0.2",
    ),
)


def unequal(rows: Sequence[Rollout]) -> bool:
    """Whether the rewards of a group differ: otherwise it has no advantage."""
    return len({r.reward for r in rows}) > 1


@check_ranges
def dapo(
    *,
    group_size: PositiveInt = 16,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.28),
    rounds: PositiveInt = 10,
    overlong: Share = 0.2,
    overlong_factor: NonNegative = 1.0,
    overlong_filter: bool = False,
    tis_cap: Positive | None = None,
    tis_bounds: Annotated[tuple[NonNegative, NonNegative], Rising] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    temperature: NonNegative = 1.0,
) -> Method:
    """Decoupled clip and dynamic sampling (Yu et al. 2025, arXiv:2503.14476, Eq. 8-13).

    GRPO with clip-higher and a token mean.  Groups whose rewards are all equal are replaced by further prompts; the
    reward of a long answer falls linearly, by `overlong_factor` at the completion limit.

    Args:
      group_size: rollouts per prompt.
      clip: widths of the ratio's clip below and above 1.  It acts from the second update on a batch on.
      rounds: of sampling per batch, before giving up with an error; 1: no replacement, and an error if one is needed.
      overlong: share of the completion limit, at its end, in which length is penalised; 0: no penalty.
      overlong_factor: the penalty at the limit.
      overlong_filter: take no gradient from answers that were cut off (their rewards still count in the mean).
      tis_cap, tis_bounds, tis_level: weights for a sampler whose numerics differ from the scorer's: truncated at a cap,
        or dropped outside of bounds (IcePop), per token or per row; see `grpo`.
      temperature: of sampling.
    """

    def collect(environment, examples, key, memory):
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        attempt = lambda some, own_key: attempts(environment, some, own_key, **how)
        rollouts = resample(environment, examples, key, attempt, unequal, rounds=rounds)
        return shaped(rollouts, environment.live.shapes.completion), memory

    def shaped(rollouts: list[Rollout], limit: int) -> list[Rollout]:
        if overlong:
            lengths = np.asarray([len(r.tokens) for r in rollouts])
            penalty = np.asarray(overlong_penalty(lengths, limit, overlong * limit, overlong_factor))
            rollouts = [r.shaped(float(x)) for r, x in zip(rollouts, penalty, strict=True)]
        if overlong_filter:
            untrained = lambda r: dataclasses.replace(r, trained=(False,) * len(r.tokens))
            rollouts = [r if r.finished else untrained(r) for r in rollouts]
        return rollouts

    return grpo(
        group_size=group_size,
        clip=clip,
        tis_cap=tis_cap,
        tis_bounds=tis_bounds,
        tis_level=tis_level,
        reduce=token_mean,
        collect=collect,
    )
