"""Purified OPSD: a teacher's preference for the solution, less what the solution alone, without the question, says."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.collect.contexts import question, rewrite_last
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen
from sdjax.kernels.distributions import entropy, logprob, normalise
from sdjax.kernels.divergences import jsd
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.opsd import reference_solution
from sdjax.ranges import NonNegative, Positive, PositiveInt, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Purified OPSD 2026 (authors not in our source)",
    arxiv="2607.02234",
    equation="JSD_alpha(p || P), P = P_0 (q / q_ref)^(1/beta) normalised",
    student="question",
    teacher="P_0: question; q: question + solution; q_ref: solution without the question; all the initial parameters",
    reduction="token mean over rows with a lesson",
    differences=(
        "known from a paragraph: beta, alpha and the template are ours",
        "the question's text is cut out of the lesson, once, to get what is read without the question",
        "alpha near 0 or 1 shrinks the loss to nothing (0.999: under 0.001 of the KL); only 0 and 1 are the two KLs",
    ),
    status="reconstruction",
)


def without_question(lesson: Messages | None, asked: Messages) -> Messages | None:
    """A lesson whose last turn no longer holds the question's text; `None` where it did not hold it."""
    text = asked[-1]["content"]
    if lesson is None or text not in lesson[-1]["content"]:
        return None
    left = lesson[-1]["content"].replace(text, "", 1).strip()
    return rewrite_last(lesson, left, lesson[-1].get("privileged", ""))


def purified(base, informed, reference, beta: float):
    """The target `P_0 (q / q_ref)^(1/beta)`, normalised: log-probabilities `[..., V]` x3 `-> [..., V]`."""
    return normalise(base + (informed - reference) / beta)


@check_ranges
def purified_opsd(
    *,
    beta: Positive = 1.0,
    alpha: Share = 0.5,
    temperature: NonNegative = 1.0,
    group_size: PositiveInt = 1,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Purified on-policy self-distillation (arXiv:2607.02234): the shortcut part of the log-ratio is taken out.

    `log q - log p = (log q_ref - log p) + (log q - log q_ref)`: only the second part shapes the target.  Token mean.

    Args:
      beta: the larger, the closer the target stays to the model that reads the question alone.
      alpha: 0 KL(target||student), 1 KL(student||target), between: Jensen-Shannon.
      temperature: of sampling; all distributions are taken at temperature 1.
      group_size: rollouts per prompt.
      lesson: `(rollout, its batch) -> what the informed side reads, or None`, with the question's text in its last turn;
        by default the question and the example's solution.
      reduce: how tokens are averaged.
    """
    told = lesson or reference_solution

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        return [read(r, told(r, rollouts)) for r in rollouts], memory

    def read(r, informed):
        alone = without_question(informed, question(r.example))
        return r.read_by(base=question(r.example), informed=informed if alone else None, reference=alone)

    def signals(dist, token):
        target = purified(dist["base"], dist["informed"], dist["reference"], beta)
        said = {name: logprob(dist[name], token) for name in dist}
        return {
            "divergence": jsd(dist["student"], target, alpha),
            "shortcut": said["reference"] - said["student"],
            "kept": said["informed"] - said["reference"],
            "entropy": entropy(dist["student"]),
        }

    def terms(batch, sig, step):
        taught = batch.contexts["informed"].valid
        measured = {name: Term(abs(sig[name]), over=taught, coef=0.0) for name in ("shortcut", "kept")}
        divergence = Term(sig["divergence"], 1.0, taught, reduce)
        return {"divergence": divergence, **measured, "entropy": Term(sig["entropy"], coef=0.0)}

    told_apart = dict.fromkeys(("informed", "reference"), View("initial", per_rollout=lesson is not None, told=True))
    views = {"student": View(trainable=True), "base": View("initial"), **told_apart}
    return Method(collect, (Objective(views, signals, terms),), {"initial": frozen()})
