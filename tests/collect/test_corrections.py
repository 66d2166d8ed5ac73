"""Which attempts are corrected, what is asked, and how the share of right ones follows what became of them."""

import jax
import numpy as np
import pytest
import tiny

from sdjax.collect.corrections import anchors, correction, graded, replayed

KEY = jax.random.key(0)


def rewards(rows):
    return sorted((r.reward for r in rows), reverse=True)


def test_the_attempt_is_shown_without_its_thinking_and_may_be_wrong():
    (asked,) = correction(tiny.row("<think>perhaps</think>it is k3"))[-1:]
    question = tiny.TASK.train[0].prompt[-1]["content"]
    assert asked["content"].startswith(question) and "perhaps" not in asked["content"]
    assert "may be wrong:\nit is k3\n" in asked["content"] and asked["privileged"] == "it is k3"
    assert "(no answer was reached)" in correction(tiny.row("<think>perhaps"))[-1]["content"]


@pytest.mark.parametrize(
    "right, wrong, count, wanted",
    [
        (9, 9, 8, (2, 6)),  # a share of 0.3 is 2.4
        (9, 3, 8, (5, 3)),
        (0, 9, 8, (0, 8)),
        (1, 9, 8, (1, 7)),
        (2, 3, 8, (2, 3)),
        (9, 9, 0, (0, 0)),
    ],
)
def test_how_many_right_ones_are_among_them(right, wrong, count, wanted):
    """A reward of exactly the threshold is right."""
    rows = [tiny.row("r", 0.5)] * right + [tiny.row("w", 0.4)] * wrong
    found = [r.reward for r in anchors(rows, count, 0.3, (0.0, 1.0), KEY)]
    assert (found.count(0.5), found.count(0.4)) == wanted
    assert found == sorted(found, reverse=True)  # right ones first


def test_problems_of_medium_difficulty_come_first():
    """Pass rates 1/4, 1/2, 3/4 and 1 within [1/2, 3/4]: those of the bounds are medium."""
    groups = {0: 1, 1: 2, 2: 3, 3: 4}
    rows = [tiny.row("x", float(i < right), group) for group, right in groups.items() for i in range(4)]
    found = anchors(rows, 6, 0.5, (0.5, 0.75), KEY)
    assert {r.group for r in found} == {1, 2} and rewards(found) == [1.0] * 3 + [0.0] * 3
    at_threshold = [tiny.row("x", 0.5 * (i < 2), g) for g in (1, 0) for i in range(2 + 2 * g)]
    assert {r.group for r in anchors(at_threshold, 4, 0.5, (0.5, 0.75), KEY)} == {1}
    more = anchors(rows, 12, 0.5, (0.5, 0.75), KEY)
    assert [r.group for r in more if r.reward][:5] != [0] * 5 and {r.group for r in more[:5]} == {1, 2}


def test_the_order_is_the_keys():
    rows = [tiny.row("x", 0.0, tokens=(i,)) for i in range(8)]
    orders = [tuple(r.tokens for r in anchors(rows, 8, 0.3, (0, 1), jax.random.key(i))) for i in (0, 0, 1, 2)]
    assert orders[0] == orders[1] and len({*orders}) == 3 and sorted(orders[0]) == [(i,) for i in range(8)]


def test_breaking_a_right_attempt_costs():
    """Shaped rewards count, outcomes are told by the reward; exactly the threshold is right."""
    right, wrong = tiny.row(reward=0.6), tiny.row(reward=0.5)
    corrections = [tiny.row(reward=x) for x in (0.6, 0.5, 0.6, 0.5)]
    corrections[3] = corrections[3].shaped(-0.1)
    shaped, kept = graded(corrections, [right, right, wrong, wrong], 2.0, 0.6)
    np.testing.assert_allclose(shaped, [0.6, -1.5, 0.6, 0.4])
    assert kept == 0.5
    assert graded(corrections, [wrong] * 4, 2.0, 0.6)[1] is None


@pytest.mark.parametrize(
    "before, below, retention, share, steps",
    [
        (0.7, 0, 0.6, 0.3 * (1 + 0.8 * 0.2 + 0.3 * 0.1 + 0.05 * 1), 1),
        (0.9, 2, 0.7, 0.3 * (1 + 0.8 * 0.1 + 0.3 * 0.2 + 0.05 * 3), 3),
        (0.7, 7, 0.7, 0.3 * (1 + 0.8 * 0.1 + 0.05 * 3), 8),  # three steps count at most
        (None, 0, 0.7, 0.3 * (1 + 0.8 * 0.1 + 0.05), 1),  # nothing before: no fall
        (0.7, 4, 0.8, 0.3, 0),  # exactly the target
        (0.7, 4, 1.0, 0.3 * (1 - 0.8 * 0.2), 0),
    ],
)
def test_the_share_follows_how_many_stay_right(before, below, retention, share, steps):
    memory = {"share": 0.3, "retention": before, "below": below}
    found = replayed(memory, retention, 0.8, (0.8, 0.3, 0.05), (0.1, 0.9))
    assert found == {"share": pytest.approx(share), "retention": retention, "below": steps}
    assert replayed(memory, None, 0.8, (0.8, 0.3, 0.05), (0.1, 0.9)) == memory
    for bounds, held in (((0.1, 0.2), 0.2), ((0.7, 0.9), 0.7)):
        assert replayed(memory, retention, 0.8, (0.8, 0.3, 0.05), bounds)["share"] == held
