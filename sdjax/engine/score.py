"""The engine: from contexts and completions to per-token signals.  The vocabulary axis lives here and nowhere else.

Hidden states `[B, T, D]` are small, logits `[B, T, V]` are not: an objective's `signals` is a function of one position,
run over chunks of positions whose logits are recomputed in the backward pass.  Results do not depend on chunk sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.sharding import DATA, axis_size, copies, current, with_whole_head
from sdjax.engine.by_length import divisor_at_least, over_sorted_rows
from sdjax.kernels.distributions import normalise
from sdjax.models import transformer
from sdjax.models.caches import KeyValues
from sdjax.models.routing import Usage
from sdjax.models.transformer import Transformer
from sdjax.types import Batch, ByField, Context, Scored, Scores, View


class Before(NamedTuple):
    """Contexts that were read: what completions after them need of them."""

    last: Array  # [C, 1, D] hidden states of their last tokens
    past: KeyValues
    start: Array  # [C] their lengths in tokens
    more: Any  # what was said besides of their tokens


def read_context(read: Callable, model: Transformer, params: Any, context: Context) -> Before:
    """Reads contexts; `read` is `transformer.hidden` or `transformer.watched`."""
    states, past, *more = read(model, params, context.tokens, transformer.positions_of(context.mask), context.mask)
    return Before(states[:, -1:], past, context.mask.sum(-1).astype(jnp.int32), more)


def hidden_states(
    model: Transformer, params: Any, context: Context | Before, completion: Array, present: Array
) -> Array:
    """Hidden states `[B, T, D]` that predict each completion token after its row's context, each context read once."""
    return read_through(transformer.hidden, model, params, context, completion, present)[0]


def read_through(
    read: Callable, model: Transformer, params: Any, context: Context | Before, completion: Array, present: Array
) -> tuple[Array, Any, Any]:
    """`hidden_states`, and what `read` says besides of the contexts' tokens and of the completions'.

    `read` is `transformer.hidden` or `transformer.watched`.
    """
    rows = completion.shape[0]
    repeat = lambda x: jnp.repeat(x, rows // x.shape[0], axis=0)
    last, past, start, more = context if isinstance(context, Before) else read_context(read, model, params, context)
    start, last = repeat(start), repeat(last)
    if completion.shape[1] == 1:
        return last, more, []
    # A row's last token predicts nothing: it is read or not as there is room, and never counted.
    tokens, mask = completion[:, :-1], present[:, 1:]
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    after, _, *rest = read(model, params, tokens, positions, mask, past)
    return jnp.concatenate([last, after], axis=1), more, rest


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


def row_units(contexts: Iterable[int], total: int, rows: int | None) -> tuple[int, int]:
    """Into how many units the rows of a batch may be cut, and in how many chunks of whole units they are read.

    The rows that share a context are a unit, or a part of one where `rows` are fewer.
    """
    units = math.gcd(*contexts)
    wanted = math.ceil(total / rows) if rows else 1
    if wanted > units:
        units *= divisor_at_least(total // units, math.ceil(wanted / units))
    return units, divisor_at_least(units, wanted)


def repeated(context: Context, units: int) -> Context:
    """A context of which every unit of rows has a copy of its own; as it is where that is so already."""
    count = context.tokens.shape[0]
    times = math.lcm(count, units) // count
    if times == 1:
        return context
    return context.replace(tokens=jnp.repeat(context.tokens, times, 0), mask=jnp.repeat(context.mask, times, 0))


def read_by(view: View, model: Transformer, params: Any) -> Any:
    """Parameters as a view reads them: constants unless it is trained, and then sent in the type they are used in."""
    if view.trainable:
        return with_whole_head(params)
    return with_whole_head(jax.lax.stop_gradient(params), model.dtype)


ROUTERS = "routers"
"""The name that what routers did goes by among the signals."""


def usage_by_row(of_contexts: Sequence[Usage], of_completions: Sequence[Usage], live: Array, sharing: int) -> Usage:
    """The usage of each row: that of its completion, and its part of that of the context which `sharing` rows share."""
    rows = lambda x: jnp.repeat(x, len(live) // len(x), axis=0) / sharing
    found = [jax.tree.map(rows, usage) for usage in of_contexts] + [*of_completions]
    whole = jax.tree.map(lambda *x: sum(x), *found)
    return jax.tree.map(lambda x: jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0), whole)


# ---- views whose policy depends on the example ------------------------------------------------------------------------


def policies_of(view: View) -> tuple[str, ...]:
    """The names of the policies of this process that a view reads."""
    if isinstance(view.policy, ByField):
        return view.policy.policies
    return () if isinstance(view.policy, Scored) else (view.policy,)


def head_of(models: Sequence[Transformer], params: Sequence[Any]) -> Array:
    """The parameter that a view's logits are computed with: its policy's, or those of several side by side, `[V, sum D]`.

    The hidden states of `states_by_member` are 0 but for a row's own part, so the product is the row's own logits.
    """
    heads = [transformer.head_of(model, tree) for model, tree in zip(models, params, strict=True)]
    return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=-1)


def states_by_member(
    models: Sequence[Transformer], params: Sequence[Any], context: Context, completion: Array, present: Array
) -> Array:
    """Hidden states `[B, T, sum D]` by the policy that `context.member` gives each row, 0 in the parts of the others.

    A policy that reads none of the rows is not run.
    """

    def part(number: int) -> Array:
        read = lambda: hidden_states(models[number], params[number], context, completion, present)
        nothing = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(read))
        own = context.member == number
        return jnp.where(own[:, None, None], jax.lax.cond(own.any(), read, nothing), 0)

    return jnp.concatenate([part(number) for number in range(len(models))], axis=-1)


def over_members(function: Callable, tree: Any, member: Array, members: int, units: int, chunks: int) -> Any:
    """`over_rows` without gradients, in an order in which all but `members - 1` chunks hold rows of one member only.

    On a mesh rows stay on their devices, so the order stays as it is: a chunk then costs as much as it has members.
    """
    if current() is not None:
        return over_rows(function, tree, units, chunks, False)
    # At least so many that most chunks have one member.
    chunks = divisor_at_least(units, max(chunks, 2 * members))
    sort = jnp.argsort(member.reshape(units, -1)[:, 0])
    # Chunk i holds units i, i + chunks, ...: see strided_chunks.
    order = sort.reshape(chunks, units // chunks).T.reshape(-1)
    taken = lambda tree, order: jax.tree.map(lambda x: x.reshape(units, -1, *x.shape[1:])[order].reshape(x.shape), tree)
    return taken(over_rows(function, taken(tree, order), units, chunks, False), jnp.argsort(order))


def spread(scores: Scores, size: int) -> Array:
    """Log-probabilities `[..., V]` of given entries `[..., K]`; what is left of the mass is the same for all others.

    Exact for signals that read no more than the entries and the total mass of the rest (`View.entries`).
    """
    used = scores.tokens < size
    known = jax.nn.logsumexp(jnp.where(used, scores.logprobs, -jnp.inf), axis=-1)
    rest = jnp.log(-jnp.expm1(jnp.minimum(known, -1e-7))) - jnp.log(jnp.maximum(size - used.sum(-1), 1))
    flat = jnp.broadcast_to(rest[..., None], (*rest.shape, size)).reshape(-1, size)
    entries = scores.tokens.reshape(len(flat), -1)
    rows = jnp.arange(len(flat))[:, None]
    found = flat.at[rows, entries].set(scores.logprobs.reshape(entries.shape), mode="drop")
    return found.reshape(*rest.shape, size)


def distributions(
    networks: Mapping[str, Sequence[Transformer]], heads: Mapping[str, Array], hidden: Mapping, scored: Iterable[str]
) -> dict[str, Array]:
    """Log-probabilities `[..., V]` by view: of hidden states by its head, of those that are `scored` by what was said."""
    # The policies of one view have one tokenizer, and so the same ids without a token.
    cap = lambda name: networks[name][0].config.logit_cap
    score = lambda name, head: transformer.scores(head, hidden[name], networks[name][0].unused, cap(name))
    found = {name: normalise(score(name, head)) for name, head in heads.items()}
    size = next(iter(found.values())).shape[-1]
    return {**found, **{name: spread(hidden[name], size) for name in scored}}


def token_signals(
    views: Mapping[str, View],
    signals: Callable[[dict[str, Array], Array], dict[str, Array]],
    models: Mapping[str, Transformer],
    params: Mapping[str, Any],
    batch: Batch,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    lengths: int = 1,
    routers: bool = False,
) -> dict[str, Any]:
    """Per-token signals `{name: [B, T]}` of a batch, 0 where no token is present.

    Args:
      views: who reads the completion; gradients flow through the parameters of trainable views only.
      signals: `({view: log-probabilities [..., V]}, token [...]) -> {name: [...]}`, one position at a time.
      models, params: by policy name.  A view's context is `batch.contexts[view's name]`.
      rows: at most about this many rows at a time (activations); tokens: about this many positions at a time (logits),
        on each device of the data axis.  `None` is all at once.  They change memory and time, never the result.  Fewer
        rows at a time than share a context read it once for each part of them.
      lengths: above 1, rows are read in the order of their lengths, each few of them cut to one of so many lengths
        (`sdjax.engine.by_length`), after the contexts that rows share.  Not on a mesh, where rows stay on their devices.
      routers: `{name of a trained view: Usage}` comes, too, under `ROUTERS`: what routers did with every token that was read
        for a row; a context's tokens are split evenly among the rows that share it.  Of mixtures of experts alone.
    """
    rows, tokens = (size and size * axis_size(DATA) for size in (rows, tokens))
    total = batch.completion.shape[0]
    shared = {name: batch.contexts[name].tokens.shape[0] for name in views}
    units, row_chunks = row_units(shared.values(), total, rows)
    # Here, and not in every chunk of rows and tokens, what a mesh splits along data is gathered and summed.
    read = {name: policies_of(view) for name, view in views.items()}
    networks = {name: [models[policy] for policy in own] for name, own in read.items() if own}
    params = {name: [read_by(views[name], models[p], params[p]) for p in read[name]] for name in networks}
    apart = total // row_chunks % axis_size(DATA) == 0 and axis_size(DATA) > 1
    heads = {name: head_of(own, params[name]) for name, own in networks.items()}
    heads = {name: copies(head) if apart and views[name].trainable else head for name, head in heads.items()}
    live = batch.present & batch.valid[:, None]
    scored = {name: batch.contexts[name].scores for name, own in read.items() if not own}
    trained = [name for name in networks if views[name].trainable]
    chosen = [name for name in networks if batch.contexts[name].member is not None]
    frozen = [name for name in networks if name not in (*trained, *chosen)]
    common = {"completion": batch.completion, "present": batch.present, "live": live}

    def states(some: Sequence[str]) -> Callable[[dict, dict], tuple[dict[str, Array], dict]]:
        return lambda params, x: ({name: states_of(name, params, x) for name in some}, {})

    def states_and_usages(params: dict, x: dict) -> tuple[dict[str, Array], dict[str, Usage]]:
        """Of the trained views, whose policy is one."""
        rest = lambda name: (networks[name][0], params[name][0], x["contexts"][name], x["completion"], x["present"])
        found = {name: read_through(transformer.watched, *rest(name)) for name in trained}
        row = lambda name: usage_by_row(*found[name][1:], x["live"].any(-1), total // shared[name])
        return {name: read[0] for name, read in found.items()}, {name: row(name) for name in trained}

    def states_of(name: str, params: dict, x: dict) -> Array:
        rest = x["contexts"][name], x["completion"], x["present"]
        if name in chosen:
            return states_by_member(networks[name], params[name], *rest)
        return hidden_states(networks[name][0], params[name][0], *rest)

    def per_rows(same: dict, x: dict) -> tuple[dict[str, Array], dict[str, Usage]]:
        keep = lambda s: jnp.where(x["live"].reshape(x["live"].shape + (1,) * (s.ndim - 2)), s, 0)
        own, usages = (states_and_usages if routers else states(trained))(same["params"], x)
        # Garbage at absent tokens is replaced before the head: it changes neither values nor gradients.
        hidden = jax.tree.map(keep, {**x["frozen"], **own})
        few = math.ceil(x["live"].size / tokens) if tokens else 1
        read = lambda y: signals(distributions(networks, same["heads"], y["hidden"], scored), y["token"])
        found = over_tokens(
            read, {"hidden": hidden, "token": x["completion"]}, x["live"], divisor_at_least(x["live"].shape[1], few)
        )
        return jax.tree.map(keep, found), usages

    def over(function: Callable, same: dict, some: Sequence[str], timed: dict, remat: bool) -> tuple[dict, dict]:
        """What a function of parameters and rows says of all rows, whose views read these contexts."""
        contexts = {name: batch.contexts[name] for name in some}
        if lengths > 1 and current() is None:
            how = transformer.watched if routers and remat else transformer.hidden
            first = lambda name: read_ahead(how, networks[name][0], params[name][0], contexts[name], rows)
            contexts |= {name: first(name) for name in some if shared[name] < total}
            return over_sorted_rows(function, same, timed, contexts, live, rows, lengths)
        tree = {**timed, "contexts": {name: repeated(context, units) for name, context in contexts.items()}}
        return over_rows(functools.partial(function, same), tree, units, row_chunks, remat)

    # Frozen views are read outside the rematerialised part: their forward pass is never repeated.
    early, _ = over(states(frozen), {name: params[name] for name in frozen}, frozen, common, False)
    for name in chosen:
        own, context = functools.partial(states_of, name, params), batch.contexts[name]
        tree = {**common, "contexts": {name: repeated(context, units)}}
        early[name] = over_members(own, tree, context.member, len(networks[name]), units, row_chunks)
    same = {"params": {name: params[name] for name in trained}, "heads": heads}
    found, usages = over(per_rows, same, trained, {**common, "frozen": {**early, **scored}}, True)
    return {**found, ROUTERS: usages} if routers else found


def read_ahead(read: Callable, model: Transformer, params: Any, context: Context, rows: int | None) -> Before:
    """Contexts that rows share, read before the rows, about `rows` of them at a time."""
    count = context.tokens.shape[0]
    chunks = divisor_at_least(count, math.ceil(count / rows)) if rows else 1
    return over_rows(lambda some: read_context(read, model, params, some), context, count, chunks, True)
