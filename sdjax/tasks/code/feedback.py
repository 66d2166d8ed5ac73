"""What a teacher is told of a program that failed, in the words of SDPO's official code.

One runtime error if there is any, else one time limit, else the two shortest wrong cases; nothing when all is right.
Source: Huebotter et al. 2026 (SDPO), arXiv:2601.20802; `verl/utils/reward_score/feedback/code.py` of lasgroup/SDPO.  What is
different here: only tests that are shown are quoted; what the program wrote is indented, so that it cannot look like a
heading, and loses control characters and the form of control tokens, so that it cannot speak as somebody else.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig

from sdjax.tasks.code.judging import Failure, Judgement

NO_PROGRAM = "Incorrect Format: Put your code inside a ```python ... ``` block."

FIELD, INPUT_LINES, LONGEST = 250, 8, 2000
"""Characters of a field, lines of an input, characters in all."""

_TRACE = 1200
_HEADINGS = {
    "error": "Runtime Error",
    "ended": "Runtime Error",
    "malformed": "Runtime Error",
    "memory": "Memory Limit Exceeded",
    "time": "Time Limit Exceeded",
    "output": "Output Limit Exceeded",
}
_REMARKS = {
    "ended": "The program ended before it returned.",
    "malformed": "The function returned nothing that can be read.",
}
_CONTROL = re.compile(
    r"[^\S\n\t ]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ud800-\udfff]"
)
_CONTROL_TOKEN = re.compile(r"<(?=[^<>\n]{1,60}>)|\[(?=/?[A-Z_]{2,30}\])")
_HERE = sorted(
    {os.path.dirname(os.__file__), *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, sys.exec_prefix}
    | {os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)), os.path.expanduser("~")},
    key=len,
    reverse=True,
)


def feedback(judgement: Judgement) -> str:
    """The remark on a program; empty where it passes all tests."""
    if judgement.solved:
        return ""
    shown = [failure for failure in judgement.failures if failure.shown]
    if not shown:
        return hidden(judgement)
    for kinds in (("error", "ended", "malformed", "memory"), ("time", "output")):
        found = next((failure for failure in shown if failure.kind in kinds), None)
        if found is not None:
            return within("\n\n".join(limit_or_error(found)), LONGEST)
    shortest = sorted(shown, key=lambda failure: (len(failure.input), failure.case))[:2]
    return within("\n\n".join("\n\n".join(wrong(failure)) for failure in shortest), LONGEST)


def hidden(judgement: Judgement) -> str:
    """What may be said of tests that are not shown: that some fail, and in which way."""
    kinds = sorted({_HEADINGS.get(failure.kind, "Wrong Answer") for failure in judgement.failures})
    return f"The tests that are shown pass; hidden tests fail: {', '.join(kinds)}."


def limit_or_error(failure: Failure) -> list[str]:
    """The blocks of a failure that is no wrong answer."""
    blocks = [_HEADINGS[failure.kind]]
    said = failure.trace.strip() or _REMARKS.get(failure.kind, "")
    blocks += [indented(written_by_program(said), _TRACE, keep_end=True)] if said else []
    return [
        *blocks,
        *([f"Last Executed Input\n{indented(first_lines(failure.input), FIELD)}"] if failure.input else []),
    ]


def wrong(failure: Failure) -> list[str]:
    """The blocks of a wrong answer."""
    blocks = [f"Test Case {failure.case + 1}: Wrong Answer"]
    blocks += [f"Input\n{indented(first_lines(failure.input), FIELD)}"] if failure.input else []
    if failure.trace:
        return [*blocks, indented(written_by_program(failure.trace), FIELD)]
    if failure.got or failure.expected:
        blocks.append(f"Output\n{indented(written_by_program(failure.got) or '(nothing)', FIELD)}")
        blocks += [f"Expected\n{indented(failure.expected, FIELD)}"] if failure.expected else []
    return blocks


def written_by_program(text: str) -> str:
    """A program's text without control characters, control tokens and paths of this machine."""
    for path in _HERE:
        if len(path) > 1:
            text = text.replace(path, "python")
    text = _CONTROL.sub("", text.replace("\r\n", "\n"))
    return _CONTROL_TOKEN.sub(lambda found: f"{found[0]} ", text)


def first_lines(text: str) -> str:
    """The first lines of an input."""
    lines = text.strip("\n").split("\n")
    return "\n".join([*lines[:INPUT_LINES], *(["..."] if len(lines) > INPUT_LINES else [])])


def within(text: str, longest: int, keep_end: bool = False) -> str:
    """At most so many characters, from the start or the end, with dots where something is missing."""
    if len(text) <= longest:
        return text
    return "..." + text[len(text) - longest + 3 :] if keep_end else text[: longest - 3] + "..."


def indented(text: str, longest: int, keep_end: bool = False) -> str:
    """A field: of bounded length, each line moved in."""
    return "\n".join(f"    {line}" for line in within(text.strip("\n"), longest, keep_end).split("\n"))
