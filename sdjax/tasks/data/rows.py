"""From a row to its example: the chat, the answers and what is privileged, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.tasks.data.fields import FIELDS, bad, kind, text, unpacked
from sdjax.types import Example, Messages

ROLES = ("system", "user", "assistant", "tool")
LAST = ("user", "tool")
"""Whose turn an answer may follow."""

TURN = ("role", "content", "name", "tool_calls", "tool_call_id")
"""What a turn may say, as chat templates know it."""


def example_of(row: Mapping[str, Any], where: str, default_id: str, names: Mapping[str, str] | None = None) -> Example:
    """The example of a row; `where` stands in the sentence of a `TaskError`, `names` are the fields' names in the file."""
    names = names or {}
    optional = {
        name: text(row, name, where, said=names.get(name, ""))
        for name in ("solution", "feedback")
        if row.get(name) is not None
    }
    return Example(
        id=text(row, "id", where, numbers=True, said=names.get("id", "")) if row.get("id") is not None else default_id,
        prompt=prompt_of(row, where, names),
        answer=answer_of(row, where, names),
        meta={name: value for name, value in row.items() if name not in FIELDS},
        **optional,
    )


def answer_of(row: Mapping[str, Any], where: str, names: Mapping[str, str]) -> str | tuple[str, ...]:
    """The right answer, or all of them where the field is a list; none of a text to imitate.  Raises: `TaskError`."""
    answer, said = row.get("answer"), names.get("answer", "answer")
    if "answer" not in row:
        found = ", ".join(sorted(names.get(n, n) for n in row))
        other = "or only that of a text to imitate, as --fields solution=COLUMN"
        raise bad(where, said, f"is missing; found {found}; name its column, as --fields answer=COLUMN, {other}")
    if answer == ():
        return ()
    listed = unpacked(answer)  # in a table; `[1, 2]` is an answer, `["1", "2"]` are two
    if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
        answer = listed
    if isinstance(answer, Mapping) and isinstance(answer.get("text"), list):  # SQuAD's
        answer = answer["text"]
    if not isinstance(answer, list) or not answer:
        return text({"answer": answer}, "answer", where, numbers=True, said=said)
    named = {f"{said}, number {i}": each for i, each in enumerate(answer, start=1)}
    return tuple(dict.fromkeys(text(named, name, where, numbers=True) for name in named))


def prompt_of(row: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> Messages:
    """The chat of a row: a text, or turns that may be JSON in a text.  Raises: `TaskError`."""
    names = names or {}
    if ("prompt" in row) == ("messages" in row):
        only = f"found only {', '.join(sorted(row)) or 'an empty object'}; name its column, as --fields prompt=COLUMN"
        raise bad(
            where,
            "prompt",
            f"or `messages` must be given, one of the two; {'both are there' if 'prompt' in row else only}",
        )
    form = "prompt" if "prompt" in row else "messages"
    said, turns = names.get(form, form), unpacked(row[form])
    if form == "prompt" and not (isinstance(turns, list) and turns and all(isinstance(t, Mapping) for t in turns)):
        return ({"role": "user", "content": text(row, "prompt", where, said=said)},)
    if not isinstance(turns, list) or not turns:
        raise bad(where, said, f"must be a list of turns, each with `role` and `content`; found {kind(turns)}")
    chat = tuple(turn_of(turn, f"{said}, turn {i}", where, i) for i, turn in enumerate(turns, start=1))
    if chat[-1]["role"] not in LAST:
        raise bad(where, said, f"must end with a user turn; the last turn is the {chat[-1]['role']}'s")
    return chat


def turn_of(turn: Any, field: str, where: str, number: int) -> dict[str, Any]:
    """A turn with its content as one text.  Raises: `TaskError`."""
    own = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
    calls = own.get("role") == "assistant" and bool(own.get("tool_calls"))
    if calls:
        own = {"content": "", **own, "tool_calls": opened(own["tool_calls"])}
    if not {"role", "content"} <= {*own} <= {*TURN}:
        found = f"the fields {', '.join(sorted(own)) or '(none)'}" if isinstance(turn, Mapping) else kind(turn)
        raise bad(where, field, f"must be an object with `role` and `content`; found {found}")
    if own["role"] not in ROLES:
        raise bad(where, field, f"has the role {own['role']!r}; expected one of {', '.join(ROLES)}")
    own["content"] = joined(own["content"], field, where)
    if not (calls and own["content"] == ""):
        text(own, "content", f"{where}, turn {number}")
    return {name: own[name] for name in TURN if name in own}


def opened(calls: Any) -> Any:
    """Calls with their arguments as an object, as chat templates write them, and not as the text that servers send."""
    if not isinstance(calls, list) or not all(
        isinstance(c, Mapping) and isinstance(c.get("function"), Mapping) for c in calls
    ):
        return calls
    asked = lambda function: {**function, "arguments": unpacked(function.get("arguments"))}
    return [{**call, "function": asked(call["function"])} for call in calls]


def joined(content: Any, field: str, where: str) -> Any:
    """Parts of text as one text.  Raises: `TaskError` for parts that are none, such as images."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            found = part.get("type", "a part without text") if isinstance(part, Mapping) else kind(part)
            raise bad(where, field, f"holds {found!r} among its parts; only parts of text can be read")
    return "".join(part["text"] for part in content)
