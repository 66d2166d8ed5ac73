"""Sampling after prefixes: how rows are cut into parts and padded, and who writes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import unoptimised

from sdjax.engine import waves
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import Sample
from sdjax.engine.tokens import Shapes
from sdjax.engine.waves import continued, parts, reach, widened

quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


@pytest.mark.parametrize(
    "rows, most, sizes",
    [
        (1, 64, [(1, 4)]),
        (4, 64, [(4, 4)]),
        (5, 64, [(5, 16)]),
        (16, 64, [(16, 16)]),
        (17, 64, [(17, 64)]),
        (70, 64, [(64, 64), (6, 16)]),
        (3, 10, [(3, 3)]),
        (4, 10, [(4, 10)]),
        (1, 4, [(1, 4)]),
        (3, 2, [(2, 2), (1, 2)]),
        (0, 8, []),
    ],
)
def test_parts_take_a_program_of_a_fourth_of_the_rows_where_they_fit(rows, most, sizes):
    found = list(parts(range(100, 100 + rows), most))
    assert [(len(part), size) for part, size in found] == sizes
    assert [i for part, _ in found for i in part] == list(range(100, 100 + rows))


@pytest.mark.parametrize("used, width", [(1, 32), (31, 32), (32, 32), (33, 64), (64, 64), (65, 90), (90, 90), (95, 95)])
def test_widths_are_powers_of_two_up_to_a_prompt_and_a_completion(used, width):
    shapes = Shapes(context=60, completion=30, rows=8)
    tokens = np.zeros((2, 128), np.int32)
    tokens[0, 128 - used :], tokens[1, -1] = np.arange(1, used + 1), 7
    found, mask = widened(tokens, tokens > 0, shapes)
    assert found.shape == mask.shape == (2, width)
    np.testing.assert_array_equal(found[0], [*[0] * (width - used), *range(1, used + 1)])
    np.testing.assert_array_equal(found[1], [*[0] * (width - 1), 7])
    np.testing.assert_array_equal(mask, found > 0)


def test_what_a_prefix_may_have():
    shapes = Shapes(context=5, completion=3, rows=8)
    assert [reach(shapes, [[1] * n, [1]]) for n in (4, 5, 6)] == [5, 5, 8] and reach(shapes, []) == 5


def test_a_writer_of_its_own_is_told_all():
    seen = []

    def writer(policy, prefixes, keys, *, n, sampling, limit):
        seen.append((policy, prefixes, n, sampling, limit))
        return [[Sample((i,), (0.0,), "", True)] for i in range(len(prefixes))]

    policy, how = dataclasses.replace(tiny.policy(), writer=writer), Sampling(0.7)
    found = continued(policy, [[1], [2, 3]], jnp.stack([jax.random.key(0)] * 2), sampling=how, limit=5)
    assert [s.tokens for s in found] == [(0,), (1,)] and seen == [(policy, [[1], [2, 3]], 1, how, 5)]


def test_prefixes_of_about_one_length_are_read_together_and_each_draws_from_its_own_key(monkeypatch):
    """Two rows at a time: the two short ones in 32 columns, the two long ones in 64; each as it is written alone."""
    policy = tiny.policy(shapes=dataclasses.replace(tiny.SHAPES, rows=2))
    prefixes = [[9] * 5, [10] * 40, [11] * 6, [12] * 50]
    keys = jax.random.split(jax.random.key(5), 4)
    shapes, generate = [], waves.generate

    def watched(models, params, contexts, *rest, **more):
        shapes.append(contexts[0][0].shape)
        return generate(models, params, contexts, *rest, **more)

    monkeypatch.setattr(waves, "generate", watched)
    found = continued(policy, prefixes, keys, sampling=Sampling(), limit=6)
    assert shapes == [(2, 32), (2, 64)] and max(len(s.tokens) for s in found) <= 6
    alone = [
        continued(policy, [p], k[None], sampling=Sampling(), limit=6)[0] for p, k in zip(prefixes, keys, strict=True)
    ]
    assert [s.tokens for s in found] == [s.tokens for s in alone]
    greedy = continued(policy, [prefixes[1]] * 2, keys[:2], sampling=GREEDY, limit=3)
    assert greedy[0] == greedy[1] and len(greedy[0].tokens) <= 3
