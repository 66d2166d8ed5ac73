"""Matrix products of 16-bit numbers on a CPU: rounded once, forwards and backwards, whatever adds them up."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models.primitives import product

X, WEIGHTS, PULL = (
    jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
    for i, shape in enumerate([(24, 200), (200, 16), (24, 16)])
)
ROUNDING = 2.0**-8


def test_a_product_and_its_gradients_are_rounded_once():
    x, weights, pull = (np.asarray(a, np.float64) for a in (X, WEIGHTS, PULL))
    found, back = jax.vjp(product, X, WEIGHTS)
    for got, wanted in zip((found, *back(PULL)), (x @ weights, pull @ weights.T, x.T @ pull), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=ROUNDING, atol=1e-4)


def test_every_product_of_16_bits_is_added_up_in_float32():
    """A CPU's matrix unit gets no other: neither one that comes out as bfloat16, nor one of two types."""
    step = jax.grad(lambda x, weights: product(x, weights).astype(jnp.float32).sum(), (0, 1))
    dots = [line for line in jax.jit(step).lower(X, WEIGHTS).as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 2
    for line in dots:
        types = line.split(" : ")[-1]
        assert types.count("xbf16>") == 2 and types.endswith("xf32>"), line


def test_float32_stays_a_plain_product():
    x, weights = X.astype(jnp.float32), WEIGHTS.astype(jnp.float32)
    np.testing.assert_array_equal(product(x, weights), x @ weights)
