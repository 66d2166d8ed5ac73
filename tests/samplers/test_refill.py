"""Sampling with refilled slots against the compiled sampler: the same rows, in fewer steps and with less padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import NAMES, VOCABULARY, network, padded, prompts, unoptimised
from quick import slow_but

from sdjax.collect.contexts import question
from sdjax.engine import policies
from sdjax.engine.generate import GREEDY, Sampling, generate
from sdjax.engine.policies import row_keys
from sdjax.engine.tokens import Shapes
from sdjax.models import attention
from sdjax.samplers import refill as refill_module
from sdjax.samplers.refill import Drawing, by_width, refill, refilled

LENGTH, CONTEXT = 24, 64
STOP = tuple(range(0, VOCABULARY, 6))
"""So many that rows end at very different steps."""

LENGTHS = (3, 40, 9, 17, 2, 30, 5)
TWICE = 2


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LEAST", 2)  # the ring is read in 2, 4, 8, 16 and 24 columns
        yield from unoptimised()


def drawing(sampling=None, stop=STOP, limit=LENGTH):
    return Drawing(sampling or Sampling(), jnp.asarray(stop, jnp.int32), jnp.asarray(limit, jnp.int32))


def plain(name, rows, keys, how):
    """All rows in one call of the compiled sampler."""
    model, params = network(name)
    context = padded(rows, CONTEXT)
    done = generate((model,), (params,), (context,), keys, how.sampling, how.stop, how.limit, length=LENGTH)
    return jax.tree.map(np.asarray, done)


def same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.present, expected.present)
    np.testing.assert_array_equal(found.finished, expected.finished)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(("slots", "swap"), slow_but({(5, 3)}, [(4, 1), (5, 3), (14, 1)]))
def test_every_row_is_what_the_compiled_sampler_writes(name, slots, swap):
    """Slots fewer than rows, not a divisor of them, and as many; windows, grouped queries and norms are in `mixed`."""
    rows, keys = prompts(LENGTHS), row_keys(jax.random.key(3), jnp.arange(len(LENGTHS)), TWICE)
    expected = plain(name, rows, keys, drawing())
    assert 1 < len(set(expected.present.sum(-1))), "rows of one length would not test refilling"
    found = refill(*network(name), rows, keys, drawing(), (CONTEXT, LENGTH), slots, swap, buckets=3)
    same(found.completions, expected)


@pytest.mark.slow
def test_limits_filters_and_greedy_rows_are_the_same_too():
    rows, keys = prompts(LENGTHS), row_keys(jax.random.key(4), jnp.arange(len(LENGTHS)), TWICE)
    for how in (drawing(Sampling(temperature=0.7, top_p=0.8, top_k=20), limit=5), drawing(GREEDY), drawing(stop=(-1,))):
        same(
            refill(*network("plain"), rows, keys, how, (CONTEXT, LENGTH), 4, 1, 3).completions,
            plain("plain", rows, keys, how),
        )


def test_rows_that_end_at_their_first_token_leave_their_slots():
    rows, keys = prompts(LENGTHS), row_keys(jax.random.key(4), jnp.arange(len(LENGTHS)), 1)
    how = drawing(stop=tuple(range(VOCABULARY)))
    found = refill(*network("plain"), rows, keys, how, (CONTEXT, LENGTH), 2, 1, 3)
    assert found.steps == 0 and found.completions.finished.all()
    same(found.completions, plain("plain", rows, keys, how))


def test_one_long_row_does_not_hold_the_others():
    """The queue is written while a long row goes on; four at a time, its group would wait for it."""
    rows, keys = prompts((5,) * 16), row_keys(jax.random.key(0), jnp.arange(16), 1)
    lengths = plain("plain", rows, keys, drawing()).present.sum(-1)
    long = int(lengths.argmax())
    # The longest row is made longer still: no other row draws the token that ends it.
    ends = plain("plain", rows, keys, drawing()).tokens[long, lengths[long] - 1]
    how = drawing(stop=tuple(token for token in STOP if token != ends))
    lengths = plain("plain", rows, keys, how).present.sum(-1)
    assert lengths.max() > 2 * np.median(lengths), "no long tail to test"
    in_fours = sum(lengths[i : i + 4].max() - 1 for i in range(0, 16, 4))
    steps = refill(*network("plain"), rows, keys, how, (CONTEXT, LENGTH), 4, 1, 3).steps
    # No schedule needs fewer steps than the work divided by the slots, or than the longest row.
    least = max(-(-(lengths - 1).sum() // 4), lengths.max() - 1)
    assert least <= steps < in_fours, (least, steps, in_fours)


def test_slots_are_halved_as_the_last_rows_end(monkeypatch):
    """The same rows in as many steps, with fewer slots in which nothing is written."""
    rows, keys = prompts((5,) * 16), row_keys(jax.random.key(1), jnp.arange(16), 1)
    write = lambda: refill(*network("plain"), rows, keys, drawing(), (CONTEXT, LENGTH), 16, 2, 3)
    monkeypatch.setattr(refill_module, "FEW", 4)
    found = write()
    same(found.completions, plain("plain", rows, keys, drawing()))
    lengths = found.completions.present.sum(-1)
    live = [int((lengths > step + 1).sum()) for step in range(found.steps)]
    assert found.decoded == sum(next(size for size in (4, 8, 16) if size >= n) for n in live)
    monkeypatch.setattr(refill_module, "HALVINGS", 0)
    whole = write()
    same(whole.completions, found.completions)
    assert whole.steps == found.steps and whole.decoded == 16 * whole.steps > 1.5 * found.decoded


def test_short_prompts_do_not_pay_for_long_ones():
    rows = prompts((4,) * 7 + (60,))
    keys = row_keys(jax.random.key(0), jnp.arange(8), 1)
    cost = lambda buckets: refill(*network("plain"), rows, keys, drawing(), (CONTEXT, LENGTH), 8, 1, buckets).padded
    assert cost(1) == 8 * 64 and cost(2) == 7 * 16 + 64


def test_buckets_are_few_and_read_the_fewest_padded_tokens():
    found = by_width([[0] * n for n in (10, 60, 20, 30, 15, 20)], 64, 2)
    # Of the widths 16, 24, 32 and 64: 32 and 64 read 5*32 + 64 = 224, 24 and 64 read 4*24 + 2*64 = 224, 16 less well.
    assert sum(width * len(some) for width, some in found.items()) == 224
    assert sorted(i for some in found.values() for i in some) == list(range(6))
    assert list(by_width([[0] * n for n in (10, 60)], 64, 1)) == [64]
    assert list(by_width([[0] * 3], 64, 3)) == [16]


def test_as_a_policys_writer_it_changes_nothing_but_the_schedule():
    shapes = Shapes(context=128, completion=16, rows=6, tokens_per_chunk=None)
    chats, key = [question(e) for e in tiny.TASK.train[:5]], jax.random.key(7)
    chats[1] = tuple({**turn, "content": " ".join([turn["content"]] * 6)} for turn in chats[1])
    own = policies.sample(tiny.policy(shapes=shapes), chats, key, n=3)
    policy = dataclasses.replace(tiny.policy(shapes=shapes), writer=refilled(slots=4))
    for some, expected in zip(policies.sample(policy, chats, key, n=3), own, strict=True):
        for a, b in zip(some, expected, strict=True):
            assert (a.tokens, a.text, a.finished) == (b.tokens, b.text, b.finished)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    limited = policies.sample(policy, chats, key, n=2, limit=2)
    assert {len(s.tokens) for some in limited for s in some} <= {1, 2}
