"""From values per token `[B, T]` or per row `[B]` to one number.  A reducer is `(value, over) -> scalar`.

`over` is boolean, of the value's shape: the population.  What lies outside may hold anything, infinities and NaN
included: it changes neither the value nor the gradient.  An empty population reduces to 0.  A `[B]` value counts as
one token per row.  Everything is float32.

| reducer                  | formula                               | names elsewhere                            |
|--------------------------|---------------------------------------|--------------------------------------------|
| `token_mean`             | sum of values / number of tokens      | verl `token-mean`, TRL `dapo`              |
| `token_sum`              | sum of values                         | Tinker                                     |
| `sequence_mean`          | mean over rows of their token means   | verl `seq-mean-token-mean`, TRL `grpo`     |
| `sequence_mean_of(rows)` | the same, counting all of `rows`      | SDPO's code with one row per micro-batch   |
| `sequence_sum`           | mean over rows of their token sums    | verl `seq-mean-token-sum`                  |
| `constant_mean(length)`  | sum of values / (rows * length)       | verl `seq-mean-token-sum-norm`, TRL `dr_grpo` |

A row counts if at least one of its tokens is in the population (as in verl; TRL's `grpo` counts empty rows too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

Reducer = Callable[[Array, Array], Array]


def masked_sum(value: Array, over: Array, axis: int | None = None) -> Array:
    """Sum of `value` where `over`: both of one shape, over all axes or one."""
    chex.assert_equal_shape([value, over])
    chex.assert_type(over, bool)
    return jnp.sum(jnp.where(over, value.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(value: Array, over: Array, axis: int | None = None) -> Array:
    """Mean of `value` where `over`, `sum / max(count, 1)`: both of one shape, over all axes or one."""
    count = jnp.sum(over, axis=axis, dtype=jnp.float32)
    return masked_sum(value, over, axis) / jnp.maximum(count, 1.0)


def token_mean(value: Array, over: Array) -> Array:
    """Every token counts the same, so a long row weighs more: `[B, T]` or `[B]` -> scalar.

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476.
    """
    return masked_mean(value, over)


def token_sum(value: Array, over: Array) -> Array:
    """Sum over all tokens, no divisor: `[B, T]` or `[B]` -> scalar."""
    return masked_sum(value, over)


def _tokens(x: Array) -> Array:
    return x[:, None] if x.ndim == 1 else x


def sequence_mean(value: Array, over: Array) -> Array:
    """Every row counts the same: the mean over non-empty rows of their token means, `[B, T]` or `[B]` -> scalar.

    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, Eq. 3.
    """
    value, over = _tokens(value), _tokens(over)
    return masked_mean(masked_mean(value, over, axis=-1), jnp.any(over, axis=-1))


def sequence_mean_of(rows: Array) -> Reducer:
    """A `sequence_mean` whose divisor is the number of `rows` (`[B]` bool), whether anything of them is trained or not.

    `sum over rows of (token mean, or 0 for an empty row) / number of rows`: the loss shrinks with the share of rows
    without a lesson.  What SDPO's official code computes: its `token-mean` is taken per micro-batch, shipped as one
    sequence, and averaged over all sequences of the minibatch, masked ones included (Hübotter et al. 2026,
    arXiv:2601.20802; the paper does not say so).  Tokens of rows outside `rows` are left out.
    """

    def reduce(value: Array, over: Array) -> Array:
        return masked_mean(masked_mean(_tokens(value), _tokens(over), axis=-1), rows)

    return reduce


def sequence_sum(value: Array, over: Array) -> Array:
    """The mean over non-empty rows of their token sums: `[B, T]` or `[B]` -> scalar."""
    value, over = _tokens(value), _tokens(over)
    return masked_mean(masked_sum(value, over, axis=-1), jnp.any(over, axis=-1))


def constant_mean(length: int) -> Reducer:
    """A mean whose divisor does not depend on the rows' lengths: `sum / (number of non-empty rows * length)`.

    `length` is the completion limit in tokens, so that one token's gradient is the same in short and long rows.
    Source: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783.  TRL counts empty rows too.
    """

    def reduce(value: Array, over: Array) -> Array:
        return sequence_sum(value, over) / length

    return reduce


def _population(value: Array, over: Array | None, default_over: Array) -> Array:
    """The population of one term, in the value's shape: a term can narrow the default population, never widen it."""
    default = default_over if value.ndim == 2 else jnp.any(default_over, axis=-1)
    if over is None:
        return default
    if over.ndim < value.ndim:
        over = over[:, None]
    chex.assert_rank(over, value.ndim)
    return jnp.broadcast_to(over, value.shape) & default


def _reduced(term: Any, default_over: Array, default_reduce: Reducer) -> Array:
    chex.assert_rank(term.value, {1, 2})
    over = _population(term.value, term.over, default_over)
    # Cleaned before it meets the weight: the gradient of a masked value is the weight beside it, NaN included, times 0.
    value = jnp.where(over, term.value.astype(jnp.float32), 0.0)
    return (term.reduce or default_reduce)(value * whole_weight(term), over)


def whole_weight(term: Any) -> Array:
    """`weight * importance` of a term, of its value's shape, constant."""

    def like_value(x: Any) -> Array:
        x = jnp.asarray(x, jnp.float32)
        return jnp.broadcast_to(x[:, None] if 0 < x.ndim < term.value.ndim else x, term.value.shape)

    return jax.lax.stop_gradient(like_value(term.weight) * like_value(term.importance))


def reduce_terms(
    terms: Mapping[str, Any], default_over: Array, default_reduce: Reducer = token_mean
) -> tuple[Array, dict[str, Array]]:
    """The loss and what each term contributed: `sum of coef * reduce(value * stop_gradient(weight * importance), over)`.

    A term has `value` (`[B, T]` or `[B]`), `weight` and `importance` (scalars, `[B]`, or anything that broadcasts to the
    value), `over` (bool or None), `reduce` (or None) and `coef`.  `default_over [B, T]` bool is what may be trained at all: trained
    tokens of valid rows.  The population of a term is

    - `over is None`: `default_over`, for a `[B]` value its rows with at least one token (`default_over.any(-1)`);
    - `[B, T]` value: `default_over & over`, where an `over` of shape `[B]` speaks for all tokens of its rows;
    - `[B]` value: `default_over.any(-1) & over`, with `over` of shape `[B]`.

    Returns the scalar loss and `{name: reduced value}`, weight included, without `coef` and without gradient.
    """
    chex.assert_rank(default_over, 2)
    reduced = {name: _reduced(term, default_over, default_reduce) for name, term in terms.items()}
    # A Python 0 says that the term is only measured: no gradient is computed for it.
    only_measured = lambda coef: isinstance(coef, int | float) and coef == 0
    trained = {name: value for name, value in reduced.items() if not only_measured(terms[name].coef)}
    loss = sum((terms[name].coef * value for name, value in trained.items()), jnp.float32(0.0))
    return loss, jax.tree.map(jax.lax.stop_gradient, reduced)
