"""Tools: functions that a policy may call, with a JSON schema of their arguments; a bad call gives an error that it can read."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.errors import InputError, nearest
from sdjax.tasks.errors import TaskError

LONGEST = 2000
"""Characters of an observation; the middle of a longer one is left out."""


class CallError(InputError):
    """A call that cannot be answered; its text is what the policy reads."""


class Tool(NamedTuple):
    """A function with a name, what it is for, its parameters as a JSON schema, and `run(arguments) -> text`.

    `run` may be called from several threads at once, raises `CallError` for arguments that it cannot use, and is given up
    after `seconds`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], str]
    seconds: float = 30.0

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        said = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": said}


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises `TaskError` for tools that share a name, or a schema that is none."""
    names = [tool.name for tool in tools]
    for tool in tools:
        if names.count(tool.name) > 1:
            raise TaskError(
                f"there are {names.count(tool.name)} tools with the name {tool.name!r}: rename all but one."
            )
        properties = tool.parameters.get("properties")
        if tool.parameters.get("type") != "object" or not isinstance(properties, Mapping):
            raise TaskError(
                f'tool {tool.name!r}: its parameters must be a schema {{"type": "object", "properties": ...}}.'
            )
        missing = [name for name in tool.parameters.get("required", ()) if name not in properties]
        if missing:
            raise TaskError(f"tool {tool.name!r}: the required parameter {missing[0]!r} is not among its properties.")


def called(tools: Sequence[Tool], name: str, arguments: Any) -> str:
    """What a call gives, at most `LONGEST` characters.

    Raises: `CallError` for an unknown tool, arguments that are not of its schema, a tool that refuses them, that fails or that
    takes too long.
    """
    names = [tool.name for tool in tools]
    if name not in names:
        raise CallError(f"there is no tool {name!r}; there are {', '.join(names) or 'none'}{nearest(name, names)}")
    tool = tools[names.index(name)]
    return shortened(within_time(tool, checked(tool, arguments)))


def checked(tool: Tool, arguments: Any) -> dict[str, Any]:
    """Arguments that have the types of the schema.  Raises: `CallError`."""
    if isinstance(arguments, str):  # some models write the object as a text
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise CallError(f"{tool.name}: the arguments are not a JSON object") from None
    if not isinstance(arguments, dict):
        raise CallError(f"{tool.name}: the arguments must be a JSON object, not {kind_of(arguments)}")
    properties = tool.parameters["properties"]
    for name in tool.parameters.get("required", ()):
        if name not in arguments:
            raise CallError(f"{tool.name}: the argument {name!r} is missing")
    for name, value in arguments.items():
        if name not in properties:
            raise CallError(f"{tool.name} has no argument {name!r}; it has {', '.join(properties) or 'none'}")
        check_value(f"{tool.name}: the argument {name!r}", value, properties[name])
    return arguments


KINDS = {
    "string": str,
    "boolean": bool,
    "object": dict,
    "array": list,
    "integer": int,
    "number": int | float,
    "null": type(None),
}


def check_value(what: str, value: Any, schema: Mapping[str, Any]) -> None:
    """Raises `CallError` unless a value has one of the schema's types, is one of its `enum`, and so are its items."""
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    fits = lambda name: (
        isinstance(value, KINDS.get(name, object))
        and (name == "boolean" or name not in KINDS or not _bool_as_number(name, value))
    )
    if names and not any(map(fits, names)):
        raise CallError(f"{what} must be {' or '.join(names)}, not {kind_of(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise CallError(f"{what} must be a finite number")
    if "enum" in schema and value not in schema["enum"]:
        raise CallError(f"{what} must be one of {', '.join(map(str, schema['enum']))}")
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for item in value:
            check_value(f"an item of {what}", item, schema["items"])


def _bool_as_number(name: str, value: Any) -> bool:
    return name in ("integer", "number") and isinstance(value, bool)


def kind_of(value: Any) -> str:
    """A value's type in the words of JSON."""
    names = {bool: "a boolean", str: "a string", dict: "an object", list: "an array", type(None): "null"}
    return names.get(type(value), "a number")


def within_time(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """What the tool says; raises `CallError` where it refuses, fails, or says nothing within its `seconds`.

    A tool that hangs keeps its thread, which ends with the process.
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(str(tool.run(arguments)))
        except CallError as error:
            found.append(CallError(f"{tool.name}: {error}"))
        except Exception as error:  # noqa: BLE001 (whatever a tool trips over is for the policy to read)
            found.append(CallError(f"{tool.name} failed: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(tool.seconds)
    if not found:
        raise CallError(f"{tool.name} gave no answer within {tool.seconds:g} seconds")
    if isinstance(found[0], CallError):
        raise found[0]
    return found[0]


def shortened(text: str, most: int = LONGEST) -> str:
    """A text without its middle where it is too long."""
    if len(text) <= most:
        return text
    left_out = len(text) - most
    return f"{text[: most // 2]}\n[... {left_out} characters are left out ...]\n{text[-(most - most // 2) :]}"
