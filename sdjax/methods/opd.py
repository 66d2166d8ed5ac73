"""OPD: on-policy distillation; a teacher's log-probabilities of the student's own tokens are its rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax import lax

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, teacher_name, teacher_view
from sdjax.kernels.advantages import group_advantage, reward_to_go
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import reverse_kl, unnormalised_top_k_forward_kl
from sdjax.kernels.estimators import sampled_kl
from sdjax.kernels.policy_gradient import token_ratio
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, PositiveInt, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Lu 2025, On-Policy Distillation (Thinking Machines)",
    arxiv="",
    equation="-(p/b) A, A = rl_weight (R - mean R) - coef (log b - log q), A constant",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "Tinker's loss is a sum over tokens (reduce=token_sum): long batches then weigh more in clipping and in Adam's moments",
        "full_vocabulary, the exact reverse KL per position, is not in Tinker's recipe; its top-k forms are rethinking_opd",
        "direct, losses that verl differentiates, is not in it either: k1 has no gradient in the mean, k3 a forward KL's",
    ),
)

Direct = Literal["k1", "k2", "k3", "k3_plus", "top_k_forward_kl"]
VERL_TOP_K = 32
"""Entries of the teacher's distribution in verl's `forward_kl_topk`."""


@check_ranges
def opd(
    *,
    teacher: str | None = None,
    group_size: PositiveInt = 4,
    coef: NonNegative = 1.0,
    discount: Share = 0.0,
    full_vocabulary: bool = False,
    direct: Direct | None = None,
    rl_weight: NonNegative = 0.0,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy distillation (Lu 2025, Thinking Machines; code: tinker-cookbook, distillation).

    `loss_t = -(p/b) * stop(A_t)`,  `A_t = rl_weight * (R - mean R) - coef * (log b - log q)`, `b` the sampler: without
    discount its expected gradient is that of KL(student||teacher) at fixed prefixes.  Token mean.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      group_size: rollouts per prompt.
      coef: weight of the teacher's part.
      discount: of the log-ratios of later tokens (1: the sequence's reverse KL); sampled form only.
      full_vocabulary: the exact reverse KL of every position instead of the sampled token's estimate.
      direct: instead, one of verl's losses, differentiated as it stands: estimates of reverse KL from the sampled token
        (k1, k2, k3, and k3_plus, whose gradient is k2's), or KL(teacher||student) on the teacher's 32 likeliest tokens.
      rl_weight: weight of the group-centred reward, without deviation; 0 is distillation alone.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.
      reduce: how tokens are averaged.
    """
    teacher, exact = teacher_name(teacher, lesson), "reverse_kl" if full_vocabulary else direct

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        told = lambda r: lesson(r, rollouts) if lesson else question(r.example)
        return [r.read_by(teacher=told(r)) for r in rollouts], memory

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        found = {"logprobs": logprob(student, token), "entropy": entropy(student)}
        if full_vocabulary:
            return {**found, "reverse_kl": reverse_kl(student, teacher)}
        if direct == "top_k_forward_kl":
            k = min(VERL_TOP_K, student.shape[-1])
            return {**found, "top_k_forward_kl": unnormalised_top_k_forward_kl(student, teacher, k)}
        if direct:
            return {**found, direct: sampled_kl(found["logprobs"], logprob(teacher, token), direct, clamp=20.0)}
        return {**found, "teacher_logprobs": logprob(teacher, token)}

    def terms(batch, sig, step):
        found, old = {"entropy": Term(sig["entropy"], coef=0.0)}, batch.behavior_logprobs
        taught = batch.contexts["teacher"].valid
        advantage = rl_weight * group_advantage(batch.returns, batch.group, batch.valid, normalised=False)[:, None]
        if exact:
            found[exact] = Term(sig[exact], 1.0, taught, reduce, coef)
        else:
            gap = sig["teacher_logprobs"] - old
            found["log_ratio"] = Term(-gap, 1.0, taught, coef=0.0)
            advantage = advantage + reward_to_go(coef * gap, batch.mask & taught[:, None], discount)
        if rl_weight or not exact:
            policy_gradient = -token_ratio(sig["logprobs"], old) * lax.stop_gradient(advantage)
            found["pg"] = Term(policy_gradient, 1.0, None if rl_weight else taught, reduce)
        return found

    told = teacher_view(teacher, lesson, None if full_vocabulary else 0)
    views = {"student": View(trainable=True), "teacher": told}
    objective = Objective(views, signals, terms, rewarded=rl_weight != 0)
    return Method(collect, (objective,), {"initial": frozen()} if teacher == "initial" else {})


def opd_with(
    terms: Callable,
    signals: Callable | None = None,
    entries: int | None = 0,
    credit: Sequence[str] = (),
    **options: Any,
) -> Method:
    """`opd` with other `terms`, and other `signals` if they are given; its host half and views.  `options` are `opd`'s.

    `entries` is how much of the teacher's distribution the signals read (see `View`): the sampled token's alone.
    `credit` names the terms whose weights say how much each token counts.
    """
    base = opd(**options)
    (plain,) = base.objectives
    views = {**plain.views, "teacher": plain.views["teacher"]._replace(entries=entries)}
    return base._replace(objectives=(Objective(views, signals or plain.signals, terms, credit=tuple(credit)),))
