"""vOPD: on-policy distillation with a baseline that both forward passes already give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax

from sdjax.kernels.credit import optimal_baseline
from sdjax.kernels.distributions import entropy, logprob, top_k_renormalised
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.policy_gradient import token_ratio
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opd import opd_with
from sdjax.ranges import NonNegative, PositiveInt, check_ranges
from sdjax.types import Card, Messages, Method, Rollout, Term

CARD = Card(
    paper="Oh et al. 2026, KL for a KL: On-Policy Distillation with Control Variate Baseline",
    arxiv="2605.07865",
    equation="-(p/b) A, A = log q - log p + KL(student||teacher), A constant",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "the code's plain OPD leaves the reward's student term live, a baseline of +1: live_reward with baseline='none'",
        "its baseline on top-k entries ships with k = 100, the paper says 20; the full value costs nothing more here",
        "'optimal' is not an arm of the paper; the value alone can raise the variance (uncertain teacher, sure student)",
        "its code adds GRPO's clip, without effect in the first update on a batch; left out",
    ),
)


@check_ranges
def vopd(
    *,
    teacher: str | None = None,
    baseline: Literal["value", "optimal", "none"] = "value",
    top_k: PositiveInt | None = None,
    live_reward: bool = False,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy distillation with a control variate (Oh et al. 2026, arXiv:2605.07865, Eq. 3 and 8).

    `loss_t = -(p/b) * stop(log q - log p - baseline)`: the expected gradient is that of KL(student||teacher) at fixed
    prefixes whatever the baseline, for it does not depend on the token.  Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      baseline: what is subtracted from the reward: its mean `value`, -KL(student||teacher); the `optimal` one, of least
        variance in logits; or `none`, which is plain on-policy distillation.
      top_k: entries of the student's distribution that the value is computed on, both sides renormalised; `None` is all
        (paper: all, or 20).
      live_reward: let a gradient through the reward's student term, as the released code does for plain OPD.
      group_size: rollouts per prompt.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """

    def expected_reward(student, teacher):
        if baseline == "none":
            return jnp.zeros(student.shape[:-1])
        if baseline == "optimal":
            return optimal_baseline(student, teacher)
        if top_k is not None:
            student, teacher = top_k_renormalised(student, teacher, by=student, k=top_k)
        return -lax.stop_gradient(reverse_kl(student, teacher))

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        found = {"logprobs": logprob(student, token), "teacher_logprobs": logprob(teacher, token)}
        return {**found, "baseline": expected_reward(student, teacher), "entropy": entropy(student)}

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        reward = sig["teacher_logprobs"] - sig["logprobs"]
        advantage = (reward if live_reward else lax.stop_gradient(reward)) - sig["baseline"]
        policy_gradient = -token_ratio(sig["logprobs"], batch.behavior_logprobs) * advantage
        measured = {"log_ratio": -reward, "baseline": sig["baseline"], "entropy": sig["entropy"]}
        found = {name: Term(value, 1.0, taught, coef=0.0) for name, value in measured.items()}
        return {"pg": Term(policy_gradient, 1.0, taught, reduce), **found}

    how = {"teacher": teacher, "group_size": group_size, "temperature": temperature, "lesson": lesson}
    return opd_with(terms, signals, entries=0 if baseline == "none" else None, **how)
