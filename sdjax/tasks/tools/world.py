"""A world of tools: a turn with calls is answered by the tools, a turn without one is the answer, which the task's verifier judges."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from sdjax.tasks.judging import from_threads, marked_from_threads
from sdjax.tasks.tools.calls import Call, Style, answer_in, calls_in
from sdjax.tasks.tools.tool import CallError, Tool, called, check_tools
from sdjax.tasks.worlds import in_world
from sdjax.types import Example, Messages, Step, Task, Verdict, World

MOST_CALLS = 8
"""Calls of one turn that are answered."""

NO_ANSWER = "You used all turns for calls and gave no final answer."


def with_tools(task: Task, tools: Sequence[Tool], *, style: Style, described: bool, turns: int = 4) -> Task:
    """The task in which attempts may call tools; its verifier judges the first turn that has no call.

    Args:
      style: the form of calls.
      described: the tools are described in the system turn, for chat templates that take no `tools`.
      turns: how many turns an attempt has, the answer included.

    Raises: `TaskError` for tools that cannot be used.
    """
    check_tools(tools)
    step = functools.partial(answered, tools=tuple(tools), verify=task.verify, style=style, turns=turns)
    if marked_from_threads(task.verify):
        step = from_threads(step)
    reset = functools.partial(opening, tools=tuple(tools) if described else ())
    return in_world(task, World(reset, step, turns))


def opening(example: Example, tools: Sequence[Tool]) -> Messages:
    """The example's prompt, with a description of the tools in its system turn."""
    if not tools:
        return example.prompt
    first = example.prompt[0]
    said = description(tools)
    if first["role"] == "system":
        return ({**first, "content": f"{first['content']}\n\n{said}"}, *example.prompt[1:])
    return ({"role": "system", "content": said}, *example.prompt)


def description(tools: Sequence[Tool]) -> str:
    """What the templates of Hermes and Qwen say of tools."""
    schemas = "\n".join(json.dumps(tool.schema) for tool in tools)
    return (
        f"You may call these functions:\n<tools>\n{schemas}\n</tools>\n\nFor each call write a JSON object within tags:\n"
        '<tool_call>\n{"name": <function name>, "arguments": <arguments as a JSON object>}\n</tool_call>'
    )


def answered(
    example: Example,
    messages: Messages,
    *,
    tools: Sequence[Tool],
    verify: Callable[[Example, str], Verdict],
    style: Style,
    turns: int,
) -> Step:
    """What the tools say to the calls of the last turn, or the verdict on it."""
    last = messages[-1]
    text = last.get("raw", last["content"])
    calls = calls_in(text, style)
    if not calls:
        verdict = verify(example, answer_in(last["content"], text, style))
        return Step((), verdict.reward, True, verdict.feedback, verdict.measures)
    used = sum(turn["role"] == "assistant" for turn in messages[len(example.prompt) :])
    if used >= turns:
        return Step((), 0.0, True, NO_ANSWER)
    said = [observed(call, tools) for call in calls[:MOST_CALLS]]
    errors = sum(text.startswith(ERROR) for _, text in said)
    observations = tuple({"role": "tool", "name": name, "content": content} for name, content in said)
    return Step(observations, measures={"tool_calls": float(len(said)), "tool_errors": float(errors)})


ERROR = "Error: "


def observed(call: Call, tools: Sequence[Tool]) -> tuple[str, str]:
    """The name of the tool and what it says, or what was wrong with the call."""
    name = call.name or "tool"
    if call.problem:
        return name, ERROR + call.problem
    try:
        return name, called(tools, call.name, arguments_of(call, tools))
    except CallError as error:
        return name, ERROR + str(error)


def arguments_of(call: Call, tools: Sequence[Tool]):
    """The arguments of a call; those that were spelled out as texts by the types of the schema."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if not call.spelled or tool is None:
        return call.arguments
    found = {}
    for name, value in call.arguments.items():
        kind = tool.parameters["properties"].get(name, {}).get("type", "string")
        try:
            found[name] = value if kind == "string" else json.loads(value)
        except ValueError:
            found[name] = value
    return found
