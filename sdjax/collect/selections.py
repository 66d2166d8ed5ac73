"""What of a batch a method learns from, and how much of a reference its teachers are shown: the same choices for all.

Each function takes a method and returns one that differs in one thing.  Source of the list: the axes of Cui et al.
2026, A Brief Overview: On-Policy Self-Distillation In Large Language Models, arXiv:2605.18141.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.controls import controlled
from sdjax.collect.refreshing import with_refresh
from sdjax.engine.policies import grouped
from sdjax.errors import InputError
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import logprob
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import masked_mean
from sdjax.types import STUDENT, Batch, Messages, Method, Objective, Rollout, Term

Rows = Literal["all", "successes", "failures"]
Shown = Literal["beginning", "masked"]

RIGHT, WEIGHT = "selection/right", "selection/weight"
"""Extras: whether a row is a success, and how much its question counts."""

OWN = "selection/logprobs"
"""The signal that the reward's part of a routed method reads."""

MASK = "[...]"
"""What stands for a hidden word."""


class SelectionError(InputError, ValueError):
    """A selection cannot be made of this method; the message says which and why."""


def selected(
    method: Method,
    *,
    rows: Rows = "all",
    pass_rate: tuple[float, float] = (0.0, 0.0),
    route: bool = False,
    success: float = 0.5,
    share: float = 1.0,
    shown: Shown = "beginning",
    refresh_every: int = 0,
    refresh_gain: float | None = None,
    refresh_window: int = 10,
    refresh_longest: int = 0,
) -> Method:
    """A method with the selections that the command line offers for every method; as it is by default.

    Args:
      rows: whose tokens are trained on, of the student's own: all, successes or failures.  Advantages are still made of
        the whole group.
      pass_rate: powers a and b of a question's weight `p^a (1-p)^b`, p the share of its attempts that succeed; weights
        have mean 1 over the batch.  (1, 1) prefers questions of medium difficulty, (0, 1) hard ones.
      route: failures with a lesson are distilled by this method's loss, all other attempts get GRPO's.
      success: the least reward of a success.
      share: of the words of what a teacher is told (a solution, a peer's answer, feedback) that are shown; below 1.
      shown: the beginning of it, or words chosen at random, the others masked.
      refresh_every: the teacher's snapshot is a copy of the student made every so many batches, instead of the method's
        own rule; with `refresh_gain` at the earliest so many batches after the last copy.
      refresh_gain: instead of a clock: a copy is made once the mean reward has risen by more than this since the last.
      refresh_window: batches over which that mean is taken.
      refresh_longest: no copy is made while an attempt of the window is as long as this, in tokens; 0 does not ask.

    Raises: SelectionError where a selection would change nothing.
    """
    if share != 1.0:
        method = with_partial_references(method, share, shown)
    if route:
        method = routed(method, success)
    if rows != "all" or pass_rate != (0.0, 0.0):
        method = with_rows(method, rows, pass_rate, success)
    if refresh_every or refresh_gain is not None:
        how = {"gain": refresh_gain, "window": refresh_window, "longest": refresh_longest}
        method = with_refresh(method, refresh_every, **how)
    return method


def changed(method: Method, select: Mapping[str, Any], control: Mapping[str, Any]) -> Method:
    """The method with selections, the arguments of `selected`, and then controls, those of `controlled`.

    A control acts on what is selected: weights have mean one over the rows that are trained, and a mismatched teacher
    reads the shown part of another problem's reference.

    Raises: SelectionError if a control would undo a selection; what the two functions raise.
    """
    if select.get("share", 1.0) != 1.0 and control.get("context") == "none":
        raise SelectionError(
            f"select.share={select['share']:g}: with control.context=none teachers read the question alone, so that no "
            "part of a reference is shown; leave one of the two out"
        )
    return controlled(selected(method, **select), **control)


# ---- rows and questions ---------------------------------------------------------------------------------------------


def marked(rollouts: Sequence[Rollout], success: float, powers: tuple[float, float] = (0.0, 0.0)) -> list[Rollout]:
    """The rollouts with `RIGHT` and `WEIGHT`, `p^a (1-p)^b` by their prompt, divided by its mean over prompts.

    `p` is the share of the prompt's own attempts (of the student) that succeed; prompts without any weigh 1.  All are 0
    if no prompt has a weight.  Source: pass-rate weights of PACED, arXiv:2603.11178, known from the overview.
    """
    right = lambda r: r.reward >= success
    own = {g: [right(r) for r in rows if r.source == STUDENT] for g, rows in grouped(rollouts).items()}
    rates = {g: float(np.mean(seen)) for g, seen in own.items() if seen}
    weights = {g: p ** powers[0] * (1.0 - p) ** powers[1] for g, p in rates.items()}
    mean = float(np.mean([*weights.values()])) if weights else 1.0
    scaled = lambda group: weights[group] / (mean or 1.0) if group in weights else 1.0
    return [r.with_extras(**{RIGHT: right(r), WEIGHT: scaled(r.group)}) for r in rollouts]


def with_rows(method: Method, rows: Rows, powers: tuple[float, float], success: float = 0.5) -> Method:
    """The method that trains on successes or failures only, and weighs every question by its pass rate.

    Rows that the student did not write (references, a teacher's texts) stay, with their question's weight.
    """

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        return marked(rollouts, success, powers), memory

    def change(term: Term, batch: Batch) -> Term:
        if measured(term):
            return term
        term = times_rows(term, batch.extras[WEIGHT])
        right = batch.extras[RIGHT]
        return term if rows == "all" else narrowed(term, (batch.source != STUDENT) | (right == (rows == "successes")))

    return with_terms(method._replace(collect=collect), change)


def measured(term: Term) -> bool:
    """Whether a term is only logged."""
    return isinstance(term.coef, int | float) and term.coef == 0


def narrowed(term: Term, rows: Array) -> Term:
    """The term over these rows only: bool `[B]`."""
    over = rows if term.over is None else term.over & (rows[:, None] if term.over.ndim == 2 else rows)
    return term._replace(over=over)


def times_rows(term: Term, weight: Array) -> Term:
    """The term with the weights of its rows multiplied by `weight [B]`."""
    own = jnp.asarray(term.weight, jnp.float32)
    if term.value.ndim == 1:
        return term._replace(weight=own * weight)
    return term._replace(weight=(own[:, None] if own.ndim == 1 else own) * weight[:, None])


def with_terms(method: Method, change: Callable[[Term, Batch], Term]) -> Method:
    """The method with `change(term, batch)` in place of every term."""

    def changed(objective: Objective) -> Objective:
        def terms(batch, sig, step):
            return {name: change(term, batch) for name, term in objective.terms(batch, sig, step).items()}

        return objective._replace(terms=terms)

    return method._replace(objectives=tuple(changed(o) for o in method.objectives))


# ---- routing --------------------------------------------------------------------------------------------------------


def routed(method: Method, success: float = 0.5, clip: tuple[float, float] = (0.2, 0.2)) -> Method:
    """Failures about which a teacher has something to say are distilled, all other attempts learn from their reward.

    Distilled rows have the method's own terms, the others GRPO's surrogate with the advantage of the *whole* group.  All
    terms are divided by what all of the student's attempts count: each attempt weighs the same, whatever its route.  Rows
    that the student did not write keep their terms.
    Source: SRPO, arXiv:2604.02288, which the overview describes in a line: a reconstruction.

    Raises: SelectionError if no objective has a trained view "student" beside a teacher's.
    """
    routes = lambda o: o.views.get("student") is not None and o.views["student"].trainable and len(o.views) > 1
    if not any(routes(o) for o in method.objectives):
        raise SelectionError(
            "select.route: this method's loss has no teacher to distil failures from; leave it out, or take a method with one"
        )

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        return marked(rollouts, success), memory

    objectives = tuple(routed_objective(o, clip) if routes(o) else o for o in method.objectives)
    return method._replace(collect=collect, objectives=objectives)


def routed_objective(objective: Objective, clip: tuple[float, float]) -> Objective:
    """One objective whose trained terms are for failures with a lesson, and a reward's term for all other attempts."""
    teachers = [name for name, view in objective.views.items() if not view.trainable]

    def signals(dist, token):
        return {**objective.signals(dist, token), OWN: logprob(dist["student"], token)}

    def terms(batch, sig, step):
        found = objective.terms(batch, {name: value for name, value in sig.items() if name != OWN}, step)
        own = batch.valid & (batch.source == STUDENT)
        told = jnp.stack([batch.contexts[name].valid for name in teachers]).all(0)
        distilled = own & told & ~batch.extras[RIGHT]
        trained = batch.mask & batch.valid[:, None]
        route = lambda term: term if measured(term) else spread(term, own, distilled | ~own, trained)
        advantage = group_advantage(batch.returns, batch.group, own)[:, None]
        surrogate = clipped_surrogate(sig[OWN], batch.behavior_logprobs, advantage, clip)
        rewards = Term(surrogate, (~distilled).astype(jnp.float32), over=own)
        share = Term(distilled.astype(jnp.float32), over=own, coef=0.0)
        return {**{n: route(t) for n, t in found.items()}, "rewards": rewards, "distilled": share}

    return objective._replace(signals=signals, terms=terms, rewarded=True)


def spread(term: Term, own: Array, rows: Array, trained: Array) -> Term:
    """The term over some `rows [B]`, divided by what all of the student's `own` rows count, if it is about any of them.

    Weights per token keep their mean over `trained [B, T]` positions of these rows, so that a control can rescale it.
    """
    flat = lambda x: x[:, None] if x.ndim < term.value.ndim else x
    over = (
        jnp.ones(term.value.shape, bool) if term.over is None else jnp.broadcast_to(flat(term.over), term.value.shape)
    )
    about, kept = over & flat(own), over & flat(rows)
    # Cleaned, because it now stands in the population: what was outside may be anything.
    value, weight = jnp.where(kept, term.value, 0.0), term.weight
    if jnp.ndim(weight) == 2:
        weight = jnp.broadcast_to(weight, kept.shape)
        weight = jnp.where(kept, weight, masked_mean(weight, kept & trained))
    return term._replace(value=value, weight=weight, over=over | (flat(own) & about.any()))


# ---- references -----------------------------------------------------------------------------------------------------


def with_partial_references(method: Method, share: float, shown: Shown = "beginning") -> Method:
    """The method whose teachers are told a `share` of the words of what they are told: its beginning, or any, unmasked.

    Which words are masked depends on the problem only, so that all attempts at it are judged by one text.  Views that
    score while the batch is collected read the same; what writes texts reads all of it.
    Source: partial solutions of PAINT, arXiv:2605.26573 as the overview describes it; words as the unit are ours.

    Raises: SelectionError if `share` is not between 0 and 1, or no view is told anything.
    """
    if not 0.0 < share < 1.0:
        raise SelectionError(f"select.share={share:g}: expected a number above 0 and at most 1")
    late = {name for o in method.objectives for name, view in o.views.items() if view.told} - method.early.keys()
    if not late and not any(view.told for view in method.early.values()):
        raise SelectionError(
            f"select.share={share:g}: this method scores with no teacher's context: no view is told more than the "
            "question; leave it out, or take a method, or its lesson, that tells a teacher more"
        )

    def collect(environment, examples, key, memory):
        outer = environment.reread or (lambda rollouts, views: list(rollouts))
        reread = lambda rollouts, views: outer(shortened(rollouts, views, share, shown), views)
        rollouts, memory = method.collect(environment._replace(reread=reread), examples, key, memory)
        return shortened(rollouts, late, share, shown), memory

    return method._replace(collect=collect)


def shortened(rollouts: Sequence[Rollout], views: Collection[str], share: float, shown: Shown) -> list[Rollout]:
    """The rollouts whose `views` read a part of the privileged text of their last turn, or of all beyond the question."""

    def reduced(rollout: Rollout, view: str) -> Messages | None:
        chat = rollout.contexts[view]
        if chat is None:
            return None
        content, asked = chat[-1]["content"], question(rollout.example)[-1]["content"]
        told = chat[-1].get("privileged") or content.replace(asked, "", 1).strip()
        left = part(told, share, shown, rollout.example.id)
        if not told:
            return chat
        return (*chat[:-1], {**chat[-1], "content": left.join(content.rsplit(told, 1)), "privileged": left})

    return [r.read_by(**{view: reduced(r, view) for view in views if view in r.contexts}) for r in rollouts]


def part(text: str, share: float, shown: Shown, seed: str) -> str:
    """A share of a text's words, at least one: those at its beginning, or random ones, with `MASK` for the others."""
    words = list(re.finditer(r"\S+", text))
    count = max(1, round(share * len(words))) if words else 0
    if shown == "beginning":
        return text[: words[count - 1].end()] if words else text
    kept = set(random.Random(seed).sample(range(len(words)), count))
    place = iter(range(len(words)))
    return re.sub(r"\S+", lambda word: word.group() if next(place) in kept else MASK, text)
