"""What a task says when it cannot be built."""

from __future__ import annotations


class TaskError(ValueError):
    """A task cannot be built: one sentence naming the file, line, field or option, what was expected and what to do."""
