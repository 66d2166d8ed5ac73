"""RLCSD: GRPO whose tokens are credited by what a correct sibling in context says more than wrong ones do."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.collect.contexts import question, with_solution
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import score
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.ranges import NonNegative, Positive, PositiveInt, PositiveShare, check_ranges
from sdjax.types import Card, Method, Objective, Term, View

CARD = Card(
    paper="RLCSD 2026 (authors not in our source)",
    arxiv="2606.11709",
    equation="GRPO on A + coef tanh(e/tau), never past 0, e = log q(y|correct peer) - log mean_k q(y|wrong peer k)",
    student="question",
    teacher="question + a peer's attempt, correct or wrong, in one template; the live parameters at rollout time",
    reduction="sequence mean",
    differences=("known from a line: coef, tau, threshold, the number of peers and the teacher's parameters are ours",),
    status="reconstruction",
)


def contrast(correct: Array, wrong: Array) -> Array:
    """Evidence for a token, `log q(y|correct) - log mean_k q(y|wrong_k)`: `[T]`, `[K, T]` -> `[T]`."""
    return correct - (np.logaddexp.reduce(wrong, axis=0) - np.log(len(wrong)))


def shaped(advantage: Array, evidence: Array, coef: float, tau: float, threshold: float) -> Array:
    """`A + r` where `|r| > threshold`, but never past 0: `r = coef tanh(e / tau)`, `[B, 1]`, `[B, T] -> [B, T]`."""
    reward = coef * jnp.tanh(evidence / tau)
    moved = jnp.where(jnp.abs(reward) > threshold, advantage + reward, advantage)
    return jnp.where(moved * advantage > 0.0, moved, 0.0)


@check_ranges
def rlcsd(
    *,
    group_size: PositiveInt = 8,
    coef: NonNegative = 0.5,
    tau: Positive = 1.0,
    threshold: NonNegative = 0.0,
    wrong_peers: PositiveInt = 2,
    success: PositiveShare = 0.5,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Contrastive self-distillation for RL (arXiv:2606.11709): the verifier keeps every token's sign.  Sequence mean.

    `A~_t = A + coef * tanh(e_t / tau)`, clamped at 0 on the side of `A`.  One template for correct and wrong peers, so
    that style cancels; an attempt is never shown itself.  Rows without a peer of either kind: GRPO.

    Args:
      group_size: rollouts per prompt.
      coef: most that a token's advantage moves; 0 is GRPO.
      tau: scale of the evidence, in nats.
      threshold: smaller shifts than this are left out.
      wrong_peers: wrong attempts that are compared with; each is one more reading of the completions.
      success: the least reward of a correct attempt.
      clip: widths of the ratio's clip below and above 1.
      temperature: of sampling.
      reduce: how tokens are averaged.
    """
    wrongs = [f"wrong_{k}" for k in range(wrong_peers)]
    readers = {name: View(per_rollout=True, told=True) for name in ("correct", *wrongs)}

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        read = [r.read_by(**peers(r, rollouts)) for r in rollouts]
        return [credited(r) for r in score(environment, read, readers, scored)], memory

    def peers(rollout, rollouts):
        others = [r for r in rollouts if r.group == rollout.group and r is not rollout]
        right = [r for r in others if r.reward >= success][:1]
        wrong = [r for r in others if r.reward < success][:wrong_peers]
        if not right or not wrong:
            return dict.fromkeys(readers)
        told = [with_solution(question(r.example), r.text, header="An earlier solution:") for r in (*right, *wrong)]
        return {**dict.fromkeys(readers), **dict(zip(readers, told, strict=False))}

    def scored(dist, token):
        return {name: logprob(dist[name], token) for name in readers}

    def credited(r):
        wrong = [r.extras[name] for name in wrongs if r.contexts[name] is not None]
        evidence = contrast(r.extras["correct"], np.stack(wrong)) if wrong else np.zeros(len(r.tokens), np.float32)
        contexts = {"student": r.contexts["student"]}
        extras = {name: value for name, value in r.extras.items() if name not in readers}
        return dataclasses.replace(r, contexts=contexts, extras={**extras, "evidence": evidence})

    def signals(dist, token):
        return {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}

    def terms(batch, sig, step):
        advantage = group_advantage(batch.returns, batch.group, batch.valid)[:, None]
        moved = shaped(advantage, batch.extras["evidence"], coef, tau, threshold)
        # Never of the other sign, so that it is the advantage times a weight; without an advantage it is 0.
        credit = moved / jnp.where(advantage != 0.0, advantage, 1.0)
        value = clipped_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        return {"pg": Term(value, credit, reduce=reduce), "entropy": Term(sig["entropy"], coef=0.0)}

    own = {"student": View(trainable=True)}
    objective = Objective(own, signals, terms, credit=("pg",) if coef else (), rewarded=True)
    return Method(collect, (objective,), early=readers)
