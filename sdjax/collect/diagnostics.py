"""What to watch in a run: pure functions of texts, of distributions and of per-token log-ratios.

Functions of distributions read log-probabilities `[..., V]` one position at a time, so an objective's `signals` may
return them; the average is the caller's.  A log-ratio is log teacher - log student of the sampled token unless stated.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.kernels.advantages import group_mean
from sdjax.kernels.distributions import NEVER, entropy
from sdjax.kernels.reductions import masked_mean, masked_sum
from sdjax.kernels.top_k import top_k

EPISTEMIC = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
"""Words by which a model says that it may be wrong (Kim et al. 2026, arXiv:2603.24472, section 3)."""

AGREEMENT = 0.6931
"""Teacher and student agree on a token if neither gives it twice the other's probability; the threshold is ours."""

REVISION = ("wait", "hmm", "but", "maybe")
"""Words that announce another attempt (Kaur et al. 2026, arXiv:2607.05184)."""


# ---- of texts -----------------------------------------------------------------------------------------------------


def epistemic_count(text: str, words: Sequence[str] = EPISTEMIC) -> int:
    """How often the words occur as substrings of the lower-cased text: "unlikely" counts, as in the official code.

    Source: Kim et al. 2026, arXiv:2603.24472, `E(y)`.
    """
    text = text.lower()
    return sum(text.count(word) for word in words)


def epistemic_words(text: str, words: Sequence[str] = EPISTEMIC) -> int:
    """How often the words occur as whole words, whatever their case: never more than `epistemic_count`."""
    return len(re.findall(rf"\b(?:{'|'.join(map(re.escape, words))})\b", text.lower()))


def per_thousand(count: float, tokens: int) -> float:
    """A count per 1,000 tokens; NaN without tokens.  Counts alone fall with the length."""
    return 1000.0 * count / tokens if tokens else float("nan")


def marks(pieces: Iterable[str], words: Sequence[str] = REVISION) -> np.ndarray:
    """Which tokens, given as their texts, are one of the words by themselves: `[T]` bool."""
    return np.array([piece.strip(" \n\t,.!?:;").lower() in words for piece in pieces], bool)


def compression(text: str) -> float:
    """Bytes of the text per byte of its zlib form: about 1.4 for noise, above 10 for a loop; 0 for an empty text."""
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def repeats(text: str, *, tail: int = 10_000, ratio: float = 10.0) -> bool:
    """Whether the text is longer than `tail` characters and its last `tail` ones compress by more than `ratio`.

    Take a smaller `tail`, and a smaller `ratio` with it, for short completions.
    Source: StableOPD (Luo et al. 2026), arXiv:2604.08527, `RepRate`.
    """
    return len(text) > tail and compression(text[-tail:]) > ratio


def repetition_rate(texts: Sequence[str], *, tail: int = 10_000, ratio: float = 10.0) -> float:
    """The fraction of texts that `repeats`; NaN without texts."""
    return _mean([repeats(text, tail=tail, ratio=ratio) for text in texts])


def repeated_ngrams(text: str, n: int = 3) -> float:
    """The fraction of word n-grams that occurred before in the text; 0 for a text shorter than `n` words."""
    grams = _ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def truncation_rate(finished: Sequence[bool]) -> float:
    """The fraction of completions cut by the length limit; NaN without completions."""
    return 1.0 - _mean(finished)


def distinct(texts: Sequence[str], n: int = 1) -> float:
    """Distinct word n-grams of all texts together per n-gram (Distinct-n); NaN without n-grams."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


# ---- of distributions, per position -------------------------------------------------------------------------------


def overlap_statistics(student: Array, teacher: Array, k: int) -> dict[str, Array]:
    """How far student and teacher agree on what is likely: `[..., V] x2 -> {name: [...]}`.

    With I the intersection of both top-k sets, and both distributions renormalised on I:
    `overlap` is `|I| / k`; `overlap_advantage` `-KL(student || teacher) / |I|`, at most 0; `student_mass` and
    `teacher_mass` the mass on I; `extreme_token_gap` student - teacher (not renormalised) on the token of I with the
    largest `|student (log teacher - log student)|`.
    Where I is empty all are 0: leave positions with `overlap == 0` out of the average of the advantage and the gap.
    Read the advantage with the masses: a small overlap can look well aligned.
    Source: Li et al. 2026, arXiv:2604.13016, Eqs. 6-8 and appendix B.2.  The released code and verl use other weights.
    """
    chex.assert_equal_shape([student, teacher])
    # On the student's top k alone: an array over the vocabulary, which devices may share, is read and never written.
    student, places = top_k(jnp.maximum(student, NEVER), k)
    theirs = top_k(teacher, k)[1]
    teacher = jnp.maximum(jnp.take_along_axis(teacher, places, axis=-1), NEVER)
    shared = (places[..., :, None] == theirs[..., None, :]).any(-1)
    size = jnp.sum(shared, axis=-1)
    student_inside, teacher_inside = (_renormalised(dist, shared) for dist in (student, teacher))
    advantage = jnp.where(shared, jnp.exp(student_inside) * (teacher_inside - student_inside), 0.0)
    extreme = jnp.argmax(jnp.abs(advantage), axis=-1, keepdims=True)
    gap = jnp.take_along_axis(jnp.exp(student) - jnp.exp(teacher), extreme, axis=-1)[..., 0]
    return {
        "overlap": size / k,
        "overlap_advantage": jnp.sum(advantage, axis=-1) / jnp.maximum(size, 1),
        "student_mass": jnp.sum(jnp.where(shared, jnp.exp(student), 0.0), axis=-1),
        "teacher_mass": jnp.sum(jnp.where(shared, jnp.exp(teacher), 0.0), axis=-1),
        "extreme_token_gap": jnp.where(size > 0, gap, 0.0),
    }


def entropy_gap(student: Array, teacher: Array) -> Array:
    """`|H(teacher) - H(student)|` in nats: `[..., V] x2 -> [...]`.  Source: Li et al. 2026, arXiv:2604.13016, Eq. 8."""
    return jnp.abs(entropy(teacher) - entropy(student))


def fork(teacher: Array, below: float = 0.25) -> Array:
    """Where the teacher is undecided, its top probability `< below`: `[..., V] -> [...]` bool.

    Source: Kaur et al. 2026, arXiv:2607.05184.
    """
    return jnp.max(teacher, axis=-1) < jnp.log(below)


def lock(teacher: Array, above: float = 0.65) -> Array:
    """Where the teacher is decided, its top probability `> above`: `[..., V] -> [...]` bool.  Source: as `fork`."""
    return jnp.max(teacher, axis=-1) > jnp.log(above)


# ---- of per-token log-ratios and outcomes -------------------------------------------------------------------------


def sequence_reward(log_ratio: Array, present: Array) -> Array:
    """Mean log-ratio of each completion: `[B, T] x2 -> [B]`; 0 for an empty one.

    Its mean under the student is the mean of `-KL(student || teacher)`.
    Source: Li et al. 2026, arXiv:2604.13016, section 3.5.
    """
    chex.assert_equal_shape([log_ratio, present])
    return jnp.sum(jnp.where(present, log_ratio, 0.0), axis=-1) / jnp.maximum(jnp.sum(present, axis=-1), 1)


def concentration(log_ratio: Array, present: Array, share: float = 0.1) -> Array:
    """The part of a completion's total |log-ratio| that its largest `share` of tokens holds: `[B, T] x2 -> [B]`.

    At least one token is taken; `share` means an even spread, 1 a single token; NaN where all log-ratios are 0.  A
    worked solution in the context moves every token, a remark on the error only the tokens there.
    Source: after Kara and Ersoy 2026, arXiv:2606.11173; the threshold is ours.
    """
    chex.assert_equal_shape([log_ratio, present])
    sizes = jnp.sort(jnp.where(present, jnp.abs(log_ratio), 0.0), axis=-1, descending=True)
    count = jnp.sum(present, axis=-1, keepdims=True)
    # Rounded first: 0.1 * 30 is a hair above 3 in floating point.
    taken = jnp.maximum(jnp.ceil(jnp.round(share * count, 4)), 1)
    largest = jnp.where(jnp.arange(sizes.shape[-1]) < taken, sizes, 0.0)
    return jnp.sum(largest, axis=-1) / jnp.sum(sizes, axis=-1)


def mass_share(value: Array, marked: Array, over: Array) -> Array:
    """The part of all `|value|` that the marked tokens hold: `[B, T]`, bool `[B, T]` x2 `-> scalar`; 0 if there is none.

    With advantages and the tokens of repetitive texts, the quantity that feeds on itself when on-policy distillation
    tips over: Luo et al. 2026 (StableOPD), arXiv:2604.08527.
    """
    chex.assert_equal_shape([value, marked, over])
    size = jnp.abs(value.astype(jnp.float32))
    total = masked_sum(size, over)
    return masked_sum(size, over & marked) / jnp.where(total > 0.0, total, 1.0)


def informativeness(reward: Sequence[float], correct: Sequence[bool]) -> float:
    """Mean `sequence_reward` of correct minus that of wrong completions; NaN if all are alike: `[B] x2 -> scalar`.

    Source: Demystifying OPD 2026, arXiv:2607.13399.
    """
    right, wrong = _by_outcome(reward, correct)
    return _mean(right) - _mean(wrong)


def auroc(reward: Sequence[float], correct: Sequence[bool]) -> float:
    """Probability that a correct completion is rewarded above a wrong one, ties one half; NaN if all are alike.

    `[B] x2 -> scalar`, on the host.  A compiled loss needs shapes that do not depend on the data, and logs no NaN: there
    it is `auroc_of_groups`.
    """
    right, wrong = _by_outcome(reward, correct)
    wrong = np.sort(wrong)
    below, not_above = (np.searchsorted(wrong, right, side=side) for side in ("left", "right"))
    return _mean((below + not_above) / 2.0) / len(wrong) if len(wrong) else float("nan")


def auroc_of_groups(reward: Array, correct: Array, over: Array, group: Array) -> tuple[Array, Array]:
    """`auroc` within each row's group, and one row of every group with correct and wrong rows: `[B] x4 -> [B], [B]`.

    Its mean over those rows is the AUROC per prompt: how hard a prompt is does not enter it, as it does when all rows
    are compared.  Without any such group 1/2 for all rows in `over`.
    """
    chex.assert_equal_shape([reward, correct, over, group])
    members = (group[:, None] == group) & over
    above = (reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)
    share = group_mean(masked_mean(above, members & ~correct, axis=-1), group, over & correct)
    first = over & (jnp.argmax(members, axis=-1) == jnp.arange(len(group)))
    mixed = first & (members & correct).any(-1) & (members & ~correct).any(-1)
    return jnp.where(mixed.any(), share, 0.5), jnp.where(mixed.any(), mixed, over)


def auroc_by_prompt(reward: Sequence[float], correct: Sequence[bool], prompt: Sequence[int]) -> float:
    """The mean of `auroc` over the prompts that have correct and wrong completions; NaN without any: `[B] x3 -> scalar`."""
    reward, correct, prompt = np.asarray(reward, np.float64), np.asarray(correct, bool), np.asarray(prompt)
    found = [auroc(reward[prompt == p], correct[prompt == p]) for p in np.unique(prompt)]
    return _mean([x for x in found if np.isfinite(x)])


def cells_by_outcome(log_ratio: Array, correct: Array, threshold: float = AGREEMENT) -> dict[str, Array]:
    """Which tokens lie in which cell of agreement and outcome: `[B, T]`, bool `[B] -> {name: [B, T] bool}`.

    Teacher and student agree where `|log-ratio| <= threshold`.
    """
    agree, right = abs(log_ratio) <= threshold, correct[:, None]
    return {
        "agree_correct": agree & right,
        "agree_wrong": agree & ~right,
        "disagree_correct": ~agree & right,
        "disagree_wrong": ~agree & ~right,
    }


def agreement_by_outcome(log_ratio: Array, present: Array, correct: Array, threshold: float = AGREEMENT) -> np.ndarray:
    """Shares of all tokens, `[[agree & correct, agree & wrong], [disagree & correct, disagree & wrong]]`; sums to 1.

    Teacher and student agree where `|log-ratio| <= threshold`: `[B, T] x2, [B] -> [2, 2]`; NaN without tokens.
    Source: Outcome-confounded supervision 2026, arXiv:2607.23731; the threshold is ours.
    """
    present = np.asarray(present, bool)
    cells = cells_by_outcome(np.asarray(log_ratio), np.asarray(correct, bool), threshold)
    counts, total = np.array([np.sum(present & cell) for cell in cells.values()]), present.sum()
    return counts.reshape(2, 2) / total if total else np.full((2, 2), np.nan)


def gap_recovery(before: float, after: float, teacher: float) -> float:
    """The part of the way to the teacher's accuracy that was gone: `(after - before) / (teacher - before)`.

    NaN where the teacher is no better or worse than before.  Source: Li et al. 2026, arXiv:2604.13016.
    """
    return (after - before) / (teacher - before) if teacher != before else float("nan")


# ---- helpers ------------------------------------------------------------------------------------------------------


def _renormalised(dist: Array, inside: Array) -> Array:
    kept = jnp.where(inside, dist, NEVER)
    return dist - jax.nn.logsumexp(kept, axis=-1, keepdims=True)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _by_outcome(reward: Sequence[float], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    reward, correct = np.asarray(reward, np.float64), np.asarray(correct, bool)
    chex.assert_equal_shape([reward, correct])
    return reward[correct], reward[~correct]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
