"""Conversations turn by turn: each turn a row of its own, whose teachers read what followed this turn, and no other lesson."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from sdjax.collect.conversations import transcript
from sdjax.collect.hindsight import aftermath
from sdjax.errors import InputError
from sdjax.types import Messages, Method, Objective, Rollout

Lesson = Callable[[Rollout, int], Messages | None]
"""`(attempt, number of a turn from 0) -> what teachers of that turn read`; `None` where there is nothing to say."""


class TurnError(InputError, ValueError):
    """A method cannot be taught turn by turn; the message says why."""


def by_turn(method: Method, turns: int, lesson: Lesson = aftermath) -> Method:
    """The method whose told views read a lesson for each turn of an attempt, and score the tokens of that turn only.

    Every attempt becomes `turns` rows, the most that it can have: row `t` is the stream up to the end of turn `t`, of
    which that turn is trained.  So the teacher of turn `t` reads the question, the lesson of turn `t`, and the
    conversation before it; what follows later turns is nowhere.  Rows of turns that did not happen train nothing.  A trained token stands in one row:
    means over tokens are those of whole attempts, means over sequences are means over turns, and an attempt weighs as
    much as any other in advantages and in the log.

    Raises: TurnError if no view of the loss is told anything, or one scores while the batch is collected.
    """
    told = {name for o in method.objectives for name, view in o.views.items() if view.told}
    if not told:
        raise TurnError(
            "no view of this method's loss is told more than the question: it has nothing to learn turn by turn"
        )
    if early := sorted(told & method.early.keys()):
        raise TurnError(
            f"view {early[0]!r} scores whole attempts while they are collected, before there is a lesson for each turn: take a "
            "teacher that scores during the update"
        )

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        return [row for rollout in rollouts for row in rows_of(rollout, turns, told, lesson)], memory

    return method._replace(collect=collect, objectives=tuple(apart(o, told) for o in method.objectives))


def apart(objective: Objective, told: Collection[str]) -> Objective:
    """The objective whose told views may read another context in each row."""
    views = {n: view._replace(per_rollout=True) if n in told else view for n, view in objective.views.items()}
    return objective._replace(views=views)


def rows_of(rollout: Rollout, turns: int, told: Collection[str], lesson: Lesson) -> list[Rollout]:
    """The `turns` rows of an attempt; one that is no conversation is a row as it is."""
    rows = [row_of(rollout, number, told, lesson(rollout, number)) for number in range(len(rollout.turns))]
    rows = rows or [rollout]
    nothing = dataclasses.replace(part(rollout, 1), trained=(False,)).read_by(**dict.fromkeys(told))
    return [*rows, *[nothing] * (turns - len(rows))]


def row_of(rollout: Rollout, number: int, told: Collection[str], chat: Messages | None) -> Rollout:
    """A turn of an attempt: all before it is read, the turn itself is trained."""
    turn, row = rollout.turns[number], part(rollout, rollout.turns[number].end)
    own = row.trained or (True,) * len(row.tokens)
    trained = tuple(yes and place >= turn.start for place, yes in enumerate(own))
    before = rollout.turns[: number + 1]
    row = dataclasses.replace(row, trained=trained, turns=before, text=transcript(before))
    return row.read_by(**dict.fromkeys(told, chat))


def part(rollout: Rollout, end: int) -> Rollout:
    """An attempt up to its first `end` tokens, with what belongs to them."""
    short: Callable[[Any], Any] = lambda value: value[:end] if np.ndim(value) else value
    return dataclasses.replace(
        rollout,
        tokens=rollout.tokens[:end],
        logprobs=rollout.logprobs[:end],
        trained=None if rollout.trained is None else rollout.trained[:end],
        extras={name: short(value) for name, value in rollout.extras.items()},
        scores={name: type(s)(*(x[:end] for x in s)) for name, s in rollout.scores.items()},
    )
