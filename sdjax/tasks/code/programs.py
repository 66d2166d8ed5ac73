"""From a completion to the program in it: the last fenced block of the answer, after the thinking."""

from __future__ import annotations

import re

from sdjax.tasks.completions import split

PYTHON = ("", "python", "python3", "py", "python2", "pycon")
"""What may stand behind the opening fence of a program; blocks of other languages are passed over."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*?)[ \t]*$")


def program_in(text: str) -> str | None:
    """The program of a completion; `None` where there is none.

    A block ends at a fence of the same kind that is at least as long, or where the text ends.
    """
    found, opened, lines = None, "", []
    for line in [*split(text).answer.split("\n"), None]:
        fence = None if line is None else _FENCE.match(line.rstrip("\r"))
        if not opened and fence:
            opened, language, lines = fence[1], fence[2].split(" ")[0].lower(), []
        elif opened and (line is None or (fence and fence[1].startswith(opened) and not fence[2])):
            found = "\n".join(lines) if language in PYTHON and "".join(lines).strip() else found
            opened = ""
        elif opened:
            lines.append(line)
    return found
