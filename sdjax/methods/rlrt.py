"""RLRT: on correct answers, the tokens that the informed teacher did not expect get more of the credit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from sdjax.collect.lessons import READERS, scored_attempts
from sdjax.engine.generate import Sampling
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import clipped_surrogate, importance_weight
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.kernels.weights import likelihood_ratio, mean_one
from sdjax.methods.sdpo import peer_or_feedback
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Kim et al. 2026, Rebellious Student: Reversing Teacher Signals for Reasoning Exploration",
    arxiv="2605.10781",
    equation="GRPO with A * (1 - mix + mix * clip(p/q, 1-eps, 1+eps)) on correct rows",
    student="question",
    teacher="question + another correct answer of the group; parameters: those that sampled",
    reduction="token mean",
    differences=(
        "which correct answer the teacher reads is not said: never the answer itself, so a lone success is plain GRPO",
        "the shape of the decay is not said: linear to 0",
        "the deviation is the unbiased one; the paper compares with a GRPO without deviation, a smaller step",
    ),
)


@check_ranges
def rlrt(
    *,
    group_size: PositiveInt = 8,
    mix: Share = 0.5,
    ratio_eps: NonNegative = 1.0,
    mix_decay: NonNegativeInt = 0,
    mean_one_weights: bool = False,
    success: PositiveShare = 0.5,
    rows: Literal["correct", "all"] = "correct",
    toward: bool = False,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.28),
    tis_cap: Positive | None = 2.0,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Reinforcement learning with a reversed teacher (Kim et al. 2026, arXiv:2605.10781, Algorithm 1).

    `A_t = A * (1 - mix + mix * clip((p/q)^sign(A), 1 -+ ratio_eps))` on correct rows with a lesson, else `A`; token mean.

    Args:
      group_size: rollouts per prompt.
      mix: share of the ratio in the credit; 0 is GRPO.
      ratio_eps: width of the ratio's clip around 1 (paper: 1 base, 0.5 instruct, 0.2 thinking models).
      mix_decay: batches in which `mix` falls linearly to 0; 0: it stays (paper: 30 for instruct and thinking models).
      mean_one_weights: rescale every row's credit to mean 1, so that only its placement differs from GRPO; not in the
        paper, which compares without.
      success: least reward of a correct answer.
      rows: whose credit is weighted, where there is a lesson.
      toward: weigh by the teacher over the student instead, RLSD's direction: with `rows` "all", `ratio_eps` 0.2 and a
        `mix_decay` of 50, the advantage reweighting that RLRT and VPD are compared with.
      clip: widths of the surrogate's clip below and above 1.
      tis_cap: cap of the importance weight of the sampler's numerics; `None`: no weight.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default another correct answer.
      reduce: how tokens are averaged.
    """
    told = lesson or peer_or_feedback(success=success, use_feedback=False)

    def collect(environment, examples, key, memory):
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        rollouts = scored_attempts(environment, examples, key, told, scored, **how)
        credited = lambda r: (rows == "all" or r.reward >= success) and r.contexts["teacher"] is not None
        return [r.with_extras(credited=credited(r)) for r in rollouts], memory

    def scored(dist, token):
        return {"old_logprobs": logprob(dist["student"], token), "old_teacher": logprob(dist["teacher"], token)}

    def signals(dist, token):
        return {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        old, informed = batch.extras["old_logprobs"], batch.extras["old_teacher"]
        advantage = group_advantage(batch.returns, batch.group, batch.valid)[:, None]
        share = mix * jnp.maximum(1.0 - step / mix_decay, 0.0) if mix_decay else mix
        above, below = (informed, old) if toward else (old, informed)
        ratio = likelihood_ratio(above, below, eps=ratio_eps, sign=jnp.sign(advantage))
        credit = jnp.where(batch.extras["credited"][:, None], 1.0 - share + share * ratio, 1.0)
        if mean_one_weights:
            credit = mean_one(credit, batch.mask & batch.valid[:, None], axis=-1)
        behavior, importance = batch.behavior_logprobs, 1.0
        if tis_cap is not None:
            behavior, importance = old, importance_weight(old, behavior, cap=tis_cap)
        surrogate = clipped_surrogate(sig["logprobs"], behavior, advantage, clip)
        return {
            "pg": Term(surrogate, credit, reduce=reduce, importance=importance),
            "credit": Term(credit, over=batch.extras["credited"], coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    own = {"student": View(trainable=True)}
    objective = Objective(own, signals, terms, credit=("pg",) if mix else (), rewarded=True)
    return Method(collect, (objective,), early=READERS)
