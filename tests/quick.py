"""Which parameters of a test the quick suite takes; the slow one takes all others."""

import pytest


def slow_but(quick, values) -> list:
    """The parameters `values`, a tuple for several arguments at once: all but those in `quick` are marked slow."""
    assert {*quick} <= {*values}
    slow = lambda value: pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
    return [value if value in quick else slow(value) for value in values]
