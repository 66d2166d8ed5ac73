"""Tasks whose attempts are conversations with a world (`sdjax.types.World`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from sdjax.tasks.data.stored import kept
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Messages, Task, World


def in_world(task: Task, world: World) -> Task:
    """The task in which every problem begins as the world begins it, and every attempt is a conversation with the world.

    Raises: `TaskError` naming the example whose beginning cannot be used.
    """
    begun = lambda examples: kept(dataclasses.replace(e, prompt=beginning(e, world)) for e in examples)
    if world.turns < 1:
        raise TaskError(f"a world of {world.turns} turns: expected at least 1.")
    return task._replace(train=begun(task.train), test=begun(task.test), world=world)


def beginning(example: Example, world: World) -> Messages:
    """What the policy reads first.  Raises: `TaskError` where that is no chat that ends with a user turn."""
    messages = tuple(world.reset(example))
    wrong = problem_of(messages)
    if wrong:
        raise TaskError(f"example {example.id!r}: the world begins with a chat that {wrong}.")
    return messages


def problem_of(messages: Sequence) -> str:
    """What is wrong with a chat; empty if nothing is."""
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "is not a list of turns with `role` and `content`"
    if messages[-1].get("role") not in ("user", "tool"):
        return f"ends with the turn of {messages[-1].get('role')!r}; expected a user turn"
    try:
        json.dumps(messages)
    except (TypeError, ValueError) as error:
        return f"JSON cannot hold ({error})"
    return ""
