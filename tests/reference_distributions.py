"""Distillation of distributions, as papers print it, in float64 NumPy: `NAME(options)(live, at, data)`.

Nothing here comes from `sdjax`.  `data.said` picks the sampled token; p is the student, q the teacher, b the sampler.
"""

import numpy as np
from reference_batch import (
    advantage,
    entropy,
    jsd,
    kept,
    kl,
    log_softmax,
    ppo,
    row_mean,
    sequence_mean,
    sigmoid,
    smaller,
    token_mean,
)

from sdjax.types import STUDENT, TEACHER


def clipped(student, teacher, beta, clip):
    """OPSD: every vocabulary entry's addend bounded from above before the sum."""
    if beta == 0.0:
        entries = np.exp(teacher) * (teacher - student)
    elif beta == 1.0:
        entries = np.exp(student) * (student - teacher)
    else:
        mixture = np.log(beta * np.exp(teacher) + (1.0 - beta) * np.exp(student))
        entries = beta * np.exp(teacher) * (teacher - mixture) + (1.0 - beta) * np.exp(student) * (student - mixture)
    return np.sum(entries if clip is None else smaller(entries, clip), axis=-1)


def opsd(beta=0.0, clip=0.05, temperature=1.1, k=None, weight=None, mean=token_mean):
    """Eq. 6-8 at the sampling temperature; a `weight(divergence, data)` of tokens, constant, makes PW-OPSD and DASH."""

    def loss(live, at, data):
        def value(student):
            pair = log_softmax(student / temperature), log_softmax(data.dists["teacher"] / temperature)
            pair = pair if k is None else tuple(kept(x, data.dists["teacher"], k, "renormalised") for x in pair)
            return clipped(*pair, beta, clip)

        return mean(value(live) * (1.0 if weight is None else weight(value(at), data)), data.heard)

    return loss


def rising(lowest=0.25, centre=0.3, width=0.1):
    """PW-OPSD's weight by a token's place in its row."""

    def weight(divergence, data):
        length = np.maximum(data.over.sum(-1, keepdims=True), 1)
        place = (np.cumsum(data.over, axis=-1) - 0.5) / length
        return lowest + (1.0 - lowest) * sigmoid((place - centre) / width)

    return weight


def looking_ahead(kappa=5.0, horizon=1.0):
    """DASH: A_t = r_t + f_t A_{t+1}, so c_1 = 1 and c_k = 1 + f_{k-1} c_{k-1}."""

    def weight(divergence, data):
        found = np.ones(divergence.shape)
        for row in np.flatnonzero(data.heard.any(-1)):
            places = np.flatnonzero(data.heard[row])
            own = divergence[row, places]
            factor = horizon * sigmoid(-kappa * (own - own.mean()))
            for k in range(1, len(places)):
                found[row, places[k]] = 1.0 + factor[k - 1] * found[row, places[k - 1]]
        return found

    return weight


def sampled_clipped(bound, most=2.0):
    """The sampled token's advantage log q/p within a bound, and SDPO's weight."""

    def loss(live, at, data):
        gain = np.clip(data.said(data.dists["teacher"]) - data.said(at), -bound, bound)
        return token_mean(-importance(at, data, most) * gain * data.said(live), data.heard)

    return loss


def sampled_policy_gradient(temperature=1.0, capped_at=None):
    """OPSD's Eq. 9: value k3, gradient -sg[log q - log p] grad log p; SDPO's sampled form at alpha 1 with its weight."""

    def loss(live, at, data):
        tempered = lambda dist: data.said(log_softmax(dist / temperature))
        gap = tempered(data.dists["teacher"]) - tempered(at)
        value = np.exp(gap) - 1.0 - gap - gap * (tempered(live) - tempered(at))
        return token_mean(value * importance(at, data, capped_at), data.heard)

    return loss


def importance(at, data, most):
    """sg[min(p/b, cap)] per token."""
    return 1.0 if most is None else np.minimum(np.exp(data.said(at) - data.behavior), most)


def sdft(alpha=0.0, skip=3, most=2.0):
    """KL(q || p) from token `skip` on, times the row's mean importance weight; mean over rows that still have a token."""

    def loss(live, at, data):
        late = data.heard & (np.arange(data.over.shape[1]) >= skip)
        weight = row_mean(importance(at, data, most), late)[:, None] if most is not None else 1.0
        return sequence_mean(weight * jsd(live, data.dists["teacher"], alpha), late)

    return loss


def sdpo(alpha=0.5, k=None, how="rest", most=2.0, trust=None, rl_weight=0.0):
    """sg[min(p/b, 2)] JSD on the student's top k; Eq. 3's mixture counts all rows."""

    def loss(live, at, data):
        teacher = data.dists["teacher"]
        if trust is not None:
            teacher = log_softmax((1.0 - trust) * data.dists["initial"] + trust * teacher)
        pair = (live, teacher) if k is None else (kept(x, at, k, how) for x in (live, teacher))
        weight = importance(at, data, most)
        value = weight * jsd(*pair, alpha)
        if not rl_weight:
            return token_mean(value, data.heard)
        gain = -weight * advantage(data, normalised=False) * data.said(live)
        distilled = np.where(data.taught[:, None], value, 0.0)
        return token_mean(rl_weight * gain + (1.0 - rl_weight) * distilled, data.over)

    return loss


def sdpo_sequence(most=2.0, bound=np.inf):
    """The ablation: every token's advantage is its row's mean of log q/p, within a bound."""

    def loss(live, at, data):
        gap = np.clip(row_mean(data.said(data.dists["teacher"]) - data.said(at), data.over), -bound, bound)[:, None]
        return token_mean(-importance(at, data, most) * gap * data.said(live), data.heard)

    return loss


def sdpo_test_time(bound, most=2.0):
    """Test-time training: every entry's advantage log q/p within a bound."""

    def loss(live, at, data):
        gain = np.clip(data.dists["teacher"] - at, -bound, bound)
        return token_mean(-importance(at, data, most) * np.sum(np.exp(live) * gain, axis=-1), data.heard)

    return loss


def mopd_steps(alpha=0.5):
    """`step_level_kl`: a token's divergence is its step's mean, then the token's own weight."""

    def loss(live, at, data):
        value, step = jsd(live, data.dists["teacher"], alpha), data.extras.step
        of_step = np.zeros(value.shape, value.dtype)
        for number in range(step.max() + 1):
            here = data.over & (step == number)
            of_step = of_step + np.where(here, row_mean(value, here)[..., None], 0.0)
        return token_mean(importance(at, data, 2.0) * of_step, data.heard)

    return loss


def sure_and_apart(data, k=20, sampled=False):
    """MSD's (1 - H(q on its top k) / log k) (1 - p(y*))."""
    at, teacher = data.dists["student"], data.dists["teacher"]
    k_here = min(k, at.shape[-1])
    sure = 1.0 - entropy(kept(teacher, teacher, k_here, "renormalised")) / np.log(k_here)
    best = np.take_along_axis(at, teacher.argmax(-1)[..., None], axis=-1)[..., 0]
    return sure * (1.0 - np.exp(data.said(at) if sampled else best))


def msd(k=20, sampled=False):
    """Row means of w KL(p || q), w of mean 1 per row."""

    def loss(live, at, data):
        weight = sure_and_apart(data, k, sampled)
        total = np.maximum(row_mean(weight, data.heard), 1e-12)[:, None]
        return sequence_mean(weight / total * kl(live, data.dists["teacher"]), data.heard)

    return loss


def purified_opsd(beta=1.0, alpha=0.5):
    """JSD to P_0 (q / q_ref)^(1/beta), normalised."""

    def loss(live, at, data):
        view = data.dists
        target = log_softmax(view["base"] + (view["informed"] - view["reference"]) / beta)
        return token_mean(jsd(live, target, alpha), data.heard)

    return loss


def resd(alpha=1.0, k=None, low=0.2, high=None, most=2.0, powers=(1.0, 1.0), success=0.5):
    """s_i sg[min(p/b, 2)] D(p || q clipped around sg p); s balances successes over the batch."""

    def loss(live, at, data):
        pair = (
            (live, data.dists["teacher"])
            if k is None
            else (kept(x, at, k, "rest") for x in (live, data.dists["teacher"]))
        )
        student, teacher = pair
        centre = at if k is None else kept(at, at, k, "rest")
        teacher = np.maximum(teacher, centre + np.log(low)) if low else teacher
        teacher = teacher if high is None else np.minimum(teacher, centre + np.log(high))
        right = data.reward >= success
        share = np.clip(right[data.valid].mean(), 1.0 / data.valid.sum(), 1.0 - 1.0 / data.valid.sum())
        balance = np.where(right, (1.0 - share) ** powers[0], share ** powers[1])
        balance = (balance / balance[data.valid].mean())[:, None]
        # Not `jsd`: a clipped teacher is no distribution, and RESD sums over it as it stands.
        return token_mean(balance * importance(at, data, most) * jsd(student, teacher, alpha), data.heard)

    return loss


def support(at, teacher, k, which):
    """Booleans `[..., V]` of candidate tokens."""
    rank = lambda dist: np.argsort(np.argsort(-dist, axis=-1), axis=-1) < k
    own, other = rank(at), rank(teacher)
    return {
        "student": own,
        "teacher": other,
        "intersection": own & other,
        "union": own | other,
        "symmetric_difference": own ^ other,
    }[which]


def rethinking_opd(k=16, which="student", weights="student", raw=False, old=None, rl_weight=0.0):
    """The released code: PPO over candidates, A_v = -w_v (log p_v - log q_v), clip .2, dual clip 3."""

    def loss(live, at, data):
        teacher, before = data.dists["teacher"], at if old is None else data.dists[old]
        over = support(before, teacher, k, which)
        chance = {"student": np.exp(before), "teacher": np.exp(teacher), "uniform": np.ones(at.shape)}[weights]
        weight = np.where(over, chance, 0.0)
        if not raw:
            total = weight.sum(-1, keepdims=True)
            weight = weight / np.where(total > 0.0, total, 1.0)
        value = np.sum(ppo(live, before, -weight * (before - teacher), (0.2, 0.2), 3.0), axis=-1)
        found = token_mean(value, data.heard)
        if rl_weight:
            found = found + rl_weight * token_mean(
                ppo(data.said(live), data.behavior, advantage(data), (0.2, 0.2), 3.0), data.over
            )
        return found

    return loss


def rethinking_sampled(live, at, data):
    """k = 0: A = log q - log b of the sampled token, clip .2, dual clip 3."""
    gain = data.said(data.dists["teacher"]) - data.behavior
    return token_mean(ppo(data.said(live), data.behavior, gain, (0.2, 0.2), 3.0), data.heard)


def rethinking_renormalised(k, which="student"):
    """Eq. 5: KL of both distributions renormalised on the candidates."""

    def loss(live, at, data):
        over = support(at, data.dists["teacher"], k, which)
        own, other = (np.where(over, x, -1e30) for x in (live, data.dists["teacher"]))
        own, other = log_softmax(own), log_softmax(other)
        return token_mean(np.sum(np.where(over, np.exp(own) * (own - other), 0.0), axis=-1), data.heard)

    return loss


def brts(coef=10.0, k=3):
    """The released top-k reverse KL on the student's text, and lambda sum q/Z (log q - log p) on the teacher's."""

    def loss(live, at, data):
        teacher = data.dists["teacher"]
        own, other = kept(at, at, k), kept(teacher, at, k)
        weight = np.exp(log_softmax(own))
        reverse = np.sum(weight * (own - other) * np.exp(kept(live, at, k) - own), axis=-1)
        head = kept(teacher, teacher, k)
        forward = np.sum(np.exp(log_softmax(head)) * (head - kept(live, teacher, k)), axis=-1)
        by = lambda who: data.heard & (data.source == who)[:, None]
        return token_mean(reverse, by(STUDENT)) + coef * token_mean(forward, by(TEACHER))

    return loss


def trace(step, w0=0.5, hold=10, decay=30, key=1.0, error=0.0, most=0.25, clip=0.05, k=None, success=0.5):
    """(1 - lambda/w0 on spans) GRPO, token mean, plus lambda (1/|y|) sum of clipped KLs on spans, mean over rows."""

    def loss(live, at, data):
        left = 1.0 if step < hold else max(0.0, 1.0 - (step - hold) / decay)
        span = np.zeros(data.over.shape, bool)
        for row in np.flatnonzero(data.valid & data.taught):
            places = np.flatnonzero(data.over[row] & data.extras.span[row])
            span[row, places[: int(most * data.over[row].sum())]] = True
        pair = (
            (live, data.dists["teacher"])
            if k is None
            else [kept(x, at, k, "rest") for x in (live, data.dists["teacher"])]
        )
        right = (data.reward >= success)[:, None]
        value = np.where(right, key * clipped(*pair, 0.0, clip), error * clipped(*pair, 1.0, clip))
        routed = ppo(data.said(live), data.behavior, advantage(data), (0.2, 0.28))
        routed = token_mean(np.where(span, 1.0 - left, 1.0) * routed, data.over)
        return routed + w0 * left * sequence_mean(np.where(span, value, 0.0), data.over)

    return loss
