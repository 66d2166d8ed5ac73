"""Rollouts written with weights of some updates ago: made on purpose, bounded, counted, and weighed.

How old the weights behind a rollout are stands in its extra `staleness`, in batches; rows without one are fresh.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sdjax.engine.policies import nested, refresh
from sdjax.kernels.distributions import logprob
from sdjax.kernels.policy_gradient import importance_weight
from sdjax.kernels.reductions import token_mean
from sdjax.types import STUDENT, Batch, Method, Objective, Term

STALENESS, DROPPED = "staleness", "staleness_dropped"
"""Extras: batches since the writer's weights were the live ones; rows of this batch that were too old."""

WRITER = "writer"
"""The snapshot that writes in `lagged`."""

OWN = f"{STALENESS}/logprob"


def lagged(method: Method, lag: int) -> Method:
    """The method whose live policy, while it collects, has the weights of 0 to `lag` batches ago.

    They are a snapshot, refreshed after every `lag + 1`-th batch: what an engine does that is sent weights that
    often, and part of the checkpoint.  Rollouts record their age; `behavior_logprobs` are the writer's.

    Raises: ValueError if `lag` is negative or the method has a snapshot of the same name.
    """
    if lag < 0:
        raise ValueError(f"lag={lag}: expected at least 0")
    if WRITER in method.snapshots:
        raise ValueError(f"the method already has a snapshot {WRITER!r}: lag it once")

    def collect(environment, examples, key, memory):
        writer = dataclasses.replace(environment.live, params=environment.policies[WRITER].params)
        policies = {**environment.policies, "live": writer}
        rollouts, inner = method.collect(environment._replace(policies=policies), examples, key, memory["method"])
        age = memory["batches"] % (lag + 1)
        fresh = lambda r: r.source == STUDENT and STALENESS not in r.extras
        rollouts = [r.with_extras(**{STALENESS: age}) if fresh(r) else r for r in rollouts]
        return rollouts, {"batches": memory["batches"] + 1, "method": inner}

    snapshots = {**nested(method.snapshots), WRITER: refresh(lag + 1)}
    return method._replace(collect=collect, snapshots=snapshots, memory={"batches": 0, "method": method.memory})


def bounded(method: Method, most: int, *, cap: float | None = None) -> Method:
    """The method without rollouts older than `most` batches, and with importance weights for the others.

    `cap`: the importance of every token of the student's rows is multiplied by `min(p/b, cap)`, constant, `p` the
    student now and `b` the writer.  For losses that have no ratio of their own, such as distillation; `None` leaves the loss to the
    method, and policy gradients have `p/b` already.  Terms of one value per row and objectives without a trained view
    "student" stay as they are.

    Logged: `staleness/age`, `staleness/dropped` (rows of the batch), `staleness/importance` (mean of `p/b`, cut at
    `cap` or 2) and `staleness/truncated` (share that was cut).  `memory["dropped"]` counts over the run.
    Source: Yao et al. 2025 (truncated importance sampling), cap 2.
    """
    if most < 0:
        raise ValueError(f"most={most}: expected at least 0")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap={cap}: expected a number above 0, or None")

    def collect(environment, examples, key, memory):
        rollouts, inner = method.collect(environment, examples, key, memory["method"])
        kept = [r for r in rollouts if r.extras.get(STALENESS, 0) <= most]
        dropped = len(rollouts) - len(kept)
        kept = [r.with_extras(**{STALENESS: r.extras.get(STALENESS, 0), DROPPED: float(dropped)}) for r in kept]
        return kept, {"dropped": memory["dropped"] + dropped, "method": inner}

    objectives = tuple(weighed(o, cap) for o in method.objectives)
    known = {"snapshots": nested(method.snapshots), "memory": {"dropped": 0, "method": method.memory}}
    return method._replace(collect=collect, objectives=objectives, **known)


def weighed(objective: Objective, cap: float | None) -> Objective:
    """One objective with importance weights and their measurements; as it is without a trained view "student"."""
    if "student" not in objective.views or not objective.views["student"].trainable:
        return objective

    def signals(dist, token):
        return {**objective.signals(dist, token), OWN: jax.lax.stop_gradient(logprob(dist["student"], token))}

    def terms(batch, sig, step):
        own = objective.terms(batch, {name: value for name, value in sig.items() if name != OWN}, step)
        written = batch.source[:, None] == STUDENT
        ratio = jnp.where(written, importance_weight(sig[OWN], batch.behavior_logprobs), 1.0)
        if cap is not None:
            own = {name: times(term, jnp.minimum(ratio, cap)) for name, term in own.items()}
        return {**own, **measurements(batch, ratio, 2.0 if cap is None else cap)}

    return objective._replace(signals=signals, terms=terms)


def times(term: Term, weight: jax.Array) -> Term:
    """A per-token term that is trained, with its importance multiplied by `weight [B, T]`."""
    measured = isinstance(term.coef, int | float) and term.coef == 0
    if measured or term.value.ndim != 2:
        return term
    own = term.importance[:, None] if jnp.ndim(term.importance) == 1 else term.importance
    return term._replace(importance=own * weight)


def measurements(batch: Batch, ratio: jax.Array, cap: float) -> dict[str, Term]:
    """Terms of coefficient 0 about the student's own rows."""
    own = batch.valid & (batch.source == STUDENT)
    tokens = batch.mask & own[:, None]
    row = lambda name: batch.extras[name].astype(jnp.float32)
    measure = lambda value, over: Term(value, over=over, reduce=token_mean, coef=0.0)
    return {
        f"{STALENESS}/age": measure(row(STALENESS), own),
        f"{STALENESS}/dropped": measure(row(DROPPED), own),
        f"{STALENESS}/importance": measure(jnp.minimum(ratio, cap), tokens),
        f"{STALENESS}/truncated": measure((ratio > cap).astype(jnp.float32), tokens),
    }
