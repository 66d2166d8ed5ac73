"""How much is done at a time, so that a run fits the memory there is: chosen before the first step, the same on resume.

Candidates go from the fastest to the smallest.  An estimate passes over those that are far too large; the next is
compiled, with few layers where there are many, and taken if it fits.  The compiler's figure corrects the estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.devices.memory import MemoryShortage, Room, gigabytes
from sdjax.devices.platforms import on_cpu
from sdjax.devices.sharding import DATA, axis_size
from sdjax.engine import needs, sketch, train
from sdjax.engine.lengths import fitted
from sdjax.engine.needs import Load, Sizes
from sdjax.engine.score import row_units
from sdjax.engine.tokens import ROWS, bucket, collate
from sdjax.engine.train import Experiment
from sdjax.models.adapters import Lora
from sdjax.types import Batch, Context

CLEAR = 0.25
"""A share of the room below which an estimate is believed and nothing is compiled."""

SAFETY = 1.1
"""What a program told from few layers may need more."""

MOST_COMPILED = 4
"""Candidates whose programs are compiled before the smallest one is tried."""

TOKENS = (512, 128, 32)
"""Positions whose logits are held at a time, the fastest first."""

Candidate = TypeVar("Candidate")


FEW_ROWS, MANY = 16, 64
"""Rows of a prompt where nothing is known of a method: for a generous glance, and for a choice."""


class Chosen(NamedTuple):
    """Sizes, and the bytes of a device that the run then needs at most, the state included."""

    sizes: Sizes
    needed: float


# ---- what a run does at most ----------------------------------------------------------------------------------------


def planned(experiment: Experiment, longest: int) -> Load:
    """What a run does at most, by a sketch of the method on the run's own problems; `longest` prompt in tokens.

    A method that cannot be sketched is taken to read everything in every row.
    """
    e, shapes, views = experiment, experiment.shapes, train.all_views(experiment.method)
    small = dataclasses.replace(shapes, completion=min(8, shapes.completion), rows=8, rows_per_chunk=None)
    try:
        little = sketch.little(e.student.tokenizer, small)
        rollouts = sketch.collected(e.method, little, e.task.train)
        batch = collate(fitted(rollouts, views, little.tokenizer, small).rollouts, views, little.tokenizer, small)
    except Exception:  # noqa: BLE001 # somebody else's method, asked with texts that no model wrote
        return guessed(e, longest, MANY)
    plain = {v for v in views if all(r.contexts.get(v) in (None, r.example.prompt) for r in rollouts)}
    widths = {v: bucket(longest, shapes.context) if v in plain else shapes.lesson for v in views}
    own = {v for v, view in views.items() if view.per_rollout and v not in plain}
    whole = sketch.sized(batch, groups(e), sketch.rows_per_prompt(batch), shapes.completion, widths, own)
    return Load(e, whole, read_at_most(e, longest))


def groups(experiment: Experiment) -> int:
    """Prompts in one update."""
    multiple = axis_size(DATA)
    return -(-experiment.prompts // experiment.minibatches // multiple) * multiple


def guessed(experiment: Experiment, longest: int, rows: int) -> Load:
    """What a run does if every prompt has so many rows, and every view reads a context of its own for each."""
    count, shapes = groups(experiment) * rows, experiment.shapes
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
    read = Context(array(count, max(shapes.context, shapes.lesson)), None, None)
    contexts = dict.fromkeys(train.all_views(experiment.method), read)
    nothing = {f.name: None for f in dataclasses.fields(Batch)}
    batch = Batch(**nothing | {"completion": array(count, shapes.completion), "contexts": contexts})
    return Load(experiment, batch, read_at_most(experiment, longest))


# ---- candidates -----------------------------------------------------------------------------------------------------


def read_at_most(experiment: Experiment, longest: int) -> int:
    """The most tokens that the sampler reads before it writes: the longest prompt, in conversations with all that was said."""
    said = 0 if experiment.task.world is None else experiment.shapes.completion
    return bucket(longest, experiment.shapes.context) + said


def halves(most: int) -> list[int]:
    """`most`, its half, quarter, ..., 1, rounded up."""
    return [most] if most <= 1 else [most, *halves(-(-most // 2))]


def given_sizes(experiment: Experiment) -> dict[str, Any]:
    """The sizes that an experiment says; `None` for those that it leaves open."""
    shapes = experiment.shapes
    return {**{n: getattr(shapes, n) for n in Sizes._fields if n != "remat"}, "remat": experiment.remat}


def candidates(experiment: Experiment, batch: Batch) -> list[Sizes]:
    """Everything that may be chosen for an update, the fastest first; what the experiment says stays."""
    shapes, rows = experiment.shapes, -(-batch.completion.shape[0] // axis_size(DATA))
    remat = [False, True] if experiment.remat is None else [experiment.remat]
    chunks = [None, *halves(rows)[1:]] if shapes.rows_per_chunk is None else [shapes.rows_per_chunk]
    tokens = tokens_of(experiment, batch) if shapes.tokens_per_chunk is None else [shapes.tokens_per_chunk]
    found = [Sizes(shapes.rows or ROWS, chunk, tokens[0], again) for chunk in chunks for again in remat]
    found.sort(key=lambda sizes: work(batch, sizes))  # equals stay in order: larger chunks first
    smallest = Sizes(shapes.rows or ROWS, chunks[-1], tokens[0], remat[-1])
    found = [sizes for sizes in found if sizes != smallest] + [smallest]
    # Logits that are all kept need not be computed again: a third of the head's products and more, measured on a CPU only.
    keeps = on_cpu() and shapes.tokens_per_chunk is None and tokens[0] is not None
    whole = [found[0]._replace(tokens_per_chunk=None)] if keeps else []
    return [*whole, *found, *(smallest._replace(tokens_per_chunk=few) for few in tokens[1:])]


def work(batch: Batch, sizes: Sizes) -> float:
    """What an update costs in tokens that pass forward: three times each, and again where something is recomputed."""
    rows, length = batch.completion.shape
    counts = [read.tokens.shape[0] for read in batch.contexts.values()]
    chunk = sizes.rows_per_chunk and sizes.rows_per_chunk * axis_size(DATA)
    units, chunks = row_units(counts, rows, chunk)
    read = sum(math.lcm(r.tokens.shape[0], units) * r.tokens.shape[1] for r in batch.contexts.values())
    return (3 + sizes.remat + (chunks > 1)) * (read + rows * length * len(counts))


def tokens_of(experiment: Experiment, batch: Batch) -> list[int | None]:
    """How many positions may be read at a time: all where their logits are small."""
    vocabulary = max(c.vocab_size for c in needs.configs(experiment).values())
    small = batch.completion.size * vocabulary * 4 < 1e8
    return [None if small else TOKENS[0], *TOKENS[1:]]


# ---- choosing -------------------------------------------------------------------------------------------------------


def choose(load: Load, room: Room) -> Chosen:
    """The fastest sizes with which the run fits.  Raises `MemoryShortage` where none does, with what would do."""
    e = load.experiment
    state = sum(needs.state_of(e).parts().values())
    left = room.free - state
    objectives = e.method.objectives
    most = lambda of: lambda sizes: max(of(load, objective, sizes) for objective in objectives)
    deep = lambda of: lambda *which: SAFETY * needs.by_depth(load, lambda layers: of(load, *which, layers))
    updates = candidates(e, load.batch)
    measured = lambda sizes: max(deep(needs.compiled_update)(o, sizes) for o in objectives)
    update = first_that_fits(updates, most(needs.estimated_update), measured, left)
    rows = halves(ROWS) if e.shapes.rows is None else [e.shapes.rows]
    sampler = first_that_fits(
        rows, lambda n: needs.estimated_sampler(load, n), lambda n: deep(needs.compiled_sampler)(n), left
    )
    for found, what in ((update, "an update"), (sampler, "the sampler")):
        if not found.fits:
            raise shortage(load, room, state, found, what)
    return Chosen(update.choice._replace(rows=sampler.choice), state + max(update.needed, sampler.needed))


def at_once(load: Load, room: Room) -> Chosen | None:
    """The fastest sizes, or the next to them, if even a generous estimate leaves most of the room free."""
    e = load.experiment
    state = sum(needs.state_of(e).parts().values())
    for sizes in candidates(e, load.batch)[:2]:
        update = max(needs.estimated_update(load, o, sizes) for o in e.method.objectives)
        needed = state + max(update, needs.estimated_sampler(load, sizes.rows))
        if needed <= CLEAR * room.free:
            return Chosen(sizes, needed)
    return None


class Found(NamedTuple):
    """A candidate, the bytes that it needs beside the state, whether that is there, and the compiler's word by the estimate's."""

    choice: Any
    needed: float
    fits: bool
    ratio: float = 1.0


def first_that_fits(
    options: Sequence[Candidate],
    estimate: Callable[[Candidate], float],
    measure: Callable[[Candidate], float],
    room: float,
) -> Found:
    """The first of the candidates that needs at most `room` bytes, or the last one where none does."""
    measured = 0
    ratios: dict[bool, float] = {}  # recomputation is estimated worse than what is kept
    for option in options:
        kind, guess, last = getattr(option, "remat", False), estimate(option), option == options[-1]
        ratio = ratios.get(kind, 1.0)
        if guess * max(ratio, 1.0) <= CLEAR * room:
            return Found(option, guess * max(ratio, 1.0), True, ratio)
        if not last and (guess * ratio > room or measured >= MOST_COMPILED):
            continue
        needed, measured = measure(option), measured + 1
        ratios[kind] = needed / guess
        if needed <= room or last:
            return Found(option, needed, needed <= room, ratios[kind])
    raise ValueError("no candidates")


# ---- where nothing fits ---------------------------------------------------------------------------------------------


def shortage(load: Load, room: Room, state: float, found: Found, what: str) -> MemoryShortage:
    """What is needed, what there is, and which options would do."""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in needs.state_of(load.experiment).parts().items())
    would = remedies(load, room, found)
    return MemoryShortage(
        f"the run does not fit: it needs {gigabytes(state + found.needed)} ({parts}; {what} {gigabytes(found.needed)} at "
        f"the least), and there are {room}.  "
        + (f"These would do: {', or '.join(would)}" if would else "No option helps enough: take a smaller model")
        + ".  --memory off starts it all the same"
    )


def remedies(load: Load, room: Room, found: Found) -> list[str]:
    """Options with which the run would fit, by the estimate."""
    e, ratio = load.experiment, max(1.0, found.ratio)
    free = dataclasses.replace(
        e, remat=None, shapes=dataclasses.replace(e.shapes, rows=None, rows_per_chunk=None, tokens_per_chunk=None)
    )
    given = [name for name, value in given_sizes(e).items() if value is not None]
    changes = [(" and ".join(f"no --{name.replace('_', '-')}" for name in given), load._replace(experiment=free))]
    changes = changes if given else []
    if e.dtype == jnp.float32:
        changes.append(("--bf16", load._replace(experiment=dataclasses.replace(e, dtype=jnp.bfloat16))))
    if e.lora is None:
        changes.append(("--lora-rank 16", load._replace(experiment=dataclasses.replace(e, lora=Lora(rank=16)))))
    would = [name for name, changed in changes if fits(changed, room, ratio)]
    for name, most in (("completion", e.shapes.completion), ("context", load.context)):
        enough = [n for n in halves(most)[1:] if fits(shorter(load, **{name: n}), room, ratio)]
        would += [f"--{name} {n}" for n in enough[:1] if n >= 16]
    return would


def fits(load: Load, room: Room, ratio: float) -> bool:
    """Whether a run fits in the smallest sizes, by the estimate."""
    e = load.experiment
    small, rows = candidates(e, load.batch)[-1], e.shapes.rows or 1
    state = sum(needs.state_of(e).parts().values())
    update = max(needs.estimated_update(load, o, small) for o in e.method.objectives)
    return state + ratio * max(update, needs.estimated_sampler(load, rows)) <= room.free


def shorter(load: Load, completion: int | None = None, context: int | None = None) -> Load:
    """The same load with shorter completions or contexts."""
    array = lambda x, width: jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)
    e, batch, width = load.experiment, load.batch, context or load.context
    length = completion or e.shapes.completion
    contexts = {
        name: read.replace(
            tokens=array(read.tokens, min(width, read.tokens.shape[1]) if context else read.tokens.shape[1])
        )
        for name, read in batch.contexts.items()
    }
    batch = batch.replace(completion=array(batch.completion, length), contexts=contexts)
    return Load(dataclasses.replace(e, shapes=dataclasses.replace(e.shapes, completion=length)), batch, width)
