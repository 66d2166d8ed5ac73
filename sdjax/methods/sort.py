"""SORT (a reconstruction): where every attempt fails, imitate the reference, most where a plan makes it predictable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.plans import redacted, repairs, with_plan, written_plans
from sdjax.collect.remembered import Remembered
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import Reducer, sequence_mean
from sdjax.kernels.weights import geometric_mean, mean_one
from sdjax.ranges import NonNegative, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import REFERENCE, STUDENT, Card, Example, Method, Objective, Term, View

CARD = Card(
    paper="Le et al. 2026, SORT: Selective Off-Policy Reference Tuning with Plan Guidance",
    arxiv="2605.11505",
    equation="GRPO + coef * -w log p(y*), w = p(y*|x)^(1-a) p(y*|x, plan)^a, on prompts whose attempts all fail",
    student="question",
    teacher="question + a plan made from the reference without its answer; the live parameters, weights only",
    reduction="sequence mean",
    differences=("formula, plan, defaults: reconstructed from the abstract and a summary; no number is the paper's",),
    status="reconstruction",
)


@check_ranges
def sort(
    *,
    group_size: PositiveInt = 8,
    coef: NonNegative = 1.0,
    plan_rate: Share = 0.5,
    mean_one_weights: bool = False,
    uplift_cap: Positive = 5.0,
    plans: Literal["written", "redacted"] = "written",
    plan: Callable[[Environment, Sequence[Example], Array], list[str]] | None = None,
    normalised: bool = True,
    success: PositiveShare = 0.5,
    clip: tuple[NonNegative, NonNegative] = (0.2, 0.2),
    temperature: NonNegative = 1.0,
    reduce: Reducer = sequence_mean,
) -> Method:
    """Selective off-policy reference tuning (Le et al. 2026, arXiv:2605.11505), reconstructed.  Sequence mean, each part.

    `loss = GRPO + coef * mean over all-wrong prompts of mean_t(-w_t log p(y*_t))`.  Plans are made once per problem and
    kept in `memory`, `{id: plan}`; without a plan the weight is `p(y*_t)` itself, dynamic fine-tuning.

    Args:
      group_size: rollouts per prompt.
      coef: weight of the reference's part.
      plan_rate: exponent a of the probability with the plan; 0: dynamic fine-tuning, 1: that probability alone.
      mean_one_weights: rescale the weights of every reference to mean 1.
      uplift_cap: bound of `|log p(y*|plan) - log p(y*)|` when weights are rescaled.
      plans: by the live policy from the solution without its answer, or that solution itself.
      plan: instead, `(environment, examples, key) -> plans`; the answer is taken out of them.
      normalised: divide GRPO's advantages by the group's standard deviation.
      success: the least reward of a success; the reference is learnt where no attempt is one.
      clip: widths of the ratio's clip below and above 1.
      temperature: of sampling.
      reduce: how tokens are averaged.
    """

    def collect(environment, examples, key, memory):
        sampling, planning = jax.random.split(key)
        how = {"n": group_size, "sampling": Sampling(temperature=temperature)}
        rollouts = attempts(environment, examples, sampling, **how)
        rows = repairs(environment, rollouts, examples, success)
        new = [r.example for r in rows if r.example.id not in memory]
        said = make(environment, new, planning, len(examples)) if new else []
        memory = memory | {e.id: redacted(text, e.answers) for e, text in zip(new, said, strict=True)}
        read = lambda r: r.read_by(plan=with_plan(question(r.example), memory[r.example.id]))
        return [*rollouts, *map(read, rows)], memory

    def make(environment, examples, key, slots):
        if plan is not None:
            return plan(environment, examples, key)
        if plans == "redacted":
            return [redacted(e.solution, e.answers) for e in examples]
        return written_plans(environment, examples, key, slots)

    def signals(dist, token):
        logprobs, planned = logprob(dist["student"], token), logprob(dist["plan"], token)
        return {"logprobs": logprobs, "plan_logprobs": planned, "entropy": entropy(dist["student"])}

    def weights(sig, over):
        base, planned = sig["logprobs"], sig["plan_logprobs"]
        if not mean_one_weights:
            return geometric_mean(base, planned, plan_rate)
        planned = base + jnp.clip(planned - base, -uplift_cap, uplift_cap)
        return mean_one(geometric_mean(base, planned, plan_rate), over, axis=-1)

    def terms(batch, sig, step):
        own = batch.valid & (batch.source == STUDENT)
        repaired = batch.valid & (batch.source == REFERENCE) & batch.contexts["plan"].valid
        advantage = group_advantage(batch.returns, batch.group, own, normalised=normalised)[:, None]
        value = clipped_surrogate(sig["logprobs"], batch.behavior_logprobs, advantage, clip)
        return {
            "pg": Term(value, over=own, reduce=reduce),
            "repair": Term(-sig["logprobs"], weights(sig, batch.mask & repaired[:, None]), repaired, reduce, coef),
            "entropy": Term(sig["entropy"], over=own, coef=0.0),
        }

    # A group has at most one reference, so that its plan is the group's.
    views = {"student": View(trainable=True), "plan": View("live", told=True)}
    objective = Objective(views, signals, terms, credit=("repair",), rewarded=True)
    return Method(collect, (objective,), memory=Remembered())
