"""BRTS: on-policy distillation, and a forward KL on the best of several teacher rollouts: correct, then closest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import attempts
from sdjax.collect.selection import Rule, cut, likeliest_of, selected
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen, teacher_name
from sdjax.kernels import candidates as kernel
from sdjax.kernels.distributions import entropy, logprob, normalise, top_k_entries
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, PositiveInt, PositiveShare, check_ranges
from sdjax.types import STUDENT, TEACHER, Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Zhang et al. 2026, On-Policy Distillation with Best-of-N Teacher Rollout Selection",
    arxiv="2605.09725",
    equation="KL(p||q) on the student's text + coef * sum_{v in top k of q} q_v (log q_v - log p_v) on the teacher's",
    student="question",
    teacher="question; an external policy, or the initial one with a lesson.  The answer only when it writes once more",
    reduction="token mean, per source",
    differences=(
        "the scripts switch the second term off, with coef 0.05, weights of the student, 2 samples; the paper's is here",
        "the code's other weights have a gradient without the teacher (student_p, none) or against it (teacher_p)",
        "the code cuts the teacher's text to the student's length (truncate=True)",
        "closeness compares positions of two texts, as in the code (align='position'); 'prefix' reads the candidate",
    ),
)


def candidates_reverse_kl(student, teacher, k: int | None):
    """KL(student || teacher) on the student's top k: value of the kept part, renormalised, gradient `g_code` of OPD.

    `sum_v p_v/Z log(p_v/q_v) grad log p_v` with full-vocabulary log-probabilities; with all entries, that of the KL.
    """
    ids, kept = kernel.candidates(student, teacher, student.shape[-1] if k is None else k)
    student, teacher = (jnp.take_along_axis(dist, ids, axis=-1) for dist in (student, teacher))
    return kernel.candidate_surrogate(student, teacher, kernel.candidate_weights(student, teacher, kept))


def head_forward_kl(student, teacher, k: int | None):
    """`sum_v q_v/Z (log q_v - log p_v)` on the teacher's top k; may be as low as `log Z`.  All entries: KL(q || p)."""
    kept = teacher.shape[-1] if k is None else min(k, teacher.shape[-1])
    student, teacher = top_k_entries(student, teacher, by=teacher, k=kept)
    return jnp.sum(jnp.exp(normalise(teacher)) * (teacher - student), axis=-1)


@check_ranges
def brts(
    *,
    teacher: str | None = None,
    candidates: PositiveInt = 2,
    perturb: bool = False,
    coef: NonNegative = 10.0,
    top_k: PositiveInt | None = 16,
    align: Literal["position", "prefix"] = "position",
    retry: bool = True,
    fallback: Literal["most_similar", "skip"] = "most_similar",
    truncate: bool = False,
    success: PositiveShare = 0.5,
    teacher_temperature: NonNegative = 0.7,
    teacher_top_p: PositiveShare = 0.95,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Best-of-N teacher rollout selection (Zhang et al. 2026, arXiv:2605.09725, Eq. 3-5).  Token mean, per source.

    One student rollout per prompt, scored by the teacher; and one chosen of the teacher's own: a correct one first, the
    closest among them; else another that was shown the answer, if correct; else the closest of all.

    Args:
      teacher: an external policy's name; "live"; or "initial", the default when there is a lesson (else "teacher").
      candidates: teacher rollouts per prompt.
      perturb: half of them are also asked to rethink (the paper's ablation): they then miss together less often.
      coef: weight of the forward KL; 0 is OPD.
      top_k: entries kept, the student's in the first term and the teacher's in the second; `None`: all.
      align: closeness by the student's likeliest tokens along its own rollout, or along the candidate.
      retry: ask once more, with the answer, where no candidate is correct.
      fallback: what is learnt where none is: the closest candidate, or none.
      truncate: learn from the teacher's text up to the length of the student's only.
      success: the least reward of a correct candidate.
      teacher_temperature, teacher_top_p: of the teacher's sampling.
      temperature: of the student's sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`, in writing and in scoring; by default the question.
      reduce: how the tokens of a source are averaged.
    """
    name = teacher_name(teacher, lesson)
    sampling = Sampling(temperature=teacher_temperature, top_p=teacher_top_p)
    rule = Rule(likeliest_of(top_k or 16), candidates, success, align, retry, fallback == "skip", perturb, sampling)

    def collect(environment, examples, key, memory):
        keys = jax.random.split(key, 3)
        own = attempts(environment, examples, keys[0], n=1, sampling=Sampling(temperature=temperature))
        told = [lesson(r, own) if lesson else question(r.example) for r in own]
        rows = [r.read_by(teacher=t) for r, t in zip(own, told, strict=True)]
        if not coef or not any(told):
            return rows, memory
        asked = [t or question(r.example) for t, r in zip(told, own, strict=True)]
        found = selected(environment, environment.policies[name], own, asked, keys[1:], rule)
        found = [cut(r, len(own[r.group].tokens)) if truncate else r for r in found if told[r.group]]
        return rows + [r.read_by(student=question(r.example), teacher=told[r.group]) for r in found], memory

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        return {
            "reverse_kl": candidates_reverse_kl(student, teacher, top_k),
            "forward_kl": head_forward_kl(student, teacher, top_k),
            "logprobs": logprob(student, token),
            "entropy": entropy(student),
        }

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        own, other = taught & (batch.source == STUDENT), taught & (batch.source == TEACHER)
        return {
            "reverse_kl": Term(sig["reverse_kl"], over=own, reduce=reduce),
            "forward_kl": Term(sig["forward_kl"], over=other, reduce=reduce, coef=coef),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    views = {"student": View(trainable=True), "teacher": View(name, told=lesson is not None)}
    snapshots = {"initial": frozen()} if name == "initial" else {}
    return Method(collect, (Objective(views, signals, terms),), snapshots, writers=(name,))
