"""Float32 master weights of bfloat16 parameters, kept without a second copy.

A float32 number is its nearest bfloat16 number and a remainder of 16 bits.  The parameters are the former; the latter is
part of the optimizer's state.  Together they are the master weights, exactly: the optimizer sees float32 numbers, and an
update of 1e-5 of a weight is not lost, as it would be in bfloat16, whose steps are 4e-3 to 8e-3 of a number.

Stochastic rounding would need no remainder, but a weight `w` that moves by `u` in each of `T` steps would then be
`sqrt(T u ulp(w))` off, which for `u = 1e-5 w` exceeds what was learnt until `T = 780`.

Parameters that are float32 have no master weights: their programs and states are those of the optimizer alone.
Source: Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740, section 3.1; in two halves as in Split-SGD
(Intel Extension for PyTorch).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sdjax.engine.sensible import ExperimentError


class Mastered(NamedTuple):
    """An optimizer's state beside bfloat16 parameters: `remainder` int16 (`None` at other parameters), and its own."""

    remainder: Any
    own: Any


def check_dtype(dtype: Any) -> None:
    """Raises `ExperimentError` for a type that parameters are not kept in."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ExperimentError(f"params_dtype={jnp.dtype(dtype)}: expected float32 or bfloat16")


def is_short(x: Any) -> bool:
    """Whether a parameter is bfloat16."""
    return x.dtype == jnp.bfloat16


def split(master: Array) -> tuple[Array, Array]:
    """Float32 numbers as the nearest bfloat16 numbers (of two equally near the larger) and int16 remainders."""
    bits = jax.lax.bitcast_convert_type(master, jnp.int32)
    upper = (bits + 0x8000) >> 16
    nearest = jax.lax.bitcast_convert_type(upper.astype(jnp.int16), jnp.bfloat16)
    return nearest, (bits - (upper << 16)).astype(jnp.int16)


def joined(nearest: Array, remainder: Array) -> Array:
    """The float32 numbers of which `split` made these, bit for bit."""
    upper = jax.lax.bitcast_convert_type(nearest, jnp.int16).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((upper << 16) + remainder.astype(jnp.int32), jnp.float32)


def wide(params: Any) -> Any:
    """Parameters, those in bfloat16 as float32: gradients with respect to them are summed in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_short(x) else x, params)


def initial(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's first state, with remainders of 0 where parameters are bfloat16."""
    if not any(map(is_short, jax.tree.leaves(params))):
        return optimizer.init(params)
    remainder = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int16) if is_short(x) else None, params)
    return Mastered(remainder, optimizer.init(wide(params)))


def stepped(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and optimizer state after a step along the float32 gradients `grads`."""
    if not isinstance(opt_state, Mastered):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    # A tree of parameters is a prefix of the remainders: where there is none, `None` stands.
    whole = jax.tree.map(lambda x, r: x if r is None else joined(x, r), params, opt_state.remainder)
    updates, own = optimizer.update(grads, opt_state.own, whole)
    whole = optax.apply_updates(whole, updates)
    halves = jax.tree.map(lambda x, new: split(new) if is_short(x) else (new, None), params, whole)
    nearest = jax.tree.map(lambda _, both: both[0], params, halves)
    remainder = jax.tree.map(lambda _, both: both[1], params, halves)
    return nearest, Mastered(remainder, own)
