"""Losses made of rewards, as their papers print them, in float64 NumPy: `NAME(options)(live, at, data)`.

Nothing here comes from `sdjax`.  `data.said` picks the sampled token; p is the student, q the teacher, b the sampler.
"""

import numpy as np
from reference_batch import advantage, entropy, ppo, row_mean, sequence_mean, sigmoid, token_mean

from sdjax.types import REFERENCE, STUDENT


def sft(mean=token_mean):
    """Cross-entropy of given texts; MixSD and TESSY are this on texts of their own."""
    return lambda live, at, data: mean(-data.said(live), data.over)


def grpo(mean=sequence_mean, normalised=True, clip=(0.2, 0.2), kl_coef=0.0, tis=None, dual=None, length=None):
    """DeepSeekMath's Eq. 3; Dr. GRPO with a constant `length`; DAPO with its clip and `token_mean`; TIS with a cap."""

    def loss(live, at, data):
        now, old = data.said(live), data.behavior if tis is None else data.extras.old_logprobs
        value = ppo(now, old, advantage(data, normalised), clip, dual)
        if tis is not None:
            value = value * tis(np.exp(old - data.behavior), data.over)
        if kl_coef:
            gap = data.said(data.dists["reference"]) - now
            value = value + kl_coef * (np.exp(gap) - gap - 1.0)
        if length is not None:
            return np.sum(np.where(data.over, value, 0.0), axis=(-1, -2)) / (length * data.over.any(-1).sum())
        return mean(value, data.over)

    return loss


def capped(most):
    """Truncated importance sampling per token."""
    return lambda ratio, over: np.minimum(ratio, most)


def icepop_rows(low, high):
    """A row's product of ratios where it lies within bounds, else 0."""

    def weight(ratio, over):
        product = np.prod(np.where(over, ratio, 1.0), axis=-1, keepdims=True)
        return np.where((product >= low) & (product <= high), product, 0.0)

    return weight


def against(compared):
    """GRPO's surrogate with another comparison: the batch's deviation (ScaleRL) or the other rows (RLOO)."""

    def loss(live, at, data):
        centred = advantage(data, normalised=False)
        if compared == "batch":
            scaled = centred / np.std(centred[data.valid], ddof=1)
        else:
            count = np.asarray([(data.valid & (data.group == g)).sum() for g in data.group])[:, None]
            scaled = centred * count / (count - 1)
        return sequence_mean(ppo(data.said(live), data.behavior, scaled), data.over)

    return loss


def gspo(clip=(3e-4, 4e-4), normalised=True):
    """s = exp(mean_t log p/b); a token's ratio is sg[s] p/sg[p]."""

    def loss(live, at, data):
        now, held = data.said(live), data.said(at)
        row = row_mean(held - data.behavior, data.over)[:, None]
        return sequence_mean(ppo(now - held + row, 0.0, advantage(data, normalised), clip), data.over)

    return loss


def cispo(clip=(1.0, 4.0), scaled_by_batch=False, normalised=True):
    """-sg[clip(r)] A log p."""

    def loss(live, at, data):
        weight = np.clip(np.exp(data.said(at) - data.behavior), 1.0 - clip[0], 1.0 + clip[1])
        gain = advantage(data, normalised)
        if scaled_by_batch:
            gain = advantage(data, normalised=False)
            gain = gain / np.std(gain[data.valid], ddof=1)
        return token_mean(-weight * gain * data.said(live), data.over)

    return loss


def opsa(threshold=0.1):
    """A fixed advantage of -1 on tokens that their sampler found unlikely."""
    return lambda live, at, data: token_mean((np.exp(data.behavior) < threshold) * data.said(live), data.over)


def atmanrl_sequence(clip=(0.2, 0.2)):
    """The printed ratio: a row's product, the same for all its tokens; R - mean R."""

    def loss(live, at, data):
        row = np.sum(np.where(data.over, data.said(live) - data.behavior, 0.0), axis=-1)[..., None]
        gain = advantage(data, normalised=False)
        return sequence_mean(ppo(row, 0.0, gain, clip) * np.ones(data.over.shape), data.over)

    return loss


def antisd(coef=0.5, centred=False):
    """A - coef gate phi(u), phi = (softplus(u) - log 2) / 2."""

    def loss(live, at, data):
        bonus = -0.5 * (np.log1p(np.exp(data.extras.log_ratio)) - np.log(2.0))
        if centred:
            bonus = bonus - token_mean(bonus, data.over & (data.extras.gate > 0.0)[:, None])
        gain = advantage(data) + coef * data.extras.gate[:, None] * bonus
        return token_mean(ppo(data.said(live), data.behavior, gain), data.over)

    return loss


def rlcsd(coef=0.5, tau=1.0, threshold=0.0):
    """A + coef tanh(e / tau), never past 0."""

    def loss(live, at, data):
        gain, shift = advantage(data), coef * np.tanh(data.extras.evidence / tau)
        moved = np.where(np.abs(shift) > threshold, gain + shift, gain * np.ones_like(shift))
        moved = np.where(np.sign(moved) == np.sign(gain), moved, 0.0)
        return sequence_mean(ppo(data.said(live), data.behavior, moved), data.over)

    return loss


def rebellious(data, mix=0.5, eps=1.0, toward=False):
    """RLRT's credit (1 - mix) + mix clip((p/q)^sign A, 1 -+ eps) on credited rows, else 1."""
    old, informed = data.extras.old_logprobs, data.extras.old_teacher
    exponent = np.sign(advantage(data)) * ((informed - old) if toward else (old - informed))
    credit = 1.0 - mix + mix * np.clip(np.exp(exponent), 1.0 - eps, 1.0 + eps)
    return np.where(data.extras.credited[:, None], credit, 1.0)


def rlrt(mix=0.5, eps=1.0, toward=False, mean_one=False):
    """A times the credit; TIS with cap 2; clip .2 and .28."""

    def loss(live, at, data):
        old, credit = data.extras.old_logprobs, rebellious(data, mix, eps, toward)
        if mean_one:
            credit = credit / np.where(row_mean(credit, data.over) > 0, row_mean(credit, data.over), 1.0)[:, None]
        weight = np.minimum(np.exp(old - data.behavior), 2.0)
        return token_mean(weight * ppo(data.said(live), old, advantage(data) * credit, (0.2, 0.28)), data.over)

    return loss


def sure(data, strength=0.3, window=0, windowed_maximum=False):
    """EGRSD's gate clip(1 - strength H / max(H max, 1), .1, 1), the teacher's entropy H the least of a window."""
    unsure = entropy(data.dists["teacher"])
    hidden, length = np.where(data.heard, unsure, np.inf), unsure.shape[1]
    least = np.stack([hidden[:, t : t + window + 1].min(-1) for t in range(length)], axis=-1)
    highest = max(1.0, (least if windowed_maximum else unsure)[data.heard].max())
    return np.clip(1.0 - strength * least / highest, 0.1, 1.0)


def egrsd(strength=0.3, eps=0.2, window=0, windowed_maximum=False):
    """-A clip((q/p)^sign A, 1 -+ eps) gate log p, Eq. 4-9."""

    def loss(live, at, data):
        gain, gate = data.extras.advantage[:, None], sure(data, strength, window, windowed_maximum)
        ratio = np.exp(np.sign(gain) * (data.said(data.dists["teacher"]) - data.said(at)))
        credit = np.where(data.taught[:, None], gate * np.clip(ratio, 1.0 - eps, 1.0 + eps), 1.0)
        return token_mean(-gain * credit * data.said(live), data.over)

    return loss


def directed(data, repelled=0.2, about="mean", unit="magnitude"):
    """DASD's direction tanh((h - H) / spread) and bonus, direction sigmoid(|d| - 1) d; statistics of one row's tokens."""
    at = data.dists["student"]
    gap, unsure = data.said(data.dists["teacher"]) - data.said(at), entropy(at)
    direction, bonus = np.zeros(gap.shape), np.zeros(gap.shape)
    for row in np.flatnonzero(data.heard.any(-1)):
        here = data.heard[row]
        own, delta = unsure[row, here], gap[row, here]
        level = np.quantile(own, 1.0 - repelled)
        spread = np.mean(np.abs(own - (own.mean() if about == "mean" else level))) + 1e-6
        scaled = delta / ((np.mean(np.abs(delta)) if unit == "magnitude" else np.std(delta)) + 1e-6)
        direction[row, here] = np.tanh((level - own) / spread)
        bonus[row, here] = direction[row, here] * sigmoid(np.abs(scaled) - 1.0) * scaled
    return direction, bonus


def dasd(beta=0.1, repelled=0.2, about="mean", unit="magnitude"):
    """A + beta times the bonus."""

    def loss(live, at, data):
        gain = advantage(data) + beta * directed(data, repelled, about, unit)[1]
        return token_mean(ppo(data.said(live), data.behavior, gain), data.over)

    return loss


def cipo(coef=1.0, kl_coef=1e-4):
    """GRPO with k3 on answers, plus coef times the same on corrections, each averaged over its own rows."""

    def loss(live, at, data):
        gap = data.said(data.dists["reference"]) - data.said(live)
        value = ppo(data.said(live), data.behavior, data.extras.advantage[:, None]) + kl_coef * (np.exp(gap) - gap - 1)
        fix = data.extras.correction[:, None]
        return sequence_mean(value, data.over & ~fix) + coef * sequence_mean(value, data.over & fix)

    return loss


def sort(coef=1.0, rate=0.5, cap=None, normalised=True):
    """GRPO on attempts, plus coef times -w log p on references, w = p^(1-a) p_plan^a; with a cap, w of mean 1."""

    def loss(live, at, data):
        own = data.valid & (data.source == STUDENT)
        value = ppo(data.said(live), data.behavior, advantage(data, normalised, own))
        learnt = data.over & ((data.source == REFERENCE) & data.taught)[:, None]
        base, planned = data.said(at), data.said(data.dists["plan"])
        if cap is not None:
            planned = base + np.clip(planned - base, -cap, cap)
        weight = np.exp((1.0 - rate) * base + rate * planned)
        if cap is not None:
            weight = weight / np.maximum(row_mean(weight, learnt), 1e-9)[:, None]
        repair = sequence_mean(-weight * data.said(live), learnt)
        return sequence_mean(value, data.over & own[:, None]) + coef * repair

    return loss
