"""Rows in the order of their lengths: what is said of each stays, positions of padding are few, little is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import test_score
from networks import jaxprs

from sdjax.cli.bench import log_normal_lengths
from sdjax.engine.by_length import SHORTEST, lengths_of, over_sorted_rows, positions_read, sorted_chunks
from sdjax.engine.score import token_signals

ROWS, LENGTH, WIDTH, BETWEEN = 12, 64, 3, 7
USED = np.asarray([64, 3, 0, 17, 8, 64, 1, 30, 5, 11, 40, 2])


def test_lengths_rise_by_the_same_factor_to_the_longest():
    found = lengths_of(2048, 16)
    assert len(found) == 16 and found[-1] == 2048 and list(found) == sorted(found)
    assert all(length % (2048 // 64) == 0 for length in found) and found[0] <= 2 * 2048 / SHORTEST
    factors = np.divide(found[8:], found[7:-1])
    np.testing.assert_allclose(factors, SHORTEST ** (1 / 16), rtol=0.06)
    assert lengths_of(8, 1) == (8,) and lengths_of(3, 16) == (1, 2, 3) and lengths_of(1, 4) == (1,)


def test_chunks_are_cut_to_the_least_length_that_holds_them():
    sizes = (8, 64)
    chunks, kinds = sorted_chunks(jnp.asarray(USED), 6, sizes)
    assert sorted(np.asarray(chunks).ravel()) == list(range(ROWS)) and chunks.shape == (4, 3)
    assert [sizes[kind] for kind in kinds] == [8, 8, 64, 64]  # 0 1 2, 3 5 8, 11 17 30, 40 64 64
    assert sorted_chunks(jnp.asarray(USED), 2, sizes)[0].shape == (6, 2)  # no more than two rows at a time


def told(same, x):
    """A sum over each row's own past, through a product that is wider than what goes in and comes out."""
    rows, length = x["live"].shape
    seen = jnp.where(x["live"], x["number"], 0.0).cumsum(axis=1) + x["contexts"]["start"][:, None]
    wide = jnp.tanh(seen[..., None, None] * same["weight"] * same["fixed"])  # [R, L, WIDTH, BETWEEN]
    said = jnp.where(x["live"][..., None], wide.sum(-1) * x["contexts"]["count"][:, None, None], 0.0)
    return {"said": said, "length": jnp.where(x["live"], length, 0)}, {"rows": jnp.full(rows, length)}


@functools.cache
def data():
    draw = np.random.default_rng(0).standard_normal
    live = np.arange(LENGTH) < USED[:, None]
    same = {"weight": jnp.asarray(draw((WIDTH, BETWEEN))), "fixed": jnp.asarray(draw(BETWEEN))}
    number = np.where(live, draw(live.shape), np.nan)  # what is absent is garbage
    timed = {"live": jnp.asarray(live), "number": jnp.asarray(number)}
    contexts = {"start": jnp.asarray(draw(4)), "count": jnp.arange(1, ROWS + 1), "nothing": None}
    return same, timed, contexts


def loss(weight, start, lengths, rows=None):
    same, timed, contexts = data()
    same, contexts = {**same, "weight": weight}, {**contexts, "start": start}
    if lengths:
        found, rest = over_sorted_rows(told, same, timed, contexts, timed["live"], rows, lengths)
    else:
        contexts["start"] = jnp.repeat(start, ROWS // 4)
        found, rest = told(same, {**timed, "contexts": contexts})
    each = jnp.sin(1.0 + jnp.arange(found["said"].size)).reshape(found["said"].shape)
    return (found["said"] * each).sum(), (found, rest)


@pytest.mark.parametrize(("lengths", "rows"), [(1, 3), (4, 3), (3, None), (6, 12)])
def test_value_and_gradient_are_those_of_all_rows_at_once(lengths, rows):
    """A context is shared by three rows; a count belongs to each; what is fixed has no gradient."""
    same, _, contexts = data()
    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (wanted, _)), gradients = both(same["weight"], contexts["start"], 0)
    (found_value, (found, rest)), found_gradients = jax.jit(both, static_argnums=(2, 3))(
        same["weight"], contexts["start"], lengths, rows
    )
    np.testing.assert_allclose(found_value, value, rtol=1e-5)
    np.testing.assert_allclose(found["said"], wanted["said"], atol=1e-5)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # Every row was read at a length that holds it, by the program for it.
    assert set(np.asarray(rest["rows"])) <= set(lengths_of(LENGTH, lengths))
    assert (np.asarray(rest["rows"]) >= USED).all()
    shown = np.asarray(found["length"]).max(axis=1)
    np.testing.assert_array_equal(shown[USED > 0], np.asarray(rest["rows"])[USED > 0])


def test_the_backward_pass_keeps_nothing_of_a_branch():
    """No condition gives out what lies between, of which every branch would give a copy."""
    same, _, contexts = data()
    gradient = jax.grad(lambda w, s: loss(w, s, 4, 3)[0], argnums=(0, 1))
    given = [
        out.aval.shape
        for equation in jaxprs(jax.make_jaxpr(gradient)(same["weight"], contexts["start"]))
        if equation.primitive.name == "cond"
        for out in equation.outvars
    ]
    assert given and not [shape for shape in given if BETWEEN in shape and shape != (WIDTH, BETWEEN)]


def test_padding_where_lengths_differ_twenty_times():
    """At 64 rows of at most 2,048 tokens: 71 % of positions with one length, 11 % with sixteen, 9 % a row at a time."""
    rows = [log_normal_lengths(64, 2048, 20, seed) for seed in range(20)]
    share = lambda lengths, most: 1 - np.sum(rows) / sum(positions_read(used, 2048, most, lengths) for used in rows)
    assert 0.69 < share(1, None) < 0.73
    assert share(4, None) < 0.40 and share(16, None) < 0.12 and share(16, 1) < 0.095


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "rows", "tokens"), [(3, 2, None), (2, 1, 6), (4, None, 12)])
def test_an_objective_of_networks_is_that_of_all_rows_at_once(lengths, rows, tokens):
    """Contexts that rows share and that they do not, a frozen view, a row that does not count: loss, signals, gradient."""
    networks, params = test_score.models("mixed", "plain")
    batch, views = test_score.three_views(after=4), dict(test_score.TWO)

    def total(params, lengths, rows, tokens):
        how = {"rows": rows, "tokens": tokens, "lengths": lengths}
        found = token_signals(views, test_score.divergences, networks, params, batch, **how)
        return test_score.weighted(found, {}), found

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=(1, 2, 3))
    (value, found), gradients = run(params, lengths, rows, tokens)
    (wanted_value, wanted), wanted_gradients = run(params, 1, None, None)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, err_msg=name)
    largest = test_score.largest(wanted_gradients)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest)
