"""CIPO: GRPO on answers and, at the same time, on corrections of the policy's own attempts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.collect.contexts import question
from sdjax.collect.corrections import anchors, correction, graded, replayed
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import frozen
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.estimators import sampled_kl
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.ranges import FirstBetween, NonNegative, PositiveInt, PositiveShare, Rising, Share, check_ranges
from sdjax.types import Card, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Ren et al. 2026, Correction-Oriented Policy Optimization",
    arxiv="2605.14539",
    equation="GRPO(answers) + coef GRPO(corrections of own attempts), R' = R - risk [a correct attempt was broken]",
    student="question; for corrections, question + one of its own attempts, right or wrong",
    teacher="none",
    reduction="sequence mean, per stream",
    differences=(
        "the paper's equations were not available: forms and constants are a third party's re-implementation",
        "corrections of one attempt compared with each other, by standard deviation, make the risk penalty a no-op",
        "so corrections of a problem are compared (default); compare='anchor' is the other form",
        "only attempts of the same batch are corrected; a buffer of earlier right ones, if the paper has one, is left out",
    ),
    status="reconstruction",
)


def compared(
    rollouts: Sequence[Rollout], pools: Sequence[int], returns: Sequence[float], fix: bool, normalised: bool
) -> list[Rollout]:
    """The rollouts with their advantages among those of the same pool, and whether they are corrections.

    Taken here and not from the batch, because a problem's corrections lie in several of its groups.
    """
    arrays = jnp.asarray(returns, jnp.float32), jnp.asarray(pools), jnp.ones(len(rollouts), bool)
    found = np.asarray(group_advantage(*arrays, normalised=normalised))
    rows = [r.with_extras(advantage=a, correction=fix) for r, a in zip(rollouts, found, strict=True)]
    return [r.read_by(reference=question(r.example)) for r in rows]


@check_ranges
def cipo(
    *,
    group_size: PositiveInt = 8,
    replay: NonNegative = 1.0,
    coef: NonNegative = 1.0,
    risk: NonNegative = 1.0,
    compare: Literal["problem", "anchor"] = "problem",
    normalised: bool = True,
    share: Annotated[tuple[Share, Share, Share], FirstBetween] = (0.3, 0.2, 0.8),
    target: Share = 0.8,
    gains: tuple[NonNegative, NonNegative, NonNegative] = (0.8, 0.3, 0.05),
    medium: Annotated[tuple[Share, Share], Rising] = (0.375, 0.75),
    success: PositiveShare = 0.5,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    kl_coef: NonNegative = 1e-4,
    temperature: NonNegative = 1.0,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Correction-oriented policy optimisation (Ren et al. 2026, arXiv:2605.14539).  Sequence mean, each stream its own.

    A second round of rollouts corrects attempts of the first.  `memory` is the share of right attempts among them.

    Args:
      group_size: answers per prompt, and corrections per attempt.
      replay: attempts to correct, per prompt: so many groups are added, which minibatches must divide as well.
      coef: weight of the corrections' part.
      risk: what a correction that breaks a right attempt loses, for its advantage only.
      compare: corrections with all those of the problem, or with those of the same attempt.
      normalised: divide advantages by their standard deviation.
      share: of right attempts among those corrected: at first, least, most.
      target: how many right attempts should stay right.
      gains: how the share reacts to the gap, to a drop, to repetition.
      medium: pass rates of the problems whose attempts are preferred.
      success: the least reward of a right attempt or correction.
      clip: widths of the ratio's clip below and above 1.
      kl_coef: weight of the penalty (k3) towards the initial policy, in both streams.
      temperature: of sampling.
      reduce: how a stream is averaged.
    """

    def collect(environment, examples, key, memory):
        answering, choosing, correcting = jax.random.split(key, 3)
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        base = attempts(environment, examples, answering, **how)
        chosen = anchors(base, corrected(len(examples)), memory["share"], medium, choosing, success)
        if not chosen:
            return answers(base), memory
        asked = [dataclasses.replace(a.example, prompt=correction(a)) for a in chosen]
        fixes = attempts(environment, asked, correcting, **how)
        of = [chosen[r.group] for r in fixes]
        shaped, retention = graded(fixes, of, risk, success)
        pools = [a.group if compare == "problem" else r.group for r, a in zip(fixes, of, strict=True)]
        # Groups of a batch share a context: one per attempt, after those of the prompts.
        fixes = [dataclasses.replace(r, group=len(examples) + r.group) for r in fixes]
        memory = replayed(memory, retention, target, gains, share[1:])
        return answers(base) + compared(fixes, pools, shaped, True, normalised), memory

    def corrected(prompts):
        return min(int(replay * prompts), group_size * prompts)

    def answers(rollouts):
        return compared(rollouts, [r.group for r in rollouts], [r.returns for r in rollouts], False, normalised)

    def signals(dist, token):
        found = {"logprobs": logprob(dist["student"], token), "entropy": entropy(dist["student"])}
        return {**found, "reference_logprobs": logprob(dist["reference"], token)} if kl_coef else found

    def terms(batch, sig, step):
        advantage, fix = batch.extras["advantage"][:, None], batch.extras["correction"]
        value = clipped_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        if kl_coef:
            value = value + kl_coef * sampled_kl(sig["logprobs"], sig["reference_logprobs"], "k3")
        return {
            "answers": Term(value, over=~fix, reduce=reduce),
            "corrections": Term(value, over=fix, reduce=reduce, coef=coef),
            "entropy": Term(sig["entropy"], coef=0.0),
        }

    reference = {"reference": View("reference")} if kl_coef else {}
    objective = Objective({"student": View(trainable=True), **reference}, signals, terms, rewarded=True)
    memory = {"share": share[0], "retention": None, "below": 0}
    snapshots = {"reference": frozen()} if kl_coef else {}
    return Method(collect, (objective,), snapshots, memory, groups=lambda prompts: prompts + corrected(prompts))
