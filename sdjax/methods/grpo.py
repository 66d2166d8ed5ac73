"""GRPO: policy gradient on verifier rewards, compared within the group of answers to one prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import jax.numpy as jnp
from jax import Array

from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, score
from sdjax.kernels.advantages import group_advantage, leave_one_out, whiten
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.estimators import sampled_kl
from sdjax.kernels.policy_gradient import (
    clipped_surrogate,
    icepop,
    ignored_ratio,
    importance_weight,
    informative_groups,
    sequence_importance_weight,
)
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.ranges import NonNegative, Positive, PositiveInt, Range, Rising, check_ranges
from sdjax.types import Batch, Card, Method, Objective, Term, View

CARD = Card(
    paper="Shao et al. 2024, DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    arxiv="2402.03300",
    equation="max(-r A, -clip(r, 1-lo, 1+hi) A), r = p/b, A = (R - mean R) / std R",
    student="question",
    teacher="none",
    reduction="sequence mean",
    differences=(
        "the paper averages per sequence (default); verl and TRL default to the token mean (reduce=token_mean)",
        "the deviation is the unbiased one, as in verl and TRL",
        "DeepSeekMath's run has 64 rollouts per prompt and a KL coefficient of 0.04; 8 and 0 are TRL's defaults",
        "with kl_coef a group of equal rewards still moves, by its KL term alone: towards the initial policy, as in the paper",
    ),
)

STUDENT = {"student": View(trainable=True)}

Compared = Literal["group", "batch", "leave_one_out"]
"""What a reward is compared with, and by which deviation: see `advantages`."""


def advantages(batch: Batch, compared: Compared, normalised: bool) -> Array:
    """One advantage per row `[B]`: against its group, by its group's or the batch's deviation, or against the others."""
    known = (batch.returns, batch.group, batch.valid)
    if compared == "leave_one_out":
        return leave_one_out(*known)
    if compared == "batch":
        return whiten(group_advantage(*known, normalised=False), batch.valid)
    return group_advantage(*known, normalised=normalised)


def sampler_weight(
    old: Array, behavior: Array, over: Array, cap: float | None, bounds: tuple[float, float] | None, level: str
) -> Array:
    """Weights for a sampler whose numerics differ from the scorer's: truncated, or 0 outside of `bounds` (IcePop)."""
    row = level == "sequence"
    ratio = sequence_importance_weight(old, behavior, over)[:, None] if row else importance_weight(old, behavior)
    return jnp.minimum(ratio, cap) if bounds is None else icepop(ratio, bounds)


@check_ranges
def grpo(
    *,
    group_size: PositiveInt = 8,
    normalised: bool = True,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    dual_clip: Annotated[float, Range(1, above=True)] | None = None,
    kl_coef: NonNegative = 0.0,
    compared: Compared = "group",
    tis_cap: Positive | None = None,
    tis_bounds: Annotated[tuple[NonNegative, NonNegative], Rising] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    temperature: NonNegative = 1.0,
    reduce: Reducer = sequence_mean,
    surrogate: Callable[[Array, Array, Array, Array], Array] | None = None,
    collect: Callable | None = None,
) -> Method:
    """Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, Eq. 3).

    `A_i = (R_i - mean R) / (std R + eps)`,  `loss_t = max(-r_t A, -clip(r_t) A) + kl_coef * k3(student, reference)`,
    `r_t = p / b`.  Sequence mean (the paper; verl and TRL default to the token mean: `reduce=token_mean`).

    Args:
      group_size: rollouts per prompt.
      normalised: divide by the group's standard deviation; without, Dr. GRPO's advantage.
      clip: widths of the ratio's clip below and above 1.  It acts from the second update on a batch on.
      dual_clip: bound of the loss where the advantage is negative (verl: 3).
      kl_coef: weight of the penalty towards the initial policy; k3 is differentiated directly, as in the paper's code,
        so its expected gradient is the *forward* KL's.
      compared: a reward minus its group's mean, by the group's deviation or by the batch's (ScaleRL, REINFORCE++; of a
        minibatch where there are several); or minus the mean of the group's *other* rows, without deviation (RLOO).
      tis_cap: truncated importance weight for a sampler whose numerics differ from the scorer's (2 in the literature);
        scores every rollout once more.
      tis_bounds: IcePop instead: tokens whose weight lies outside of these bounds are dropped (0.5 and 2 in verl).
      tis_level: one such weight per token, or per row, the product of its tokens' (TRL's bounds: 0 and 3).
      temperature: of sampling; ratios are taken at temperature 1.
      reduce: how tokens are averaged.
      surrogate: another loss per token, `(logprobs, old logprobs, advantage [B, 1], trained [B, T]) -> [B, T]`; `clip`
        and `dual_clip` then have no effect.
      collect: another host half that gives judged rollouts with a "student" context.
    """
    weighed = tis_cap is not None or tis_bounds is not None
    surrogate = surrogate or (lambda now, old, advantage, _: clipped_surrogate(now, old, advantage, clip, dual_clip))

    def sample_and_judge(environment, examples, key, memory):
        sampling = Sampling(temperature=temperature)
        return attempts(environment, examples, key, n=group_size, sampling=sampling), memory

    def collect_and_score(environment, examples, key, memory):
        rollouts, memory = (collect or sample_and_judge)(environment, examples, key, memory)
        if kl_coef:
            rollouts = [r.read_by(reference=r.contexts["student"]) for r in rollouts]
        return (score(environment, rollouts, STUDENT, scored) if weighed else rollouts), memory

    def scored(dist, token):
        return {"old_logprobs": logprob(dist["student"], token)}

    def signals(dist, token):
        found = {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}
        if kl_coef:
            found["reference_logprobs"] = logprob(dist["reference"], token)
        return found

    def terms(batch, sig, step):
        advantage, over = advantages(batch, compared, normalised)[:, None], batch.mask & batch.valid[:, None]
        old, importance = batch.behavior_logprobs, 1.0
        if weighed:
            old = batch.extras["old_logprobs"]
            importance = sampler_weight(old, batch.behavior_logprobs, over, tis_cap, tis_bounds, tis_level)
        value = surrogate(sig["logprobs"], old, advantage, over)
        found = {"pg": Term(value, reduce=reduce, importance=importance), "entropy": Term(sig["entropy"], coef=0.0)}
        informative = informative_groups(batch.reward, batch.group, batch.valid)
        found["informative"] = Term(informative.astype(jnp.float32), coef=0.0)
        found["ignored_ratios"] = Term(ignored_ratio(sig["logprobs"], old).astype(jnp.float32), coef=0.0)
        if kl_coef:
            penalty = sampled_kl(sig["logprobs"], sig["reference_logprobs"], "k3")
            found["reference_kl"] = Term(penalty, reduce=reduce, coef=kl_coef)
        return found

    views = {**STUDENT, "reference": View("reference")} if kl_coef else STUDENT
    snapshots = {"reference": frozen()} if kl_coef else {}
    return Method(collect_and_score, (Objective(views, signals, terms, rewarded=True),), snapshots)
