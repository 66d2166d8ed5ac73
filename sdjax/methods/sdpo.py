"""SDPO: the same model, told a peer's success or feedback, grades every token of the attempt."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from sdjax.collect.lessons import peer_or_feedback
from sdjax.collect.rollouts import attempts
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import ema, frozen
from sdjax.errors import MethodError
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import entropy, interpolate, logprob, top_k_renormalised, top_k_with_rest
from sdjax.kernels.divergences import advantage_clipped_reverse_kl, jsd
from sdjax.kernels.estimators import sampled_jsd
from sdjax.kernels.policy_gradient import importance_weight, reinforce
from sdjax.kernels.reductions import Reducer, masked_mean, token_mean
from sdjax.ranges import NonNegative, Positive, PositiveInt, PositiveShare, Share, check_ranges
from sdjax.types import Card, Messages, Method, Objective, Rollout, Term, View

CARD = Card(
    paper="Hübotter et al. 2026, Reinforcement Learning via Self-Distillation",
    arxiv="2601.20802",
    equation="w * JSD_alpha(student || teacher), alpha 0: KL(teacher||student), 1: KL(student||teacher)",
    student="question",
    teacher="question + a peer's success, else feedback on the attempt; parameters: EMA of the student",
    reduction="token mean over rows with a lesson",
    differences=(
        "a success is not shown to itself (released configurations); the paper's Table 2 shows it (shown_itself)",
        "the code's token mean over micro-batches of one sequence is sequence_mean_of(all rows), not the default",
        "the mixture with GRPO (Eq. 3, rl_weight) is in the paper and not in the code; both parts then count all rows",
        "one weight min(p/b, cap) for the code's min(p/p_old, 2) min(p_old/b, 2): the same in the first update on a batch",
        "Eq. 13, a clipped weight per vocabulary entry, is left out: the paper's runs have one per token, no source has its form",
        "test-time training clips advantages (advantage_clip=5) in the paper only; whose is read as every entry's",
        "alpha near 0 or 1 shrinks the loss to nothing (0.999: under 0.001 of the KL); only 0 and 1 are the two KLs",
    ),
)


TEST_TIME = {"group_size": 16, "alpha": 1.0, "top_k": 20, "ema_rate": 0.01, "advantage_clip": 5.0}
"""Test-time training on one question per batch (section 5; Table 12), `sdpo(**TEST_TIME)`: feedback until it is solved."""


def divergence(alpha: float, top_k: int | None, rest: bool, sampled_token: bool, most: float | None) -> Callable:
    """`(student, teacher [..., V], token [...]) -> [...]`: what one token costs; the arguments are `sdpo`'s."""

    def measure(student: Array, teacher: Array, token: Array) -> Array:
        if sampled_token:
            said, graded = logprob(student, token), logprob(teacher, token)
            if most is None:
                return sampled_jsd(said, graded, alpha)
            return reinforce(said, jnp.clip(graded - said, -most, most))
        if top_k is not None:
            narrow = top_k_with_rest if rest else top_k_renormalised
            student, teacher = narrow(student, teacher, by=student, k=top_k)
        return jsd(student, teacher, alpha) if most is None else advantage_clipped_reverse_kl(student, teacher, most)

    return measure


@check_ranges
def sdpo(
    *,
    group_size: PositiveInt = 8,
    alpha: Share = 0.5,
    top_k: PositiveInt | None = 100,
    rest: bool = True,
    sampled_token: bool = False,
    sequence_level: bool = False,
    ema_rate: Share = 0.05,
    trust: Share | None = None,
    is_cap: Positive | None = 2.0,
    rl_weight: Share = 0.0,
    advantage_clip: Positive | None = None,
    success: PositiveShare = 0.5,
    shown_itself: bool = False,
    temperature: NonNegative = 1.0,
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None = None,
    reduce: Reducer = token_mean,
) -> Method:
    """Self-distillation policy optimisation (Hübotter et al. 2026, arXiv:2601.20802, Eq. 1).

    `loss_t = w_t * JSD_alpha(student || teacher)`, the teacher being the same model reading the question *and* a lesson.
    Token mean over rows with a lesson (the official code's micro-batch of one makes it
    `sdjax.kernels.reductions.sequence_mean_of`).

    Args:
      group_size: rollouts per prompt.
      alpha: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon (paper: 0.5, or 1 with feedback).
      top_k: entries of the student's distribution that are kept, the others in one `rest` bucket, or dropped and
        renormalised without `rest`; `None` is the full vocabulary (paper: 100, or 20 with feedback).
      rest: keep one bucket for all entries outside of `top_k`.
      sampled_token: use the sampled token's log-probabilities only: unbiased for every alpha, of higher variance.
      sequence_level: instead, every sampled token's advantage is its row's mean of `log q/p` (the paper's ablation).
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live (paper: 0.05, 0.01 with feedback).
      trust: instead, the teacher is the geometric mixture `initial^(1-trust) * live^trust`, both reading the lesson.
      is_cap: cap of the importance weight `w = p/b` (no effect in the first update on a batch); `None`: no weight.
      rl_weight: lambda of Eq. 3: `lambda * policy gradient + (1 - lambda) * distillation`, both averaged over the tokens
        of all rows, a row without a lesson having no distillation; not in the released code.
      advantage_clip: bound of every entry's advantage `log q - log p`, or the sampled token's; for `alpha` 1 (5 in
        test-time training); `None`: no bound.
      success: the least reward of a success, for the default lesson.
      shown_itself: a success reads itself instead of a peer's, in the default lesson (Table 2).
      temperature: of sampling; all distributions are taken at temperature 1.
      lesson: `(rollout, its batch) -> what the teacher reads, or None`; by default `peer_or_feedback()`.
      reduce: how tokens are averaged.
    """
    if advantage_clip is not None and alpha != 1.0:
        raise MethodError(f"advantage_clip={advantage_clip:g} needs alpha=1, the reverse KL; alpha is {alpha:g}")
    lesson = lesson or peer_or_feedback(success=success, shown_itself=shown_itself)
    most = jnp.inf if advantage_clip is None else advantage_clip
    measure = divergence(alpha, top_k, rest, sampled_token, advantage_clip)

    def collect(environment, examples, key, memory):
        rollouts = attempts(environment, examples, key, n=group_size, sampling=Sampling(temperature=temperature))
        return [r.read_by(teacher=(told := lesson(r, rollouts)), initial=told) for r in rollouts], memory

    def signals(dist, token):
        student, teacher = dist["student"], dist["teacher"]
        if trust is not None:
            teacher = interpolate(dist["initial"], teacher, trust)
        found = {"logprobs": logprob(student, token), "entropy": entropy(student)}
        if sequence_level:
            return {**found, "log_ratio": logprob(teacher, token) - found["logprobs"]}
        return {**found, "divergence": measure(student, teacher, token)}

    def distillation(batch, sig):
        if not sequence_level:
            return sig["divergence"]
        advantage = masked_mean(sig["log_ratio"], batch.mask & batch.valid[:, None], axis=-1)[:, None]
        return reinforce(sig["logprobs"], jnp.clip(advantage, -most, most))

    def terms(batch, sig, step):
        taught = batch.contexts["teacher"].valid
        importance = 1.0 if is_cap is None else importance_weight(sig["logprobs"], batch.behavior_logprobs, cap=is_cap)
        # Eq. 3 mixes advantages: both parts are one mean over all rows.
        value = jnp.where(taught[:, None], distillation(batch, sig), 0.0)
        found = {
            "divergence": Term(value, 1.0, None if rl_weight else taught, reduce, 1.0 - rl_weight, importance),
            "entropy": Term(sig["entropy"], coef=0.0),
        }
        if rl_weight:
            advantage = group_advantage(batch.returns, batch.group, batch.valid, normalised=False)[:, None]
            found["pg"] = Term(reinforce(sig["logprobs"], advantage), 1.0, None, reduce, rl_weight, importance)
        return found

    live = trust is not None or ema_rate == 1.0
    told = View("live" if live else "teacher", per_rollout=True, told=True)
    views = {"student": View(trainable=True), "teacher": told}
    views |= {"initial": told._replace(policy="initial")} if trust is not None else {}
    snapshots = {"initial": frozen()} if trust is not None else {} if live else {"teacher": ema(ema_rate)}
    return Method(collect, (Objective(views, signals, terms, rewarded=rl_weight != 0),), snapshots)
