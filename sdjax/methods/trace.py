"""TRACE: GRPO, and for some batches distillation of a few marked steps instead, from a teacher told their kinds only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.collect.annotators import Annotator, Mask, ablated, by_policy, by_rule, marked
from sdjax.collect.lessons import private_note
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, refresh
from sdjax.kernels.distributions import top_k_with_rest
from sdjax.kernels.divergences import clip_entries, clip_entries_straight_through, jsd_entries
from sdjax.kernels.reductions import sequence_mean, token_mean
from sdjax.kernels.weights import keep_earliest
from sdjax.methods.grpo import grpo
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Method, Term, View

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
        "the paper's annotator is a language model (annotator=NAME); the default is a rule that knows arithmetic only",
        "an annotator may mark nothing; the rule then marks the last sentence",
        "which tokens the inverted mask takes is not said: here random ones outside the spans",
        "attempts are sampled at 0.6, but ratios and divergences are taken at temperature 1",
    ),
)


@check_ranges
def trace(
    *,
    group_size: PositiveInt = 8,
    error_weight: NonNegative = 0.0,
    key_weight: NonNegative = 1.0,
    schedule: tuple[NonNegative, NonNegativeInt, NonNegativeInt] = (0.5, 10, 30),
    most: Share = 0.25,
    mask: Mask = "annotated",
    top_k: PositiveInt = 100,
    entry_clip: NonNegative | None = 0.05,
    straight_through: bool = False,
    active_only: bool = True,
    refresh_every: PositiveInt = 10,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.28),
    tis_cap: Positive | None = None,
    success: PositiveShare = 0.5,
    temperature: NonNegative = 0.6,
    annotator: str = "rule",
    annotate: Annotator | None = None,
) -> Method:
    """Token-routed alignment (Wang et al. 2026, arXiv:2605.10194, Eq. 1-2).  Token mean; divergence: sequence mean.

    After the schedule it is GRPO, and neither annotator nor teacher is asked.  `memory` is how many batches there were.

    Args:
      group_size: rollouts per prompt.
      error_weight: of KL(student||teacher) on error spans of wrong answers.
      key_weight: of KL(teacher||student) on key spans of correct answers.
      schedule: lambda's first value, the batches for which it stays, and those in which it then falls to 0.
      most: largest share of a row's tokens that is marked.
      mask: what is marked: the annotated spans or, as a control, as many random tokens as `most` allows, as many outside
        the spans, or all tokens of the row whatever `most` says.  The teacher is told the same.
      top_k: entries of the student's distribution that are kept, the others in one rest.
      entry_clip: bound of every vocabulary entry's addend; `None`: none.
      straight_through: clip the value only and keep the unclipped gradient.
      active_only: leave spans alone whose branch has weight 0; their rows are then not annotated.
      refresh_every: batches after which the teacher's parameters are renewed.
      clip: widths of the surrogate's clip below and above 1.
      tis_cap: as in `grpo`; 2 in the published settings, where another program samples.
      success: the least reward of a correct answer.
      temperature: of sampling, as published; ratios and divergences are taken at temperature 1.
      annotator: who marks steps: "rule" (`sdjax.collect.annotators.by_rule`, for arithmetic), or a policy: "live" (the
        student itself), "initial", or an external one: "teacher", which --teacher names.
      annotate: instead, `(environment, rollouts, key) -> spans`; see `sdjax.collect.annotators`.
    """
    weight, hold, decay = schedule
    ends = hold + decay
    writers = () if annotate or annotator == "rule" else (annotator,)
    annotate = annotate or (by_policy(annotator, success) if writers else functools.partial(by_rule, success=success))

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        asked = [r for r in rollouts if memory < ends and (not active_only or branch(r.reward))]
        # Not a key that an attempt was drawn from.
        marking = jax.random.fold_in(key, len(examples))
        found = annotate(environment, asked, marking) if asked else []
        spans = {id(r): tuple(s for s in some if s.kind.strip()) for r, some in zip(asked, found, strict=True)}
        chance = np.random.default_rng(np.asarray(jax.random.key_data(marking)))
        return [told(environment, r, spans.get(id(r), ()), chance) for r in rollouts], memory + 1

    def branch(reward):
        return key_weight if reward >= success else error_weight

    def told(environment, rollout, spans, chance):
        span = ablated(marked(rollout, spans, environment.live.tokenizer), mask, most, chance)
        note = private_note(rollout.example, spans, rollout.reward >= success)
        return rollout.with_extras(span=span).read_by(teacher=note)

    def signals(dist, token):
        pair = top_k_with_rest(dist["student"], dist["teacher"], by=dist["student"], k=top_k)
        bounded = clip_entries_straight_through if straight_through else clip_entries
        total = lambda entries: entries.sum(-1) if entry_clip is None else bounded(entries, entry_clip)
        found = {"key_kl": total(jsd_entries(*pair, 0.0)), "error_kl": total(jsd_entries(*pair, 1.0))}
        return {**plain.signals(dist, token), **found}

    def terms(batch, sig, step):
        left = jnp.clip(1.0 - (step - hold) / max(decay, 1), 0.0, 1.0)
        taught, correct = batch.contexts["teacher"].valid[:, None], (batch.reward >= success)[:, None]
        span = keep_earliest(batch.extras["span"] & taught, batch.mask, 1.0 if mask == "all" else most)
        kl = jnp.where(correct, key_weight * sig["key_kl"], error_weight * sig["error_kl"])
        found = plain.terms(batch, sig, step)
        rest = jnp.where(span, 1.0 - left, 1.0)
        return {
            **found,
            "pg": found["pg"]._replace(weight=rest),
            "span_kl": Term(jnp.where(taught, kl, 0.0), span.astype(jnp.float32), None, sequence_mean, weight * left),
        }

    base = grpo(clip=clip, tis_cap=tis_cap, reduce=token_mean, collect=collect)
    plain = base.objectives[0]
    views = {**plain.views, "teacher": View("renewed", per_rollout=True, told=True)}
    routed = plain._replace(views=views, signals=signals, terms=terms, until=ends, credit=("pg", "span_kl"))
    objectives = (routed, plain._replace(since=ends))
    snapshots = {"renewed": refresh(refresh_every), **({"initial": frozen()} if "initial" in writers else {})}
    return base._replace(objectives=objectives, snapshots=snapshots, memory=0, writers=writers)
