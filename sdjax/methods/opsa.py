"""OPSA: no teacher at all; unlikely tokens are pushed down, the control for what a teacher adds."""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import reinforce
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.ranges import NonNegative, PositiveInt, Share, check_ranges
from sdjax.types import Card, Method, Objective, Term, View

CARD = Card(
    paper="OPSA 2026 (authors not in our source), Does On-Policy Distillation Really Distill?",
    arxiv="2608.31046",
    equation="-A log p(y), A = -penalty where p(y) < threshold, else 0",
    student="question",
    teacher="none",
    reduction="token mean",
    differences=("only the abstract was read: threshold and size of the penalty are ours",),
    status="reconstruction",
)


@check_ranges
def opsa(
    *,
    group_size: PositiveInt = 4,
    threshold: Share = 0.1,
    penalty: NonNegative = 1.0,
    temperature: NonNegative = 1.0,
    reduce: Reducer = token_mean,
) -> Method:
    """A fixed negative advantage on tokens that the student itself found unlikely when it sampled them.

    `-A_t log p(y_t)`, `A_t = -penalty` where `b(y_t) < threshold`, else 0.  Matches on-policy distillation in its
    paper: the control that every teacher must beat.  A reconstruction from the abstract of arXiv:2608.31046.

    Args:
      group_size: rollouts per prompt.
      threshold: probability below which a sampled token is penalised.
      penalty: size of the advantage.
      temperature: of sampling; probabilities are taken at temperature 1.
      reduce: how tokens are averaged.
    """

    def collect(environment, examples, key, memory):
        return attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature)), memory

    def signals(dist, token):
        return {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        unlikely = batch.behavior_logprobs < jnp.log(threshold)
        lowered = reinforce(sig["logprobs"], jnp.full_like(sig["logprobs"], -1.0))
        return {
            "pg": Term(lowered, penalty * unlikely, reduce=reduce),
            "penalised": Term(unlikely.astype(jnp.float32), coef=0.0),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    views = {"student": View(trainable=True)}
    return Method(collect, (Objective(views, signals, terms, credit=("pg",) if penalty else ()),))
