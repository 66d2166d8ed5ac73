"""Verdicts on made data whose truth is known: no claim is confirmed by chance, none is refused that is true."""

import itertools

import numpy as np
import pytest

from sdjax.study import claims
from sdjax.study.claims import Claim, ClaimError, Counts, Effect, effect, holm, judge, read_claims, verdicts

TEXT = """
[[claim]]
name = "falls"
says = "it falls"
source = "somebody"
arxiv = "0000.00000"
grammar = "marked"
arm = "A"
against = "B"
problems = "in_domain"
measure = "accuracy"
step = 20
sign = -1
margin = 0.05
fails = "no fall"
"""


def made(truth, noise, rng, bases=3, seeds=4):
    """Differences `[bases][seeds]` around a truth, each base with a deviation of its own."""
    return truth + noise * (rng.normal(size=(bases, 1)) / 2 + rng.normal(size=(bases, seeds)))


def test_a_large_effect_holds_none_does_not_and_a_noisy_one_cannot_be_told():
    rng = np.random.default_rng(0)
    large = effect(made(0.3, 0.02, rng), 1, 0.05)
    none = effect(made(0.0, 0.005, rng), 1, 0.05)
    noisy = effect(made(0.05, 0.3, rng), 1, 0.05)
    against = effect(made(-0.3, 0.02, rng), 1, 0.05)
    assert verdicts([large, none, noisy, against]) == ["holds", "does not hold", "cannot be told", "does not hold"]
    assert large.low < 0.3 < large.high and large.low > 0.2


def test_the_predicted_sign_counts():
    fall = made(-0.3, 0.02, np.random.default_rng(0))
    assert verdicts([effect(fall, -1, 0.05)]) == ["holds"] and verdicts([effect(fall, 1, 0.05)]) == ["does not hold"]


def test_an_effect_that_is_there_but_smaller_than_the_margin_does_not_hold():
    found = effect(made(0.02, 0.001, np.random.default_rng(0)), 1, 0.1)
    assert found.low > 0 and verdicts([found]) == ["does not hold"]


def test_intervals_cover_the_choice_of_bases_as_well_as_that_of_seeds():
    bases, seeds = (
        np.asarray([[-0.2], [0.0], [0.2]]) + np.zeros((3, 4)),
        np.asarray([[-0.2, -0.1, 0.1, 0.2]]) + np.zeros((3, 1)),
    )
    for differences in (bases, seeds):
        found = effect(differences, 1, 0.05)
        assert found.low < -0.1 and found.high > 0.1
    assert effect(bases, 1, 0.05).high > effect(bases[:, ::-1] * 0, 1, 0.05).high


def test_no_interval_of_a_share_is_narrower_than_its_answers_allow():
    """12 runs that agree to the digit, on 40 answers each: 3.2 points is one deviation of 0.5 - 0.5."""
    same = np.full((3, 4), 0.04)
    alone, counted = effect(same, 1, 0.05), effect(same, 1, 0.05, Counts(0.54, 0.5, 480))
    assert alone.low == pytest.approx(alone.high) == pytest.approx(0.04)
    assert counted.high - counted.mean == pytest.approx(1.96 * 0.0322, rel=0.02)
    assert verdicts([alone]) == ["does not hold"] and verdicts([counted]) == ["cannot be told"]


def test_shares_of_nothing_right_have_an_uncertainty_too():
    assert claims.binomial_deviation(Counts(0.0, 0.0, 480)) > 0.002
    assert claims.binomial_deviation(Counts(0.5, 0.5, 480)) == pytest.approx(np.sqrt(2 * 0.25 / 480))


def test_holm_is_the_published_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_many_claims_without_an_effect_are_seldom_confirmed():
    """10 claims of no effect, 8 times: the smallest p-value is often below 0.05, the smallest corrected one hardly ever."""
    rng, raw, corrected = np.random.default_rng(1), 0, 0
    for _ in range(8):
        p_values = [effect(made(0.0, 0.05, rng, seeds=6, bases=6), 1, 0.05).p_none for _ in range(10)]
        raw, corrected = raw + (min(p_values) < claims.LEVEL), corrected + (min(holm(p_values)) < claims.LEVEL)
    assert raw >= 2 and corrected <= 1, (raw, corrected)


def test_differences_are_paired_by_base_and_seed():
    """Two arms that differ by 0.1 in every run, whatever a base and a seed are worth."""
    worth = np.random.default_rng(0).uniform(0.1, 0.8, (3, 4))
    run = lambda value, answers=4000: [{"step": 20, "in_domain": {"accuracy": value, "answers": answers}}]
    arm = lambda shift: [[run(w + shift) for w in row] for row in worth]
    claim = Claim("c", "", "", "", "marked", "A", "B", "in_domain", "accuracy", 20, 1, 0.05, "")
    found = judge(claim, {"A": arm(0.1), "B": arm(0.0)})
    assert found.mean == pytest.approx(0.1) and found.high - found.low < 0.03 and verdicts([found]) == ["holds"]
    shuffled = {"A": arm(0.1), "B": arm(0.0)[::-1]}
    assert judge(claim, shuffled).high - judge(claim, shuffled).low > 0.1


def test_an_arm_is_compared_with_its_own_beginning():
    rows = [{"step": 0, "s": {"words": 0.9, "answers": 9}}, {"step": 20, "s": {"words": 0.4, "answers": 9}}]
    claim = Claim("c", "", "", "", "marked", "A", "itself", "s", "words", 20, -1, 0.1, "")
    assert judge(claim, {"A": [[rows] * 4] * 3}).mean == pytest.approx(-0.5)


def test_files_of_claims_are_read_and_refused(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(TEXT + TEXT)
    assert [c.sign for c in read_claims(path)] == [-1, -1]
    cases = [("sign = -1", "sign = 2", "sign 1 or -1"), ("step = 20", 'step = "20"', "step = '20': expected int")]
    cases += [("margin = 0.05\n", "", "margin"), ("fails =", "failes =", "failes, fails")]
    for old, new, expected in cases:
        path.write_text(TEXT.replace(old, new))
        with pytest.raises(ClaimError, match=expected):
            read_claims(path)
    path.write_text("")
    with pytest.raises(ClaimError, match="no \\[\\[claim"):
        read_claims(path)


def test_verdicts_do_not_depend_on_the_order_of_claims():
    found = [Effect(0.1, 0.0, 0.2, p, q) for p, q in ((0.001, 0.9), (0.2, 0.3), (0.9, 0.0001))]
    assert all(
        dict(zip(order, verdicts([found[i] for i in order]), strict=True))
        == {0: "holds", 1: "cannot be told", 2: "does not hold"}
        for order in itertools.permutations(range(3))
    )
