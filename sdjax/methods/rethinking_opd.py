"""Rethinking OPD: on-policy distillation on the few tokens that student or teacher find likely, and what to watch in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.collect.alignment import alignment_signals, alignment_terms
from sdjax.collect.contexts import question
from sdjax.collect.continuations import with_continuation_gains
from sdjax.collect.lessons import before_writing, by_teacher
from sdjax.collect.rollouts import attempts
from sdjax.collect.synthesis import whole_texts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, refresh, teacher_name, teacher_view
from sdjax.kernels import candidates as kernel
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sft import sft
from sdjax.ranges import NonNegative, NonNegativeInt, PositiveInt, PositiveShare, Range, check_ranges
from sdjax.types import STUDENT, Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Li et al. 2026, Rethinking On-Policy Distillation of Large Language Models: Phenomenology, Mechanism, and Recipe",
    arxiv="2604.13016",
    equation="sum_{v in S} w_v log(p_v/q_v), S = top k of p, w = p/sum_S p; gradient: sum_S w log(p/q) grad log p",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson",
    reduction="token mean",
    differences=(
        "the default is the released loss; Eq. 5 (loss='renormalised') never changes the student's mass on S, it does",
        "the code keeps S, w and advantages of the rollout and clips: idle at one update per batch, else rollout_time=True",
        "the code's weights of the symmetric difference are raw probabilities (default there; raw_weights elsewhere)",
        "weights 'uniform' divide by the number of candidates: not said",
        "the cold start is a run of this method of its own, or the first batches; the paper's has its own learning rate",
        "the attempt itself is the student's continuation in the continuation gain; the paper does not say",
    ),
)


@check_ranges
def rethinking_opd(
    *,
    teacher: str | None = None,
    loss: Literal["released", "renormalised"] = "released",
    support: kernel.Support = "student",
    weights: kernel.Weights = "student",
    raw_weights: bool = False,
    top_k: NonNegativeInt | None = 16,
    group_size: PositiveInt = 4,
    rollout_time: bool = False,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    dual_clip: Annotated[float, Range(1, above=True)] | None = 3.0,
    rl_weight: NonNegative = 0.0,
    cold_start: NonNegativeInt = 0,
    depths: tuple[NonNegativeInt, ...] = (),
    success: PositiveShare = 0.5,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """On-policy distillation on candidate tokens (Li et al. 2026, arXiv:2604.13016, Eq. 5 and the released code).

    `loss_t = sum_{v in S} w_v log(p_v/q_v)` with the gradient `sum_S w_v log(p_v/q_v) grad log p_v`, weights constant.
    Token mean over rows with a teacher.  Logged besides: overlap of the top-k sets with the masses and the advantage on
    it, entropy gap, extreme token gap, and how well the mean log-ratio tells right from wrong rows of a prompt (`auroc`,
    over prompts with both).

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      loss: the code's, or Eq. 5: KL of both distributions renormalised on the candidates (weights do not act).
      support: whose likeliest tokens are the candidates; union and symmetric difference hold up to 2 `top_k`.
      weights: by whose probabilities candidates count.
      raw_weights: do not make the weights sum to 1; with the student's it is the stop-gradient form of 2605.11182.
      top_k: size of each top-k set; 0: the sampled token alone, a policy gradient; `None`: the whole vocabulary.
      group_size: rollouts per prompt.
      rollout_time: candidates, weights and advantages of the parameters that sampled, with the clipped ratio to them, for
        several updates per batch; costs a copy of the parameters and one forward pass more.
      clip: widths of the ratio's clip below and above 1; it acts with `rollout_time`, or with `top_k` 0.
      dual_clip: bound of the loss, in advantages, where the advantage is negative.
      rl_weight: weight of GRPO's advantage on the sampled token; 0 is distillation alone.
      cold_start: first batches, which the teacher writes, does not score, and the student imitates; cut and repetitive texts
        are dropped.
      depths: prefix lengths, in tokens, at which the teacher continues the student's text, once per attempt and depth:
        the difference in accuracy is logged as `continuation_gain/DEPTH`.
      success: the least reward of a right attempt, for `auroc` and the continuation gain.
      temperature: of sampling; all log-probabilities are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the question.  Before the cold start's
        texts are written it is asked about an empty rollout.
      reduce: how tokens are averaged.
    """
    name, sampling = teacher_name(teacher, lesson), Sampling(temperature=temperature)

    def collect(environment, examples, key, memory):
        cold = cold_start and memory < cold_start
        rollouts = (written if cold else attempted)(environment, examples, key)
        if depths:
            how = {"teacher": name, "sampling": sampling, "success": success}
            later = jax.random.fold_in(key, len(examples))
            rollouts = with_continuation_gains(environment, rollouts, later, depths, **how)
        return rollouts, memory + 1 if cold_start else memory

    def written(environment, examples, key):
        rollouts = by_teacher(environment, name, examples, key, before_writing(lesson), n=group_size, sampling=sampling)
        return [r.read_by(teacher=None) for r in whole_texts(rollouts)]

    def attempted(environment, examples, key):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=sampling)
        told = lambda r: lesson(r, rollouts) if lesson else question(r.example)
        also = lambda r: {"sampler": question(r.example)} if rollout_time else {}
        return [r.read_by(teacher=told(r), **also(r)) for r in rollouts]

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        found = alignment_signals(student, teacher, token, top_k or 16)
        if top_k == 0:
            return found
        return {**found, "divergence": divergence(student, teacher, dist.get("sampler", lax.stop_gradient(student)))}

    def divergence(student, teacher, old):
        ids, kept = kernel.candidates(old, teacher, top_k or student.shape[-1], support)
        own, before, other = (jnp.take_along_axis(dist, ids, axis=-1) for dist in (student, old, teacher))
        if loss == "renormalised":
            return kernel.candidate_reverse_kl(own, other, kept)
        raw = raw_weights or support == "symmetric_difference"
        weight = kernel.candidate_weights(before, other, kept, weights, raw=raw)
        return kernel.candidate_surrogate(own, other, weight, old=before, clip=clip, dual_clip=dual_clip)

    def terms(batch, sig, step):
        taught, old = batch.contexts["teacher"].valid & (batch.source == STUDENT), batch.behavior_logprobs
        surrogate = lambda advantage: clipped_surrogate(sig["logprobs"], old, advantage, clip, dual_clip)
        value = surrogate(sig["teacher_logprobs"] - old) if top_k == 0 else sig["divergence"]
        found = {**alignment_terms(batch, sig, taught, success), "divergence": Term(value, 1.0, taught, reduce)}
        if rl_weight:
            reward = group_advantage(batch.returns, batch.group, batch.valid)[:, None]
            found["pg"] = Term(surrogate(reward), 1.0, batch.source == STUDENT, reduce, rl_weight)
        return found

    views = {"student": View(trainable=True), "teacher": teacher_view(name, lesson)}
    views |= {"sampler": View("sampler")} if rollout_time else {}
    snapshots = {"initial": frozen()} if name == "initial" else {}
    snapshots |= {"sampler": refresh(1)} if rollout_time else {}
    memory, writers = 0 if cold_start else None, (name,) if cold_start or depths else ()
    distillation = Objective(views, signals, terms, since=cold_start, rewarded=rl_weight != 0)
    # Nobody but the student reads what is imitated: the teacher's forward pass is not computed.
    imitation = (sft(reduce=reduce).objectives[0]._replace(until=cold_start),) if cold_start else ()
    return Method(collect, (*imitation, distillation), snapshots, memory, writers)
