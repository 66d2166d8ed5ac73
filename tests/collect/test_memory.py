"""What is remembered from batch to batch, against NumPy over the whole history, and at its thresholds."""

import numpy as np
import pytest
import tiny

from sdjax.collect.memory import NO_REWARDS, OPEN_GATE, entropy_gated, told_apart, whitened


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_rewards_by_the_moments_of_earlier_batches(warmup):
    batches = [[0.25], [2.0, 1.0], [0.5, 0.0, 3.0], [1.0, 1.5]]
    memory, seen = NO_REWARDS, []
    for step, batch in enumerate(batches):
        found, memory = whitened(batch, memory, warmup)
        mean = np.mean(seen) if seen else 0.0
        deviation = np.std(seen, ddof=1) if len(seen) > 1 else 1.0
        wanted = np.subtract(batch, 0.5) if step < warmup else np.subtract(batch, mean) / deviation
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        seen += batch
        assert (memory["steps"], memory["count"]) == (step + 1, len(seen))
        np.testing.assert_allclose(memory["mean"], np.mean(seen))
        np.testing.assert_allclose(memory["squares"], np.sum((np.asarray(seen) - np.mean(seen)) ** 2))
    assert NO_REWARDS == {"steps": 0, "count": 0, "mean": 0.0, "squares": 0.0}


def test_equal_rewards_are_shifted_only():
    _, memory = whitened([0.75, 0.75, 0.75], NO_REWARDS, 0)
    assert whitened([1.0, 0.75], memory, 0)[0] == [0.25, 0.0]
    # Two rewards that differ have a deviation of their own, however small the history.
    _, memory = whitened([0.0, 2.0], NO_REWARDS, 0)
    np.testing.assert_allclose(whitened([3.0], memory, 0)[0], [2.0 / np.sqrt(2.0)])


def test_the_gate_is_shut_in_the_warm_up_and_then_a_trigger():
    gates, memory = [], OPEN_GATE
    for median in (1.0, 3.0, 2.0, 1.9, 1.8, 1.7, 1.9, 2.0, 1.8):
        gate, memory = entropy_gated(median, memory, 3, 0.9)  # opens at 2, closes below 1.8
        gates.append(gate)
    assert gates == [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert memory == {"warm": [1.0, 3.0, 2.0], "gate": 1.0} and OPEN_GATE == {"warm": [], "gate": 1.0}
    assert entropy_gated(0.0, OPEN_GATE, 0, 0.9)[0] == 1.0


# ---- classes ------------------------------------------------------------------------------------------------------

HEARD = ()
ROWS = [
    tiny.row(reward=0.7).read_by(teacher=HEARD),
    tiny.row(reward=0.6).read_by(teacher=HEARD),
    tiny.row(reward=0.1).read_by(teacher=HEARD),
    tiny.row(reward=1.0).read_by(teacher=None),
    tiny.row(reward=0.0, tokens=()).read_by(teacher=HEARD),
]
IMPLICIT = np.asarray([0.5, 0.1, -0.7, 50.0, 50.0])


def test_classes_have_the_same_weight_and_others_none():
    """Two right rows and a wrong one count; one without a lesson and an empty one do not."""
    found, midpoint = told_apart(ROWS, IMPLICIT, 0.6, None, 0.25)
    assert midpoint == pytest.approx((0.3 - 0.7) / 2)
    assert [r.extras["right"] for r in found] == [True, True, False, True, False]
    np.testing.assert_allclose([r.extras["class_weight"] for r in found[:3]], [1.5, 1.5, 3.0])
    assert {r.extras["midpoint"] for r in found} == {midpoint}
    assert told_apart(ROWS, IMPLICIT, 0.6, 2.0, 0.25)[1] == pytest.approx(0.75 * 2.0 - 0.25 * 0.2)


@pytest.mark.parametrize("implicit, success", [(None, 0.6), (IMPLICIT, 2.0), (IMPLICIT, 0.0)])
def test_one_class_teaches_nothing(implicit, success):
    for before in (None, 0.5):
        found, midpoint = told_apart(ROWS, implicit, success, before, 0.25)
        assert midpoint == before
        assert {(r.extras["class_weight"], r.extras["midpoint"]) for r in found} == {(0.0, before or 0.0)}
