"""Pre-training from nothing: a small decoder learns to write given texts after given chats, by maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from sdjax.engine.chats import encode_text, render
from sdjax.engine.tokens import bucket
from sdjax.kernels.distributions import logprob, normalise
from sdjax.kernels.reductions import token_mean
from sdjax.models.configs import ModelConfig
from sdjax.models.transformer import Transformer, hidden, initialise, logits, positions_of
from sdjax.types import Messages


def rows(tokenizer: Any, texts: Iterator[tuple[Messages, str]], most: int) -> Iterator[tuple[list[int], int]]:
    """`(token ids of chat and text with its end, how many of them are the chat's)`, longer ones than `most` left out."""
    for chat, text in texts:
        before = render(tokenizer, chat)
        after = [*encode_text(tokenizer, text), tokenizer.eos_token_id]
        if len(before) + len(after) <= most:
            yield before + after, len(before)


def batches(
    examples: Iterator[tuple[list[int], int]], tokens: int, most: int, least: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of rows of about the same length, about `tokens` tokens each: few shapes and little padding.

    Rows are padded to `least` tokens or more: fewer shapes, more padding.  A batch has `tokens`, `present` and `trained`, all `[B, S]`; the chat is read and not trained.
    """
    waiting: dict[int, list] = {}
    for ids, start in examples:
        size = bucket(max(len(ids), least), most)
        queue = waiting.setdefault(size, [])
        queue.append((ids, start))
        if len(queue) == max(1, tokens // size):
            yield padded(waiting.pop(size), size)


def padded(queue: Sequence[tuple[list[int], int]], size: int) -> dict[str, np.ndarray]:
    """Rows as arrays `[B, size]`, padded on the right."""
    ids, present, trained = (np.zeros((len(queue), size), kind) for kind in (np.int32, bool, bool))
    for row, (tokens, start) in enumerate(queue):
        ids[row, : len(tokens)], present[row, : len(tokens)], trained[row, start : len(tokens)] = tokens, True, True
    return {"tokens": ids, "present": present, "trained": trained}


def matrix_axes(params: dict) -> dict:
    """Which axes of each of the blocks' weights are read and which are written; `None` for all other parameters."""

    def axes(path, x):
        name = path[-1].key
        if x.ndim < 2 or name in ("embed", "head"):
            return None
        read = x.ndim - 1 if name == "out" else 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(read)), tuple(range(read, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def widened(params: dict, initial: float = 0.02) -> dict:
    """Random parameters of deviation `initial`, which suits wide models, rescaled to `1 / sqrt(inputs)`."""

    def scale(path, x):
        name = path[-1].key
        if x.ndim < 2:
            return x
        inputs = x.shape[-1] if name in ("embed", "head") else math.prod(x.shape[:-1] if name == "out" else x.shape[:1])
        return x / (initial * math.sqrt(inputs))

    return jax.tree_util.tree_map_with_path(scale, params)


def pretrain(
    config: ModelConfig,
    data: Iterator[dict[str, np.ndarray]],
    *,
    steps: int,
    lr: float = 2e-2,
    warmup: int = 50,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> dict:
    """Parameters of a decoder trained from nothing on `steps` batches: warm-up, then a cosine to a tenth of `lr`.

    The blocks' matrices are moved by Muon, the rest by Adam at a quarter of the rate.  `report(step, loss)` is called
    now and then.  The same arguments give the same parameters.
    Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon.
    """
    model = Transformer(config)
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, lr, min(warmup, steps // 2), steps, lr / 10)
    matrices = optax.contrib.muon(
        schedule, adam_learning_rate=lambda step: schedule(step) / 4, muon_weight_dimension_numbers=matrix_axes
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), matrices)
    params = widened(jax.jit(initialise, static_argnums=0)(model, jax.random.key(seed)))
    state = jax.jit(optimizer.init)(params)

    def loss(params, batch):
        ids, present = batch["tokens"], batch["present"]
        states, _ = hidden(model, params, ids[:, :-1], positions_of(present[:, :-1]), present[:, :-1])
        said = logprob(normalise(logits(model, params, states)), ids[:, 1:])
        return token_mean(-said, batch["trained"][:, 1:])

    @jax.jit
    def update(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    for step in range(steps):
        params, state, value = update(params, state, next(data))
        if step % 50 == 0 or step + 1 == steps:
            report(step, float(value))
    return jax.device_get(params)
