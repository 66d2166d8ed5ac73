"""The engine: from contexts and completions to per-token signals.  The vocabulary axis lives here and nowhere else.

Hidden states `[B, T, D]` are small, logits `[B, T, V]` are not: an objective's `signals` is a function of one position,
run over chunks of positions whose logits are recomputed in the backward pass.  Results do not depend on chunk sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.sharding import DATA, axis_size, copies, with_whole_head
from sdjax.kernels.distributions import normalise
from sdjax.models import transformer
from sdjax.models.transformer import Transformer
from sdjax.types import Batch, Context, View


def hidden_states(model: Transformer, params: Any, context: Context, completion: Array, present: Array) -> Array:
    """Hidden states `[B, T, D]` that predict each completion token after its row's context, each context read once."""
    rows = completion.shape[0]
    repeat = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    before, past = transformer.hidden(
        model, params, context.tokens, transformer.positions_of(context.mask), context.mask
    )
    start = repeat(context.mask.sum(-1).astype(jnp.int32))
    last = repeat(before[:, -1:])
    if completion.shape[1] == 1:
        return last
    tokens, mask = completion[:, :-1], present[:, :-1]
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    after, _ = transformer.hidden(model, params, tokens, positions, mask, past)
    return jnp.concatenate([last, after], axis=1)


def strided_chunks(tree: Any, units: int, chunks: int) -> Any:
    """Leaves `[n, ...]`, `units` dividing `n`, as `[chunks, n / chunks, ...]`: chunk `i` holds units `i, i + chunks, ...`

    Strided, so that an axis sharded over devices stays sharded in every chunk.
    """

    def split(x):
        x = x.reshape(units // chunks, chunks, x.shape[0] // units, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(chunks, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def joined_chunks(tree: Any, units: int, chunks: int) -> Any:
    """The inverse of `strided_chunks`."""

    def join(x):
        x = x.reshape(chunks, units // chunks, -1, *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

    return jax.tree.map(join, tree)


def over_rows(function: Callable, tree: Any, units: int, chunks: int, remat: bool) -> Any:
    """Maps `function` over strided chunks of the leading axis of every leaf of `tree`."""
    if chunks == 1:
        return function(tree)
    function = jax.checkpoint(function) if remat else function
    return joined_chunks(jax.lax.map(function, strided_chunks(tree, units, chunks)), units, chunks)


def over_tokens(function: Callable, tree: Any, live: Array, chunks: int) -> Any:
    """Maps `function` over slices of the time axis (axis 1 of every leaf); a slice without a live token is all zeros.

    `function` is rematerialised: nothing of vocabulary size outlives its slice.
    """
    if chunks == 1:
        return function(tree)
    rows, length = live.shape
    split = lambda x: jnp.moveaxis(x.reshape(rows, chunks, length // chunks, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, length, *x.shape[3:])
    slices, alive = jax.tree.map(split, tree), split(live).any((1, 2))
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], slices))
    nothing = lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    one = jax.checkpoint(lambda x: jax.lax.cond(x[0], function, nothing, x[1]))
    return jax.tree.map(join, jax.lax.map(one, (alive, slices)))


def divisor_at_least(number: int, wanted: int) -> int:
    """The smallest divisor of `number` that is at least `wanted` (at most `number`)."""
    return next(d for d in range(1, number + 1) if number % d == 0 and d >= min(wanted, number))


def read_by(view: View, model: Transformer, params: Any) -> Any:
    """Parameters as a view reads them: constants unless it is trained, and then sent in the type they are used in."""
    if view.trainable:
        return with_whole_head(params)
    return with_whole_head(jax.lax.stop_gradient(params), model.dtype)


def token_signals(
    views: Mapping[str, View],
    signals: Callable[[dict[str, Array], Array], dict[str, Array]],
    models: Mapping[str, Transformer],
    params: Mapping[str, Any],
    batch: Batch,
    *,
    rows: int | None = None,
    tokens: int | None = None,
) -> dict[str, Array]:
    """Per-token signals `{name: [B, T]}` of a batch, 0 where no token is present.

    Args:
      views: who reads the completion; gradients flow through the parameters of trainable views only.
      signals: `({view: log-probabilities [..., V]}, token [...]) -> {name: [...]}`, one position at a time.
      models, params: by policy name.  A view's context is `batch.contexts[view's name]`.
      rows: at most about this many rows at a time (activations); tokens: about this many positions at a time (logits),
        on each device of the data axis.  `None` is all at once.  They change memory and time, never the result.
    """
    rows, tokens = (size and size * axis_size(DATA) for size in (rows, tokens))
    total, length = batch.completion.shape
    units = math.gcd(*(batch.contexts[name].tokens.shape[0] for name in views))
    row_chunks = divisor_at_least(units, math.ceil(total / rows)) if rows else 1
    # Here, and not in every chunk of rows and tokens, what a mesh splits along data is gathered and summed.
    params = {name: read_by(view, models[view.policy], params[view.policy]) for name, view in views.items()}
    apart = total // row_chunks % axis_size(DATA) == 0 and axis_size(DATA) > 1
    heads = {name: transformer.head_of(models[view.policy], params[name]) for name, view in views.items()}
    heads = {name: copies(head) if apart and views[name].trainable else head for name, head in heads.items()}
    live = batch.present & batch.valid[:, None]
    frozen = {name: view for name, view in views.items() if not view.trainable}
    trained = {name: view for name, view in views.items() if view.trainable}

    def states(some: Mapping[str, View], x: dict) -> dict[str, Array]:
        return {
            name: hidden_states(models[view.policy], params[name], x["contexts"][name], x["completion"], x["present"])
            for name, view in some.items()
        }

    def read(x: dict) -> dict[str, Array]:
        unused = {name: models[view.policy].unused for name, view in views.items()}
        score = lambda name, head: normalise(transformer.scores(head, x["hidden"][name], unused[name]))
        return signals({name: score(name, head) for name, head in heads.items()}, x["token"])

    def per_rows(x: dict) -> dict[str, Array]:
        hidden = {**x["frozen"], **states(trained, x)}
        # Garbage at absent tokens is replaced before the head: it changes neither values nor gradients.
        hidden = {name: jnp.where(x["live"][..., None], h, 0) for name, h in hidden.items()}
        wanted = math.ceil(x["completion"].size / tokens) if tokens else 1
        chunks = divisor_at_least(length, wanted)
        found = over_tokens(read, {"hidden": hidden, "token": x["completion"]}, x["live"], chunks)
        keep = lambda s: jnp.where(x["live"].reshape(x["live"].shape + (1,) * (s.ndim - 2)), s, 0)
        return jax.tree.map(keep, found)

    common = {"completion": batch.completion, "present": batch.present, "live": live}
    contexts = lambda some: {name: batch.contexts[name] for name in some}
    # Frozen views are read outside the rematerialised part: their forward pass is never repeated.
    early = over_rows(lambda x: states(frozen, x), {**common, "contexts": contexts(frozen)}, units, row_chunks, False)
    late = {**common, "contexts": contexts(trained), "frozen": early}
    return over_rows(per_rows, late, units, row_chunks, True)
