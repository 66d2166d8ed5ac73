"""The root of every error that bad input raises, and the hint that its sentence ends with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class InputError(Exception):
    """Something that a person gave cannot be used: one sentence that names it as it was typed, and says what to do.

    The command line prints the sentence without a traceback.  Errors that callers may expect as a `ValueError` or
    `RuntimeError` derive from that, too.
    """


class MethodError(InputError, ValueError):
    """Options of a method that do not go together."""


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...` for names that look alike, else an empty text."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
