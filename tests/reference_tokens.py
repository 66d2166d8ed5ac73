"""Distillation from sampled tokens and whole texts, as papers print it, in float64 NumPy: `NAME(options)(live, at, data)`.

Nothing here comes from `sdjax`.  `data.said` picks the sampled token; p is the student, q the teacher, b the sampler.
"""

import numpy as np
from reference_batch import advantage, kept, kl, larger, ppo, sequence_mean, token_mean

from sdjax.types import REFERENCE, STUDENT, TEACHER


def ratio(live, data):
    """p/b of the sampled token, live."""
    return np.exp(data.said(live) - data.behavior)


def opd(coef=1.0, discount=0.0, rl_weight=0.0):
    """Tinker: -(p/b) A, A = rl (R - mean R) - coef sum_i discount^i (log b - log q)."""

    def loss(live, at, data):
        gain = np.where(data.heard, coef * (data.said(data.dists["teacher"]) - data.behavior), 0.0)
        for t in reversed(range(gain.shape[1] - 1)):
            gain[:, t] += discount * gain[:, t + 1]
        gain = np.where(data.heard, gain, 0.0) + rl_weight * advantage(data, normalised=False)
        return token_mean(-ratio(live, data) * gain, data.over if rl_weight else data.heard)

    return loss


def opd_direct(estimator, k=None):
    """verl's losses, differentiated as they stand: k1, k2, k3, k3+ (k2's gradient), and the teacher's top-k forward KL."""

    def loss(live, at, data):
        teacher = data.dists["teacher"]
        gap = data.said(live) - data.said(teacher)
        held = data.said(at) - data.said(teacher)
        k3 = lambda d: np.exp(-d) - 1.0 + d
        if estimator == "top_k_forward_kl":
            student, other = kept(live, teacher, k), kept(teacher, teacher, k)
            value = larger(np.sum(np.exp(other) * (other - student), axis=-1), 0.0)
        else:
            plus = k3(held) + gap**2 / 2.0 - held**2 / 2.0
            value = {"k1": gap, "k2": gap**2 / 2.0, "k3": k3(gap), "k3_plus": plus}[estimator]
        return token_mean(value, data.heard)

    return loss


def full(divergence, mean=token_mean):
    """A full divergence per position over rows with a lesson, no weight."""
    return lambda live, at, data: mean(divergence(live, data.dists["teacher"]), data.heard)


def vopd(baseline="value", k=None, live_reward=False):
    """-(p/b) A, A = log q - log p - baseline: KL(p || q), also on the student's top k; of least variance; or none."""

    def loss(live, at, data):
        teacher = data.dists["teacher"]
        reward = data.said(teacher) - data.said(live if live_reward else at)
        if baseline == "optimal":
            square = 1.0 - 2.0 * np.exp(at) + np.sum(np.exp(2.0 * at), axis=-1, keepdims=True)
            weight = np.exp(at) * square
            level = np.sum(weight * (teacher - at), axis=-1) / np.sum(weight, axis=-1)
        else:
            pair = (at, teacher) if k is None else (kept(x, at, k, "renormalised") for x in (at, teacher))
            level = -kl(*pair) if baseline == "value" else 0.0
        return token_mean(-ratio(live, data) * (reward - level), data.heard)

    return loss


def iw_opd(gamma=0.5):
    """w_t = 1 + gamma (1 - sum_{j<t} |a_j| / sum_j |a_j|)."""

    def loss(live, at, data):
        gap = data.said(data.dists["teacher"]) - data.behavior
        size = np.where(data.heard, np.abs(gap), 0.0)
        total = size.sum(-1, keepdims=True)
        before = np.cumsum(size, axis=-1) - size
        weight = 1.0 + gamma * (1.0 - before / np.where(total > 0.0, total, 1.0))
        return token_mean(-ratio(live, data) * weight * gap, data.heard)

    return loss


def power_opd(alpha=5.0, scaled=False):
    """-(p/b) (q^alpha - b^alpha)."""

    def loss(live, at, data):
        reward = np.exp(alpha * data.said(data.dists["teacher"])) - np.exp(alpha * data.behavior)
        return token_mean(-ratio(live, data) * reward / (alpha if scaled else 1.0), data.heard)

    return loss


def topd(alpha=0.5, discount=1.0, normalised=True):
    """r = log(alpha q/p + 1 - alpha), its mean to come, whitened over each group's tokens."""

    def loss(live, at, data):
        gap = data.said(data.dists["teacher"]) - data.said(at)
        reward = np.where(data.heard, np.log(alpha * np.exp(gap) + 1.0 - alpha), 0.0)
        gain, length = np.zeros(reward.shape), reward.shape[1]
        for t in range(length):
            power = discount ** np.arange(length - t)
            gain[:, t] = (power * reward[:, t:]).sum(-1) / np.maximum((power * data.heard[:, t:]).sum(-1), 1e-6)
        if normalised:
            for group in set(data.group[data.heard.any(-1)]):
                here = data.heard & (data.group == group)[:, None]
                gain[here] = (gain[here] - gain[here].mean()) / np.sqrt(gain[here].var() + 1e-8)
        return token_mean(-ratio(live, data) * gain, data.heard)

    return loss


def minillm(discount=1.0, length_normalised=True, single_step=True, count_present=False, corpus=False):
    """sg[p/b] KL(p || q), plus PPO on the mean (or discounted sum) of the log-ratios of later tokens."""

    def loss(live, at, data):
        teacher, later = data.dists["teacher"], single_step and not count_present
        gap = np.where(data.heard, data.said(teacher) - data.said(at), 0.0)
        gain, length = np.zeros(gap.shape), gap.shape[1]
        for t in range(length):
            start = t + 1 if later else t
            power = discount ** (np.arange(start, length) - t)
            gain[:, t] = (power * gap[:, start:]).sum(-1)
            if length_normalised:
                count = (power * data.heard[:, start:]).sum(-1)
                gain[:, t] = gain[:, t] / np.where(count > 0.0, count, 1.0)
        found = token_mean(ppo(data.said(live), data.behavior, gain), data.heard)
        if single_step:
            found = found + token_mean(np.exp(data.said(at) - data.behavior) * kl(live, teacher), data.heard)
        read = data.over & (data.source == REFERENCE)[:, None]
        return found + token_mean(-data.said(live), read) if corpus else found

    return loss


def stable_opd(gold=0.1, anchor=0.01, sampled=False):
    """PPO with A = log q - log b on attempts, NLL of golden rows, KL(p || initial) on attempts; row means of each.

    Sampled, the KL's value is k3 and its gradient -sg[log q - log p] grad log p.
    """

    def loss(live, at, data):
        golden = (data.source == REFERENCE)[:, None]
        gain = data.said(data.dists["teacher"]) - data.behavior
        value = sequence_mean(ppo(data.said(live), data.behavior, gain), data.heard & ~golden)
        value = value + gold * sequence_mean(-data.said(live), data.over & golden)
        drift = kl(live, data.dists["reference"])
        if sampled:
            now, gap = data.said(live) - data.said(at), data.said(data.dists["reference"]) - data.said(at)
            drift = np.exp(gap) - 1.0 - gap - gap * now
        return value + anchor * sequence_mean(drift, data.over & ~golden)

    return loss


def pbsd(beta=0.1, per_token=False):
    """Eq. 10: -log sigmoid(beta (l(y+) - l(y-))), l = log p - log q of whole texts; mean over complete pairs."""

    def loss(live, at, data):
        gap = np.where(data.over, data.said(live) - data.said(data.dists["teacher"]), 0.0).sum(-1)
        gap = gap / np.maximum(data.over.sum(-1), 1) if per_token else gap
        found = []
        for row in np.flatnonzero(data.valid & (data.source == TEACHER) & data.over.any(-1)):
            mates = np.flatnonzero(data.valid & (data.source == STUDENT) & (data.extras.pair == data.extras.pair[row]))
            found += [np.log1p(np.exp(-beta * (gap[..., row] - gap[..., mate]))) for mate in mates]
        return sum(found) / len(found)

    return loss


def vpd_e_step(beta=0.1, prior="behavior"):
    """BCO: mean over each class of -log sigmoid(+-(beta log q/p_old - midpoint)); trained is the teacher's view."""

    def loss(live, at, data):
        reference = data.behavior if prior == "behavior" else data.said(data.dists["prior"])
        reward = beta * np.where(data.heard, data.said(live) - reference, 0.0).sum(-1)
        # In the midpoint the sampler's numbers stand, whatever the E-step's reference.
        right, rows = data.reward >= 0.5, data.heard.any(-1)
        level = 0.5 * (reward[..., rows & right].real.mean(-1) + reward[..., rows & ~right].real.mean(-1))[..., None]
        value = np.log1p(np.exp(np.where(right, -1.0, 1.0) * (reward - level)))
        return value[..., rows & right].mean(-1) + value[..., rows & ~right].mean(-1)

    return loss


def implicit(data, beta=0.1, prior="behavior"):
    """The implicit rewards of the E-step, `[B]`."""
    reference = data.behavior if prior == "behavior" else data.said(data.dists["prior"])
    return beta * np.where(data.heard, data.said(data.dists["teacher"]) - reference, 0.0).sum(-1)
