"""The committed models of `golden/`: ours, their parameters, and what transformers computes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models import transformer
from sdjax.models.configs import from_hf
from sdjax.models.files import weights

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One committed model: ours, its parameters, and what transformers computes."""

    def __init__(self, name: str):
        self.name, self.folder = name, GOLDEN / name
        self.config = from_hf(self.folder)
        self.params = jax.tree.map(jnp.asarray, weights.load(self.folder, self.config))
        self.model = transformer.Transformer(self.config)
        with np.load(self.folder / "logits.npz") as file:
            self.tokens, lengths, self.logits, self.padded = (
                file[key] for key in ("tokens", "lengths", "logits", "padded")
            )
        self.mask = np.arange(self.tokens.shape[1]) >= self.tokens.shape[1] - lengths[:, None]

    def full(self, tokens, mask, model=None):
        """Logits `[B, S, V]` of a run without past."""
        mask = jnp.asarray(mask)
        return run(model or self.model, self.params, jnp.asarray(tokens), transformer.positions_of(mask), mask)[0]


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, mask, past=None):
    """Logits `[B, S, V]` of a run, and its keys and values."""
    hidden, past = transformer.hidden(model, params, tokens, positions, mask, past)
    return transformer.logits(model, params, hidden), past


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, token, position, past, cache, column):
    """Logits `[B, V]` of one token more, written to a column after all those before it, and the cache."""
    place = transformer.Column(column, column + 1)
    hidden, cache = transformer.decode(model, params, token, position, past, cache, place)
    return transformer.logits(model, params, hidden), cache
