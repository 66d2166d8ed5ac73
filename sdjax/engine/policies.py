"""Policies: a model with its parameters and tokenizer, asked to write or to score; and the rules of snapshots."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.devices.sharding import DATA, axis_size, place_rows, rows_multiple, to_host
from sdjax.engine import lengths
from sdjax.engine.by_length import divisor_at_least
from sdjax.engine.generate import Completions, Sampling, first, generate
from sdjax.engine.score import policies_of, token_signals
from sdjax.engine.tokens import ROWS, Shapes, collate, decode_text, left_pad, thinking_opened
from sdjax.engine.vocabulary import limited
from sdjax.models.pretrained import UNKNOWN, Origin
from sdjax.models.templates import stop_tokens
from sdjax.models.transformer import Transformer
from sdjax.types import Batch, ByField, Example, Messages, Method, Objective, Rollout, Scored, Verdict, View, World


@dataclasses.dataclass(frozen=True)
class Policy:
    """A language model that can be sampled and that can score: `params` of `model`, read through `tokenizer`.

    Ids that the tokenizer does not have get no mass (`sdjax.engine.vocabulary`).  `template` are the options of the chat
    template with which it writes: in a run those of the view that it reads.
    `writer`, if there is one, samples in place of `sdjax.engine.generate.generate`: see `sdjax.samplers.servers`.
    `world`, if there is one, is whom its attempts at examples talk with (`sdjax.collect.conversations`).
    """

    model: Transformer
    params: Any
    tokenizer: Any
    shapes: Shapes
    writer: Callable[..., list[list[Sample]]] | None = None
    origin: Origin = UNKNOWN
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    world: World | None = None

    def __post_init__(self):
        object.__setattr__(self, "model", limited(self.model, self.tokenizer))

    @functools.cached_property
    def stop(self) -> tuple[int, ...]:
        return stop_tokens(self.tokenizer, self.origin.generation)


class Sample(NamedTuple):
    """One completion as the host sees it; `staleness` is how many updates old its writer's weights were, if known."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    staleness: int | None = None


class Environment(NamedTuple):
    """What `collect` may use: the policies by name ("live" is the student), the verifier, and further prompts.

    `more()` takes the next step's examples from the data: what it takes is not seen again by later steps.  Controls
    (`sdjax.collect.controls`) set the others: `reread(rollouts, views)` is what these views read instead when they score
    in `collect`, `shape(rollout)` what is added to the reward of a judged rollout for its advantage.
    """

    policies: Mapping[str, Policy]
    verify: Callable[[Example, str], Verdict]
    more: Callable[[], Sequence[Example]] | None = None
    reread: Callable[[Sequence[Rollout], Collection[str]], list[Rollout]] | None = None
    shape: Callable[[Rollout], float] | None = None

    @property
    def live(self) -> Policy:
        return self.policies["live"]


def sample(
    policies: Policy | Sequence[Policy],
    contexts: Sequence[Messages] | Sequence[Sequence[Messages]],
    key: Array,
    *,
    n: int = 1,
    sampling: Sampling | None = None,
    limit: int | None = None,
    choose: Callable = first,
) -> list[list[Sample]]:
    """Writes `n` completions after each context: `[len(contexts)][n]` samples.

    Args:
      policies: one policy, or `K` that are decoded together (then `contexts` is `K` equally long lists, see
        `sdjax.engine.generate.generate`).
      key: one random key; row `(i, j)` draws from `fold_in(fold_in(key, i), j)`, whatever else is in the call.
      limit: at most this many tokens, by default `shapes.completion`.

    A context that does not fit `shapes.teacher_context` has empty completions that are not finished.

    Raises:
      LengthError: a context does not fit, and there is no such limit.
    """
    together = (policies,) if isinstance(policies, Policy) else tuple(policies)
    chats = (contexts,) if isinstance(policies, Policy) else tuple(contexts)
    shapes = together[0].shapes
    encoded = [
        [lengths.encoded(p.tokenizer, c, p.shapes, p.template) for c in some]
        for p, some in zip(together, chats, strict=True)
    ]
    unread = {i for i, some in enumerate(zip(*encoded, strict=True)) if any(ids is None for ids in some)}
    encoded = [[[0] if i in unread else ids for i, ids in enumerate(some)] for some in encoded]
    limit = shapes.completion if limit is None else min(limit, shapes.completion)
    if isinstance(policies, Policy) and policies.writer is not None:
        found = policies.writer(policies, encoded[0], key, n=n, sampling=sampling or Sampling(), limit=limit)
    else:
        found = generated(together, encoded, key, n, sampling or Sampling(), limit, choose)
    return [[Sample((), (), "", False)] * n if i in unread else some for i, some in enumerate(found)]


def generated(
    together: Sequence[Policy],
    encoded: Sequence[Sequence[Sequence[int]]],
    key: Array,
    n: int,
    sampling: Sampling,
    limit: int,
    choose: Callable,
) -> list[list[Sample]]:
    """`sample` by the compiled sampler, `shapes.rows` rows in a call: those of one prompt may take several."""
    shapes, tokenizer = together[0].shapes, together[0].tokenizer
    rows_at_a_time = shapes.rows or ROWS
    per_call, calls = max(1, rows_at_a_time // n), divisor_at_least(n, math.ceil(n / rows_at_a_time))
    openings = [thinking_opened(tokenizer, row) for row in encoded[0]]
    results: list[list[Sample]] = []
    for start in range(0, len(encoded[0]), per_call):
        count = len(encoded[0][start : start + per_call])
        size = rows_multiple(per_call if len(encoded[0]) > per_call else count)
        rows = np.minimum(np.arange(size), count - 1) + start
        padded = tuple(
            left_pad([some[i] for i in rows], p.shapes.context) for p, some in zip(together, encoded, strict=True)
        )
        keys = row_keys(key, jnp.asarray(np.arange(size) + start), n).reshape(size, n)
        written: list[list[Sample]] = [[] for _ in range(count)]
        for part in np.split(np.arange(n), calls):
            done = generate(
                tuple(p.model for p in together),
                tuple(p.params for p in together),
                place_rows(padded),
                keys[:, part[0] : part[-1] + 1].reshape(-1),
                sampling,
                jnp.asarray(together[0].stop, jnp.int32),
                limit,
                length=shapes.completion,
                choose=choose,
            )
            done = Completions(*to_host(tuple(done)))
            for i, own in enumerate(written):
                own += [one_sample(done, i * len(part) + j, tokenizer, openings[start + i]) for j in range(len(part))]
        results += written
    return results


@functools.partial(jax.jit, static_argnames="n")
def row_keys(key: Array, rows: Array, n: int) -> Array:
    """Keys `[len(rows) * n]`: `fold_in(fold_in(key, row), j)`; of an array of keys, one per row, `fold_in(key[row], j)`."""
    own = (lambda row: key[row]) if key.ndim else (lambda row: jax.random.fold_in(key, row))
    of_row = lambda row: jax.vmap(lambda j: jax.random.fold_in(own(row), j))(jnp.arange(n))
    return jax.vmap(of_row)(rows).reshape(-1)


def one_sample(done: Completions, row: int, tokenizer: Any, opening: str = "") -> Sample:
    """Row `row` of completions that lie on the host; `opening` is as in `decode_text`."""
    length = int(done.present[row].sum())
    tokens = tuple(int(t) for t in done.tokens[row, :length])
    logprobs = tuple(float(x) for x in done.logprobs[row, :length])
    return Sample(tokens, logprobs, decode_text(tokenizer, tokens, opening), bool(done.finished[row]))


def score(
    environment: Environment, rollouts: Sequence[Rollout], views: Mapping[str, View], signals: Callable
) -> list[Rollout]:
    """The rollouts with per-token signals of the present policies added to their `extras`, frozen from now on.

    `views` and `signals` are as in `Objective`; `signals` must be one function object from call to call (it keys the
    compiled program).  A view's context is the rollout's own of that name, or what a control puts in its place.
    """
    told = [name for name, view in views.items() if view.told]
    if environment.reread is not None and told:
        rollouts = environment.reread(rollouts, told)
    live = environment.live
    asked, (rollouts, _, _) = rollouts, lengths.fitted(rollouts, views, live.tokenizer, environment.live.shapes)
    batch = collate(rollouts, views, live.tokenizer, live.shapes, multiple=axis_size(DATA))
    used = {name for view in views.values() for name in policies_of(view)}
    found = to_host(
        compiled_score(
            tuple(sorted(views.items())),
            signals,
            tuple(sorted((name, environment.policies[name].model) for name in used)),
            {name: environment.policies[name].params for name in used},
            place_rows(batch),
            live.shapes.rows_per_chunk,
            live.shapes.tokens_per_chunk,
            live.shapes.lengths,
        )
    )
    # Collating orders rows by group and pads groups: walk the valid rows in the same order.
    order = [r for _, rows in grouped(rollouts).items() for r in rows]
    scored = {
        id(rollout): {name: x[row, : len(rollout.tokens)] for name, x in found.items()}
        for rollout, row in zip(order, np.flatnonzero(batch.valid), strict=True)
    }
    return [own.with_extras(**scored[id(fitted)]) for own, fitted in zip(asked, rollouts, strict=True)]


def grouped(rollouts: Sequence[Rollout]) -> dict[int, list[Rollout]]:
    """Rollouts by group, in order of appearance."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return groups


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5, 6, 7))
def compiled_score(views, signals, models, params, batch: Batch, rows, tokens, lengths=1):
    """`token_signals` without gradients, compiled once per objective and shape; views and models as sorted pairs."""
    views = {name: view._replace(trainable=False) for name, view in views}
    return token_signals(views, signals, dict(models), params, batch, rows=rows, tokens=tokens, lengths=lengths)


def teacher_name(teacher: str | None, lesson: Callable | None) -> str:
    """The policy that teaches: the one named, else the "initial" snapshot if it is told a lesson, else "teacher"."""
    return teacher or ("initial" if lesson else "teacher")


def teacher_view(policy: str, lesson: Callable | None, entries: int | None = None) -> View:
    """The view of a teacher that reads a lesson, which may differ from rollout to rollout, or else the question."""
    return View(policy, per_rollout=lesson is not None, entries=entries, told=lesson is not None)


def reading(method: Method, policy: str, other: str | ByField | Scored) -> Method:
    """The method in which every view that reads `policy` reads another one."""

    def changed(objective: Objective) -> Objective:
        own = {name: v._replace(policy=other) if v.policy == policy else v for name, v in objective.views.items()}
        return objective._replace(views=own)

    return method._replace(objectives=tuple(changed(o) for o in method.objectives))


def templated(method: Method, options: Mapping[str, Any]) -> Method:
    """The method in which all views' chats are written with these options of the chat template, too; a view's own go first."""
    own = lambda views: {n: v._replace(template={**options, **v.template}) for n, v in views.items()}
    objectives = tuple(o._replace(views=own(o.views)) for o in method.objectives)
    return method._replace(objectives=objectives, early=own(method.early))


# ---- snapshots: (live, old, step) -> new ---------------------------------------------------------------------------

OCCASIONS = ("update", "trained", "batch")
"""When a snapshot's rule is applied: after every update, after every batch that trained, after every batch.

An update whose loss or gradient is not finite is skipped: it is none, and a batch of such updates has not trained."""


@dataclasses.dataclass(frozen=True)
class Follows:
    """A rule that is applied after updates only: after every batch that trained or, with `every_update`, every update."""

    rule: Callable[[Any, Any, Array], Any]
    every_update: bool = False
    averages: bool = False  # and is kept in float32: in bfloat16 small steps would be rounded away

    def __call__(self, live: Any, old: Any, step: Array) -> Any:
        return self.rule(live, old, step)


@dataclasses.dataclass(frozen=True)
class Gated:
    """A rule that is applied after those batches only after which the method's memory opens the gate."""

    rule: Callable[[Any, Any, Array], Any]
    open: Callable[[Any], bool]

    def __call__(self, live: Any, old: Any, step: Array) -> Any:
        return self.rule(live, old, step)


def nested(snapshots: Mapping[str, Callable]) -> dict[str, Callable]:
    """The rules of a method whose memory now lies under "method" in a wrapper's: gates look there."""
    inside = lambda rule: dataclasses.replace(rule, open=lambda memory: rule.open(memory["method"]))
    return {name: inside(rule) if isinstance(rule, Gated) else rule for name, rule in snapshots.items()}


def occasion(rule: Callable) -> str:
    """Which of `OCCASIONS` a rule waits for."""
    if isinstance(rule, Gated):
        return "gate"
    if isinstance(rule, Follows):
        return "update" if rule.every_update else "trained"
    return "batch"


def frozen() -> Callable:
    """A snapshot that stays what it was at the start: a run then keeps one copy of the start, and saves none."""
    return unchanged


def unchanged(live: Any, old: Any, step: Array) -> Any:
    """The rule of `frozen`."""
    return old


def ema(rate: float, *, every_update: bool = False) -> Callable:
    """An exponential moving average: `new = (1 - rate) old + rate live`.  Rate 1 is live, 0 is `frozen`.

    Once per batch, as in SDPO (arXiv:2601.20802), or after every update, as in SDFT (arXiv:2601.19897).  Skipped updates
    do not move it, as in the official code of MOPD (arXiv:2605.12652).
    """
    if rate == 0:
        return frozen()
    average = lambda live, old, step: jax.tree.map(lambda a, b: (1.0 - rate) * b + rate * a.astype(b.dtype), live, old)
    return Follows(average, every_update, averages=True)


def refresh(every: int) -> Callable:
    """A copy of the live parameters made after every `every`-th batch."""
    return lambda live, old, step: jax.tree.map(lambda a, b: jnp.where(step % every == 0, a, b), live, old)
