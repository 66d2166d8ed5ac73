"""What a token is worth, against loops in float64: ragged rows, masks with holes, garbage outside, an empty row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels import credit
from sdjax.kernels.distributions import normalise

OVER = np.asarray([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
VALUE = np.asarray([[0.5, -2.0, 0.0, 3.0, -0.25, 1.0], [9, -1, 4, 9, 2, 9], [9, 9, 9, -3, 9, 9], [9] * 6])
GROUP, VALID = np.asarray([7, 7, 2, 7]), np.asarray([True, True, True, True])


def dirty(value, over=OVER, garbage=np.nan):
    """Arguments of a kernel, with garbage outside the population."""
    return jnp.asarray(np.where(over, value, garbage), jnp.float32), jnp.asarray(over)


def by_row(function, value=VALUE, over=OVER):
    """`function(tokens of a row) -> as many`, and 0 outside of them."""
    found = np.zeros(over.shape)
    for row, (one, there) in enumerate(zip(value, over, strict=True)):
        found[row, there] = function(np.asarray(one[there], np.float64)) if there.any() else 0.0
    return found


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-6)


def assert_constant(function, *arguments):
    """Every entry alone: the gradient of a sum that is constant would be 0 anyway."""
    jacobian = jax.jacobian(function)(*arguments)
    assert np.any(np.asarray(function(*arguments))) and not np.any(np.asarray(jacobian))


# ---- of one position ----------------------------------------------------------------------------------------------


def test_the_optimal_baseline_by_enumeration():
    student, teacher = normalise(jax.random.normal(jax.random.key(0), (2, 3, 5)))
    p, reward = np.exp(np.asarray(student, np.float64)), np.asarray(teacher - student, np.float64)
    scores = np.eye(5) - p[:, None, :]  # of every token, with respect to the logits
    size = (scores**2).sum(-1)
    close(credit.optimal_baseline(student, teacher), (p * size * reward).sum(-1) / (p * size).sum(-1))
    assert_constant(credit.optimal_baseline, student, teacher)
    assert_constant(lambda q: credit.optimal_baseline(student, q), teacher)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0])
def test_the_difference_of_powers(alpha):
    p, q = np.asarray([0.9, 0.2, 0.5, 1e-6]), np.asarray([0.1, 0.7, 0.5, 0.3])
    logs = jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32))
    close(credit.power_difference(*logs, alpha), q**alpha - p**alpha)
    assert_constant(lambda x: credit.power_difference(x, logs[1], alpha), logs[0])


# ---- of a row -----------------------------------------------------------------------------------------------------


def test_weights_by_place_count_tokens_of_the_population():
    place = lambda row: (np.arange(1, row.size + 1) - 0.5) / row.size
    wanted = by_row(lambda row: 0.2 + 0.8 / (1 + np.exp(-(place(row) - 0.3) / 0.1)))
    close(credit.position_weight(jnp.asarray(OVER), lowest=0.2, centre=0.3, width=0.1), wanted)


def test_the_remaining_share():
    share = lambda row: np.abs(row)[::-1].cumsum()[::-1] / np.abs(row).sum()
    for garbage in (np.nan, np.inf, -7.0):
        close(credit.remaining_share(*dirty(VALUE, garbage=garbage)), by_row(share))
    close(credit.remaining_share(jnp.zeros((4, 6)), jnp.asarray(OVER)), OVER)
    assert_constant(lambda x: credit.remaining_share(x, jnp.asarray(OVER)), jnp.asarray(VALUE, jnp.float32))


def test_compounded_weights_pass_over_holes():
    def compounded(row):
        found = [1.0]
        for factor in row[:-1]:
            found.append(1.0 + factor * found[-1])
        return np.asarray(found)

    close(credit.compounded_weight(*dirty(VALUE)), by_row(compounded))
    assert_constant(lambda x: credit.compounded_weight(x, jnp.asarray(OVER)), jnp.asarray(VALUE, jnp.float32))


def test_the_mean_of_a_step():
    """Of its tokens in the population; the gradient goes through, and whole steps keep their sums."""
    step = np.asarray([[0, 0, 0, 1, 1, 5], [0, 1, 1, 1, 0, 0], [2] * 6, [0] * 6])
    wanted = np.zeros(OVER.shape)
    for row, t in np.argwhere(OVER):
        wanted[row, t] = VALUE[row, OVER[row] & (step[row] == step[row, t])].mean()
    value, over = dirty(VALUE)
    close(credit.step_mean(value, jnp.asarray(step), over), wanted)
    gradient = jax.grad(lambda x: credit.step_mean(x, jnp.asarray(step), over)[0, 0])(value)
    close(gradient, [[1 / 3] * 3 + [0.0] * 3] + [[0.0] * 6] * 3)


# ---- of a group ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [VALID, np.asarray([True, False, True, True])], ids=["all", "some"])
def test_tokens_are_whitened_over_their_group(valid):
    """Each token counts once, however long its row; a group of one token is 0."""
    wanted, over = np.zeros(OVER.shape), OVER & valid[:, None]
    for group in set(GROUP):
        members = over & (GROUP == group)[:, None]
        tokens = VALUE[members]
        wanted[members] = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8)
    arguments = *dirty(VALUE), jnp.asarray(GROUP), jnp.asarray(valid)
    close(credit.group_whiten(*arguments), wanted)
    found = credit.group_whiten(*dirty(VALUE), jnp.asarray(GROUP), jnp.asarray(valid), eps=1.0)
    close(np.abs(found) < np.abs(wanted), np.abs(wanted) > 0)
    assert_constant(lambda x: credit.group_whiten(x, *arguments[1:]), jnp.asarray(VALUE, jnp.float32))
