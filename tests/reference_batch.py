"""One hostile batch, and the float64 tools with which the other `reference_*` files write down what papers print.

A reference is `loss(live, at, data)`: `live` are the trained view's log-probabilities, through which the gradient flows,
`at` the same numbers as constants, so that a formula says itself what it stops.  `live` may be complex and may have
leading axes: its derivative is taken by the complex step, exact to rounding, all logits at once.
"""

import dataclasses
import types

import numpy as np

from sdjax.types import REFERENCE, STUDENT, TEACHER

LENGTHS = (6, 4, 1, 5, 3, 6, 2, 5, 6, 4, 6)
GROUPS = (4, 4, 0, 0, 2, 2, 2, 7, 7, 7, 7)
REWARDS = (1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.3, 0.7, 0.0, 99.0)  # all right, all wrong, one right, partial; padding
UNTAUGHT = (1, 6, 10)
CUT = (3, 5)  # at the length cap: they are trained and compared like all others
VIEWS = ("student", "teacher", "reference", "initial", "base", "informed", "plan", "sampler", "prior")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a loss may read, float64; sizes B, T, V.  `over` are the trained tokens of valid rows."""

    dists: dict
    token: np.ndarray
    behavior: np.ndarray
    over: np.ndarray
    taught: np.ndarray
    reward: np.ndarray
    group: np.ndarray
    source: np.ndarray
    valid: np.ndarray
    finished: np.ndarray
    extras: types.SimpleNamespace

    @property
    def heard(self):
        """Trained tokens of rows with a lesson."""
        return self.over & self.taught[:, None]

    def said(self, dist):
        """Log-probability of the sampled token, `[..., B, T]`."""
        return np.sum(np.where(self.token[..., None] == np.arange(dist.shape[-1]), dist, 0.0), axis=-1)


def hostile(vocabulary=7, **changes):
    """Eleven rows of four groups, the last row padding; every view says something else and the sampler is off-policy."""
    chance = np.random.default_rng(7)
    rows, length = len(LENGTHS), max(LENGTHS)
    over = np.arange(length) < np.asarray(LENGTHS)[:, None]
    over[0, 2] = over[5, 0] = over[8, 3] = over[8, 4] = False  # holes
    over[9] = False  # a row whose reward counts and whose tokens do not
    over[10] = False
    logits = {name: 1.5 * chance.normal(size=(rows, length, vocabulary)) for name in VIEWS}
    token = chance.integers(vocabulary, size=(rows, length))
    noise = 0.3 * chance.normal(size=(rows, length))
    dists = {name: log_softmax(z) for name, z in logits.items()}
    data = Data(
        dists=dists,
        token=token,
        behavior=np.zeros((rows, length)),
        over=over,
        taught=~np.isin(np.arange(rows), UNTAUGHT),
        reward=np.asarray(REWARDS),
        group=np.asarray(GROUPS),
        source=np.full(rows, STUDENT),
        valid=np.arange(rows) < 10,
        finished=~np.isin(np.arange(rows), CUT),
        extras=types.SimpleNamespace(),
    )
    data = dataclasses.replace(data, behavior=data.said(dists["student"]) + noise)
    return dataclasses.replace(data, **changes)


def with_extras(data, **extras):
    """The batch with per-row or per-token extras."""
    return dataclasses.replace(data, extras=types.SimpleNamespace(**vars(data.extras), **extras))


def sources(data, **rows):
    """The batch with these rows written by the teacher or taken from references."""
    source, taught = data.source.copy(), data.taught.copy()
    source[list(rows.get("teacher", ()))] = TEACHER
    source[list(rows.get("reference", ()))] = REFERENCE
    taught[list(rows.get("untaught", ()))] = False
    return dataclasses.replace(data, source=source, taught=taught)


# ---- float64 tools; x may be complex and have leading axes ------------------------------------------------------------


def log_softmax(logits):
    shifted = logits - np.max(logits.real, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def larger(x, y):
    return np.where(np.real(x) >= np.real(y), x, y)


def smaller(x, y):
    return -larger(-x, -y)


def between(x, low, high):
    return smaller(larger(x, low), high)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def token_mean(x, over):
    return np.sum(np.where(over, x, 0.0), axis=(-1, -2)) / over.sum()


def row_mean(x, over):
    """Means over each row's tokens, 0 for an empty row: `[..., B]`."""
    return np.sum(np.where(over, x, 0.0), axis=-1) / np.maximum(over.sum(-1), 1)


def sequence_mean(x, over):
    """The mean of row means over rows that have a token."""
    return row_mean(x, over)[..., over.any(-1)].mean(-1)


def kl(first, second):
    """KL(first || second) over the last axis."""
    return np.sum(np.exp(first) * (first - second), axis=-1)


def jsd(student, teacher, beta):
    """GKD's Eq. 1 with its two ends, which are KLs."""
    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta == 0.0 else kl(student, teacher)
    mixture = np.log(beta * np.exp(teacher) + (1.0 - beta) * np.exp(student))
    return beta * kl(teacher, mixture) + (1.0 - beta) * kl(student, mixture)


def entropy(dist):
    return -np.sum(np.exp(dist) * dist, axis=-1)


def kept(dist, by, k, how="plain"):
    """The `k` likeliest entries of `by`: as they are, "renormalised", or with one bucket for the "rest"."""
    ids = np.argsort(-by, axis=-1)[..., :k]
    found = np.take_along_axis(dist, np.broadcast_to(ids, (*dist.shape[:-1], k)), axis=-1)
    if how == "renormalised":
        return log_softmax(found)
    rest = np.log(1.0 - np.sum(np.exp(found), axis=-1, keepdims=True)) if how == "rest" else found[..., :0]
    return np.concatenate([found, rest], axis=-1)


def advantage(data, normalised=True, among=None):
    """GRPO's, `[B, 1]`: over valid rows of the group (`among`: of these rows only), unbiased deviation, eps 1e-6."""
    found = np.zeros(len(data.reward))
    among = data.valid if among is None else among
    for row in np.flatnonzero(among):
        rewards = data.reward[among & (data.group == data.group[row])]
        centred = data.reward[row] - rewards.mean()
        if len(rewards) == 1:
            found[row] = rewards[0] if normalised else 0.0
        else:
            found[row] = centred / (rewards.std(ddof=1) + 1e-6) if normalised else centred
    return found[:, None]


def ppo(now, old, advantages, clip=(0.2, 0.2), dual=None):
    """max(-r A, -clip(r) A), and not above -dual A where A < 0."""
    ratio = np.exp(now - old)
    loss = larger(-ratio * advantages, -between(ratio, 1.0 - clip[0], 1.0 + clip[1]) * advantages)
    return loss if dual is None else np.where(advantages < 0.0, smaller(loss, -dual * advantages), loss)


def value_and_gradient(loss, data, view="student"):
    """A reference's value and its gradient in the logits of `view`, `[B, T, V]`, by the complex step."""
    at = data.dists[view]
    step = 1e-30j * np.eye(at.size).reshape(at.size, *at.shape)
    moved = np.concatenate([loss(log_softmax(at + part), at, data) for part in np.array_split(step, 8)])
    return float(np.real(moved[0])), np.imag(moved).reshape(at.shape) / 1e-30
