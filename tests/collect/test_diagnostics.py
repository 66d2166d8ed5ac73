"""Diagnostics against numbers worked out by hand and in the papers."""

import random
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdjax.collect import diagnostics
from sdjax.collect.rollouts import written
from sdjax.kernels.distributions import normalise

# ---- of texts


def test_epistemic_counts_follow_the_official_substring_rule_and_the_word_rule():
    text = "Wait, unlikely; let me double-check. await"
    assert diagnostics.epistemic_count(text) == 4  # wait, likely, check, wait
    assert diagnostics.epistemic_words(text) == 2  # Wait, check


def test_epistemic_counts_of_words_inside_words():
    assert diagnostics.epistemic_count("almighty checkmate, CHECKED checking") == 4
    assert diagnostics.epistemic_words("almighty checkmate, CHECKED checking") == 0
    assert diagnostics.epistemic_count("") == diagnostics.epistemic_words("") == 0


def test_per_thousand_tokens():
    assert diagnostics.per_thousand(182.5, 13_054) == pytest.approx(13.98, abs=0.01)  # 1.40 % in the paper's Table 1
    assert np.isnan(diagnostics.per_thousand(3, 0))


def test_marks_are_tokens_not_parts_of_tokens():
    assert diagnostics.marks([" Wait", ",", " but", "ter", " Hmm...", "waiting"]).tolist() == [1, 0, 1, 0, 1, 0]


def test_compression_of_a_loop_of_noise_and_of_sums():
    letters = random.Random(0)
    noise = "".join(letters.choice(string.ascii_letters) for _ in range(10_001))
    assert diagnostics.compression(("wait, let me check. " * 501)[-10_000:]) == pytest.approx(142.9, rel=0.05)
    assert diagnostics.compression(noise) == pytest.approx(1.37, rel=0.05)
    assert diagnostics.compression("") == 0
    sums = "\n".join(f"{i}+{i + 1}={2 * i + 1}" for i in range(2000))
    assert diagnostics.compression(sums[:10_001]) == pytest.approx(2.13, abs=0.01)


def test_an_end_exactly_at_the_limit_is_no_truncation():
    policy, word = tiny.policy(), "red "
    rows = [written(tiny.TASK.train[0], word * n, policy, group=0, source=0) for n in (7, 8)]  # and the end token, of 8
    assert [len(r.tokens) for r in rows] == [8, 8]
    assert [diagnostics.truncation_rate([r.finished]) for r in rows] == [0.0, 1.0]


@pytest.mark.parametrize(("factor", "share", "to_the_rest"), [(4.0, 0.63, 1.71), (9.0, 0.79, 3.86)])
def test_repetitive_tokens_hold_most_of_the_advantage(factor, share, to_the_rest):
    """StableOPD's feedback arithmetic: 30 % of the tokens at 4 or 9 times the advantage."""
    marked = jnp.arange(10)[None] < 3
    advantage = jnp.where(marked, factor, -1.0)
    found = float(diagnostics.mass_share(advantage, marked, jnp.ones((1, 10), bool)))
    assert found == pytest.approx(share, abs=0.005) and found / (1 - found) == pytest.approx(to_the_rest, abs=0.005)
    assert diagnostics.mass_share(advantage, marked, jnp.zeros((1, 10), bool)) == 0.0


def test_repetition_needs_length_and_a_loop():
    loop = "wait, let me check. " * 501
    assert diagnostics.repeats(loop)
    assert not diagnostics.repeats(loop[:10_000])  # not longer than the tail
    assert not diagnostics.repeats("abc " * 12)
    assert diagnostics.repeats("7 7 " * 40, tail=64, ratio=3.0)
    assert diagnostics.repetition_rate([loop, "short", loop, "x"]) == 0.5
    assert np.isnan(diagnostics.repetition_rate([]))


def test_the_papers_thresholds_are_the_defaults():
    """More than 10,000 characters, of which the last compress more than ten times: texts on either side of each."""
    letters = random.Random(0)
    noise = "".join(letters.choice(string.ascii_letters) for _ in range(1300))
    looped = lambda period: (noise[:period] * 20)[:10_001]
    assert 10.0 < diagnostics.compression(looped(1000)) < 12.5
    assert 8.0 < diagnostics.compression(looped(1300)) < 10.0
    texts = {looped(1000): True, looped(1000)[1:]: False, looped(1300): False}
    assert [diagnostics.repeats(text) for text in texts] == [*texts.values()]
    assert diagnostics.repetition_rate([*texts]) == pytest.approx(1 / 3)


def test_repeats_reads_the_tail_only():
    numbers = " ".join(str(i * i) for i in range(5000))
    assert diagnostics.repeats(numbers + "again " * 2000) and not diagnostics.repeats("again " * 2000 + numbers)


def test_repeated_ngrams():
    assert diagnostics.repeated_ngrams("a b c a b c") == pytest.approx(1 / 4)
    assert diagnostics.repeated_ngrams("a b") == 0.0


def test_truncation_rate_and_distinct():
    assert diagnostics.truncation_rate([True, True, False, True]) == 0.25
    assert diagnostics.distinct(["a b", "a c"], 1) == 3 / 4
    assert diagnostics.distinct(["a b", "a b"], 2) == 1 / 2
    assert np.isnan(diagnostics.distinct([], 1)) and np.isnan(diagnostics.truncation_rate([]))


def test_any_text_is_accepted():
    for text in ("\ud800", "\0", "é" * 20_000, " \n"):
        diagnostics.compression(text), diagnostics.repeats(text), diagnostics.epistemic_words(text)


# ---- of distributions

STUDENT = np.log([0.40, 0.25, 0.15, 0.12, 0.08])
TEACHER = np.log([0.20, 0.35, 0.05, 0.30, 0.10])


def test_overlap_on_the_papers_fixture():
    got = diagnostics.overlap_statistics(jnp.array(STUDENT), jnp.array(TEACHER), 3)
    assert got["overlap"] == pytest.approx(2 / 3)
    assert got["overlap_advantage"] == pytest.approx(-0.065043, abs=1e-6)
    assert got["student_mass"] == pytest.approx(0.65)
    assert got["teacher_mass"] == pytest.approx(0.55)
    assert got["extreme_token_gap"] == pytest.approx(0.2)  # token 0: |-.32375| > |.193664|


def test_positions_are_apart():
    """The extreme token is no position's first, and each position has its own."""
    student = jnp.log(jnp.array([[0.3, 0.5, 0.2], [0.2, 0.1, 0.7]]))
    teacher = jnp.log(jnp.array([[0.3, 0.1, 0.6], [0.3, 0.6, 0.1]]))
    got = diagnostics.overlap_statistics(student, teacher, 3)
    np.testing.assert_allclose(got["extreme_token_gap"], (0.4, 0.6), atol=1e-6)
    for name, value in got.items():
        alone = [diagnostics.overlap_statistics(s, t, 3)[name] for s, t in zip(student, teacher, strict=True)]
        np.testing.assert_allclose(value, alone, atol=1e-6, err_msg=name)


def test_entropy_gap_on_the_papers_fixture():
    assert diagnostics.entropy_gap(jnp.array(STUDENT), jnp.array(TEACHER)) == pytest.approx(0.023586, abs=1e-6)


def test_overlap_limits():
    dist = normalise(jax.random.normal(jax.random.key(0), (7, 11)))
    same = diagnostics.overlap_statistics(dist, dist, 4)
    np.testing.assert_array_equal(same["overlap"], 1)
    np.testing.assert_allclose(same["overlap_advantage"], 0, atol=1e-7)
    np.testing.assert_array_equal(same["extreme_token_gap"], 0)
    whole = diagnostics.overlap_statistics(dist, dist[::-1], 11)
    np.testing.assert_allclose(whole["student_mass"], 1, rtol=1e-5)
    other = diagnostics.overlap_statistics(dist, dist[::-1], 3)
    assert (other["overlap_advantage"] <= 1e-7).all()


def test_proportional_on_the_shared_tokens_is_advantage_zero():
    student, teacher = jnp.log(jnp.array([0.6, 0.3, 0.1, 0.0])), jnp.log(jnp.array([0.4, 0.2, 0.1, 0.3]))
    got = diagnostics.overlap_statistics(student, teacher, 2)  # sets {0, 1} and {0, 3}: one shared token
    assert got["overlap"] == 0.5 and got["overlap_advantage"] == 0.0
    wide = diagnostics.overlap_statistics(student, teacher, 3)  # {0, 1, 2} and {0, 1, 3}
    assert wide["overlap_advantage"] == pytest.approx(0.0, abs=1e-7)


def test_no_shared_token_gives_zeros_not_nans():
    student, teacher = jnp.log(jnp.array([0.7, 0.2, 0.05, 0.05])), jnp.log(jnp.array([0.05, 0.05, 0.2, 0.7]))
    got = diagnostics.overlap_statistics(student, teacher, 1)
    assert all(value == 0 for value in got.values())


def test_overlap_works_inside_jit_and_with_impossible_tokens():
    student = jnp.log(jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    got = jax.jit(lambda s, t: diagnostics.overlap_statistics(s, t, 2))(student, student[::-1])
    assert all(np.isfinite(value).all() for value in got.values())


def test_fork_and_lock_thresholds():
    def peak(top):
        return jnp.log(jnp.array([top, *[(1 - top) / 9] * 9]))

    teacher = jnp.stack([peak(0.2), peak(0.5), peak(0.7)])
    assert diagnostics.fork(teacher).tolist() == [True, False, False]
    assert diagnostics.lock(teacher).tolist() == [False, False, True]


# ---- of log-ratios and outcomes


def test_sequence_reward_leaves_padding_out():
    present = jnp.array([[1, 1, 0], [0, 0, 0]], bool)
    got = diagnostics.sequence_reward(jnp.array([[1.0, -3.0, jnp.nan], [jnp.inf] * 3]), present)
    assert got.tolist() == [-1.0, 0.0]


def test_sequence_reward_of_the_students_own_samples_is_minus_kl():
    student, teacher = normalise(jnp.array([2.0, 1, 0, -1])), normalise(jnp.array([1.0, 1.5, 0.5, -0.5]))
    tokens = jax.random.categorical(jax.random.key(1), student, shape=(100, 500))
    got = diagnostics.sequence_reward((teacher - student)[tokens], jnp.ones((100, 500), bool)).mean()
    assert got == pytest.approx(-0.272249, abs=0.015)


def test_concentration():
    flat, one = jnp.ones(30), jnp.zeros(30).at[4].set(-5.0)
    present = jnp.ones((2, 30), bool)
    np.testing.assert_allclose(diagnostics.concentration(jnp.stack([flat, one]), present), [0.1, 1.0], rtol=1e-6)
    padded = jnp.pad(flat, (0, 10), constant_values=jnp.nan)[None]
    shorter = jnp.arange(40)[None] < 30
    np.testing.assert_allclose(diagnostics.concentration(padded, shorter), [0.1], rtol=1e-6)
    assert np.isnan(diagnostics.concentration(jnp.zeros((1, 4)), jnp.ones((1, 4), bool)))


def test_informativeness_and_auroc():
    reward, correct = [-0.1, -0.3, -0.2, -0.4], [True, True, False, False]
    assert diagnostics.informativeness(reward, correct) == pytest.approx(0.1)
    assert diagnostics.auroc(reward, correct) == 0.75
    assert diagnostics.auroc([1, 1, 1, 1], correct) == 0.5
    assert diagnostics.auroc([4, 3, 2, 1], correct) == 1.0
    for undefined in (diagnostics.auroc, diagnostics.informativeness):
        assert np.isnan(undefined([1.0, 2.0], [True, True])) and np.isnan(undefined([1.0, 2.0], [False, False]))


def test_auroc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    reward, correct = rng.integers(0, 5, 60), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in reward[correct] for b in reward[~correct]]
    assert diagnostics.auroc(reward, correct) == pytest.approx(np.mean(pairs))


def test_auroc_per_prompt_on_arrays_and_on_lists():
    """Four prompts, interleaved: mixed with a tie, mixed, only right, and one whose only wrong row does not count."""
    group = np.array([0, 1, 0, 1, 2, 0, 3, 2, 3, 0])
    correct = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 1], bool)
    over = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 1], bool)
    reward = np.array([2.0, 5.0, 1.0, 4.0, 9.0, 2.0, 3.0, 8.0, 0.0, 0.5])
    wanted = np.mean([(1.0 + 0.5 + 0.0 + 0.0) / 4, 0.0])
    share, mixed = map(np.asarray, diagnostics.auroc_of_groups(*map(jnp.asarray, (reward, correct, over, group))))
    assert mixed.sum() == 2 and {*group[mixed]} == {0, 1} and share[mixed].mean() == pytest.approx(wanted)
    assert diagnostics.auroc_by_prompt(reward[over], correct[over], group[over]) == pytest.approx(wanted)
    alike = np.ones(10, bool)
    share, rows = map(np.asarray, diagnostics.auroc_of_groups(*map(jnp.asarray, (reward, alike, over, group))))
    np.testing.assert_array_equal(share[rows], 0.5)
    np.testing.assert_array_equal(rows, over)
    assert np.isnan(diagnostics.auroc_by_prompt(reward, alike, group))


def test_agreement_by_outcome():
    """At the threshold they agree; every cell has another number of tokens."""
    log_ratio = np.array([[0.5, -0.5, 0.0, 3.0, 4.0, -2.0, 0.6, 0.1], [0.1, 9.0, -9.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    present = np.array([[1] * 7 + [0], [1] * 3 + [0] * 5], bool)
    got = diagnostics.agreement_by_outcome(log_ratio, present, np.array([True, False]), threshold=0.5)
    np.testing.assert_allclose(got, [[0.3, 0.1], [0.4, 0.2]])
    assert np.isnan(diagnostics.agreement_by_outcome(log_ratio, present & False, np.array([1, 0]), 0.5)).all()


def test_gap_recovery():
    assert diagnostics.gap_recovery(0.50, 0.62, 0.65) == pytest.approx(0.8)
    assert np.isnan(diagnostics.gap_recovery(0.5, 0.6, 0.5))
