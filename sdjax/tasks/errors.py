"""What a task says when it cannot be built."""

from __future__ import annotations

from sdjax.errors import InputError


class TaskError(InputError, ValueError):
    """A task cannot be built: one sentence naming the file, line, field or option, what was expected and what to do."""
