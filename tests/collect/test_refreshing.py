"""The gate of a teacher's copy: every condition alone, at its threshold."""

import tiny

from sdjax.collect.refreshing import START, seen
from sdjax.types import TEACHER

HOW = {"least": 2, "gain": 0.25, "window": 2, "longest": 0}


def after(*batches, **how):
    """The gate's memories after batches of `(rewards, length)`."""
    memory, found = START, []
    for rewards, length in batches:
        rows = [tiny.row(reward=r, tokens=(1,) * (length - i)) for i, r in enumerate(rewards)]
        memory = seen(rows, memory, **{**HOW, **how})
        found.append(memory)
    return found


def test_the_first_whole_window_is_the_level():
    one, two, three = after(((0.0, 0.5), 3), ((0.5, 1.0), 5), ((1.0, 1.0), 4))
    assert one == {**START, "batches": 1, "rewards": [0.25], "lengths": [3]} and one["level"] is None
    assert two == {"batches": 2, "copied": 0, "level": 0.5, "rewards": [0.25, 0.75], "lengths": [3, 5], "due": False}
    assert three["rewards"] == [0.75, 1.0] and three["lengths"] == [5, 4]
    assert three["due"] and three["copied"] == 3 and three["level"] == 0.875


def test_a_gain_of_exactly_the_threshold_is_none():
    steps = [((0.0,), 1), ((0.0,), 1), ((0.5,), 1)]  # the last window's mean is 0.25
    assert not after(*steps)[-1]["due"] and after(*steps, gain=0.24)[-1]["due"]


def test_so_many_batches_lie_between_copies():
    steps = [((float(i),), 1) for i in range(6)]
    assert [m["due"] for m in after(*steps, window=1)] == [False, True, False, True, False, True]
    assert [m["due"] for m in after(*steps, window=1, least=3)] == [False, False, True, False, False, True]
    assert [m["copied"] for m in after(*steps, window=1, least=3)] == [0, 0, 3, 3, 3, 6]


def test_a_long_attempt_in_the_window_shuts_it():
    steps = [((0.0,), 1), ((0.0,), 8), ((1.0,), 1), ((1.0,), 1)]
    assert [m["due"] for m in after(*steps)] == [False, False, True, False]
    assert [m["due"] for m in after(*steps, longest=8)] == [False, False, False, True]
    assert [m["due"] for m in after(*steps, longest=9)] == [False, False, True, False]


def test_others_texts_say_nothing():
    (before,) = after(((0.5,), 3))
    rows = [tiny.row(reward=1.0, tokens=(1,) * 9, source=TEACHER)]
    now = seen(rows, before, **HOW)
    assert now == {**before, "batches": 2}
    assert seen([*rows, tiny.row(reward=1.0)], before, **HOW)["lengths"] == [3, 1]
