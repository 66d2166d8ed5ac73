"""Losses of the routers of a mixture of experts, from sums over tokens: how evenly experts are used, how large logits are.

Sizes: `L` layers with experts, `E` experts.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array


def load_balance(chosen: Array, probability: Array) -> Array:
    """`sum over layers of E sum_i f_i P_i`: 1 for each layer whose experts are used evenly, `E` where one gets all.

    `f_i` is the share of routes that lead to expert `i` (they sum to 1, however many a token takes), a constant; `P_i` is the mean
    of its probability over tokens.
    Sources: Fedus et al. 2022 (Switch Transformers), arXiv:2101.03961, Eq. 4 to 6; Shazeer et al. 2017, arXiv:1701.06538.
    transformers pools the tokens of all layers, and does not divide `f` by the experts that a token goes to.

    Args:
      chosen: `[L, E]` float32, tokens that went to each expert.
      probability: `[L, E]` float32, sums over tokens of the router's probabilities.
    """
    chex.assert_equal_shape([chosen, probability])
    share = lambda x: x / jnp.maximum(x.sum(-1, keepdims=True), 1.0)
    return chosen.shape[-1] * jnp.sum(jax.lax.stop_gradient(share(chosen)) * mean_probability(probability))


def mean_probability(probability: Array) -> Array:
    """Means over tokens, `[L, E]`, of probabilities that are summed over tokens: a token's sum to 1."""
    tokens = jax.lax.stop_gradient(probability.sum(-1, keepdims=True))
    return probability / jnp.maximum(tokens, 1e-6)


def most_loaded(chosen: Array) -> Array:
    """The largest share of routes that one expert gets, in multiples of an even share; the mean over layers `[L, E]`."""
    return jnp.mean(chosen.max(-1) / jnp.maximum(chosen.mean(-1), 1e-6))
