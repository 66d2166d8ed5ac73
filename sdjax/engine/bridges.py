"""What stands between two turns of a policy in a conversation: as the chat template writes it, in token ids.

The policy's turns are never rendered: a bridge begins after the token that ended the last one and ends where the policy
speaks next.  Templates that change earlier turns (Qwen3 leaves out their thinking) therefore change nothing here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.engine.chats import BREAKS, broken, cannot, controls_in, encoded
from sdjax.models.templates import MARK, TemplateError, turn_ends, written
from sdjax.types import Messages

PLACE = "\ue0ab"
"""A character that stands for an observation where ways of writing one are tried."""

MIDDLE = "<|end|>"
"""What ends a turn of gpt-oss in the middle of a chat; its last turn ends with another token."""

Ways = ("plain", "called", "user")
"""How observations can be written: after an assistant's text; after a call of the assistant's, which some templates want
before a tool's turn; or as the user's turns, where a template knows no tools."""


def bridge(
    tokenizer: Any, observations: Messages, stop: Sequence[int], template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids from after the end of an assistant's turn, over the observations, to where the assistant speaks next.

    The end of the turn itself is left out: the policy has written it, as any of the tokens `stop`.  A control token in an
    observation is encoded as text.

    Raises: `TemplateError` where the template writes observations in no way, `ChatError` as `render`.
    """
    contents = [str(turn["content"]).replace(MARK, "").replace(PLACE, "") for turn in observations]
    if getattr(tokenizer, "chat_template", None) is None:
        write, own = (lambda some: "\n".join(["", *some, ""])), ""
    else:
        own = str(tokenizer.chat_template)
        how = way(tokenizer, own, tuple(turn["role"] for turn in observations), tuple(stop), text_of(template))
        write = lambda some: after_turn(tokenizer, observations, some, how, template)
    if not any(controls_in(tokenizer, own, text) for text in contents):
        return after_end(tokenizer, own, tokenizer.encode(write(contents), add_special_tokens=False), stop)
    for mark in BREAKS:
        if mark not in "".join(contents):
            ids = encoded(tokenizer, write([broken(tokenizer, own, text, mark) for text in contents]), mark, False)
            if ids is not None:
                return after_end(tokenizer, own, ids, stop)
    raise cannot(controls_in(tokenizer, own, "\n".join(contents))[0])


def text_of(template: Mapping[str, Any] | None) -> str:
    """Options of a chat template as a text, which can key a cache."""
    return json.dumps(dict(template or {}), sort_keys=True)


@functools.lru_cache(maxsize=64)
def way(tokenizer: Any, own: str, roles: tuple[str, ...], stop: tuple[int, ...], template: str) -> str:
    """Which of `Ways` the template has for observations of these roles.

    Raises: `TemplateError` where none shows them.
    """
    turns, why = [{"role": role, "content": PLACE} for role in roles], "it does not write them"
    for how in Ways if "tool" in roles else ("plain",):
        try:
            text = after_turn(tokenizer, turns, [PLACE] * len(turns), how, json.loads(template))
        except TemplateError as error:
            why = str(error)
            continue
        ends = ends_in(tokenizer, own, tokenizer.encode(text, add_special_tokens=False), stop)
        if text.count(PLACE) == len(turns) and (how != "called" or ends):
            return how
    raise TemplateError(f"the chat template cannot write what a policy observes ({', '.join(roles)}): {why}")


def after_turn(
    tokenizer: Any, observations: Messages, contents: Sequence[str], how: str, template: Mapping[str, Any] | None
) -> str:
    """What the template writes after an assistant's turn that these observations follow.  Raises: `TemplateError`."""
    called = {"content": MARK}
    if how == "called":
        names = [turn.get("name") or "tool" for turn in observations if turn["role"] == "tool"]
        call = lambda i, name: {
            "id": ident(i),
            "type": "function",
            "function": {"name": name, "arguments": {"x": MARK}},
        }
        called = {"content": "", "tool_calls": [call(i, name) for i, name in enumerate(names)]}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", **called}]
    for i, (turn, content) in enumerate(zip(observations, contents, strict=True)):
        role = "user" if how == "user" else turn["role"]
        named = {"name": turn.get("name") or "tool", "tool_call_id": ident(i)} if role == "tool" else {}
        turns.append({"role": role, "content": content, **named})
    text = written(tokenizer, turns, **template or {})
    if MARK not in text:
        raise TemplateError("the chat template does not write what the assistant says before an observation")
    return text.rpartition(MARK)[2]


def ident(number: int) -> str:
    """The id of a call: nine letters and digits, as Mistral's templates want it."""
    return f"call{number:05d}"


def ends_in(tokenizer: Any, own: str, ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The places after tokens that end a turn."""
    middle = tokenizer.get_vocab().get(MIDDLE)
    ends = {*stop, *(turn_ends(tokenizer, own) if own else ()), middle}
    return [i + 1 for i, token in enumerate(ids) if token in ends]


def after_end(tokenizer: Any, own: str, ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """What follows the first token that ends a turn; everything where none does."""
    return list(ids[next(iter(ends_in(tokenizer, own, ids, stop)), 0) :])
