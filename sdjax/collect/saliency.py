"""Attention saliency: how much attention to its reasoning has to be given back before a rollout's answer returns.

Attention to the reasoning is suppressed by an additive mask, which is then learnt with the model fixed; what the answer
needs is switched on again.  Source: Höth et al. 2026 (AtManRL), arXiv:2604.16158.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sdjax.devices.sharding import to_host
from sdjax.engine.policies import Policy
from sdjax.engine.tokens import bucket, encode_context, left_pad
from sdjax.kernels.distributions import logprob, normalise
from sdjax.kernels.divergences import forward_kl
from sdjax.kernels.reductions import masked_mean
from sdjax.models.transformer import hidden, logits, positions_of
from sdjax.types import Rollout

START = -0.4
"""What the mask's entries begin at."""

SCALE = 10.0
"""From the mask to what is added to attention scores."""


def effective(mask: Array) -> Array:
    """What a mask adds to attention scores, `10 min(mask, 0)`: it can suppress, never amplify.  Any shape."""
    return SCALE * jnp.minimum(mask, 0.0)


Inner = Literal["adamw", "sgd"]


def relearned(loss: Callable[[Array], Array], start: Array, steps: int = 200, inner: Inner = "adamw") -> Array:
    """The mask after `steps` of AdamW (lr 1e-3, betas 0.6 and 0.9999, weight decay 0.05) or of SGD (lr 1e-3) on `loss`.

    Adam, the paper's, does not see the gradient's scale: an entry moves by how consistently, not by how much, it helps.
    What the answer needs most is soon given back, its gradient falls, and it moves *least*; SGD moves it most.
    """
    optimizer = optax.adamw(1e-3, b1=0.6, b2=0.9999, weight_decay=0.05) if inner == "adamw" else optax.sgd(1e-3)

    def step(carry, _):
        mask, state = carry
        updates, state = optimizer.update(jax.grad(loss)(mask), state, mask)
        return (optax.apply_updates(mask, updates), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[0][0]


def restored(mask: Array) -> Array:
    """The share of an entry that was switched on again, `1 - clip(mask, -0.4, 0) / -0.4`, in [0, 1]: any shape.

    The paper prints its complement, which pays for reasoning that is *not* needed.
    """
    return 1.0 - jnp.clip(mask, START, 0.0) / START


def parts(rollout: Rollout, policy: Policy, delimiter: str) -> tuple[int, int, int] | None:
    """Tokens of reasoning, tokens before the answer, tokens before its end; split at the last `delimiter`.

    `None` where one of reasoning, delimiter and answer is missing.
    """
    tokens = rollout.tokens[: -1 if rollout.tokens and rollout.tokens[-1] in policy.stop else None]
    decoded = lambda count: policy.tokenizer.decode(list(tokens[:count]), skip_special_tokens=True)
    place = decoded(len(tokens)).rfind(delimiter)
    if place < 0:
        return None
    count = lambda characters: bisect_right(range(len(tokens) + 1), characters, key=lambda n: len(decoded(n))) - 1
    reasoning, answer = count(place), count(place + len(delimiter) - 1) + 1
    return (reasoning, answer, len(tokens)) if 0 < reasoning and answer < len(tokens) else None


@functools.partial(jax.jit, static_argnames=("model", "width", "steps", "mask_loss", "inner", "rows"))
def compiled_saliency(
    model, params: Any, x: dict[str, Array], width: int, steps: int, mask_loss: str, inner: Inner, rows: int
):
    """Mean restored share `[B]` and its mean per column `[B, T - 1]`, parameters fixed, `rows` rollouts at a time."""
    params = jax.lax.stop_gradient(params)

    def of_row(row: dict[str, Array]) -> tuple[Array, Array]:
        one = jax.tree.map(lambda a: a[None], row)
        _, past = hidden(model, params, one["context"], positions_of(one["read"]), one["read"])
        tokens, present = row["completion"], row["present"][:-1]
        size = present.size
        places = row["read"].sum() + jnp.arange(size, dtype=jnp.int32)
        reasoning = jnp.arange(size) < row["parts"][0]
        # The answer's last token predicts nothing of it: its row, and what follows, cannot be needed.
        predicting = jnp.arange(size) < row["parts"][2] - 1
        region = jnp.tril(jnp.ones((size, size), bool)) & reasoning[None, :] & predicting[:, None]
        where = jnp.clip(row["parts"][1] + jnp.arange(width), 1, size)
        over = jnp.arange(width) < row["parts"][2] - row["parts"][1]

        def dist(mask: Array) -> Array:
            bias = jnp.where(region, effective(mask), 0.0)[None]
            states, _ = hidden(model, params, tokens[None, :-1], places[None], present[None], past, bias)
            return normalise(logits(model, params, states[0, where - 1]))

        unmasked = dist(jnp.zeros(region.shape))

        def loss(mask: Array) -> Array:
            if mask_loss == "nll":
                return -masked_mean(logprob(dist(mask), tokens[where]), over)
            return masked_mean(forward_kl(dist(mask), unmasked), over)

        share = restored(relearned(loss, jnp.where(region, START, 0.0), steps, inner))
        return masked_mean(share, region), masked_mean(share, region, axis=0)

    return jax.lax.map(of_row, x, batch_size=rows)


def saliency(policy: Policy, rollouts: Sequence[Rollout], **how: Any) -> list[float | None]:
    """How much each rollout's answer needs its reasoning: the mean restored share, in [0, 1], or `None` without parts.

    `how` is as in `measured`.
    """
    split, shares, _ = measured(policy, rollouts, **how)
    return [None if found is None else float(s) for found, s in zip(split, shares, strict=True)]


def saliency_of_tokens(policy: Policy, rollouts: Sequence[Rollout], **how: Any) -> list[np.ndarray | None]:
    """The mean restored share of attention to every token of the reasoning, `[tokens]` each: which of them are needed.

    It ranks tokens within a rollout; means over rows that may see a token, so the last ones have the fewest.  `how` is
    as in `measured`.
    """
    split, _, columns = measured(policy, rollouts, **how)
    return [None if found is None else c[: found[0]] for found, c in zip(split, columns, strict=True)]


def measured(
    policy: Policy,
    rollouts: Sequence[Rollout],
    *,
    delimiter: str = "####",
    steps: int = 200,
    mask_loss: Literal["nll", "kl_to_unmasked"] = "nll",
    target: Literal["own", "gold"] = "own",
    inner: Inner = "adamw",
    view: str = "student",
) -> tuple[list[tuple[int, int, int] | None], np.ndarray, np.ndarray]:
    """Every rollout's `parts`, mean restored share `[B]` and mean restored share per token `[B, T - 1]`.

    Args:
      delimiter: what separates reasoning and answer; its last occurrence counts.
      mask_loss: the answer's negative log-likelihood, or the divergence from the unmasked model (0 without a mask).
      target: the answer that the rollout gave, or the example's.
      inner: the mask's optimizer; SGD ranks tokens by how much they help, AdamW does not.
      view: whose context stands before the completion.
    """
    split = [parts(r, policy, delimiter) for r in rollouts]
    if not any(split):
        return split, np.zeros(len(rollouts)), np.zeros((len(rollouts), 0))
    tokens = [list(r.tokens) for r in rollouts]
    if target == "gold":
        for i, (rollout, found) in enumerate(zip(rollouts, split, strict=True)):
            if found is not None:
                gold = policy.tokenizer.encode(f" {rollout.example.main_answer}", add_special_tokens=False)
                tokens[i] = (tokens[i][: found[1]] + gold)[: policy.shapes.completion]
                split[i] = (*found[:2], len(tokens[i])) if len(tokens[i]) > found[1] else None
    length = max(2, policy.shapes.completion)
    row = lambda values, dtype: np.asarray([*values, *[0] * (length - len(values))], dtype)
    context, read = left_pad(
        [encode_context(policy.tokenizer, r.contexts[view], policy.shapes, policy.template) for r in rollouts],
        policy.shapes.context,
    )
    x = {
        "context": context,
        "read": read,
        "completion": np.stack([row(t, np.int32) for t in tokens]),
        "present": np.stack([row([True] * len(t), bool) for t in tokens]),
        "parts": np.asarray([found or (0, 1, 1) for found in split], np.int32),
    }
    width = bucket(int(max(p[2] - p[1] for p in x["parts"])), length)
    rows = min(policy.shapes.rows_per_chunk or len(rollouts), len(rollouts))
    shares, columns = compiled_saliency(policy.model, policy.params, x, width, steps, mask_loss, inner, rows)
    return split, *to_host((shares, columns))
