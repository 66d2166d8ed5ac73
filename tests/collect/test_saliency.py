"""Attention saliency: the numbers of AtManRL's note, what a mask can and cannot do, and the reward made of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from method_checks import assert_same, close, fixture, slopes
from networks import unoptimised

from sdjax.collect.contexts import question
from sdjax.collect.saliency import (
    SCALE,
    START,
    compiled_saliency,
    effective,
    parts,
    relearned,
    restored,
    saliency,
    saliency_of_tokens,
)
from sdjax.engine.chats import render
from sdjax.kernels.divergences import forward_kl
from sdjax.kernels.reductions import masked_mean
from sdjax.methods import atmanrl as atmanrl_module
from sdjax.methods.atmanrl import atmanrl
from sdjax.methods.grpo import grpo
from sdjax.models.attention import Keys, attend
from sdjax.models.transformer import hidden, positions_of
from sdjax.types import Rollout

near = functools.partial(np.testing.assert_allclose, atol=6e-6, rtol=6e-6)


quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


# ---- the mask ---------------------------------------------------------------------------------------------------------


def test_a_mask_suppresses_and_never_amplifies():
    near(effective(jnp.asarray([0.2, 0.0, -0.1, START])), (0.0, 0.0, -1.0, -4.0))


def test_shares():
    mask = jnp.asarray([[-0.4, 0.0, 0.0], [-0.1, -0.4, 0.0], [0.2, -0.3, -0.4]])
    region = jnp.tril(jnp.ones((3, 3), bool))
    near(1 - restored(mask), jnp.asarray([[1, 0, 0], [0.25, 1, 0], [0, 0.75, 1]]), atol=1e-6)
    near(masked_mean(restored(mask), region), 1 / 3)
    near(masked_mean(1 - restored(mask), region), 2 / 3)
    near(restored(jnp.asarray([START, 0.0, 0.3, -5.0, -0.2])), (0.0, 1.0, 1.0, 0.0, 0.5))


def read_by_one(keys, values, bias):
    """What one query of ones, after all keys, reads under a bias of its scores."""
    count = keys.shape[1]
    run = Keys(keys, values, jnp.zeros((1, count), jnp.int32), jnp.ones((1, count), bool))
    return attend(jnp.ones((1, 1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32), [run], bias=bias)[0, 0, 0, 0]


def two_keys(bias):
    """What one query reads from a prompt key (1, 0) and a reasoning key (0, 1) of equal scores."""
    return read_by_one(jnp.zeros((1, 2, 1, 2)), jnp.eye(2)[None, :, None], bias[None, None])


def test_suppressed_attention():
    near(two_keys(jnp.asarray([0.0, -4.0])), (0.982014, 0.017986))
    near(two_keys(jnp.asarray([-3.0, -7.0])), (0.982014, 0.017986))  # a constant for all keys changes nothing
    near(jax.nn.softmax(jnp.asarray([-3.0, -2.0, -1.0])), (0.090031, 0.244728, 0.665241))
    # One key alone: whatever is added, it is read.
    one = lambda bias: read_by_one(jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)), bias).sum()
    assert jax.grad(one)(jnp.full((1, 1, 1), -4.0)).item() == 0.0


def nll(added):
    """The toy: logits are what attention reads, the second class is the target."""
    return -jax.nn.log_softmax(two_keys(jnp.stack([jnp.zeros(()), added])))[1]


def test_toy_gradients_are_small_where_suppression_is_strong():
    near([nll(-4.0), nll(0.0)], (1.287092, 0.693147))
    near([jax.grad(nll)(x) for x in (-4.0, -2.0, 0.0)], (-0.025573, -0.143148, -0.25))
    dist = lambda added: jax.nn.log_softmax(two_keys(jnp.asarray([0.0, added])))
    near([forward_kl(dist(x), dist(0.0)) for x in (-4.0, 0.0)], (0.111931, 0.0))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_toy_is_relearnt(scale):
    loss = lambda mask: scale * nll(effective(mask))
    learn = jax.jit(relearned, static_argnums=(0, 2))
    masks = jnp.stack([learn(loss, jnp.asarray(START), steps) for steps in (50, 100, 150, 200)])
    near(masks, (-0.3433, -0.2708, -0.1799, -0.0791), atol=2e-4)
    near(restored(masks), (0.142, 0.323, 0.550, 0.802), atol=1e-3)


def test_sgd_sees_how_much_an_entry_helps():
    """AdamW, the paper's, moves entries of constant gradients alike, whatever their size."""
    slope, start = jnp.asarray([-1.0, -0.1, 0.0]), jnp.full(3, START)
    by_effect, published = (relearned(lambda mask: slope @ mask, start, 50, inner) for inner in ("sgd", "adamw"))
    close(by_effect, START - 50 * 1e-3 * slope)
    close(published[0], published[1], atol=1e-5)
    assert published[0] > START + 0.04


def test_an_entry_without_effect_stays():
    near(jax.jit(relearned, static_argnums=0)(lambda mask: 0.0 * mask, jnp.asarray(START)), -0.39602)


# ---- in the network ---------------------------------------------------------------------------------------------------

TOKENS = jnp.asarray([[6, 7, 9, 12, 20, 23]], jnp.int32)


def states(bias):
    mask = jnp.ones_like(TOKENS, bool)
    return hidden(tiny.model(), tiny.pretrained().params, TOKENS, positions_of(mask), mask, None, bias)[0]


def test_no_mask_changes_nothing():
    np.testing.assert_array_equal(states(None), states(jnp.zeros((1, 6, 6))))
    assert np.abs(states(None) - states(jnp.zeros((1, 6, 6)).at[0, 5, 2].set(-4.0))).max() > 1e-4


def test_the_future_stays_hidden():
    weights = jax.random.normal(jax.random.key(0), (1, 6, 32))
    found = np.asarray(jax.grad(lambda bias: jnp.sum(weights * states(bias)))(jnp.full((1, 6, 6), -1.0)))[0]
    assert not found[np.triu_indices(6, 1)].any()
    assert (found[np.tril_indices(6)] != 0).sum() >= 19  # all but the corner, where one key is all there is
    np.testing.assert_allclose(found[0, 0], 0.0, atol=1e-7)


def policy():
    return tiny.policy()


def answer(text, group=0):
    tokens = tuple(tiny.tokenizer().encode(text, add_special_tokens=False))
    example = tiny.TASK.train[group]
    rollout = Rollout(example, tokens, (0.0,) * len(tokens), text, group)
    return rollout.read_by(student=question(example))


def test_parts():
    cut = lambda text: parts(answer(text), policy(), "->")
    assert cut("key 1 -> red") == (2, 3, 4)
    assert cut("key 1 -> red <end>") == (2, 3, 4)
    assert cut("key -> red") == (1, 2, 3)
    assert cut("key -> 1 -> red blue") == (3, 4, 6)  # the last one
    assert [cut(text) for text in ("-> red", "key 1 ->", "key 1 red", "", "key 1 -> <end>")] == [None] * 5


ROLLOUTS = ("key 1 2 -> red", "key 1 red", "ask ask key -> blue grey <end>", "-> red")


@functools.cache
def found(**how):
    return saliency(policy(), [answer(text, i) for i, text in enumerate(ROLLOUTS)], delimiter="->", steps=20, **how)


def test_saliency_of_rollouts():
    shares = found()
    assert shares[1] is None and shares[3] is None
    assert all(0.0 <= x <= 1.0 for x in (shares[0], shares[2]))
    assert shares[0] > 0.0
    # A rollout's share depends on nothing else in the batch.
    alone = saliency(policy(), [answer(ROLLOUTS[2], 2)], delimiter="->", steps=20)
    close(alone[0], shares[2], atol=1e-5)


def test_saliency_before_learning_is_zero():
    shares = saliency(policy(), [answer(ROLLOUTS[0])], delimiter="->", steps=0)
    close(shares, [0.0], atol=1e-6)


def test_saliency_of_other_targets():
    other, gold = found(mask_loss="kl_to_unmasked"), found(target="gold")
    for shares in (other, gold):
        assert shares[1] is None and 0.0 <= shares[0] <= 1.0 and 0.0 <= shares[2] <= 1.0
    assert gold != found() and other != found()
    right = answer(f"key 0 -> {tiny.TASK.train[0].answer}")
    own, same = (saliency(policy(), [right], delimiter="->", steps=20, target=t)[0] for t in ("own", "gold"))
    close(own, same, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2])
def test_saliency_is_the_likelihood_it_claims_to_restore(number):
    """Against a loop in plain sight: one rollout, no padding, the optimiser step by step; answers of one and two tokens."""
    rollout = answer(ROLLOUTS[number], number)
    reasoning, start, end = parts(rollout, policy(), "->")
    prompt = render(tiny.tokenizer(), question(rollout.example))
    run = jnp.asarray([prompt + list(rollout.tokens[:end])], jnp.int32)
    region = np.zeros((run.size - 1,) * 2, bool)
    region[len(prompt) :, len(prompt) : len(prompt) + reasoning] = True
    region &= np.tril(np.ones_like(region))
    mask = jnp.ones((1, run.size - 1), bool)
    net, params = tiny.model(), tiny.pretrained().params

    def loss(H):
        bias = jnp.where(region, effective(H), 0.0)[None]
        final, _ = hidden(net, params, run[:, :-1], positions_of(mask), mask, None, bias)
        logits = net.apply({"params": params}, final[0, len(prompt) + start - 1 :], method="logits")
        said = run[0, len(prompt) + start :]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(said)), said])

    H = jax.jit(relearned, static_argnums=(0, 2))(loss, jnp.where(region, START, 0.0), 20)
    close(masked_mean(restored(H), jnp.asarray(region)), found()[number], atol=2e-4)
    columns = saliency_of_tokens(policy(), [rollout], delimiter="->", steps=20)[0]
    wanted = masked_mean(restored(H), jnp.asarray(region), axis=0)[len(prompt) : len(prompt) + reasoning]
    close(columns, wanted, atol=2e-4)
    assert SCALE * START == -4.0


def test_few_rollouts_at_a_time_take_less_memory():
    rollouts = [answer(ROLLOUTS[0], i) for i in range(4)]
    tokens = jnp.asarray([[*r.tokens, *[0] * (8 - len(r.tokens))] for r in rollouts])
    context = jnp.ones((4, 32), jnp.int32)
    x = {"context": context, "read": context > 0, "completion": tokens, "present": tokens > 0}
    x["parts"] = jnp.asarray([parts(r, policy(), "->") for r in rollouts], jnp.int32)
    size = lambda rows: (
        compiled_saliency.lower(tiny.model(), tiny.pretrained().params, x, 1, 1, "nll", "sgd", rows)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert size(1) < 0.5 * size(4)


# ---- the reward -------------------------------------------------------------------------------------------------------


def test_advantages():
    rewards = (0.5, 0.2, -0.1, -0.9)
    batch = tiny.batch(jnp.zeros((4, 1)), reward=rewards)
    near(slopes(atmanrl(), batch).ravel(), (0.575, 0.275, -0.025, -0.825))
    np.testing.assert_array_equal(slopes(atmanrl(), tiny.batch(jnp.zeros((4, 1)), reward=[-0.4] * 4)), 0.0)


def rewards_of(monkeypatch, correct, shares, **options):
    rows = [dataclasses.replace(answer("red"), reward=float(c)) for c in correct]
    monkeypatch.setattr(atmanrl_module, "attempts", lambda *_, **__: rows)
    monkeypatch.setattr(atmanrl_module, "saliency", lambda *_, **__: list(shares))
    return [r.reward for r in atmanrl(**options).collect(tiny.environment(), [], None, None)[0]]


def test_rewards(monkeypatch):
    reward = functools.partial(rewards_of, monkeypatch)
    close(reward([1, 1, 0, 0, 1], [0.5, 0.2, 0.9, 0.1, None]), [0.5, 0.2, -0.1, -0.9, 0.0])
    close(reward([1, 0], [0.3, 0.3], printed_sign=True), [0.7, -0.3])
    close(reward([1, 0], [0.3, 0.3], coef=0.0), [0.0, -1.0])
    # A wrong, fully needed reasoning ties a correct one that nobody read, unless only correct answers are paid.
    assert len(set(reward([1, 0], [0.0, 1.0]))) == 1
    close(reward([1, 0], [0.0, 1.0], combine="correct_only"), [0.0, -1.0])


def test_limits():
    data = fixture(on_policy=False)
    assert_same(atmanrl(), grpo(normalised=False), *data)
    # On-policy, the printed ratio's gradient is the token's times the row's length.
    batch = fixture()[0]
    whole, token = (slopes(atmanrl(ratio=ratio), batch) for ratio in ("sequence", "token"))
    close(whole, token * batch.mask.sum(-1, keepdims=True), rtol=1e-5)
    shifted = tiny.batch(jnp.zeros((2, 3)), reward=[1.0, 0.0], behavior=jnp.full((2, 3), -1.0))
    moved = slopes(atmanrl(ratio="sequence"), shifted, logprobs=shifted.behavior_logprobs + 0.1)
    assert not moved[0].any() and moved[1].any()  # the product, e^0.3, is past the clip; each token's ratio is not
    assert slopes(atmanrl(), shifted, logprobs=shifted.behavior_logprobs + 0.1)[0].all()
