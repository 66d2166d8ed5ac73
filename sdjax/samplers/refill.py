"""Sampling where no row waits for another: finished rows make room for queued prompts, in buckets of prompt length.

The compiled sampler holds a batch until its longest row has ended, and pads every prompt to its longest.  Here rows
live in a fixed number of slots, each with its own prompt and step; a compiled loop advances all of them until enough
have finished, then the host takes those out and puts the next ones in.  Once none waits, slots are halved as rows end.  A
row's tokens are those of the compiled sampler for the same key: they depend on the row's key, step and prompt alone.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.devices.sharding import constrain_parameters, rows_multiple
from sdjax.engine.generate import Completions, Sampling, draw
from sdjax.engine.policies import Policy, Sample, one_sample, row_keys
from sdjax.engine.tokens import ROWS, bucket, left_pad, thinking_opened
from sdjax.engine.waves import reach
from sdjax.models.transformer import Column, KeyValues, Transformer, decode, empty_cache, hidden, logits, positions_of
from sdjax.samplers.servers import Writer

HALVINGS, FEW = 3, 8
"""How often slots are halved when no row waits for one, and how few are not: a decoding program more each time, and fewer
empty slots.  A step with less than a few rows takes as long, for it reads all weights."""


def refilled(*, slots: int | None = None, swap: int | None = None, buckets: int = 3) -> Writer:
    """A writer (see `sdjax.samplers.servers`) that refills finished rows from a queue.

    Args:
      slots: rows decoded at once, by default `shapes.rows`; their prompts and caches are what memory must hold.
      swap: the queue is looked at when this many slots are free, by default an eighth of them: fewer steps are decoded
        by empty slots when it is small, the host is asked less often when it is large.
      buckets: at most this many padded prompt lengths; three programs are compiled for each, and two for every halving.
    """

    def write(policy: Policy, contexts, key, *, n: int, sampling: Sampling, limit: int) -> list[list[Sample]]:
        size = min(slots or policy.shapes.rows or ROWS, len(contexts) * n)
        keys = row_keys(key, jnp.arange(len(contexts)), n)
        chosen = Drawing(sampling, jnp.asarray(policy.stop, jnp.int32), jnp.asarray(limit, jnp.int32))
        lengths = (reach(policy.shapes, contexts), policy.shapes.completion)
        found = refill(
            policy.model, policy.params, contexts, keys, chosen, lengths, size, swap or max(1, size // 8), buckets
        ).completions
        openings = [thinking_opened(policy.tokenizer, row) for row in contexts]
        one = lambda i, j: one_sample(found, i * n + j, policy.tokenizer, openings[i])
        return [[one(i, j) for j in range(n)] for i in range(len(contexts))]

    return write


class Drawing(NamedTuple):
    """How tokens are drawn and when a row ends."""

    sampling: Sampling
    stop: Array  # [n] int32
    limit: Array  # [] int32


class Refilled(NamedTuple):
    """Completions in the order of the keys, and what they cost."""

    completions: Completions  # on the host
    steps: int  # of decoding, all slots together in each
    decoded: int  # slots in all steps together: tokens, and steps of slots in which nothing is written
    padded: int  # prompt tokens read, padding included


def refill(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    keys: Array,
    drawing: Drawing,
    lengths: tuple[int, int],
    slots: int,
    swap: int,
    buckets: int,
) -> Refilled:
    """`B` completions of `C` prompts, `B / C` consecutive keys each, in `slots` slots.

    `lengths` are the most tokens of a prompt and of a completion; see `refilled` for the rest.
    """
    rows, per_prompt = len(keys), len(keys) // len(prompts)
    arrays = Completions(
        np.zeros((rows, lengths[1]), np.int32),
        np.zeros((rows, lengths[1]), np.float32),
        np.zeros((rows, lengths[1]), bool),
        np.zeros(rows, bool),
    )
    params, tables = cast(model, params), []
    for width, members in by_width(prompts, lengths[0], buckets).items():
        queue = collections.deque((i, i * per_prompt + j) for i in members for j in range(per_prompt))
        table = Table(model, params, prompts, keys, drawing, (width, lengths[1]), min(slots, len(queue)), per_prompt)
        table.run(queue, swap, arrays)
        tables.append((table.steps, table.decoded, table.padded))
    return Refilled(arrays, *map(sum, zip(*tables, strict=True)))


def by_width(prompts: Sequence[Sequence[int]], limit: int, most: int) -> dict[int, list[int]]:
    """Prompts by padded width, at most `most` widths, chosen so that the fewest padded tokens are read."""
    fitting = [bucket(len(p), limit) for p in prompts]
    sizes = sorted(set(fitting))
    choices = [(*some, sizes[-1]) for some in itertools.combinations(sizes[:-1], min(most, len(sizes)) - 1)]
    widened = lambda widths, fit: next(w for w in widths if w >= fit)
    best = min(choices, key=lambda widths: sum(widened(widths, fit) for fit in fitting))
    return {w: [i for i, fit in enumerate(fitting) if widened(best, fit) == w] for w in best}


# ---- on the device --------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Slots:
    """Rows under way, one per slot.  The cache is a ring, in which all slots write the same column."""

    past: KeyValues  # [S, P]
    cache: KeyValues  # [S, T]
    steps: Array  # []: decoding steps so far
    keys: Array  # [S]
    start: Array  # [S]: prompt tokens
    token: Array  # [S]: drawn last
    step: Array  # [S]: tokens drawn
    done: Array  # [S] bool
    finished: Array  # [S] bool
    tokens: Array  # [S, T]
    logprobs: Array  # [S, T]


class Read(NamedTuple):
    """Prompts that were read: keys and values, lengths `[C]`, and the logits `[C, V]` of what follows them."""

    past: KeyValues
    start: Array
    heads: Array


@functools.partial(jax.jit, static_argnums=0)
def cast(model: Transformer, params: Any) -> Any:
    """Parameters as `sdjax.engine.generate` reads them: in the model's type, gathered over a mesh's data axis."""
    to = lambda x: x.astype(model.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return constrain_parameters(jax.tree.map(to, params), least=math.inf)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(model: Transformer, slots: int, width: int, length: int) -> Slots:
    """Slots with nothing in them."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    past, cache = empty_cache(model, slots, width), empty_cache(model, slots, length)
    done, finished = jnp.ones(slots, bool), jnp.zeros(slots, bool)
    keys = jax.random.split(jax.random.key(0), slots)
    rest = (zeros(slots), zeros(slots), zeros(slots), done, finished, zeros(slots, length))
    return Slots(past, cache, zeros(), keys, *rest, jnp.zeros((slots, length), jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def read(model: Transformer, params: Any, tokens: Array, mask: Array) -> Read:
    """Reads prompts `[C, P]`, left-padded."""
    states, past = hidden(model, params, tokens, positions_of(mask), mask)
    return Read(past, mask.sum(-1).astype(jnp.int32), logits(model, params, states[:, -1]))


@functools.partial(jax.jit, donate_argnums=0)
def admit(slots: Slots, prompts: Read, row: Array, take: Array, keys: Array, drawing: Drawing) -> Slots:
    """Starts row `row[s]` of the prompts, with key `keys[s]`, in every slot `s` where `take`; draws its first token."""

    def put(new, old):
        return jnp.where(take.reshape(-1, *(1,) * (old.ndim - 1)), new[row], old)

    keys = jax.random.wrap_key_data(
        jnp.where(take[:, None], jax.random.key_data(keys), jax.random.key_data(slots.keys))
    )
    clear = lambda x: jnp.where(take.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)
    slots = slots.replace(
        past=jax.tree.map(put, prompts.past, slots.past),
        # Of the row before, only what may be read is forgotten: the ring writes over the rest.
        cache=slots.cache.replace(mask=clear(slots.cache.mask)),
        keys=keys,
        start=put(prompts.start, slots.start),
        **{name: clear(getattr(slots, name)) for name in ("step", "finished", "tokens", "logprobs")},
    )
    return recorded(slots, prompts.heads[row], take, drawing)


def recorded(slots: Slots, heads: Array, going: Array, drawing: Drawing) -> Slots:
    """The slots with one more token each where `going`, drawn from `heads [S, V]`."""
    now = jax.vmap(jax.random.fold_in)(slots.keys, slots.step)
    token = draw(heads, jax.vmap(jax.random.uniform)(now), drawing.sampling)
    chosen = jnp.take_along_axis(heads, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(heads, axis=-1)
    length = slots.tokens.shape[1]
    place = (jnp.arange(len(token)), jnp.where(going, slots.step, length))
    step = slots.step + going
    ended = going & (token[:, None] == drawing.stop[None]).any(-1)
    over = going & (step >= jnp.minimum(drawing.limit, length))
    return slots.replace(
        token=jnp.where(going, token, slots.token),
        step=step,
        done=jnp.where(going, ended | over, slots.done),
        finished=jnp.where(going, ended, slots.finished),
        tokens=slots.tokens.at[place].set(token, mode="drop"),
        logprobs=slots.logprobs.at[place].set(chosen, mode="drop"),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(model: Transformer, params: Any, slots: Slots, drawing: Drawing, wanted: Array) -> Slots:
    """Decodes until `wanted` slots are done."""

    def one(s: Slots) -> Slots:
        length = s.tokens.shape[1]
        column = Column(s.steps % length, jnp.minimum(s.steps + 1, length))
        state, cache = decode(model, params, s.token, s.start + s.step - 1, s.past, s.cache, column)
        s = s.replace(cache=cache, steps=s.steps + 1)
        return recorded(s, logits(model, params, state), ~s.done, drawing)

    return jax.lax.while_loop(lambda s: s.done.sum() < wanted, one, slots)


@jax.jit
def kept_slots(slots: Slots, kept: Array) -> Slots:
    """The slots of these numbers."""
    return jax.tree.map(lambda x: x[kept] if x.ndim else x, slots)


# ---- on the host ----------------------------------------------------------------------------------------------------


class Table:
    """The slots of one bucket, and who sits in them."""

    def __init__(self, model, params, prompts, keys, drawing, lengths, size, per_prompt):
        self.model, self.params, self.prompts, self.keys, self.drawing = model, params, prompts, keys, drawing
        self.width, self.together = lengths[0], -(-size // per_prompt)
        self.state = empty(model, size, *lengths)
        self.owner: list[int | None] = [None] * size
        self.least = max(FEW, size >> HALVINGS)
        self.read: Read | None = None
        self.place: dict[int, int] = {}
        self.steps, self.decoded, self.padded = 0, 0, 0

    def run(self, queue: collections.deque, swap: int, results: Completions) -> None:
        """Writes every row `(prompt, row)` of the queue into the results."""
        while queue or any(row is not None for row in self.owner):
            self.take_out(results)
            self.put_in(queue)
            if not queue:
                self.halve()
            wanted = self.wanted(swap if queue else None)
            self.state = advance(self.model, self.params, self.state, self.drawing, jnp.asarray(wanted))

    def wanted(self, swap: int | None) -> int:
        """How many slots are free when the host looks next: `swap` more, or without a queue as many as lets it halve them."""
        size = len(self.owner)
        if swap is not None:
            return min(sum(row is None for row in self.owner) + swap, size)
        return size - self.half() if self.half() < size else size

    def half(self) -> int:
        """How many slots there are after they are halved; as many as now where they are few enough."""
        half = rows_multiple(-(-len(self.owner) // 2))
        return half if half >= self.least else len(self.owner)

    def halve(self) -> None:
        """Leaves half of the slots as long as they hold every row."""
        live = [slot for slot, row in enumerate(self.owner) if row is not None]
        while live and len(live) <= self.half() < len(self.owner):
            free = [slot for slot, row in enumerate(self.owner) if row is None]
            kept = [*live, *free][: self.half()]
            self.state = kept_slots(self.state, jnp.asarray(kept))
            self.owner = [self.owner[slot] for slot in kept]
            live = list(range(len(live)))

    def take_out(self, results: Completions) -> None:
        """Copies rows that are done, and frees their slots."""
        s = self.state
        done, finished, step, tokens, logprobs, steps = jax.device_get(
            (s.done, s.finished, s.step, s.tokens, s.logprobs, s.steps)
        )
        self.steps, self.decoded = int(steps), self.decoded + (int(steps) - self.steps) * len(self.owner)
        for slot in np.flatnonzero(done):
            row, self.owner[slot] = self.owner[slot], None
            if row is not None:
                results.tokens[row], results.logprobs[row] = tokens[slot], logprobs[slot]
                results.present[row, : step[slot]], results.finished[row] = True, finished[slot]

    def put_in(self, queue: collections.deque) -> None:
        """Starts the next rows of the queue in the free slots."""
        free = [slot for slot, row in enumerate(self.owner) if row is None]
        while free and queue:
            if queue[0][0] not in self.place:
                self.read_next(queue)
            seats, of_prompt, rows = [], [], []
            while free and queue and queue[0][0] in self.place:
                prompt, row = queue.popleft()
                seats, of_prompt, rows = [*seats, free.pop(0)], [*of_prompt, self.place[prompt]], [*rows, row]
            self.start(seats, of_prompt, rows)

    def read_next(self, queue: collections.deque) -> None:
        """Reads the next prompts of the queue, as many as fill all slots: each is read once."""
        ahead = list(itertools.islice(dict.fromkeys(prompt for prompt, _ in queue), self.together))
        self.place = {prompt: i for i, prompt in enumerate(ahead)}
        rows = [self.prompts[ahead[min(i, len(ahead) - 1)]] for i in range(self.together)]
        tokens, mask = left_pad(rows, self.width)
        short = ((0, 0), (self.width - tokens.shape[1], 0))
        self.read = read(self.model, self.params, np.pad(tokens, short), np.pad(mask, short))
        self.padded += self.width * len(rows)

    def start(self, seats: Sequence[int], of_prompt: Sequence[int], rows: Sequence[int]) -> None:
        """Puts rows of the prompts that were read last into slots."""
        place, take = np.zeros(len(self.owner), np.int32), np.zeros(len(self.owner), bool)
        row = np.zeros(len(self.owner), np.int32)
        place[seats], take[seats], row[seats] = of_prompt, True, rows
        for slot, number in zip(seats, rows, strict=True):
            self.owner[slot] = number
        self.state = admit(self.state, self.read, place, take, self.keys[row], self.drawing)
