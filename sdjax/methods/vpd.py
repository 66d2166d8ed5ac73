"""VPD: SDPO whose teacher learns to use feedback: every few batches it is trained to tell right attempts from wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.collect.contexts import question
from sdjax.collect.critiques import criticised
from sdjax.collect.memory import told_apart
from sdjax.engine.policies import frozen, score
from sdjax.kernels.distributions import logprob
from sdjax.kernels.preference import sequence_log_ratio, unpaired
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sdpo import peer_or_feedback, sdpo
from sdjax.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Li et al. 2026, Learning from Language Feedback via Variational Policy Distillation",
    arxiv="2605.15113",
    equation="M: JSD_alpha(p||q); E: -log sigmoid(+-(beta log q(y)/p_old(y) - midpoint)), mean per class",
    student="question",
    teacher="question + a peer's success or feedback; the live parameters, trained in the E-step",
    reduction="E: mean per class of rows; M: token mean over rows with a lesson",
    differences=(
        "no official code; the divergence depends on the task: JSD on the top 100 (default), alpha=1 on the top 20, or 0",
        "a live M-step teacher as in Algorithm 1 (default); the tables list SDPO's EMA rate (0.01, 0.05)",
        "a batch with one class has no E-step, and rows without a lesson are in neither step: both ours",
        "the midpoint is one batch's, as in Algorithm 1; midpoint_rate below 1 makes it the text's moving average",
        "E's classes are weighed as in the whole batch, so that a minibatch may hold one of them only: ours",
        "Proposition 1 (the objective never falls) does not hold as stated; nothing here depends on it",
        "alpha near 0 or 1 shrinks the loss to nothing (0.999: under 0.001 of the KL); only 0 and 1 are the two KLs",
    ),
)


@check_ranges
def vpd(
    *,
    group_size: PositiveInt = 8,
    every: NonNegativeInt = 5,
    beta: NonNegative = 0.1,
    midpoint_rate: PositiveShare = 1.0,
    prior: Literal["current", "initial"] = "current",
    feedback: Literal["sibling", "environment", "critique"] = "sibling",
    success: PositiveShare = 0.5,
    alpha: Share = 0.5,
    top_k: PositiveInt | None = 100,
    ema_rate: Share = 1.0,
    is_cap: Positive | None = None,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Variational policy distillation (Li et al. 2026, arXiv:2605.15113, Algorithm 1): two objectives on one batch.

    E, every few batches: BCO on `beta * (log q(y|x, lesson) - log p_old(y|x))`, sums over tokens; the student that wrote
    the attempt is the constant reference.  M, on every batch: SDPO.  Weights are shared, so E moves the student too.
    The midpoint and the classes are those of the whole batch before the E-step, whatever the minibatches: it is scored
    once more for that.  `memory` is `{"batches", "midpoint"}`.
    The paper's one-phase hybrids with GRPO: `sdpo(rl_weight=...)` (joint), `antisd(beta=1, coef=-w, warmup=0, low=0)`
    (advantage reshaping) and `rlrt(toward=True, rows="all")` (reweighting).

    Args:
      group_size: rollouts per prompt.
      every: batches per E-step; 0: none, which is SDPO.
      beta: scale of the implicit reward; 0 makes E a constant.
      midpoint_rate: how far an E-step's midpoint moves the running one: 1 is that of the batch alone (Algorithm 1); the
        paper's text calls it a moving average.
      prior: E's reference: the student that wrote the attempt, or the initial model (the paper's ablation, which loses).
      feedback: what the lesson is made of: a peer's success alone; a peer's success, else the verifier's feedback; or,
        for failures, a critique by the policy, which is told the answer.
      success: the least reward of a success.
      alpha: M's divergence: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      top_k: entries of the student's distribution that are kept, the others in one bucket; `None`: all.
      ema_rate: of the M-step's teacher; 1 is live.
      is_cap: cap of M's importance weight; `None`: no weight.
      temperature: of sampling.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; instead of `feedback`.
      reduce: how M's tokens are averaged.
    """
    told = lesson or peer_or_feedback(success=success, use_feedback=feedback == "environment")
    how = {"group_size": group_size, "alpha": alpha, "top_k": top_k, "ema_rate": ema_rate, "is_cap": is_cap}
    distil = sdpo(**how, temperature=temperature, lesson=told, reduce=reduce)

    def collect(environment, examples, key, memory):
        rollouts, _ = distil.collect(environment, examples, key, distil.memory)
        rollouts = [r.read_by(prior=question(r.example)) for r in rollouts]
        if feedback == "critique" and not lesson:
            # Not a key that an attempt was drawn from.
            rollouts = criticised(environment, rollouts, jax.random.fold_in(key, len(examples)), success)
        due = bool(every) and refine.due(memory["batches"])
        implicit = implicit_rewards(environment, rollouts) if due else None
        rows, midpoint = told_apart(rollouts, implicit, success, memory["midpoint"], midpoint_rate)
        return rows, {"batches": memory["batches"] + 1, "midpoint": midpoint}

    def implicit_rewards(environment, rollouts):
        """`beta` times the log-ratio of teacher and reference of whole attempts, by the present parameters: `[B]`."""
        found = score(environment, rollouts, readers, signals)
        old = lambda r: r.logprobs if prior == "current" else r.extras["prior_logprobs"]
        return np.asarray([beta * np.sum(r.extras["teacher_logprobs"] - np.asarray(old(r))) for r in found])

    def signals(dist, token):
        return {f"{name}_logprobs": logprob(dist[name], token) for name in readers}

    def terms(batch, sig, step):
        kept, right = batch.valid & batch.contexts["teacher"].valid, batch.extras["right"]
        # The sampler's log-probabilities are the student's as it was when it wrote the attempt.
        reference = batch.behavior_logprobs if prior == "current" else sig["prior_logprobs"]
        reward = beta * sequence_log_ratio(sig["teacher_logprobs"], reference, batch.mask & kept[:, None])
        value = unpaired(reward, right, kept, batch.extras["midpoint"])
        mean = lambda value, **how: Term(value, batch.extras["class_weight"], kept, token_mean, **how)
        return {
            "right": mean(jnp.where(right, value, 0.0)),
            "wrong": mean(jnp.where(right, 0.0, value)),
            "margin": mean(jnp.where(right, reward, -reward), coef=0.0),
        }

    readers = {"teacher": View("live", trainable=True, per_rollout=True, told=True)}
    snapshots = dict(distil.snapshots)
    if prior == "initial":
        readers, snapshots = {**readers, "prior": View("initial")}, {**snapshots, "initial": frozen()}
    refine = Objective(readers, signals, terms, every or 1)
    objectives = (*((refine,) if every else ()), *distil.objectives)
    return Method(collect, objectives, snapshots, {"batches": 0, "midpoint": None})
