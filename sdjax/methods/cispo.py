"""CISPO: a policy gradient whose importance weight is clipped, so that no token loses its gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from sdjax.kernels import policy_gradient
from sdjax.kernels.reductions import token_mean
from sdjax.methods.grpo import Compared, grpo
from sdjax.ranges import NonNegative, Positive, PositiveInt, Rising, check_ranges
from sdjax.types import Card, Method

CARD = Card(
    paper="MiniMax 2025, MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    arxiv="2506.13585",
    equation="-stop(clip(r, 1-lo, 1+hi)) A log p, r = p/b, A = (R - mean R) / std R",
    student="question",
    teacher="none",
    reduction="token mean",
    differences=(
        "the default is TRL's with ScaleRL's cap of 5: no lower bound (the paper has none in effect), 1 + hi = 5",
        "ScaleRL divides by the deviation of the batch's centred rewards: compared='batch'; the group's is the default",
        "verl clips to (1 - 0.2, 1 + 0.28): clip=(0.2, 0.28)",
    ),
)


@check_ranges
def cispo(
    *,
    group_size: PositiveInt = 16,
    normalised: bool = True,
    compared: Compared = "group",
    clip: tuple[NonNegative, NonNegative] = (1.0, 4.0),
    tis_cap: Positive | None = None,
    tis_bounds: Annotated[tuple[NonNegative, NonNegative], Rising] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    temperature: NonNegative = 1.0,
) -> Method:
    """Clipped importance-sampling policy optimisation (MiniMax 2025, arXiv:2506.13585).  Token mean.

    Args:
      group_size: rollouts per prompt.
      normalised: divide the advantage by the group's standard deviation.
      compared: a reward minus its group's mean, by the group's deviation or the "batch"'s (ScaleRL; of a minibatch where
        there are several); or minus the mean of the group's other rows.
      clip: how far the weight may fall below and rise above 1: (1, 4) is between 0 and 5, verl's is (0.2, 0.28).
      tis_cap, tis_bounds, tis_level: weights for a sampler whose numerics differ from the scorer's: truncated at a cap,
        or dropped outside of bounds (IcePop), per token or per row; see `grpo`.
      temperature: of sampling.
    """

    def surrogate(logprobs, old_logprobs, advantage, trained):
        return policy_gradient.cispo(logprobs, old_logprobs, advantage, clip)

    return grpo(
        group_size=group_size,
        normalised=normalised,
        compared=compared,
        tis_cap=tis_cap,
        tis_bounds=tis_bounds,
        tis_level=tis_level,
        temperature=temperature,
        reduce=token_mean,
        surrogate=surrogate,
    )
