"""Rematerialisation that holds on every backend, CPU included."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.devices.sharding import gathered, parted


def recomputed(function: Callable) -> Callable:
    """`function(x, *rest)`, computed again in the backward pass, which then keeps nothing but the arguments.

    `jax.checkpoint` asks for the same with an optimisation barrier, which XLA drops on a CPU before it merges equal
    computations: the second forward pass becomes the first, and everything is kept after all.  Here the second one
    reads `x` through a selection that depends on the gradient, so it can be neither merged nor started early.

    `x [B, S, D]`, the same on all devices of a mesh's model axis, is kept in as many parts along `D`, one on each.
    """

    @jax.custom_vjp
    def call(*args):
        return function(*args)

    def forward(*args):
        x, *rest = args
        return function(*args), (parted(x), *rest)

    def backward(args, cotangents):
        x, *rest = gathered(args[0]), *args[1:]
        # True for every number and for NaN, which the compiler does not see.
        arrived = ~(jax.tree.leaves(cotangents)[0].ravel()[0] > jnp.inf)
        return jax.vjp(function, jnp.where(arrived, x, 0), *rest)[1](cotangents)

    call.defvjp(forward, backward)
    return call
