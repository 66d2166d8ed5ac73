"""Instruments: diagnostics that any method logs on request, without changing what it learns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.collect import diagnostics
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.reductions import token_mean
from sdjax.types import Batch, Method, Objective, Term

MARKER, REPEATS = "diagnostic_marker", "diagnostic_repeats"
"""Extras: which tokens are one of `diagnostics.REVISION` by themselves, and which texts repeat themselves."""


def with_instruments(method: Method, k: int = 16, success: float = 0.5) -> Method:
    """The method with measured terms (coefficient 0) in every objective that has a "student" and a "teacher" view.

    Logged under `diagnostic/`: overlap of the top-k sets with the masses and the advantage on it, entropy gap, fork
    and lock rates of the teacher, mean and mean absolute log-ratio (teacher minus student), its concentration, its
    mean on correct and on wrong rows and how well it tells them apart (AUROC per prompt, over prompts with rows of both kinds; 0.5 without any), shares
    of tokens by agreement and outcome, the log-ratio on words that announce another attempt and how often it is
    positive there, the share of texts that repeat themselves and of all log-ratios that these hold, and reverse KL in
    the first, middle and last third of the completions.
    A correct row has a reward of at least `success`.  Rows about which the teacher has nothing to say are left out; a mean over nothing is 0.  Gradients are not computed.
    """
    objectives = tuple(instrumented(o, k, success) for o in method.objectives)
    known: dict[int, bool] = {}

    def is_marker(tokenizer: Any, token: int) -> bool:
        if token not in known:
            known[token] = bool(diagnostics.marks([tokenizer.decode([token])])[0])
        return known[token]

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        marked = lambda r: [is_marker(environment.live.tokenizer, token) for token in r.tokens]
        extras = lambda r: {MARKER: np.asarray(marked(r), bool), REPEATS: diagnostics.repeats(r.text)}
        return [r.with_extras(**extras(r)) for r in rollouts], memory

    return method._replace(
        collect=collect if objectives != method.objectives else method.collect, objectives=objectives
    )


def instrumented(objective: Objective, k: int, success: float) -> Objective:
    """One objective with the diagnostics; as it is without both views."""
    if not {"student", "teacher"} <= set(objective.views):
        return objective

    def signals(dist, token):
        student, teacher = (jax.lax.stop_gradient(dist[name]) for name in ("student", "teacher"))
        measured = {
            **diagnostics.overlap_statistics(student, teacher, min(k, student.shape[-1])),
            "entropy_gap": diagnostics.entropy_gap(student, teacher),
            "teacher_entropy": entropy(teacher),
            "fork": diagnostics.fork(teacher).astype(jnp.float32),
            "lock": diagnostics.lock(teacher).astype(jnp.float32),
            "log_ratio": logprob(teacher, token) - logprob(student, token),
            "reverse_kl": reverse_kl(student, teacher),
        }
        own = objective.signals(dist, token)
        return {**own, **{f"diagnostic/{name}": value for name, value in measured.items()}}

    def terms(batch, sig, step):
        own = {name: value for name, value in sig.items() if not name.startswith("diagnostic/")}
        found = {name.removeprefix("diagnostic/"): v for name, v in sig.items() if name.startswith("diagnostic/")}
        measured = {f"diagnostic/{name}": term for name, term in measurements(batch, found, success).items()}
        return {**objective.terms(batch, own, step), **measured}

    whole = {**objective.views, "teacher": objective.views["teacher"]._replace(entries=None)}
    return objective._replace(views=whole, signals=signals, terms=terms)


def measurements(batch: Batch, found: dict[str, Array], success: float) -> dict[str, Term]:
    """Terms of coefficient 0 from per-token diagnostics `[B, T]`."""
    taught = batch.contexts["teacher"].valid
    over = batch.mask & (batch.valid & taught)[:, None]
    shared = over & (found["overlap"] > 0)
    measure = lambda value, over=over: Term(value, over=over, reduce=token_mean, coef=0.0)
    partial = ("overlap_advantage", "extreme_token_gap")
    terms = {name: measure(value, shared if name in partial else over) for name, value in found.items()}
    terms["absolute_log_ratio"] = measure(jnp.abs(found["log_ratio"]))
    spread = diagnostics.concentration(found["log_ratio"], over)
    terms["concentration"] = measure(spread, taught & jnp.isfinite(spread))
    # (tokens seen, or to be seen, of the row) / (its length): thirds of each completion, whatever its length.
    place = (jnp.cumsum(over, axis=-1) - 0.5) / jnp.maximum(over.sum(-1, keepdims=True), 1)
    for third, name in enumerate(("first", "middle", "last")):
        inside = over & (place >= third / 3) & (place < (third + 1) / 3)
        terms[f"reverse_kl_{name}_third"] = measure(found["reverse_kl"], inside)
    return {
        **terms,
        **by_outcome(batch, found["log_ratio"], over, success),
        **on_words(batch, found["log_ratio"], over),
    }


def by_outcome(batch: Batch, log_ratio: Array, over: Array, success: float) -> dict[str, Term]:
    """How the log-ratio `[B, T]` differs between correct and wrong rows, those with a reward of at least `success`."""
    taught, correct = over.any(-1), batch.reward >= success
    reward = diagnostics.sequence_reward(log_ratio, over)
    measure = lambda value, over: Term(value, over=over, reduce=token_mean, coef=0.0)
    share, mixed = diagnostics.auroc_of_groups(reward, correct, taught, batch.group)
    means = {
        "log_ratio_correct": measure(reward, taught & correct),
        "log_ratio_wrong": measure(reward, taught & ~correct),
    }
    cells = diagnostics.cells_by_outcome(log_ratio, correct)
    shares = {name: measure(cell.astype(jnp.float32), over) for name, cell in cells.items()}
    return {"auroc": measure(share, mixed), **means, **shares}


def on_words(batch: Batch, log_ratio: Array, over: Array) -> dict[str, Term]:
    """The log-ratio `[B, T]` on words that announce another attempt and in texts that repeat themselves, and both's share."""
    if MARKER not in batch.extras:
        return {}
    marker, repeats = batch.extras[MARKER], jnp.broadcast_to(batch.extras[REPEATS][:, None], over.shape)
    measure = lambda value, over: Term(value.astype(jnp.float32), over=over, reduce=token_mean, coef=0.0)
    held = jnp.full(over.shape[:1], diagnostics.mass_share(log_ratio, repeats, over))
    return {
        "markers": measure(marker, over),
        "log_ratio_on_markers": measure(log_ratio, over & marker),
        "positive_on_markers": measure(log_ratio > 0.0, over & marker),
        "repeats": measure(batch.extras[REPEATS], over.any(-1)),
        "log_ratio_held_by_repeats": measure(held, over.any(-1)),
    }
