"""Optimizers by option: what they keep of each parameter is what they differ in.

Bytes of state per parameter: AdamW 8, with a first moment in bfloat16 6, Adafactor about 0.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

Name = Literal["adamw", "adafactor"]
Type = Literal["float32", "bfloat16"]


def chosen(
    name: Name,
    rate: Any,
    *,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    first_moment: Type = "float32",
) -> optax.GradientTransformation:
    """An optimizer after clipping by the global norm; `rate` is a number or a schedule."""
    decay = {"weight_decay": weight_decay}
    own = adafactor(rate, **decay) if name == "adafactor" else adamw(rate, first_moment=first_moment, **decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), own)


def adamw(rate: Any, *, weight_decay: float, first_moment: Type = "float32") -> optax.GradientTransformation:
    """AdamW with `betas = (0.9, 0.999)`; its first moment is kept in the type `first_moment`.

    The second moment stays float32: it changes by at most 1e-3 of itself in a step, which bfloat16 would round away.
    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    return optax.adamw(rate, weight_decay=weight_decay, mu_dtype=None if first_moment == "float32" else jnp.bfloat16)


def adafactor(rate: Any, *, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor without a first moment: `p -= rate (u / max(1, RMS(u)) + weight_decay p)`, `u = g / sqrt(v)`.

    Of a matrix with two axes of at least 128 `v` is the product of a row and a column, both float32.  The step does not
    grow with the parameter's size, so that `rate` means what it means for AdamW, as in the trainer of transformers.
    Source: Shazeer and Stern 2018, Adafactor, arXiv:1804.04235, algorithm 4.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
