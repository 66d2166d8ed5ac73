"""Bfloat16 parameters with their remainders are float32 master weights, and float32 parameters know nothing of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from engine.test_train import ADAMW, BATCHES, METHOD, TRAP, Learner, batch, model, params

from sdjax.engine import master_weights, optimizers, train
from sdjax.engine.master_weights import Mastered, joined, split
from sdjax.engine.policies import ema, frozen, refresh
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.snapshots import begun

bits = lambda x: np.asarray(x).view(np.int32)


def numbers():
    """Float32 numbers of every size and sign, the ends of the range, ties."""
    draw = np.random.default_rng(0)
    spread = draw.standard_normal(10_000) * np.exp(draw.uniform(-85, 85, 10_000))
    ends = [0.0, -0.0, np.inf, -np.inf, 1e-42, -1e-45, 3.4e38, 1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8]
    return np.concatenate([spread, ends]).astype(np.float32)


def test_both_halves_are_the_number_bit_for_bit():
    x = numbers()
    nearest, remainder = jax.jit(split)(x)
    assert (nearest.dtype, remainder.dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(bits(joined(nearest, remainder)), bits(x))


def test_the_upper_half_is_the_nearest_bfloat16_number():
    x = numbers()
    x = x[np.abs(x) < 1e38]
    off = lambda y: np.abs(np.asarray(y, np.float64) - x)
    rounded = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(off(split(x)[0].astype(jnp.float32)), off(rounded.astype(np.float32)))


def test_small_steps_add_up_and_in_bfloat16_alone_are_lost():
    """A thousand steps of 1e-5 of a weight make 1 % of it."""
    start = jnp.asarray([1.0, -0.02, 3e-5, 1000.0], jnp.bfloat16)
    wanted = np.asarray(start, np.float64) * (1 - 1e-5 * 1000)
    optimizer, grads = optax.sgd(1e-5), {"w": start.astype(jnp.float32)}

    def kept(carry, _):
        return master_weights.stepped(optimizer, grads, carry[1], carry[0]), None

    def lost(w, _):
        return optax.apply_updates({"w": w}, {"w": -1e-5 * grads["w"]})["w"], None

    first = {"w": start}, master_weights.initial(optimizer, {"w": start})
    (w, state), _ = jax.lax.scan(kept, first, length=1000)
    np.testing.assert_allclose(joined(w["w"], state.remainder["w"]), wanted, rtol=1e-4)
    np.testing.assert_allclose(w["w"].astype(jnp.float32), wanted, rtol=2**-8)
    np.testing.assert_array_equal(jax.lax.scan(lost, start, length=1000)[0], start)


@pytest.mark.parametrize("optimizer", [ADAMW, optax.sgd(0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_the_master_weights_are_those_of_float32(optimizer):
    """The optimizer sees what it would see without bfloat16: numbers of either kind, and moments, are the same bits."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    mixed = {"w": draw(0, 7, 5).astype(jnp.bfloat16), "b": draw(1, 5)}
    plain = master_weights.wide(mixed)
    own, state = master_weights.initial(optimizer, mixed), optimizer.init(plain)
    assert isinstance(own, Mastered) and own.remainder["b"] is None
    step = functools.partial(master_weights.stepped, optimizer)  # compiled, sums would be rounded in other places
    for i in range(3):
        grads = {"w": draw(2 + i, 7, 5), "b": draw(20 + i, 5)}
        mixed, own = step(grads, own, mixed)
        plain, state = step(grads, state, plain)
    assert mixed["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(joined(mixed["w"], own.remainder["w"]), plain["w"])
    np.testing.assert_array_equal(mixed["b"], plain["b"])
    jax.tree.map(np.testing.assert_array_equal, own.own, state)


def test_float32_parameters_have_the_program_that_they_had():
    """Nothing is added: the same equations, in the same order."""
    own, grads = params(0), jax.tree.map(jnp.ones_like, params(0))
    state = ADAMW.init(own)
    assert jax.tree.structure(master_weights.initial(ADAMW, own)) == jax.tree.structure(state)

    def plain(grads, state, params):
        updates, state = ADAMW.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = jax.make_jaxpr(functools.partial(master_weights.stepped, ADAMW))(grads, state, own)
    assert str(found) == str(jax.make_jaxpr(plain)(grads, state, own))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (master_weights.wide(own), own)), strict=True))


# ---- the update -----------------------------------------------------------------------------------------------------


class Short(Learner):
    """The same learner with bfloat16 parameters."""

    def __init__(self, method="sdpo", **shapes):
        super().__init__(method, **shapes)
        self.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(0))
        self.opt_state = master_weights.initial(ADAMW, self.params)

    def masters(self):
        return jax.tree.map(joined, self.params, self.opt_state.remainder)


class Rounded(Learner):
    """Float32 parameters that begin as bfloat16 numbers."""

    def __init__(self, **shapes):
        super().__init__(**shapes)
        self.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params(0))
        self.opt_state = ADAMW.init(self.params)


def test_an_update_changes_the_master_weights_as_it_would_change_float32():
    """The first one reads equal parameters, so gradients are equal; chunks add them up in float32."""
    short, whole = Short(rows_per_chunk=2), Rounded(rows_per_chunk=2)
    found, wanted = short.learn(BATCHES[0]), whole.learn(BATCHES[0])
    assert {x.dtype for x in jax.tree.leaves(short.params)} == {jnp.dtype("bfloat16")}
    assert found.useful and found.loss == wanted.loss
    np.testing.assert_allclose(found.grad_norm, wanted.grad_norm, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, short.masters(), whole.params)


def test_an_update_without_signal_keeps_the_remainders():
    short = Short(rows_per_chunk=2)
    short.learn(BATCHES[0])
    before = jax.tree.map(np.array, (short.params, short.opt_state))
    assert any(np.any(x) for x in jax.tree.leaves(before[1].remainder))
    garbage = dataclasses.replace(BATCHES[1], valid=np.zeros_like(BATCHES[1].valid))
    assert not short.learn(garbage).useful
    jax.tree.map(np.testing.assert_array_equal, (short.params, short.opt_state), before)


def test_bfloat16_and_adafactor_learn():
    """Twenty updates on one batch: likelier rows, as in float32 with AdamW."""
    optimizer, own = (
        optimizers.chosen("adafactor", 1e-2),
        train.Shapes(context=128, completion=8, tokens_per_chunk=None),
    )
    short, plain, rows = Short(method="trap"), Learner("trap"), batch(TRAP, reward=lambda i: 1.0)
    short.update = train.make_update(TRAP.objectives[0], {"live": model()}, optimizer, own)
    short.opt_state, short.others = master_weights.initial(optimizer, short.params), {}
    for learner in (short, plain):
        losses = [float(learner.learn(rows).loss) for _ in range(20)]
        assert losses[-1] < 0.6 * losses[0], losses


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_an_average_is_kept_in_float32_and_copies_as_they_are():
    live = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    rules = {"frozen": frozen(), "refresh": refresh(1), "ema": ema(0.01)}
    kinds = {name: begun(rule, live)["w"].dtype for name, rule in rules.items()}
    assert kinds == {"frozen": jnp.bfloat16, "refresh": jnp.bfloat16, "ema": jnp.float32}
    average, moved = begun(ema(1e-4), live), {"w": live["w"] + 0.0625}
    for _ in range(10):
        average = ema(1e-4)(moved, average, 0)
    np.testing.assert_allclose(average["w"], live["w"].astype(jnp.float32) + 0.0625 * (1 - (1 - 1e-4) ** 10), rtol=1e-6)


def test_another_type_is_refused():
    with pytest.raises(ExperimentError, match="params_dtype=float16: expected float32 or bfloat16"):
        train.Experiment(METHOD, tiny.TASK, tiny.pretrained(), ADAMW, params_dtype=jnp.float16)
