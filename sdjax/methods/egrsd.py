"""EGRSD: the verifier says which way, an informed frozen teacher how far, less where the teacher itself is unsure."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from sdjax.collect.memory import NO_REWARDS, whitened
from sdjax.engine.policies import refresh
from sdjax.errors import MethodError
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.policy_gradient import reinforce
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.kernels.weights import entropy_gate, likelihood_ratio, window_minimum
from sdjax.methods.opsd import opsd
from sdjax.ranges import NonNegative, NonNegativeInt, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term

CARD = Card(
    paper="Ke et al. 2026, Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
    arxiv="2605.13255",
    equation="-A clip((q/p)^sign(A), 1-eps, 1+eps) clip(1 - strength H/max(H_max, 1), 0.1, 1) log p",
    student="question",
    teacher="question + reference solution; parameters: the initial ones",
    reduction="token mean",
    differences=(
        "H_max is the largest raw entropy (Eq. 8); Algorithm 1 takes it after the window's minimum: windowed_maximum",
        "the scope of H_max is not said: the minibatch here; the teacher's wording is not given: OPSD's",
        "a running deviation of 0 is not divided by (not said); rows without a reference keep weight 1",
        "log-probabilities are taken at temperature 1, texts at 1.1 with filters: a constant A then moves the logits, too",
        "the frozen teacher is the paper's best; its EMA (ema_rate=0.01) and hard copies (copy_every=20, 50) are worse there",
    ),
)


@check_ranges
def egrsd(
    *,
    strength: NonNegative = 0.3,
    window: NonNegativeInt = 0,
    windowed_maximum: bool = False,
    ratio_eps: NonNegative = 0.2,
    length_bonus: NonNegative = 0.5,
    warmup: NonNegativeInt = 10,
    ema_rate: Share = 0.0,
    copy_every: NonNegativeInt = 0,
    group_size: PositiveInt = 1,
    temperature: NonNegative = 1.1,
    top_p: PositiveShare = 0.95,
    top_k: NonNegativeInt = 20,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Entropy-guided reinforced self-distillation (Ke et al. 2026, arXiv:2605.13255, Eq. 4-9).

    `A` is the reward, whitened by earlier steps'.  `strength` 0 is RLSD (Yang et al. 2026, arXiv:2604.03128), `window` 3
    or 5 is CL-EGRSD; with `ratio_eps` 0 as well, REINFORCE.  Token mean.

    Args:
      strength: how fast the weight falls with the teacher's entropy (paper: 0.3; 1 for CL-EGRSD on 8B).
      window: later tokens whose least entropy counts, so that a short rise is not punished (CL-EGRSD: 3 or 5).
      windowed_maximum: take the largest entropy after the window's minimum, as in Algorithm 1.
      ratio_eps: width of the clip of the ratio teacher / student around 1.
      length_bonus: a correct answer of length n earns `1 + length_bonus * (1 - n / limit)`.
      warmup: first batches, whose advantage is the reward minus 0.5.
      ema_rate: the teacher's parameters follow the student's: 0 is frozen (paper), 1 is live.
      copy_every: instead, the teacher is a copy of the student of every so many batches; 0: none.
      group_size: rollouts per prompt.
      temperature, top_p, top_k: of sampling; log-probabilities, ratios and entropies are taken at temperature 1, so that
        an advantage that is the same for all tokens pushes towards the unfiltered distribution.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default the reference solution.
      reduce: how tokens are averaged.
    """
    if copy_every and ema_rate:
        raise MethodError(f"copy_every={copy_every} and ema_rate={ema_rate:g} are two teachers: choose one")
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "group_size": group_size}
    base = opsd(**how, ema_rate=ema_rate, lesson=lesson)

    def collect(environment, examples, key, memory):
        rollouts, _ = base.collect(environment, examples, key, None)
        limit = environment.live.shapes.completion
        bonus = lambda r: r.reward * length_bonus * (1.0 - len(r.tokens) / limit)
        rewards = [r.returns + bonus(r) for r in rollouts]
        advantages, memory = whitened(rewards, memory, warmup)
        return [r.with_extras(advantage=a) for r, a in zip(rollouts, advantages, strict=True)], memory

    def signals(dist, token):
        both = {"logprobs": logprob(dist["student"], token), "teacher_logprobs": logprob(dist["teacher"], token)}
        return {**both, "entropy": entropy(dist["student"]), "teacher_entropy": entropy(dist["teacher"])}

    def terms(batch, sig, step):
        advantage, taught = batch.extras["advantage"][:, None], batch.contexts["teacher"].valid
        over, unsure, ahead = batch.mask & (batch.valid & taught)[:, None], sig["teacher_entropy"], window
        if windowed_maximum:
            unsure, ahead = window_minimum(unsure, over, window), 0
        gate = entropy_gate(unsure, over, strength=strength, window=ahead)
        ratio = likelihood_ratio(sig["teacher_logprobs"], sig["logprobs"], eps=ratio_eps, sign=jnp.sign(advantage))
        credit = jnp.where(taught[:, None], gate * ratio, 1.0)
        measured = {"gate": gate, "teacher_entropy": sig["teacher_entropy"], "entropy": sig["entropy"]}
        found = {name: Term(value, 1.0, taught, coef=0.0) for name, value in measured.items()}
        return {"pg": Term(reinforce(sig["logprobs"], advantage), credit, reduce=reduce), **found}

    weighted = ("pg",) if strength or ratio_eps else ()
    objective = Objective(base.objectives[0].views, signals, terms, credit=weighted, rewarded=True)
    snapshots = {"teacher": refresh(copy_every)} if copy_every else base.snapshots
    return base._replace(collect=collect, objectives=(objective,), snapshots=snapshots, memory=NO_REWARDS)
