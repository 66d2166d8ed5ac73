"""Losses of routers against their equations in float64, and at their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.kernels.routers import load_balance, most_loaded
from sdjax.models.routing import Moe, route, usage

LAYERS, EXPERTS, TOKENS, TAKEN = 3, 5, 40, 2


def draw(seed=0, size=2.0):
    """Router logits of every layer, `[L, 1, S, E]`."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(LAYERS, 1, TOKENS, EXPERTS)) * size, jnp.float32)


def used(logits, mask=None):
    """What routers with these logits did."""
    mask = jnp.ones((1, TOKENS), bool) if mask is None else mask
    moe = Moe(EXPERTS, TAKEN, 1)
    found = [usage(layer, route(layer, moe), mask) for layer in logits]
    return jax.tree.map(lambda *x: jnp.stack(x).sum(1), *found)


def aux(logits, mask=None):
    found = used(logits, mask)
    return load_balance(found.chosen, found.probability)


def exact(logits, kept):
    """Value and gradient of the load balance, the z-loss and the entropy, token by token in float64."""
    logits = np.asarray(logits, np.float64)[:, 0]
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    balance, gradient, z, entropy = 0.0, np.zeros(logits.shape), 0.0, 0.0
    for layer in range(LAYERS):
        f, mean = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for token in kept:
            for expert in np.argsort(-logits[layer, token])[:TAKEN]:
                f[expert] += 1 / (TAKEN * len(kept))
            mean += probability[layer, token] / len(kept)
            z += np.log(np.exp(logits[layer, token]).sum()) ** 2 / len(kept)
            entropy -= (probability[layer, token] * np.log(probability[layer, token])).sum() / len(kept) / LAYERS
        balance += EXPERTS * (f * mean).sum()
        for token in kept:
            p = probability[layer, token]
            gradient[layer, token] = EXPERTS / len(kept) * p * (f - (f * p).sum())
    return balance, gradient[:, None], z, entropy


def test_load_balance_and_its_gradient_are_those_of_the_paper():
    logits = draw()
    wanted, gradient, z, entropy = exact(logits, range(TOKENS))
    value, found = jax.jit(jax.value_and_grad(aux))(logits)
    assert float(value) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-8)
    sums = used(logits)
    assert float((sums.log_partition / TOKENS).sum()) == pytest.approx(z, rel=1e-6)
    assert float((sums.entropy / TOKENS).mean()) == pytest.approx(entropy, rel=1e-5)


def test_a_layer_that_is_used_evenly_counts_1_and_one_that_is_not_as_many_as_it_has_experts():
    even = jnp.full((LAYERS, EXPERTS), 7.0)
    assert float(load_balance(even, even)) == pytest.approx(LAYERS)
    assert float(most_loaded(even)) == pytest.approx(1)
    one = jnp.zeros((LAYERS, EXPERTS)).at[:, 2].set(7.0)
    assert float(load_balance(one, one)) == pytest.approx(LAYERS * EXPERTS)
    assert float(most_loaded(one)) == pytest.approx(EXPERTS)
    assert float(load_balance(0 * one, 0 * one)) == 0.0


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.inf, np.nan])
def test_tokens_that_are_not_there_change_neither_value_nor_gradient(garbage):
    kept = np.random.default_rng(1).random(TOKENS) < 0.6
    logits = jnp.where(kept[:, None], draw(), garbage)
    wanted, gradient, z, _ = exact(draw(), np.flatnonzero(kept))
    value, found = jax.jit(jax.value_and_grad(aux))(logits, jnp.asarray(kept)[None])
    assert float(value) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(found, np.where(kept[:, None], gradient, 0), rtol=1e-4, atol=1e-8)
    sums = used(logits, jnp.asarray(kept)[None])
    assert float((sums.log_partition / kept.sum()).sum()) == pytest.approx(z, rel=1e-6)
    assert sums.tokens.tolist() == [kept.sum()] * LAYERS and sums.chosen.sum() == TAKEN * kept.sum() * LAYERS
