"""TRACE: GRPO, and for some batches distillation of a few marked steps instead, from a teacher told their kinds only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sdjax.collect.annotators import Span, by_rule, marked
from sdjax.collect.lessons import private_note
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import refresh
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob, top_k_with_rest
from sdjax.kernels.divergences import clip_entries, clip_entries_straight_through, jsd_entries
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import sequence_mean, token_mean
from sdjax.kernels.weights import keep_earliest
from sdjax.types import Card, Method, Objective, Term, View

CARD = Card(
    paper="Wang et al. 2026, TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
    arxiv="2605.10194",
    equation="(1 - lambda/w0 on spans) GRPO + lambda/|y| (error RKL on error spans + key FKL on key spans)",
    student="question",
    teacher="question + a note of the kinds of the marked steps; parameters: the student's of every tenth batch",
    reduction="token mean of GRPO, sequence mean of the divergence",
    differences=(
        "spans of a branch of weight 0 get no gradient by Eq. 1 (active_only=False); here they keep GRPO",
        "the published hard clip lowers what the teacher wants most: straight_through=True, or entry_clip=None",
        "not said: which tokens the cap keeps (here the earliest), whose top k (the student's, with the rest)",
    ),
)


def trace(
    *,
    group_size: int = 8,
    error_weight: float = 0.0,
    key_weight: float = 1.0,
    schedule: tuple[float, int, int] = (0.5, 10, 30),
    most: float = 0.25,
    top_k: int = 100,
    entry_clip: float | None = 0.05,
    straight_through: bool = False,
    active_only: bool = True,
    refresh_every: int = 10,
    clip: tuple[float, float] = (0.2, 0.28),
    temperature: float = 0.6,
    annotate: Callable[..., Sequence[Sequence[Span]]] = by_rule,
) -> Method:
    """Token-routed alignment (Wang et al. 2026, arXiv:2605.10194, Eq. 1-2).  Token mean; divergence: sequence mean.

    Args:
      group_size: rollouts per prompt.
      error_weight: of KL(student||teacher) on error spans of wrong answers.
      key_weight: of KL(teacher||student) on key spans of correct answers.
      schedule: lambda's first value, the batches for which it stays, and those in which it then falls to 0.
      most: largest share of a row's tokens that is marked.
      top_k: entries of the student's distribution that are kept, the others in one rest.
      entry_clip: bound of every vocabulary entry's addend; `None`: none.
      straight_through: clip the value only and keep the unclipped gradient.
      active_only: leave spans alone whose branch has weight 0.
      refresh_every: batches after which the teacher's parameters are renewed.
      clip: widths of the surrogate's clip below and above 1.
      temperature: of sampling, as published.
      annotate: `(environment, rollouts, key) -> spans`; see `sdjax.collect.annotators`.
    """
    weight, hold, decay = schedule

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        spans = (
            annotate(environment, rollouts, jax.random.split(key)[1]) if memory < hold + decay else [()] * len(rollouts)
        )
        return [told(environment, r, s) for r, s in zip(rollouts, spans, strict=True)], memory + 1

    def told(environment, rollout, spans):
        correct = rollout.reward >= 0.5
        spans = spans if not active_only or (key_weight if correct else error_weight) else ()
        span = marked(rollout, spans, environment.live.tokenizer)
        return rollout.with_extras(span=span).read_by(teacher=private_note(rollout.example, spans, correct))

    def signals(dist, token):
        found = {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}
        pair = top_k_with_rest(dist["student"], dist["teacher"], by=dist["student"], k=top_k)
        bounded = clip_entries_straight_through if straight_through else clip_entries
        total = lambda entries: entries.sum(-1) if entry_clip is None else bounded(entries, entry_clip)
        return {**found, "key_kl": total(jsd_entries(*pair, 0.0)), "error_kl": total(jsd_entries(*pair, 1.0))}

    def terms(batch, sig, step):
        left = jnp.clip(1.0 - (step - hold) / max(decay, 1), 0.0, 1.0)
        span, correct = keep_earliest(batch.extras["span"], batch.mask, most), (batch.reward >= 0.5)[:, None]
        advantage = group_advantage(batch.reward, batch.group, batch.valid)[:, None]
        surrogate = clipped_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        kl = jnp.where(correct, key_weight * sig["key_kl"], error_weight * sig["error_kl"])
        return {
            "pg": Term(surrogate, jnp.where(span, 1.0 - left, 1.0), reduce=token_mean),
            "span_kl": Term(jnp.where(span, kl, 0.0), reduce=sequence_mean, coef=weight * left),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    views = {"student": View(trainable=True), "teacher": View("teacher", per_rollout=True)}
    return Method(collect, (Objective(views, signals, terms),), {"teacher": refresh(refresh_every)}, memory=0)
