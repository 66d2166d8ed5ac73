"""Intervals cover what they promise, on problems that differ; majorities and differences against enumeration."""

import itertools
import math

import numpy as np
import pytest

from sdjax.run.measuring.estimates import clustered, majority_at, mean, paired, pass_at, wilson


def test_one_answer_a_problem_is_the_binomial_interval():
    right = [1, 0, 1, 1, 0, 0, 0]
    assert clustered(right, len(right)) == (pytest.approx(3 / 7), *map(pytest.approx, wilson(3, 7)))
    assert clustered([], 0) == (0.0, 0.0, 1.0)
    assert clustered([0.4], 10) == (0.4, 0.0, 1.0)


def test_an_interval_over_problems_is_never_narrower_than_binomial():
    rng = np.random.default_rng(0)
    for problems, answers in itertools.product((2, 5, 30), (2, 8, 32)):
        for spread in (0.3, 3.0, 300.0):
            chance = rng.beta(spread, spread, problems)
            values = rng.binomial(answers, chance) / answers
            found = clustered(values, problems * answers)
            low, high = wilson(values.mean() * problems * answers, problems * answers)
            assert found.high - found.low >= high - low - 1e-12 and found.low <= found.value <= found.high


def test_problems_that_agree_by_chance_count_once_each():
    for share in (0.0, 1.0):
        assert clustered([share] * 30, 30 * 32)[1:] != pytest.approx(wilson(share * 960, 960))
        low, high = clustered([share] * 30, 30 * 32)[1:]
        assert high - low > wilson(0, 30)[1] - 1e-12


@pytest.mark.parametrize("spread", [0.4, 2.0, 50.0])
def test_intervals_over_problems_cover_the_mean(spread):
    """Problems drawn from a beta distribution with mean 1/2 or 1/5, 16 answers to each of 30: at least 93 % of 95 %."""
    rng, runs = np.random.default_rng(1), 1500
    for a, b in ((spread, spread), (spread, 4 * spread)):
        chance = rng.beta(a, b, (runs, 30))
        values = rng.binomial(16, chance) / 16
        found = [clustered(row, 30 * 16) for row in values]
        covered = np.mean([one.low <= a / (a + b) <= one.high for one in found])
        assert covered >= 0.93
        naive = np.mean(
            [wilson(16 * row.sum(), 480)[0] <= a / (a + b) <= wilson(16 * row.sum(), 480)[1] for row in values]
        )
        assert covered > naive - 0.01


@pytest.mark.parametrize("answers", [1, 16])
def test_paired_differences_cover_what_they_should_and_are_narrower_than_unpaired_ones(answers):
    rng, runs, problems = np.random.default_rng(2), 1500, 40
    hard = rng.beta(0.5, 0.5, (runs, problems))
    better = np.clip(hard + 0.05 * (hard < 0.9), 0, 1)
    one, other = (rng.binomial(answers, p) / answers for p in (better, hard))
    found = [paired(a, b, answers) for a, b in zip(one, other, strict=True)]
    truth = float(np.mean(better - hard))
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.93
    apart = [math.hypot(*((e.high - e.low) / 2 for e in (mean(a), mean(b)))) for a, b in zip(one, other, strict=True)]
    assert np.mean([(f.high - f.low) / 2 for f in found]) < np.mean(apart)


def test_a_paired_difference_never_vanishes():
    assert paired([1, 0, 1], [1, 0, 1]).low < 0 < paired([1, 0, 1], [1, 0, 1]).high
    assert paired([1.0], [0.0])[1:] == (-1.0, 1.0)
    alike = paired([0.5] * 30, [0.5] * 30, 32)
    assert 0 < alike.high < 0.02


VOTES = [
    ([0, 0, 1, -1, 1], [True, True, False, False, False]),
    ([0, 1, 2, 2, 0], [False, True, False, False, False]),
    ([-1, -1, -1], [False, False, False]),
    ([0, 0, 0], [True, True, True]),
]


@pytest.mark.parametrize("votes, right", VOTES)
def test_majorities_are_the_mean_over_subsets(votes, right):
    def of(subset):
        counts = {v: [votes[i] for i in subset].count(v) for v in {votes[i] for i in subset} - {-1}}
        best = [v for v, count in counts.items() if count == max(counts.values())]
        return np.mean([right[votes.index(v)] for v in best]) if best else 0.0

    n = len(votes)
    for k in range(1, n + 1):
        expected = np.mean([of(s) for s in itertools.combinations(range(n), k)])
        tolerance = 1e-12 if k == n else 0.03
        assert majority_at(votes, right, k, draws=4000) == pytest.approx(expected, abs=tolerance)
    assert majority_at(votes, right, n) == majority_at(votes, right, n)


def test_pass_at_one_is_the_share_and_at_all_whether_any_is_right():
    assert pass_at(3, 8, 1) == pytest.approx(3 / 8) and pass_at(1, 8, 8) == 1.0 and pass_at(0, 8, 8) == 0.0
