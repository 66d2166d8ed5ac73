"""Group, leave-one-out, whitened and discounted advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import advantages as adv

ONE_GROUP = jnp.zeros(4, jnp.int32)
ALL = jnp.ones(4, bool)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def array(*values):
    return jnp.array(values, jnp.float32)


def mixed_groups(rows=40, groups=7, seed=0):
    """Interleaved groups of unequal size with padding rows, and rewards that are NaN there."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, rows) * 1000 - 3
    valid = rng.random(rows) < 0.8
    reward = np.where(valid, rng.normal(size=rows), np.nan)
    return reward, group, valid


def reference(reward, group, valid, function):
    out = np.zeros(len(reward))
    for i in np.flatnonzero(valid):
        peers = [j for j in np.flatnonzero(valid) if group[j] == group[i]]
        out[i] = function(reward[i], reward[peers])
    return out


def test_hand_values():
    reward = array(1, 0, 0, 1)
    np.testing.assert_allclose(adv.group_advantage(reward, ONE_GROUP, ALL), 0.866024 * (2 * reward - 1), atol=1e-6)
    centred = adv.group_advantage(reward, ONE_GROUP, ALL, normalised=False)
    np.testing.assert_allclose(centred, 0.5 * (2 * reward - 1), atol=1e-7)
    np.testing.assert_allclose(adv.leave_one_out(reward, ONE_GROUP, ALL), 2 / 3 * (2 * reward - 1), atol=1e-6)

    reward = array(1, 0, 0, 0)
    for eps, high, low in ((1e-6, 1.499997, -0.499999), (1e-4, 1.49970, -0.49990)):
        got = adv.group_advantage(reward, ONE_GROUP, ALL, eps=eps)
        np.testing.assert_allclose(got, (high, low, low, low), atol=2e-6)
    centred = adv.group_advantage(reward, ONE_GROUP, ALL, normalised=False)
    np.testing.assert_allclose(centred, (0.75, -0.25, -0.25, -0.25))


def test_the_deviation_is_unbiased():
    """Divisor n - 1: the population deviation would give 1.7321 for one success of four, 1.732051 for two of eight."""
    assert abs(float(adv.group_advantage(array(1, 0, 0, 0), ONE_GROUP, ALL)[0]) - 1.5) < 1e-4
    reward = jnp.array([1.0, 1, 0, 0, 0, 0, 0, 0])
    got = adv.group_advantage(reward, jnp.zeros(8, jnp.int32), jnp.ones(8, bool))
    np.testing.assert_allclose(got[jnp.array([0, 2])], (1.620185, -0.540062), atol=5e-6)


def test_equal_rewards_have_exactly_no_advantage():
    """0.1 is not a float: a plain mean leaves rounding, which the deviation would blow up."""
    group = jnp.repeat(jnp.arange(4), jnp.array([3, 5, 6, 7]))
    for function in (adv.group_advantage, adv.leave_one_out):
        np.testing.assert_array_equal(function(jnp.full(21, 0.1), group, jnp.ones(21, bool)), 0.0)


def test_shift_and_scale_of_rewards():
    reward = array(0.3, -1.2, 2.0, 0.4)
    base = adv.group_advantage(reward, ONE_GROUP, ALL)
    np.testing.assert_allclose(adv.group_advantage(reward + 5.0, ONE_GROUP, ALL), base, atol=1e-5)
    np.testing.assert_allclose(adv.group_advantage(reward * 40.0, ONE_GROUP, ALL), base, atol=1e-5)
    np.testing.assert_allclose(base.sum(), 0.0, atol=1e-6)
    centred = adv.group_advantage(reward * 40.0, ONE_GROUP, ALL, normalised=False)
    assert np.abs(centred - adv.group_advantage(reward, ONE_GROUP, ALL, normalised=False)).max() > 1.0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_interleaved_groups_against_numpy(wrap):
    reward, group, valid = mixed_groups()
    inputs = jnp.array(reward), jnp.array(group), jnp.array(valid)
    mean = wrap(adv.group_mean)(*inputs)
    want = reference(reward, group, valid, lambda r, peers: peers.mean())
    np.testing.assert_allclose(np.where(valid, mean, 0.0), want, rtol=1e-5, atol=1e-6)

    def standard(r, peers):
        return r if len(peers) == 1 else (r - peers.mean()) / (peers.std(ddof=1) + 1e-6)

    got = wrap(adv.group_advantage)(*inputs)
    np.testing.assert_allclose(got, reference(reward, group, valid, standard), rtol=1e-4, atol=1e-5)
    others = lambda r, peers: r - (peers.sum() - r) / max(len(peers) - 1, 1) if len(peers) > 1 else r
    got = wrap(adv.leave_one_out)(*inputs)
    np.testing.assert_allclose(got, reference(reward, group, valid, others), rtol=1e-4, atol=1e-5)


def test_order_and_names_of_groups_do_not_matter():
    reward, group, valid = mixed_groups(seed=1)
    order = np.random.default_rng(2).permutation(len(reward))
    base = adv.group_advantage(jnp.array(reward), jnp.array(group), jnp.array(valid))
    moved = adv.group_advantage(jnp.array(reward[order]), jnp.array(-group[order]), jnp.array(valid[order]))
    np.testing.assert_allclose(moved, base[order], atol=1e-6)


def test_padding_rows_with_a_real_group_id():
    reward, valid = array(1, 0, 0, 1, 99, jnp.nan), jnp.array([1, 1, 1, 1, 0, 0], bool)
    got = adv.group_advantage(reward, jnp.zeros(6, jnp.int32), valid)
    np.testing.assert_allclose(got[:4], adv.group_advantage(reward[:4], ONE_GROUP, ALL), atol=1e-7)
    np.testing.assert_array_equal(got[4:], 0.0)


def test_a_group_of_one():
    reward, group, valid = array(0.7, 1, 0), jnp.array([5, 6, 6]), jnp.ones(3, bool)
    for function in (adv.group_advantage, adv.leave_one_out):
        assert float(function(reward, group, valid)[0]) == pytest.approx(0.7)
    assert float(adv.group_advantage(reward, group, valid, normalised=False)[0]) == 0.0
    only_one_left = jnp.array([True, True, False])
    assert float(adv.group_advantage(reward, group, only_one_left)[1]) == 1.0


def test_a_group_of_two_is_compared():
    """Deviation of 1 and 0 with divisor n - 1: 0.7071."""
    group, valid = jnp.array([5, 5, 6]), jnp.array([True, True, False])
    reward = array(1, 0, jnp.nan)
    np.testing.assert_allclose(adv.group_advantage(reward, group, valid), (0.707106, -0.707106, 0.0), atol=2e-6)
    np.testing.assert_allclose(adv.leave_one_out(reward, group, valid), (1.0, -1.0, 0.0), atol=1e-6)


def test_padding_rows_with_a_group_of_their_own():
    """Without a valid row in the group there is nobody to compare with, and no reward to fall back on."""
    reward, group, valid = array(jnp.nan, 3, 1, 0), jnp.array([4, 5, 6, 6]), jnp.array([False, False, True, True])
    for function in (adv.group_advantage, adv.leave_one_out):
        np.testing.assert_array_equal(function(reward, group, valid)[:2], 0.0)


def test_mean_over_chosen_rows_reaches_the_others():
    value, group = array(1, 10, 3, 30), jnp.array([0, 1, 0, 1])
    chosen = jnp.array([True, True, False, False])
    np.testing.assert_array_equal(adv.group_mean(value, group, chosen), (1, 10, 1, 10))
    np.testing.assert_array_equal(adv.group_mean(value, group, jnp.array([True, False, True, False])), (2, 0, 2, 0))


def test_group_mean_is_differentiable_and_advantages_are_not():
    reward, group, valid = array(1, 2, 4), jnp.array([0, 0, 1]), jnp.ones(3, bool)
    gradient = jax.grad(lambda r: adv.group_mean(r, group, valid)[0])(reward)
    np.testing.assert_allclose(gradient, (0.5, 0.5, 0.0))
    for function in (adv.group_advantage, adv.leave_one_out):
        np.testing.assert_array_equal(jax.grad(lambda r, f=function: f(r, group, valid).sum())(reward), 0.0)


def test_whiten():
    rng = np.random.default_rng(0)
    value, over = rng.normal(size=(5, 6)) * 3 + 2, rng.random((5, 6)) < 0.7
    dirty = jnp.where(jnp.array(over), jnp.array(value), jnp.nan)
    got = adv.whiten(dirty, jnp.array(over))
    kept = value[over]
    np.testing.assert_allclose(got[over], (kept - kept.mean()) / kept.std(ddof=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[~over], 0.0)
    np.testing.assert_array_equal(adv.whiten(jnp.full(4, 0.3), ALL), 0.0)
    np.testing.assert_allclose(adv.whiten(array(0, 2), ALL[:2]), (-0.707107, 0.707107), atol=1e-6)
    np.testing.assert_allclose(adv.whiten(array(0, 2), ALL[:2], eps=2.0), (-0.5, 0.5), atol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: adv.whiten(x, ALL)[0])(array(1, 2, 3, 4)), 0.0)


def test_reward_to_go_hand_values():
    reward, over = jnp.array([[0.1, -0.2, 0.3, 0.4]]), jnp.ones((1, 4), bool)
    cases = [
        ((1.0, False), (0.6, 0.5, 0.7, 0.4)),
        ((1.0, True), (0.15, 0.1667, 0.35, 0.4)),
        ((0.9, False), (0.4546, 0.394, 0.66, 0.4)),
        ((0.9, True), (0.13219, 0.14539, 0.34737, 0.4)),
        ((0.0, False), (0.1, -0.2, 0.3, 0.4)),
    ]
    for (discount, normalised), want in cases:
        got = adv.reward_to_go(reward, over, discount, normalised=normalised)
        np.testing.assert_allclose(got[0], want, atol=6e-5)
    shrunk = (0.4546, 0.3546, 0.5346, 0.2916)  # with the exponent counted from the row's start
    assert np.abs(adv.reward_to_go(reward, over, 0.9)[0] - np.array(shrunk)).max() > 0.1


@pytest.mark.parametrize("normalised", [False, True])
def test_reward_to_go_against_numpy(normalised):
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(3, 33))
    over = np.arange(33) < np.array([[33], [20], [0]])
    want = np.zeros_like(reward)
    for i, t in np.argwhere(over):
        powers = 0.95 ** np.arange(33 - t)
        want[i, t] = (powers * (reward * over)[i, t:]).sum() / ((powers * over[i, t:]).sum() if normalised else 1.0)
    dirty = jnp.where(jnp.array(over), jnp.array(reward), jnp.nan)
    got = jax.jit(lambda r, o: adv.reward_to_go(r, o, 0.95, normalised=normalised))(dirty, jnp.array(over))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_reward_to_go_is_a_constant():
    over = jnp.ones((1, 3), bool)
    gradient = jax.grad(lambda r: adv.reward_to_go(r, over, 0.9).sum())(jnp.ones((1, 3)))
    np.testing.assert_array_equal(gradient, 0.0)


def test_what_is_far_ahead_counts_in_a_discounted_mean():
    """Four tokens that do not count lie before the only one that does: its weight is 1e-5, and the mean its reward."""
    over = jnp.array([[1, 0, 0, 0, 0, 1]], bool)
    reward = jnp.array([[9.0, jnp.nan, 0, 0, 0, 3.0]])
    np.testing.assert_allclose(adv.reward_after(reward, over, 0.1, normalised=True)[0, 0], 3.0, rtol=1e-5)
    np.testing.assert_allclose(adv.reward_after(reward, over, 0.1)[0, 0], 3e-5, rtol=1e-5)


def test_whitening_keeps_small_differences():
    """A variance of 5e-9 beside 1e-8."""
    found = adv.whiten(array(0, 1e-4), ALL[:2])
    np.testing.assert_allclose(found, np.array([-0.5, 0.5]) * 1e-4 / np.sqrt(1.5e-8), rtol=1e-4)
