"""Controls: what a method's effect is compared with.  Each takes a method and returns one that differs in one thing.

Whether privilege, its relevance, the placement of token weights or mere shortness makes the difference is asked in the
same way of every method.  Source of the list: the survey of section 5 in the field's literature of 2026 (OP2SD,
arXiv:2608.09228; Purified OPSD, arXiv:2607.02234; OPSA, arXiv:2608.31046 is the method `opsa`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.collect.contexts import question, rewrite_last
from sdjax.collect.instruments import with_instruments
from sdjax.engine.policies import grouped
from sdjax.errors import InputError
from sdjax.kernels.weights import mean_one
from sdjax.types import Batch, Messages, Method, Objective, Rollout, Term

TeacherContext = Literal["matched", "mismatched", "reference-only", "none"]
TokenWeights = Literal["as-is", "shuffled", "mean-one"]


class ControlError(InputError, ValueError):
    """A control would change nothing about this method; the message says which and why."""


def controlled(
    method: Method,
    *,
    context: TeacherContext = "matched",
    weights: TokenWeights = "as-is",
    length_penalty: float = 0.0,
    diagnose: bool = False,
    success: float = 0.5,
) -> Method:
    """A method with the controls and instruments that the command line offers for every method.

    A control that would change nothing about the method is refused with a `ControlError`.

    The other two controls are methods or their options: no teacher at all is `opsa`, a matched budget of student
    rollouts is a larger group size.

    Args:
      context: what teachers read: the right context, that of another problem, the privileged text without the
        question, or the plain question.
      weights: per-token weights as they are, shuffled within each row, or rescaled to mean one.
      length_penalty: taken from rewards per 100 tokens, for advantages only: who is a success stays the same.
      diagnose: log overlap, entropy gap, fork and lock rates, log-ratios by outcome and on markers, and KL by position.
      success: the least reward of a correct row, for `diagnose` alone.
    """
    method = with_teacher_context(method, context)
    method = with_length_penalty(with_token_weights(method, weights), length_penalty)
    if diagnose and not any({"student", "teacher"} <= {*o.views} for o in method.objectives):
        raise ControlError(
            "control.diagnose: this method's loss has no view \"teacher\" beside the student's to compare; leave it out"
        )
    return with_instruments(method, success=success) if diagnose else method


def with_teacher_context(method: Method, control: TeacherContext) -> Method:
    """The method with another context for every view that is told more than the question (`View.told`).

    matched: as it is.  mismatched: the context of the next prompt of the batch (the same rollout's place in it); nothing
    where no other prompt has one.  reference-only: the privileged text without the question.  none: the plain question.
    A view that has nothing to say about a rollout still has nothing to say; every rollout, log-probability and
    parameter stays what it was.  Views that score while the batch is collected read the other context, too; what writes
    texts does not.

    Raises: ControlError if the method has no such view.
    """
    if control == "matched":
        return method
    late = {name for o in method.objectives for name, view in o.views.items() if view.told} - method.early.keys()
    if not late and not any(view.told for view in method.early.values()):
        raise ControlError(
            f"control.context={control}: this method scores with no teacher's context: no view is told more than the "
            "question; leave the control out, or take a method, or its lesson, that tells a teacher more"
        )
    reread = {"mismatched": mismatched, "reference-only": reference_only, "none": plain}[control]

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment._replace(reread=reread), examples, key, memory)
        return reread(rollouts, late), memory

    return method._replace(collect=collect)


def mismatched(rollouts: Sequence[Rollout], views: Collection[str]) -> list[Rollout]:
    """Every group reads what the next group that a view speaks about was told; the last one reads the first's.

    Where no other group is spoken about there is nothing to read: never the right context.
    """
    groups = grouped(rollouts)
    place = {id(r): i for rows in groups.values() for i, r in enumerate(rows)}
    spoken = lambda view, rows: [r.contexts[view] for r in rows if r.contexts.get(view) is not None]
    said = {view: {group: spoken(view, rows) for group, rows in groups.items()} for view in views}

    def other(rollout: Rollout, view: str) -> Messages | None:
        speaking = [group for group, chats in said[view].items() if chats]
        if rollout.contexts.get(view) is None or len(speaking) < 2:
            return None
        following = speaking[(speaking.index(rollout.group) + 1) % len(speaking)]
        return said[view][following][place[id(rollout)] % len(said[view][following])]

    return [r.read_by(**{view: other(r, view) for view in views if view in r.contexts}) for r in rollouts]


def reference_only(rollouts: Sequence[Rollout], views: Collection[str]) -> list[Rollout]:
    """The last turn is reduced to its privileged text (see `sdjax.collect.contexts`); turns before it stay.

    A turn that does not say what is privileged loses the question's text; nothing is read where nothing is left.
    """

    def reduced(rollout: Rollout, view: str) -> Messages | None:
        chat = rollout.contexts[view]
        if chat is None:
            return None
        asked = question(rollout.example)[-1]["content"]
        told = chat[-1].get("privileged") or chat[-1]["content"].replace(asked, "", 1).strip()
        return rewrite_last(chat, told, told) if told else None

    return [r.read_by(**{view: reduced(r, view) for view in views if view in r.contexts}) for r in rollouts]


def plain(rollouts: Sequence[Rollout], views: Collection[str]) -> list[Rollout]:
    """Every view reads the plain question."""
    ask = lambda r, view: None if r.contexts[view] is None else question(r.example)
    return [r.read_by(**{view: ask(r, view) for view in views if view in r.contexts}) for r in rollouts]


def with_token_weights(method: Method, control: TokenWeights, seed: int = 0) -> Method:
    """The method with its weights per token shuffled within each row, or rescaled to mean one over the population.

    Shuffling keeps each row's weights and their mean, and breaks their placement; a new permutation each step, the same
    for all credit of an objective.  Only what `Objective.credit` names changes: weights of rows and importance weights
    stay.  A credit with a sign is shuffled with its sign, and has no scale to rescale.

    Raises: ControlError if the method has no weights per token, or none that can be rescaled.
    """
    if control == "as-is":
        return method
    names = [name for objective in method.objectives for name in objective.credit]
    if not names:
        raise ControlError(
            f"control.weights={control}: this method, with these options, weighs all tokens of a row alike; leave the "
            "control out, or take a method with weights per token"
        )
    if control == "mean-one" and not any(isinstance(name, str) for name in names):
        raise ControlError(
            "control.weights=mean-one: this method adds its credit of a token to the advantage, so that there is no "
            "factor to rescale; control.weights=shuffled works"
        )
    return method._replace(objectives=tuple(reweighted(o, control, seed) for o in method.objectives))


def reweighted(objective: Objective, control: TokenWeights, seed: int) -> Objective:
    """One objective whose credit is shuffled or rescaled."""
    single = [name for name in objective.credit if isinstance(name, str)]
    paired = [name for pair in objective.credit if not isinstance(pair, str) for name in pair]

    def change(term: Term, batch: Batch, step: Array) -> Term:
        over = batch.mask & batch.valid[:, None]
        if term.over is not None:
            over = over & (term.over if term.over.ndim == 2 else term.over[:, None])
        weight = jnp.broadcast_to(term.weight, over.shape)
        if control == "mean-one":
            return term._replace(weight=mean_one(weight, over))
        return term._replace(weight=shuffled(weight, over, jax.random.fold_in(jax.random.key(seed), step)))

    def terms(batch: Batch, sig: dict[str, Array], step: Array) -> dict[str, Term]:
        found = objective.terms(batch, sig, step)
        changed = single if control == "mean-one" else [*single, *paired]
        return {**found, **{name: change(found[name], batch, step) for name in changed}}

    return objective._replace(terms=terms)


def shuffled(weight: Array, over: Array, key: Array) -> Array:
    """Weights `[B, T]` permuted within each row among the positions where `over`; 0 elsewhere."""
    rows = jnp.arange(weight.shape[0])[:, None]
    order = jnp.broadcast_to(jnp.arange(weight.shape[1], dtype=jnp.float32), weight.shape)
    random = jnp.where(over, jax.random.uniform(key, weight.shape), jnp.inf)
    source = jnp.argsort(random, axis=-1)
    target = jnp.argsort(jnp.where(over, order, jnp.inf), axis=-1)
    moved = jnp.zeros_like(weight).at[rows, target].set(jnp.take_along_axis(weight, source, axis=-1))
    return jnp.where(over, moved, 0.0)


def with_length_penalty(method: Method, coefficient: float) -> Method:
    """The twin that is only shorter: `coefficient` per 100 tokens is taken from every reward, for advantages only.

    What the verifier said stays: who is a success, who is shown as a peer, what is logged as the reward.  The penalty
    stands in the extra `SHAPING`, from the moment a rollout is judged.

    Raises: ControlError if no advantage of the method is made of rewards.
    """
    if coefficient == 0.0:
        return method
    if not any(objective.rewarded for objective in method.objectives):
        raise ControlError(
            f"control.length-penalty={coefficient:g}: no advantage of this method, with these options, is made of "
            "rewards, so that a penalty on them changes nothing; leave the control out"
        )
    shape = lambda rollout: -coefficient * len(rollout.tokens) / 100

    def collect(environment, examples, key, memory):
        return method.collect(environment._replace(shape=shape), examples, key, memory)

    return method._replace(collect=collect)
