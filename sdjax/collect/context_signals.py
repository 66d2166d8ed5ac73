"""What a context is worth before anything is trained: how well a teacher that reads it ranks given attempts (MOPD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from sdjax.collect.contexts import question
from sdjax.collect.diagnostics import auroc
from sdjax.collect.peers import peers
from sdjax.engine.policies import Environment, grouped, score
from sdjax.kernels.distributions import logprob
from sdjax.types import Messages, Rollout, View

Lesson = Callable[[Rollout, list[Rollout]], Messages | None]

MEASURES = {"spearman": 0.0, "pairwise": 0.5, "auc": 0.5}
"""What is measured, and what an uninformed teacher has."""


def peer_contexts(success: float = 0.5) -> dict[str, Lesson]:
    """The contexts of MOPD's ablation: the question, a failure, one or two successes, and both kinds."""
    plain = {"success": success, "use_feedback": False}
    failed = lambda r, rows: [other for other in rows if other is r or other.reward < success]
    one_failure = peers(another=False, failure="always", **plain)
    return {
        "none": lambda r, rows: question(r.example),
        "1F": lambda r, rows: one_failure(r, failed(r, rows)),
        "1S": peers(another=False, failure="never", **plain),
        "2S": peers(another=True, failure="never", **plain),
        "1S+1F": one_failure,
        "2S+1F": peers(another=True, failure="always", **plain),
    }


def _said(dist, token):
    return {"said": logprob(dist["reader"], token)}


def scores(environment: Environment, rollouts: Sequence[Rollout], lesson: Lesson, policy: str) -> np.ndarray:
    """Mean log-probability of each attempt under a policy that reads its lesson: `[N]`, NaN without one."""
    told = [r.read_by(reader=lesson(r, list(rollouts))) for r in rollouts]
    if not any(r.contexts["reader"] for r in told):
        return np.full(len(told), np.nan)
    found = score(environment, told, {"reader": View(policy, per_rollout=True)}, _said)
    mean = lambda r: float(np.mean(r.extras["said"])) if len(r.tokens) else np.nan
    return np.asarray([np.nan if r.contexts["reader"] is None else mean(r) for r in found])


def ranking(score: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """How scores rank the attempts at one prompt that has correct and wrong ones: `[n] x2`.

    Spearman's correlation with the outcome (0 for equal scores), the share of pairs of a correct and a wrong attempt in
    which the correct one is above, and the same with ties as one half (AUC).
    """
    above = score[correct][:, None] > score[~correct][None, :]
    alike = np.ptp(score) == 0.0
    spearman = 0.0 if alike else float(stats.spearmanr(score, correct).statistic)
    return {"spearman": spearman, "pairwise": float(above.mean()), "auc": auroc(score, correct)}


def context_signals(
    environment: Environment,
    rollouts: Sequence[Rollout],
    contexts: Mapping[str, Lesson],
    *,
    policy: str = "live",
    success: float = 0.5,
) -> tuple[dict[str, dict[str, float]], int]:
    """`{context: ranking}`, averaged over prompts, and how many prompts: those that every context can be compared on.

    They have correct and wrong attempts, and all contexts have something to say about each of them; without any the
    measures are NaN.  One scoring pass per context; nothing is written.
    Source: the teacher-signal diagnostic of Yu et al. 2026 (MOPD), arXiv:2605.12652.  Its code counts prompts without a
    success, or without a failure, as 0 and averages every context over prompts of its own; here none is.
    """
    found = {name: scores(environment, rollouts, lesson, policy) for name, lesson in contexts.items()}
    places = {id(r): i for i, r in enumerate(rollouts)}
    groups = [np.asarray([places[id(r)] for r in rows]) for rows in grouped(rollouts).values()]
    correct = np.asarray([r.reward >= success for r in rollouts])
    mixed = [g for g in groups if 0 < correct[g].sum() < len(g)]
    usable = [g for g in mixed if all(np.isfinite(score[g]).all() for score in found.values())]
    ranked = {name: [ranking(score[g], correct[g]) for g in usable] for name, score in found.items()}
    mean = lambda some, measure: float(np.mean([r[measure] for r in some])) if some else float("nan")
    return {name: {m: mean(some, m) for m in MEASURES} for name, some in ranked.items()}, len(usable)


def with_signals(environment: Environment, rollouts: Sequence[Rollout], success: float = 0.5) -> list[Rollout]:
    """The rollouts with the live policy's `context_signals` of `peer_contexts` as extras, the same on every row.

    `signal/CONTEXT/MEASURE` and `signal/prompts`; an uninformed teacher's values where no prompt can be compared on.
    """
    found, prompts = context_signals(environment, rollouts, peer_contexts(success), success=success)
    known = lambda value, measure: value if np.isfinite(value) else MEASURES[measure]
    extras = {f"signal/{c}/{m}": known(value, m) for c, some in found.items() for m, value in some.items()}
    return [r.with_extras(**extras, **{"signal/prompts": float(prompts)}) for r in rollouts]
