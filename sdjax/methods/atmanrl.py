"""AtManRL: a reward for reasoning that the answer attends to, measured by relearning a suppressed attention."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from sdjax.collect.rollouts import attempts
from sdjax.collect.saliency import Inner, saliency
from sdjax.engine.generate import Sampling
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, masked_sum, sequence_mean
from sdjax.methods.grpo import grpo
from sdjax.ranges import NonNegative, PositiveInt, PositiveShare, check_ranges
from sdjax.types import Card, Method

CARD = Card(
    paper="Höth et al. 2026, AtManRL: Towards Faithful Reasoning via Differentiable Attention Saliency",
    arxiv="2604.16158",
    equation="GRPO without deviation on R = (0 if correct else -1) + mean restored attention to the reasoning",
    student="question",
    teacher="none",
    reduction="sequence mean",
    differences=(
        "the printed reward pays for reasoning that is not needed (printed_sign=True); its complement is the default",
        "the paper's causal mask is a product; -inf after the addition is meant and done",
        "the printed ratio is the sequence's (ratio='sequence'); the token's, as in GRPO, is the default",
        "the paper's AdamW restores least what an answer needs most, once it has it; inner='sgd' ranks by effect",
        "one mask for all layers and heads; rows without reasoning, delimiter or answer get saliency 0: both ours",
    ),
    status="reconstruction",
)


def whole_sequence(clip: tuple[float, float]):
    """The printed surrogate: one ratio per row, the product of its tokens'."""

    def surrogate(now, old, advantage, over):
        row = masked_sum(now - old, over, axis=-1)[:, None]
        return clipped_surrogate(jnp.broadcast_to(row, now.shape), jnp.zeros_like(now), advantage, clip)

    return surrogate


@check_ranges
def atmanrl(
    *,
    group_size: PositiveInt = 8,
    coef: NonNegative = 1.0,
    delimiter: str = "####",
    steps: PositiveInt = 200,
    mask_loss: Literal["nll", "kl_to_unmasked"] = "nll",
    target: Literal["own", "gold"] = "own",
    inner: Inner = "adamw",
    combine: Literal["add", "correct_only"] = "add",
    printed_sign: bool = False,
    ratio: Literal["token", "sequence"] = "token",
    success: PositiveShare = 0.5,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Attention-manipulation RL (Höth et al. 2026, arXiv:2604.16158, Eq. 1-5).  Sequence mean; no deviation, no KL.

    `R = (0 if correct else -1) + coef * saliency`, the saliency of `sdjax.collect.saliency` with the live policy's parameters.
    The paper takes two passes over a batch: the experiment's `epochs=2`.

    Args:
      group_size: rollouts per prompt.
      coef: weight of the saliency; 0 is the paper's baseline, and computes none.
      delimiter: what separates reasoning and answer in a completion.
      steps: of the mask's optimisation, per rollout and batch; this is the method's cost.
      mask_loss: the answer's negative log-likelihood, or the divergence from the unmasked model.
      inner: the mask's optimizer, the paper's AdamW or SGD, which sees how much an entry helps.
      target: the mask restores the rollout's own answer, or the example's.
      combine: add the saliency to every reward, or to correct rollouts only (a wrong one then never ties a correct one).
      printed_sign: the reward as printed, highest where nothing needs to be restored.
      ratio: clip every token's likelihood ratio, or the row's product as printed.
      success: the least reward of a correct answer.
      clip: widths of the ratio's clip below and above 1.
      temperature: of sampling.
      reduce: how tokens are averaged.
    """

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        how = {"delimiter": delimiter, "steps": steps, "mask_loss": mask_loss, "target": target, "inner": inner}
        found = saliency(environment.live, rollouts, **how) if coef else [None] * len(rollouts)
        return [rewarded(r, share) for r, share in zip(rollouts, found, strict=True)], memory

    def rewarded(rollout, share):
        share = 0.0 if share is None else 1.0 - share if printed_sign else share
        correct = rollout.reward >= success
        bonus = coef * share if correct or combine == "add" else 0.0
        reward = (0.0 if correct else -1.0) + bonus
        return dataclasses.replace(rollout, reward=reward).with_extras(saliency=share)

    surrogate = whole_sequence(clip) if ratio == "sequence" else None
    how = {"normalised": False, "clip": clip, "reduce": reduce}
    return grpo(group_size=group_size, surrogate=surrogate, collect=collect, **how)
