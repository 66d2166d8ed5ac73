"""Conversations in the forms of public data sets: ShareGPT, Hermes, ToolACE and OpenAI's, as turns with `role` and `content`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.tasks.data.fields import bad, unpacked

COLUMNS = ("messages", "conversations", "conversation", "dialogue")
SYSTEM = ("system", "system_prompt")
"""Columns, the first that a row has."""

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Roles by other names."""


def dialogue_of(row: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]] | None:
    """The column of a row's conversation and its turns; `None` where there is none."""
    for column in COLUMNS:
        turns = unpacked(row.get(column))
        if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns):
            return column, [turn_of(turn) for turn in turns]
    return None


def turn_of(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn under the names that chat templates know."""
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    rest = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
    return {"role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": content, **rest}


def last_said(turns: Sequence[Mapping[str, Any]], column: str, where: str) -> Any:
    """What the assistant says at the end.  Raises: `TaskError` where that is a call outside the text."""
    if turns[-1].get("tool_calls") and not turns[-1]["content"]:
        raise bad(
            where,
            column,
            "ends with `tool_calls` and no text, and only a text can be imitated: write the call into the content of that "
            "turn as the model writes it, or let the tool's and the assistant's turns follow",
        )
    return turns[-1]["content"]


def with_system(turns: Any, row: Mapping[str, Any]) -> tuple[Any, str]:
    """A question with the text of a system column before it, and that column; as it is, and no name, where there is none."""
    column = next((name for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), "")
    chat = unpacked(turns)
    chat = (
        chat
        if isinstance(chat, list) and chat and isinstance(chat[0], Mapping)
        else [{"role": "user", "content": turns}]
    )
    if not column or chat[0].get("role") == "system":
        return turns, ""
    return [{"role": "system", "content": row[column]}, *chat], column
