"""Sampling: one jitted program with prefill, a `while_loop` over tokens, and log-probabilities on the way.

Every row has its own key, and token `t` of a row uses one uniform number made from `fold_in(key, t)`: a row's sample
depends neither on its neighbours nor on padding.  Several contexts may be decoded together (`K > 1`): all read the
same chosen tokens, and `choose` says whose distribution a token is drawn from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.sharding import by_rows, constrain_parameters
from sdjax.models.transformer import Column, Transformer, decode, empty_cache, hidden, logits, positions_of

BLOCK = 256
"""Vocabulary entries summed together in the first level of the inverse distribution function."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; traced, so changing a value compiles nothing but one program with filters and one without.

    `temperature` 0 is greedy.  `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing; they apply in this order, after the
    temperature, each to what the one before has left (as in the transformers library).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether nothing is filtered; of values that are traced it is taken that they filter."""
        known = all(isinstance(value, int | float) for value in (self.top_p, self.top_k, self.min_p))
        return known and self.top_k <= 0 and self.top_p >= 1.0 and self.min_p <= 0.0

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """What is traced: the temperature, and the filters where there are any."""
        values = self.temperature, self.top_p, self.top_k, self.min_p
        return values[:1] if self.plain else values, None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple[Any, ...]) -> Sampling:
        """The inverse."""
        return cls(*values)


GREEDY = Sampling(temperature=0.0)


class Completions(NamedTuple):
    """What was sampled: right-padded, the stop token included."""

    tokens: Array  # [B, T] int32, 0 after the end
    logprobs: Array  # [B, T] float32, of the first context's model at temperature 1, unfiltered; 0 after the end
    present: Array  # [B, T] bool
    finished: Array  # [B] bool: a stop token was drawn


def first(logits: Array, keys: Array) -> Array:
    """The distribution of the first context: ordinary sampling.  `logits [K, B, V]`, `keys [B]` -> `[B, V]`."""
    return logits[0]


def mixture(rate: float) -> Callable[[Array, Array], Array]:
    """Each token from the second context with probability `rate`, else from the first: MixSD's coin."""

    def choose(logits: Array, keys: Array) -> Array:
        coin = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
        return jnp.where((coin < rate)[:, None], logits[1], logits[0])

    return choose


def inverse_cdf(mass: Array, uniform: Array) -> Array:
    """The index at which the cumulated `mass [B, V]` (any positive scale) exceeds `uniform [B]` of the total -> `[B]`.

    In two levels, blocks then entries, so that no cumulative sum over the vocabulary is needed.  An entry without
    mass is never returned, whatever the rounding.
    """
    rows, size = mass.shape
    blocks = jnp.pad(mass, ((0, 0), (0, -size % BLOCK))).reshape(rows, -1, BLOCK)

    def exceeds(weights: Array, target: Array) -> tuple[Array, Array]:
        total = jnp.cumsum(weights, axis=-1)
        # Added up in a tree, `total` may also change, either way, at an entry that adds nothing: those are passed over.
        reached = jnp.where(weights > 0, total, 0.0)
        target = jnp.minimum(target, jnp.nextafter(reached.max(-1), jnp.zeros_like(target)))
        index = jnp.argmax(reached > target[:, None], axis=-1)
        before = jnp.take_along_axis(total - weights, index[:, None], axis=-1)[:, 0]
        return index, jnp.maximum(target - before, 0.0)

    per_block = blocks.sum(-1)
    block, rest = exceeds(per_block, uniform * per_block.sum(-1))
    entry, _ = exceeds(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return (block * BLOCK + entry).astype(jnp.int32)


def largest_threshold(mass: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest `t [B]` such that `enough(mass >= t)` holds, exactly, for non-negative float32 `mass [B, V]`.

    Bisects the bit patterns, which are ordered like the numbers: 31 masked sums instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        holds = enough(bits >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = jnp.zeros(mass.shape[0], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, jnp.iinfo(jnp.int32).max)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def filtered(mass: Array, sampling: Sampling) -> Array:
    """`mass [B, V]` with the entries that top-k, top-p or min-p exclude set to 0.  Ties at a threshold are all kept."""

    def keep(mass, enough):
        return jnp.where(mass >= largest_threshold(mass, lambda kept: enough(mass, kept))[:, None], mass, 0.0)

    count = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, mass.shape[-1]), mass.shape[-1])
    mass = keep(mass, lambda mass, kept: kept.sum(-1) >= count)
    mass = keep(mass, lambda mass, kept: jnp.where(kept, mass, 0.0).sum(-1) >= sampling.top_p * mass.sum(-1))
    return jnp.where(mass >= sampling.min_p * mass.max(-1, keepdims=True), mass, 0.0)


def draw(logits: Array, uniform: Array, sampling: Sampling) -> Array:
    """One token per row: `logits [B, V]` float32, `uniform [B]` in [0, 1) -> `[B]` int32."""
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    mass = jnp.exp(scaled - scaled.max(-1, keepdims=True))
    sampled = inverse_cdf(mass if sampling.plain else filtered(mass, sampling), uniform)
    return jnp.where(sampling.temperature > 0, sampled, jnp.argmax(logits, axis=-1).astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("models", "length", "choose"))
def generate(
    models: tuple[Transformer, ...],
    params: tuple[Any, ...],
    contexts: tuple[tuple[Array, Array], ...],
    keys: Array,
    sampling: Sampling,
    stop: Array,
    limit: Array | int,
    *,
    length: int,
    choose: Callable[[Array, Array], Array] = first,
) -> Completions:
    """Samples `B` completions of `C` prompts, `B / C` consecutive ones per prompt, each prompt read once.

    Args:
      models, params, contexts: one per decoded context (`K` of them); a context is `(tokens [C, P], mask [C, P])`,
        left-padded.  The models share a vocabulary.
      keys: `[B]` typed random keys, one per row.
      stop: `[n]` int32 token ids that end a completion.
      limit: at most this many tokens, `<= length`, a number or `[B]`; traced.
      length: the size `T` of the buffers; static.
      choose: `([K, B, V] logits, [B] keys) -> [B, V]`; static.

    Returns:
      `Completions`; the loop ends early when every row has ended.
    """
    rows = keys.shape[0]
    # Cast once, not in every step: a decode step reads all parameters.
    to = lambda x, dtype: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # quantised ones stay so
    cast = lambda model, tree: jax.tree.map(lambda x: to(x, model.dtype), tree)
    # And gathered once, where a mesh splits them over its data axis.
    params = tuple(
        by_rows(constrain_parameters(cast(model, tree), least=math.inf))
        for model, tree in zip(models, params, strict=True)
    )
    repeat = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    limit = jnp.broadcast_to(jnp.minimum(limit, length), (rows,))

    pasts, caches, starts, heads = [], [], [], []
    for model, tree, (tokens, mask) in zip(models, params, contexts, strict=True):
        states, past = hidden(model, tree, tokens, positions_of(mask), mask)
        pasts.append(past)
        caches.append(empty_cache(model, rows, length))
        starts.append(repeat(mask.sum(-1).astype(jnp.int32)))
        heads.append(repeat(logits(model, tree, states[:, -1])))

    def pick(heads, step):
        now = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        token = draw(choose(jnp.stack(heads), now), jax.vmap(jax.random.uniform)(now), sampling)
        chosen = jnp.take_along_axis(heads[0], token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(heads[0], axis=-1)

    def record(done, heads, buffers, step):
        token, logprob = pick(heads, step)
        going = ~done & (step < limit)
        token, logprob = jnp.where(going, token, 0), jnp.where(going, logprob, 0.0)
        ended = going & (token[:, None] == stop[None]).any(-1)
        values = (token, logprob, going)
        buffers = tuple(b.at[:, step].set(v) for b, v in zip(buffers, values, strict=True))
        return token, ended, done | ended | (step + 1 >= limit), buffers

    def advance(carry):
        step, token, done, finished, caches, buffers = carry
        column, heads, written = Column(step - 1, step), [], []
        for model, tree, past, cache, start in zip(models, params, pasts, caches, starts, strict=True):
            state, cache = decode(model, tree, token, start + step - 1, past, cache, column)
            heads.append(logits(model, tree, state))
            written.append(cache)
        token, ended, done, buffers = record(done, heads, buffers, step)
        return step + 1, token, done, finished | ended, tuple(written), buffers

    buffers = (
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length), jnp.float32),
        jnp.zeros((rows, length), bool),
    )
    token, finished, done, buffers = record(jnp.zeros(rows, bool), heads, buffers, 0)
    carry = (jnp.asarray(1), token, done, finished, tuple(caches), buffers)
    carry = jax.lax.while_loop(lambda c: (c[0] < length) & ~c[2].all(), advance, carry)
    return Completions(*carry[5], carry[3])
