"""Dr. GRPO: GRPO without the two divisions that favour long wrong answers and one-sided groups."""

from __future__ import annotations

from typing import Annotated, Literal

from sdjax.kernels.reductions import constant_mean
from sdjax.methods.grpo import grpo
from sdjax.ranges import NonNegative, Positive, PositiveInt, Rising, check_ranges
from sdjax.types import Card, Method

CARD = Card(
    paper="Liu et al. 2025, Understanding R1-Zero-Like Training: A Critical Perspective",
    arxiv="2503.20783",
    equation="max(-r A, -clip(r, 1-lo, 1+hi) A), r = p/b, A = R - mean R",
    student="question",
    teacher="none",
    reduction="sum / (rows * length), length a constant",
    differences=("rows without a trained token are not counted; TRL counts them",),
)


@check_ranges
def dr_grpo(
    *,
    group_size: PositiveInt = 8,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    length: PositiveInt = 1024,
    tis_cap: Positive | None = None,
    tis_bounds: Annotated[tuple[NonNegative, NonNegative], Rising] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    temperature: NonNegative = 1.0,
) -> Method:
    """GRPO done right (Liu et al. 2025, arXiv:2503.20783, section 3.2): `A = R - mean R`, and a constant divisor.

    A token's gradient depends neither on its row's length nor on the spread of its group's rewards.

    Args:
      group_size: rollouts per prompt.
      clip: widths of the ratio's clip below and above 1.
      length: the constant divisor, usually the completion limit: only the loss's scale depends on it.
      tis_cap, tis_bounds, tis_level: weights for a sampler whose numerics differ from the scorer's: truncated at a cap,
        or dropped outside of bounds (IcePop), per token or per row; see `grpo`.
      temperature: of sampling.
    """
    return grpo(
        group_size=group_size,
        normalised=False,
        clip=clip,
        tis_cap=tis_cap,
        tis_bounds=tis_bounds,
        tis_level=tis_level,
        temperature=temperature,
        reduce=constant_mean(length),
    )
