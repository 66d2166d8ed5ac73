"""GSPO: GRPO whose ratio is a whole sequence's, not a token's."""

from __future__ import annotations

from typing import Annotated, Literal

from sdjax.kernels.policy_gradient import sequence_clipped_surrogate
from sdjax.kernels.reductions import sequence_mean
from sdjax.methods.grpo import grpo
from sdjax.ranges import NonNegative, Positive, PositiveInt, Rising, check_ranges
from sdjax.types import Card, Method

CARD = Card(
    paper="Zheng et al. 2025, Group Sequence Policy Optimization",
    arxiv="2507.18071",
    equation="max(-s A, -clip(s, 1-lo, 1+hi) A), s = exp(mean_t log p/b), A = (R - mean R) / std R",
    student="question",
    teacher="none",
    reduction="sequence mean",
    differences=("the token form (the paper's GSPO-token, verl): same values and gradients as the sequence form",),
)


@check_ranges
def gspo(
    *,
    group_size: PositiveInt = 8,
    normalised: bool = True,
    clip: tuple[NonNegative, NonNegative] = (3e-4, 4e-4),
    tis_cap: Positive | None = None,
    tis_bounds: Annotated[tuple[NonNegative, NonNegative], Rising] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    temperature: NonNegative = 1.0,
) -> Method:
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071).  Sequence mean.

    Args:
      group_size: rollouts per prompt.
      normalised: divide the advantage by the group's standard deviation.
      clip: widths of the clip of the sequence's ratio; it acts from the second update on a batch on (paper: 4
        minibatches per batch of rollouts).
      tis_cap, tis_bounds, tis_level: weights for a sampler whose numerics differ from the scorer's: truncated at a cap,
        or dropped outside of bounds (IcePop), per token or per row; see `grpo`.
      temperature: of sampling.
    """

    def surrogate(logprobs, old_logprobs, advantage, trained):
        return sequence_clipped_surrogate(logprobs, old_logprobs, advantage, trained, clip)

    return grpo(
        group_size=group_size,
        normalised=normalised,
        tis_cap=tis_cap,
        tis_bounds=tis_bounds,
        tis_level=tis_level,
        temperature=temperature,
        reduce=sequence_mean,
        surrogate=surrogate,
    )
