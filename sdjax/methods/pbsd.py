"""PBSD: what the informed teacher writes is preferred to what the student writes, by DPO with the teacher as reference."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.collect.lessons import before_writing, by_teacher
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import ema
from sdjax.kernels.advantages import group_mean
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.preference import paired, sequence_log_ratio
from sdjax.kernels.reductions import token_mean
from sdjax.methods.opsd import reference_solution
from sdjax.ranges import NonNegative, Positive, PositiveInt, Share, check_ranges
from sdjax.types import STUDENT, TEACHER, Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Yu et al. 2026, Preference-Based Self-Distillation: Beyond KL Matching via Reward Regularization",
    arxiv="2605.05040",
    equation="-log sigmoid(beta (log p/q of the teacher's sample - log p/q of the student's))",
    student="question",
    teacher="question + reference solution; parameters: the initial ones",
    reduction="mean over pairs of sequence sums",
    differences=(
        "the sum over tokens, the teacher's parameters, beta and the lesson's wording are reconstructions",
        "not 2606.09348, which goes by the same name",
    ),
    status="reconstruction",
)


@check_ranges
def pbsd(
    *,
    beta: Positive = 0.1,
    per_token: bool = False,
    pairs: PositiveInt = 1,
    ema_rate: Share = 0.0,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
) -> Method:
    """Preference-based self-distillation (Yu et al. 2026, arXiv:2605.05040, Eq. 10).

    `loss = softplus(-beta * ((log p - log q)(y_teacher) - (log p - log q)(y_student)))`, p the student reading the
    question, q the teacher reading the lesson, log-probabilities of whole texts.  Both texts are fresh.  Mean over pairs.

    Args:
      beta: strength of the anchor to the teacher (not published; the paper's symbol).
      per_token: means over tokens instead of sums, which is another objective.
      pairs: pairs of texts per prompt.
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      temperature: of sampling, for both.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `reference_solution`.  It is asked
        before anything is written: about an empty rollout.
    """
    told = lesson or reference_solution
    name = "live" if ema_rate == 1.0 else "teacher"

    def collect(environment, examples, key, memory):
        before = before_writing(told)
        examples = [e for e in examples if before(e) is not None]
        how = {"n": pairs, "sampling": Sampling(temperature=temperature)}
        keys = jax.random.split(key)
        informed = by_teacher(environment, name, examples, keys[0], before, **how)
        own = [r.read_by(teacher=before(r.example)) for r in attempts(environment, examples, keys[1], **how)]
        return [r.with_extras(pair=i) for texts in (informed, own) for i, r in enumerate(texts)], memory

    def signals(dist, token):
        both = {"logprobs": logprob(dist["student"], token), "teacher_logprobs": logprob(dist["teacher"], token)}
        return {**both, "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        over = batch.mask & batch.valid[:, None]
        ratio = sequence_log_ratio(sig["logprobs"], sig["teacher_logprobs"], over)
        ratio = ratio / jnp.maximum(over.sum(-1), 1) if per_token else ratio
        # Every row learns the log-ratio of its pair's student row; only the pair's teacher row has a loss.
        pair, own = batch.extras["pair"], batch.valid & (batch.source == STUDENT)
        other = group_mean(ratio, pair, own)
        # Both rows of a pair, or none: the student's may have been dropped because it was too old.
        preferred = (batch.source == TEACHER) & (group_mean(jnp.ones_like(other), pair, own) > 0.0)
        return {
            "preference": Term(paired(ratio, other, beta), 1.0, preferred, token_mean),
            "margin": Term(beta * (ratio - other), 1.0, preferred, token_mean, coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    objective = Objective({"student": View(trainable=True), "teacher": View(name, told=True)}, signals, terms)
    return Method(collect, (objective,), {} if name == "live" else {"teacher": ema(ema_rate)})
