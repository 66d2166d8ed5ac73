"""Instruments: diagnostics that any method logs on request, without changing what it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from sdjax import diagnostics
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import reverse_kl
from sdjax.types import Batch, Method, Objective, Term


def with_instruments(method: Method, k: int = 16) -> Method:
    """The method with measured terms (coefficient 0) in every objective that has a "student" and a "teacher" view.

    Logged under `diagnostic/`: overlap of the top-k sets with the masses and the advantage on it, entropy gap, fork
    and lock rates of the teacher, mean and mean absolute log-ratio (teacher minus student), its concentration, its
    mean on correct minus on wrong rows, and reverse KL in the first, middle and last third of the completions.
    Rows about which the teacher has nothing to say are left out.  Gradients are not computed.
    """
    return method._replace(objectives=tuple(instrumented(o, k) for o in method.objectives))


def instrumented(objective: Objective, k: int) -> Objective:
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
        measured = {f"diagnostic/{name}": term for name, term in measurements(batch, found).items()}
        return {**objective.terms(batch, own, step), **measured}

    return objective._replace(signals=signals, terms=terms)


def measurements(batch: Batch, found: dict[str, Array]) -> dict[str, Term]:
    """Terms of coefficient 0 from per-token diagnostics `[B, T]`."""
    taught = batch.contexts["teacher"].valid
    over = batch.mask & (batch.valid & taught)[:, None]
    shared = over & (found["overlap"] > 0)
    measure = lambda value, over=over: Term(value, over=over, coef=0.0)
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
    reward = diagnostics.sequence_reward(found["log_ratio"], over)
    for name, rows in (("correct", batch.reward >= 0.5), ("wrong", batch.reward < 0.5)):
        terms[f"log_ratio_{name}"] = measure(reward, taught & rows)
    return terms
