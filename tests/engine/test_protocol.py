"""How problems are answered: greedy and once by default; every number at its bounds; what is said of it."""

import math

import pytest

from sdjax.engine.generate import Sampling
from sdjax.engine.protocol import Protocol, ProtocolError


def test_one_greedy_answer_by_default():
    assert vars(Protocol()) == {"samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    assert Protocol().sampling() == Sampling(0.0, 1.0, 0, 0.0)
    assert Protocol(4, 0.6, 0.95, 20, 0.1).sampling() == Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)


@pytest.mark.parametrize(
    "how",
    [
        {"samples": 1, "temperature": 0},
        {"samples": 2, "temperature": 0.1},
        {"temperature": 1e-9},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 0.01},
        {"min_p": 0},
        {"min_p": 0.99},
        {"top_k": 0},
        {"top_k": 1},
    ],
)
def test_bounds_that_are_allowed(how):
    for name, value in how.items():
        assert getattr(Protocol(**how), name) == value


@pytest.mark.parametrize(
    "how, said",
    [
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"samples": 2}, "samples=2 at temperature 0 are all the same"),
        ({"temperature": -0.1}, r"temperature=-0.1: expected 0 \(greedy\) or more"),
        ({"temperature": math.inf}, "temperature=inf: expected 0"),
        ({"temperature": math.nan}, "temperature=nan: expected 0"),
        ({"top_p": 0.0}, "top_p=0.0, .*expected 0 < top_p <= 1"),
        ({"top_p": 1.01}, "top_p=1.01, .*expected 0 < top_p <= 1"),
        ({"top_p": math.nan}, "top_p=nan, .*expected 0 < top_p <= 1"),
        ({"min_p": 1.0}, "min_p=1.0: expected .*0 <= min_p < 1"),
        ({"min_p": -0.1}, "min_p=-0.1: expected .*0 <= min_p < 1"),
        ({"top_k": -1}, "top_k=-1, .*top_k >= 0"),
    ],
)
def test_protocols_that_make_no_sense_are_refused(how, said):
    with pytest.raises(ProtocolError, match=said):
        Protocol(**how)


def test_a_protocol_is_said_in_words():
    assert str(Protocol()) == "1 sample of each problem, greedy"
    assert str(Protocol(2, 0.6)) == "2 samples of each problem, temperature 0.6"
    filtered = "3 samples of each problem, temperature 1, top_p 0.95, top_k 20, min_p 0.1"
    assert str(Protocol(3, 1.0, 0.95, 20, 0.1)) == filtered
