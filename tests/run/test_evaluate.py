"""Intervals against published numbers, pass@k against counting all subsets."""

import itertools
import math

import jax
import numpy as np
import pytest

from sdjax.run.measuring import evaluate
from sdjax.run.measuring.evaluate import Accuracy, accuracy, by_cap, pass_at_k, wilson
from sdjax.types import Example, Rollout, Verdict


@pytest.mark.parametrize(
    "solved, total, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(solved, total, low, high):
    np.testing.assert_allclose(wilson(solved, total), (low, high), atol=5e-5)


def test_wilson_solves_its_equation_and_stays_within_0_and_1():
    """Both ends are the shares whose distance from the observed one is z standard deviations."""
    for total in (1, 7, 400):
        for solved in {0, 1, total // 2, total}:
            low, high = wilson(solved, total)
            assert 0 <= low <= solved / total <= high <= 1 and low < high
            for end in (low, high):
                if 0 < end < 1:
                    assert abs(solved / total - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total))
    assert wilson(0, 0) == (0.0, 1.0)


EXAMPLES = tuple(Example(str(i), ({"role": "user", "content": str(i)},)) for i in range(4))
RIGHT = ((1, 0, 0, 0, 0), (0, 0, 0, 0, 0), (1, 1, 0, 1, 0), (1, 1, 1, 1, 1))


@pytest.fixture
def graded(monkeypatch):
    """Sampling replaced: the texts are the rewards of `RIGHT`; returns what it was asked for."""
    asked = {}

    def sample(policy, examples, key, *, n=1, **more):
        asked.update(more, n=n)
        return [Rollout(e, (), (), str(RIGHT[i][j]), i) for i, e in enumerate(examples) for j in range(n)]

    monkeypatch.setattr(evaluate, "sample", sample)
    return asked


def verify(example, text):
    return Verdict(0.6 * float(text))


def test_pass_at_k_is_the_share_of_subsets_with_a_success(graded):
    found = pass_at_k(None, EXAMPLES, verify, jax.random.key(0), n=5, ks=(1, 2, 3, 4, 5, 6))
    subsets = lambda row, k: np.mean([any(s) for s in itertools.combinations(row, k)])
    assert set(found) == {1, 2, 3, 4, 5}
    for k, value in found.items():
        assert value == pytest.approx(np.mean([subsets(row, k) for row in RIGHT]))
    assert graded["n"] == 5


def test_pass_at_k_counts_rewards_from_the_threshold_on(graded):
    key = jax.random.key(0)
    assert pass_at_k(None, EXAMPLES, verify, key, n=5, ks=(5,), success=0.6) == {5: 0.75}
    assert pass_at_k(None, EXAMPLES, verify, key, n=5, ks=(5,), success=0.7) == {5: 0.0}


def test_accuracy_is_the_share_of_greedy_answers_that_succeed(graded):
    found = accuracy(None, EXAMPLES, verify, limit=3)
    assert (found.solved, found.low, found.high) == (0.75, *wilson(3, 4))
    assert found.examples == len(found.rollouts) == 4
    assert graded["sampling"].temperature == 0 and graded["limit"] == 3 and graded["n"] == 1


def test_accuracy_by_cap_counts_what_is_right_and_ends_in_time():
    lengths, right = [3, 8, 8, 20], [True, False, True, True]
    assert by_cap(lengths, right, 20, parts=4) == {
        "accuracy@5": 0.25,
        "accuracy@10": 0.5,
        "accuracy@15": 0.5,
        "accuracy@20": 0.75,
    }
    assert by_cap(lengths, right, 3) == {"accuracy@1": 0.0, "accuracy@2": 0.0, "accuracy@3": 0.25}
    assert by_cap([], [], 2) == {"accuracy@1": 0.0, "accuracy@2": 0.0}


def test_accuracy_says_which_answers_are_right(graded):
    found = accuracy(None, EXAMPLES, verify)
    assert found.right == (True, False, True, True)


def test_accuracy_of_no_examples_says_nothing():
    assert Accuracy(0.0, *wilson(0, 0), 0)[:4] == (0.0, 0.0, 1.0, 0)


def test_accuracy_as_text():
    assert str(Accuracy(0.5, 0.25, 0.75, 12)) == "50.0 % [25.0, 75.0] of 12"
