"""What a teacher reads, made to fit: privileged text is cut first, the question never; where that fails, no row is trained.

A chat that is not its example's prompt (a lesson, a question with demonstrations) may have `Shapes.teacher_context`
tokens.  How long it gets is known only when peers have written, in the middle of a run: it must never end one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.engine.chats import render
from sdjax.engine.tokens import Shapes, cut_privileged, encode_context, refuse
from sdjax.types import Messages, Rollout, View


class Fitted(NamedTuple):
    """Rollouts whose contexts fit, how many chats were cut, and how many rows are not trained since one cannot be."""

    rollouts: list[Rollout]
    cut: int
    left_out: int


def fitted(rollouts: Sequence[Rollout], views: Mapping[str, View], tokenizer: Any, shapes: Shapes) -> Fitted:
    """Makes what the views read fit; prompts as they stand in the data are left to `collate`.

    A row of which one view can read nothing is kept with an empty context there, and is not trained by any.  Without
    `shapes.teacher_context` nothing is done.
    """
    if shapes.teacher_context is None:
        return Fitted(list(rollouts), 0, 0)
    counts = {name: functools.partial(length_of, tokenizer, view.template) for name, view in views.items()}
    known: dict[str, Messages | None] = {}  # rows of a group often read the same
    found, cut, left_out = [], 0, 0
    for rollout in rollouts:
        contexts = {name: rollout.contexts.get(name) for name in views}
        long = {name: chat for name, chat in contexts.items() if chat is not None and chat != rollout.example.prompt}
        changed = {}
        for name, chat in long.items():
            key = repr((chat, rollout.example.prompt, views[name].template))
            if key not in known:
                known[key] = shortened(chat, rollout.example.prompt, counts[name], shapes.teacher_context)
            if known[key] != chat:
                changed[name] = known[key]
        unread = any(chat is None for chat in changed.values())
        cut, left_out = cut + (bool(changed) and not unread), left_out + unread
        rollout = rollout.read_by(**changed) if changed else rollout
        found.append(dataclasses.replace(rollout, trained=(False,) * len(rollout.tokens)) if unread else rollout)
    return Fitted(found, cut, left_out)


def length_of(tokenizer: Any, template: Mapping[str, Any] | None, chat: Messages) -> int:
    """Tokens of a chat by a view's options of the chat template."""
    return len(render(tokenizer, chat, template))


def encoded(
    tokenizer: Any, chat: Messages, shapes: Shapes, template: Mapping[str, Any] | None = None
) -> list[int] | None:
    """Token ids of a chat that somebody writes after; `None` where it does not fit and cannot be cut.

    A chat with privileged text may have `shapes.teacher_context` tokens.  Without such a limit, and for prompts that
    `shapes.too_long` shortens, it is as in `encode_context`.

    Raises: LengthError as `encode_context`.
    """
    ids, lesson = render(tokenizer, chat, template), bool(chat[-1].get("privileged"))
    if len(ids) <= shapes.context:
        return ids
    if shapes.teacher_context is None or (shapes.too_long is not refuse and not lesson):
        return encode_context(tokenizer, chat, shapes, template)
    count = functools.partial(length_of, tokenizer, template)
    ids = render(tokenizer, cut_privileged(chat, count, shapes.lesson), template)
    return ids if len(ids) <= shapes.lesson else None


def shortened(chat: Messages, prompt: Messages, count: Callable[[Messages], int], limit: int) -> Messages | None:
    """The chat in at most `limit` tokens: without the end of its privileged text, then without turns before the prompt's.

    `None` where that is not enough.
    """
    if count(chat) <= limit:
        return chat
    chat = cut_privileged(marked(chat, prompt), count, limit)
    system = chat[:1] if chat[0]["role"] == "system" else ()
    turns, own = chat[len(system) :], max(1, sum(turn["role"] != "system" for turn in prompt))
    while len(turns) > own and count((*system, *turns)) > limit:
        turns = turns[min(2, len(turns) - own) :]
    return (*system, *turns) if count((*system, *turns)) <= limit else None


def marked(chat: Messages, prompt: Messages) -> Messages:
    """The chat with its privileged text named, where whoever wrote it has not: all but the question."""
    last, asked = chat[-1], prompt[-1]["content"]
    if last.get("privileged") or asked not in last["content"]:
        return chat
    before, after = last["content"].split(asked, 1)
    told = {"privileged": after, "question": before + asked} if len(after) >= len(before) else {"privileged": before}
    return (*chat[:-1], {**last, **told})
