"""Calls of tools in a policy's turn, in the form that its chat template teaches: text to names and arguments."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from sdjax.tasks.completions import split

Style = Literal["hermes", "llama3", "harmony", "mistral"]
"""Hermes and Qwen (`<tool_call>`), Llama 3 (JSON, `<|python_tag|>`), gpt-oss (`commentary to=functions.x`), Mistral."""


class Call(NamedTuple):
    """A call; `problem` says why it cannot be read as one.

    `spelled`: the arguments are texts, and those of other types are still to be read as JSON.
    """

    name: str
    arguments: Any
    problem: str = ""
    spelled: bool = False


def style_of(template: str) -> Style:
    """The form of calls in a chat template; `hermes` where it has none."""
    marks = {"<|channel|>": "harmony", "[TOOL_CALLS]": "mistral", "<tool_call>": "hermes"}
    marks |= {"python_tag": "llama3", "ipython": "llama3"}
    return next((style for mark, style in marks.items() if mark in template), "hermes")


def calls_in(text: str, style: Style) -> list[Call]:
    """The calls in a turn, in order, after its thinking; `text` has all special tokens but the end of the turn."""
    said = text if style == "harmony" else split(text).answer
    return {"hermes": hermes, "llama3": llama3, "harmony": harmony, "mistral": mistral}[style](said)


def answer_in(content: str, text: str, style: Style) -> str:
    """What a turn without calls answers: its content, or what gpt-oss says on its channel `final`."""
    if style != "harmony" or "<|message|>" not in text:
        return content
    final = re.findall(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\||\Z)", text, re.DOTALL)
    return final[-1] if final else ""


# ---- the forms ------------------------------------------------------------------------------------------------------


def hermes(text: str) -> list[Call]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or Qwen3-Coder's `<function=...>` inside."""
    bodies = re.findall(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", text, re.DOTALL)
    return [spelled(body) if body.lstrip().startswith("<function=") else from_json(body) for body in bodies]


def spelled(body: str) -> Call:
    """`<function=name><parameter=x>value</parameter></function>`."""
    name = re.match(r"\s*<function=([^>\s]*)\s*>", body)
    if name is None:
        return Call("", None, "the function's name cannot be read")
    found = re.findall(r"<parameter=([^>]*)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
    return Call(name[1], {key.strip(): value for key, value in found}, spelled=True)


def llama3(text: str) -> list[Call]:
    """JSON objects with `name` and `parameters`, after `<|python_tag|>` or as the whole turn; `<function=name>{...}`.

    What stands after the tag and is no JSON is a program.
    """
    named = re.findall(r"<function=([^>\s]*)>(.*?)(?:</function>|\Z)", text, re.DOTALL)
    if named:
        return [from_json(body, name=name) for name, body in named]
    _, tag, after = text.partition("<|python_tag|>")
    body = (after if tag else text).strip()
    if tag and not body.startswith("{"):
        return [Call("python", {"code": body})] if body else []
    if not body.startswith("{") or not (tag or '"name"' in body):
        return []
    return [from_json(each) for each in objects(body)]


def harmony(text: str) -> list[Call]:
    """Messages to `functions.x`, wherever in the header the recipient stands."""
    header = r"to=functions\.([\w.-]+)((?:(?!<\|message\|>|<\|start\|>|<\|end\|>).)*)<\|message\|>"
    found = re.findall(header + r"(.*?)(?=<\|call\|>|<\|end\|>|<\|start\|>|\Z)", text, re.DOTALL)
    return [from_json(body, name=name) for name, _, body in found]


def mistral(text: str) -> list[Call]:
    """`[TOOL_CALLS]` and a list of objects, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    found: list[Call] = []
    for body in text.split("[TOOL_CALLS]")[1:]:
        name, args, rest = body.partition("[ARGS]")
        if args:
            found.append(from_json(rest, name=name.strip()))
            continue
        value = read(body)
        found += [as_call(each) for each in value] if isinstance(value, list) else [from_json(body)]
    return found


# ---- JSON -----------------------------------------------------------------------------------------------------------


def read(text: str) -> Any:
    """The JSON value of a text; `ValueError` as a value where it is none."""
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def from_json(text: str, name: str | None = None) -> Call:
    """A call from a JSON object; with a `name` the object holds the arguments alone."""
    value = read(text)
    if isinstance(value, ValueError):
        return Call(name or "", None, f"the call is not valid JSON ({value})")
    return as_call(value) if name is None else Call(name, value)


def as_call(value: Any) -> Call:
    """A call from an object with `name` and `arguments` (or `parameters`), or with these under `function`."""
    value = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", None, 'a call must be a JSON object with "name" and "arguments"')
    return Call(value["name"], value.get("arguments", value.get("parameters", {})))


def objects(text: str) -> list[str]:
    """JSON objects that stand one after another, whatever is between them; what cannot be read is the last one."""
    found, decoder, at = [], json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return [*found, text[at:]]
        found.append(text[at:end])
        at = text.find("{", end)
    return found
