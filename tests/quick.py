"""Which parameters of a test the quick suite takes; the slow one takes all others."""

import pytest


def slow_but(quick, values) -> list:
    """The parameters `values`: all but those in `quick` are marked slow."""
    assert {*quick} <= {*values}
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
