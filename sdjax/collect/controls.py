"""Controls: what a method's effect is compared with.  Each takes a method and returns one that differs in one thing.

Whether privilege, its relevance, the placement of token weights or mere shortness makes the difference is asked in the
same way of every method.  Source of the list: the survey of section 5 in the field's literature of 2026 (OP2SD,
arXiv:2608.09228; Purified OPSD, arXiv:2607.02234; OPSA, arXiv:2608.31046 is the method `opsa`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.collect.contexts import question, rewrite_last
from sdjax.collect.instruments import with_instruments
from sdjax.engine.policies import grouped
from sdjax.kernels.weights import mean_one
from sdjax.types import Batch, Messages, Method, Rollout, Term

TeacherContext = Literal["matched", "mismatched", "reference-only", "none"]
TokenWeights = Literal["as-is", "shuffled", "mean-one"]


def controlled(
    method: Method,
    *,
    context: TeacherContext = "matched",
    weights: TokenWeights = "as-is",
    length_penalty: float = 0.0,
    diagnose: bool = False,
) -> Method:
    """A method with the controls and instruments that the command line offers for every method.

    The other two controls are methods or their options: no teacher at all is `opsa`, a matched budget of student
    rollouts is a larger group size.

    Args:
      context: what teachers read: the right context, that of another problem, the privileged text without the
        question, or the plain question.
      weights: per-token weights as they are, shuffled within each row, or rescaled to mean one.
      length_penalty: taken from rewards per 100 tokens.
      diagnose: log overlap, entropy gap, fork and lock rates, log-ratios by outcome and on markers, and KL by position.
    """
    method = with_teacher_context(method, context)
    method = with_length_penalty(with_token_weights(method, weights), length_penalty)
    return with_instruments(method) if diagnose else method


def with_teacher_context(method: Method, control: TeacherContext) -> Method:
    """The method with another context for every view that is told more, in some row, than the student.

    matched: as it is.  mismatched: the context of the next prompt of the batch (the same rollout's place in it).
    reference-only: the privileged text without the question.  none: the plain question.  A view that has nothing to
    say about a rollout still has nothing to say; every rollout, log-probability and parameter stays what it was.
    A method that scores its teacher at rollout time does so before this applies: `ValueError` at its first batch.
    """
    if control == "matched":
        return method
    change = {"mismatched": mismatched, "reference-only": reference_only, "none": plain}[control]

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        told = lambda r: {name for name, chat in r.contexts.items() if chat != r.contexts.get("student")}
        views = {name for r in rollouts for name in told(r)}
        if not views and rollouts:
            raise ValueError(f"context={control}: this method's batches hold no teacher's context to change")
        return change(rollouts, views), memory

    return method._replace(collect=collect)


def mismatched(rollouts: Sequence[Rollout], views: set[str]) -> list[Rollout]:
    """Every group reads what the next group that a view speaks about was told; the last one reads the first's."""
    groups = grouped(rollouts)
    place = {id(r): i for rows in groups.values() for i, r in enumerate(rows)}
    spoken = lambda view, rows: [r.contexts[view] for r in rows if r.contexts.get(view) is not None]
    said = {view: {group: spoken(view, rows) for group, rows in groups.items()} for view in views}

    def other(rollout: Rollout, view: str) -> Messages | None:
        if rollout.contexts.get(view) is None:
            return None
        speaking = [group for group, chats in said[view].items() if chats]
        following = speaking[(speaking.index(rollout.group) + 1) % len(speaking)]
        return said[view][following][place[id(rollout)] % len(said[view][following])]

    return [r.read_by(**{view: other(r, view) for view in views if view in r.contexts}) for r in rollouts]


def reference_only(rollouts: Sequence[Rollout], views: set[str]) -> list[Rollout]:
    """The last turn is reduced to its privileged text (see `sdjax.collect.contexts`); turns before it stay."""

    def reduced(chat: Messages | None) -> Messages | None:
        told = "" if chat is None else chat[-1].get("privileged", "")
        return rewrite_last(chat, told, told) if told else chat

    return [r.read_by(**{view: reduced(r.contexts[view]) for view in views if view in r.contexts}) for r in rollouts]


def plain(rollouts: Sequence[Rollout], views: set[str]) -> list[Rollout]:
    """Every view reads the plain question."""
    ask = lambda r, view: None if r.contexts[view] is None else question(r.example)
    return [r.read_by(**{view: ask(r, view) for view in views if view in r.contexts}) for r in rollouts]


def with_token_weights(method: Method, control: TokenWeights, seed: int = 0) -> Method:
    """The method with every per-token weight shuffled within its row, or rescaled to mean one over the population.

    Shuffling keeps each row's weights and their mean, and breaks their placement; a new permutation each step.
    Per-row and constant weights stay.
    """
    if control == "as-is":
        return method

    def change(term: Term, batch: Batch, step: Array) -> Term:
        if jnp.ndim(term.weight) != 2 or jnp.shape(term.weight)[-1] == 1:
            return term
        over = batch.mask & batch.valid[:, None]
        if term.over is not None:
            over = over & (term.over if term.over.ndim == 2 else term.over[:, None])
        weight = jnp.broadcast_to(term.weight, over.shape)
        if control == "mean-one":
            return term._replace(weight=mean_one(weight, over))
        return term._replace(weight=shuffled(weight, over, jax.random.fold_in(jax.random.key(seed), step)))

    return with_terms(method, lambda terms, batch, step: {n: change(t, batch, step) for n, t in terms.items()})


def shuffled(weight: Array, over: Array, key: Array) -> Array:
    """Weights `[B, T]` permuted within each row among the positions where `over`; 0 elsewhere."""
    rows = jnp.arange(weight.shape[0])[:, None]
    order = jnp.broadcast_to(jnp.arange(weight.shape[1], dtype=jnp.float32), weight.shape)
    random = jnp.where(over, jax.random.uniform(key, weight.shape), jnp.inf)
    source = jnp.argsort(random, axis=-1)
    target = jnp.argsort(jnp.where(over, order, jnp.inf), axis=-1)
    moved = jnp.zeros_like(weight).at[rows, target].set(jnp.take_along_axis(weight, source, axis=-1))
    return jnp.where(over, moved, 0.0)


def with_terms(method: Method, change: Callable[[dict[str, Term], Batch, Array], dict[str, Term]]) -> Method:
    """The method with `change(terms, batch, step)` applied to what every objective returns."""

    def changed(objective):
        terms = lambda batch, sig, step: change(objective.terms(batch, sig, step), batch, step)
        return objective._replace(terms=terms)

    return method._replace(objectives=tuple(changed(o) for o in method.objectives))


def with_length_penalty(method: Method, coefficient: float) -> Method:
    """The twin that is only shorter: `coefficient` per 100 tokens is taken from every reward.

    It acts after the method's own use of rewards on the host (choosing peers, say) and before the loss.
    """
    if coefficient == 0.0:
        return method

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        cost = lambda r: coefficient * len(r.tokens) / 100
        return [dataclasses.replace(r, reward=r.reward - cost(r)) for r in rollouts], memory

    return method._replace(collect=collect)
