"""What student and teacher think of recorded rollouts, token by token, computed by the engine that trains."""

from __future__ import annotations

import contextlib
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.cli import options
from sdjax.collect.controls import controlled
from sdjax.engine.policies import compiled_score
from sdjax.engine.tokens import Shapes, collate, shorten
from sdjax.engine.vocabulary import is_token, limited, same_vocabulary, with_rows
from sdjax.kernels.distributions import entropy, logprob
from sdjax.kernels.divergences import forward_kl, jsd, reverse_kl
from sdjax.kernels.reductions import masked_sum, whole_weight
from sdjax.models import pretrained
from sdjax.models.transformer import Transformer
from sdjax.report.runs import ReportError, Run
from sdjax.run.storage import checkpoint, places
from sdjax.types import Batch, Example, Method, Objective, Rollout, View

ALTERNATIVES = 4
"""Entries of each of the two distributions that are shown beside the sampled token."""


class Scored(NamedTuple):
    """A recorded rollout as the saved parameters see it.

    `signals` has one number per token by name.  `alternatives` has, per token, `(id, student's log-probability,
    teacher's or None)` of the likeliest entries of both distributions.
    """

    signals: dict[str, list[float]]
    alternatives: list[list[tuple[int, float, float | None]]]


class Reader(NamedTuple):
    """A run's saved policies, and its method as far as its arguments describe it."""

    model: Transformer
    params: dict[str, Any]
    tokenizer: Any
    objective: Objective | None
    step: int


# ---- opening a run --------------------------------------------------------------------------------------------------


def open_run(run: Run, model: str = "", teacher: str = "") -> Reader:
    """The policies of a run's newest checkpoint.

    Args:
      model: where architecture and tokenizer are read from; by default the run's `model/`, else its argument `model`.
      teacher: a model that stands for policies that are not saved with a run: external teachers.

    Raises: ReportError, ModelError or CheckpointError, one sentence each, if something is missing or damaged.
    """
    own = run.folder / "model"
    name = model or (str(own) if (own / "config.json").is_file() else run.arguments.get("model"))
    if not isinstance(name, str):
        raise ReportError(f"{run.folder} has no model/ and does not say what it trained: name a model with --model")
    with places.to_read(places.place(name)) if name == str(own) else contextlib.nullcontext(name) as here:
        config, whole, tokenizer, _ = pretrained.load(here)
    params, step, host = checkpoint.saved_parameters(run.folder / "checkpoints")
    if "lora" in params["live"] and name == str(own):
        params["live"] = whole  # exported with the adapters folded in
    params = fitting({**started_with(run, host), **params}, whole)
    if "live" not in params:
        raise ReportError(
            f"{run.folder}/checkpoints has other parameters than {name} (another model, or adapters alone): name the model "
            "that was trained with --model"
        )
    if teacher:
        told = pretrained.load(teacher)
        if not same_vocabulary(told.tokenizer, tokenizer):
            raise ReportError(f"--teacher {teacher} has another vocabulary than {name}")
        told = with_rows(told, config.vocab_size)
        if told.config != config:
            raise ReportError(f"--teacher {teacher} has another architecture than {name}")
        wanted = {name for line in run.rollouts for name in line["policies"].values()}
        params |= {name: told.params for name in wanted - {*params}}
    return Reader(limited(Transformer(config), tokenizer), params, tokenizer, objective_of(run.arguments), step)


def started_with(run: Run, host: Mapping[str, Any]) -> dict[str, Any]:
    """The policies that are the model that a run began with: they are read from there, for checkpoints do not hold them."""
    read = {name for line in run.rollouts for name in line["policies"].values()}
    names = read & {*(host or {}).get("start", {}).get("names", ())}
    return dict.fromkeys(names, pretrained.load(run.arguments["model"]).params) if names else {}


def fitting(params: Mapping[str, Any], whole: Any) -> dict[str, Any]:
    """The policies whose parameters have the names and shapes of a whole model; adapters alone cannot be read."""
    shapes = lambda tree: [(path, x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return {name: tree for name, tree in params.items() if shapes(tree) == shapes(whole)}


def objective_of(arguments: Mapping[str, Any]) -> Objective | None:
    """The objective of the method that a run's arguments name, the first with a student; `None` if they name none."""
    name = arguments.get("method")
    if name not in options.method_names():
        return None
    factory = options.method_factory(name)
    method = options.Choice(
        factory,
        own_options(factory, arguments, "method."),
        functools.partial(controlled, **own_options(controlled, arguments, "control.")),
    )()
    return first_objective(method)


def own_options(function: Any, arguments: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The saved arguments that are plain options of a function, lists as the tuples they were."""
    known = [n for n, hint in typing.get_type_hints(function).items() if n != "return" and options.is_plain(hint)]
    found = {name: arguments[prefix + name] for name in known if prefix + name in arguments}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def first_objective(method: Method) -> Objective | None:
    """The first objective with a view of the student."""
    return next((o for o in method.objectives if "student" in o.views), None)


# ---- scoring --------------------------------------------------------------------------------------------------------


def score_rollouts(reader: Reader, lines: Sequence[dict[str, Any]]) -> list[Scored]:
    """Recorded rollouts, scored step by step; order is kept."""
    found: dict[int, Scored] = {}
    longest = max((len(line["tokens"]) for line in lines), default=0)  # one program for all steps
    for step in sorted({line["step"] for line in lines}):
        numbers = [i for i, line in enumerate(lines) if line["step"] == step]
        found |= dict(zip(numbers, score_step(reader, [lines[i] for i in numbers], longest), strict=True))
    return [found[i] for i in range(len(lines))]


def score_step(reader: Reader, lines: Sequence[dict[str, Any]], longest: int) -> list[Scored]:
    """The recorded rollouts of one step, padded to `longest` tokens.

    What the method makes of them is left out where a view that it reads is not there.
    """
    rollouts = [rollout_of(line) for line in lines]
    check_vocabulary(reader, lines)
    views = readable_views(reader, lines[0])
    shapes = Shapes(reader.model.config.max_context - longest, longest, tokens_per_chunk=512, too_long=shorten)
    batch = jax.tree.map(jnp.asarray, collate(rollouts, views, reader.tokenizer, shapes))
    own = reader.objective if reader.objective and {*reader.objective.views} <= {*views} else None
    found = signals_of(reader, views, own, batch)
    made = method_signals(own, batch, found, lines[0]["step"]) if own else {}
    shown = {name: x for name, x in found.items() if not name.startswith(("own/", "candidate"))}
    return scored_rows(rollouts, batch, jax.device_get({**shown, **made}), jax.device_get(found))


def rollout_of(line: Mapping[str, Any]) -> Rollout:
    """A rollout from its line.  Numbers that were not finite come back as 0."""
    number = lambda x: 0.0 if x is None else x
    chat = lambda turns: tuple(turns) if turns else None
    return Rollout(
        Example(line["id"], ()),
        tuple(line["tokens"]),
        tuple(number(x) for x in line["logprobs"]),
        line["text"],
        line["group"],
        source=line["source"],
        reward=float(number(line.get("reward"))),
        finished=line["finished"],
        contexts={name: chat(turns) for name, turns in line["contexts"].items()},
        trained=None if line.get("trained") is None else tuple(line["trained"]),
        extras={n: [number(x) for x in v] if isinstance(v, list) else number(v) for n, v in line["extras"].items()},
    )


def check_vocabulary(reader: Reader, lines: Sequence[dict[str, Any]]) -> None:
    """Raises `ReportError` where a token is not of the model's vocabulary: it would be read as another one."""
    wrong = next((t for line in lines for t in line["tokens"] if not is_token(reader.model, t)), None)
    if wrong is not None:
        raise ReportError(
            f"step {lines[0]['step']}: token {wrong} is not one of the model's tokens: name the model that was trained "
            "with --model"
        )


def readable_views(reader: Reader, line: Mapping[str, Any]) -> dict[str, View]:
    """The views whose policy was saved and whose context was recorded; the student is always one."""
    named = {"student": "live", **line["policies"]}
    return {
        name: View(policy, per_rollout=True, template=line.get("templates", {}).get(name, {}))
        for name, policy in named.items()
        if policy in reader.params and (name == "student" or line["contexts"].get(name, ()) != ())
    }


def signals_of(reader: Reader, views: Mapping[str, View], own: Objective | None, batch: Batch) -> dict[str, Array]:
    """Per-token signals `{name: [B, T, ...]}` of all views; what the method's own `signals` returns is `own/...`."""
    used = {view.policy for view in views.values()}
    return compiled_score(
        tuple(sorted(views.items())),
        position_signals(teacher_of(views), own.signals if own else None),
        tuple((name, reader.model) for name in sorted(used)),
        {name: reader.params[name] for name in used},
        batch,
        4,
        256,
    )


def teacher_of(views: Mapping[str, View]) -> str | None:
    """The view that teaches: "teacher", else the first that is not the student."""
    others = [name for name in views if name != "student"]
    return "teacher" if "teacher" in others else next(iter(others), None)


@functools.cache
def position_signals(teacher: str | None, own: Any) -> Any:
    """`signals` of one position, as in `Objective`; one function object per method, which keys the compiled program."""

    def signals(dist: Mapping[str, Array], token: Array) -> dict[str, Array]:
        student = dist["student"]
        found = {"student": logprob(student, token), "student_entropy": entropy(student)}
        likely = [likeliest(student)]
        if teacher is not None:
            informed = dist[teacher]
            found |= {"teacher": logprob(informed, token), "teacher_entropy": entropy(informed)}
            found |= {"log_ratio": found["teacher"] - found["student"]}
            found |= {"forward_kl": forward_kl(student, informed), "reverse_kl": reverse_kl(student, informed)}
            found |= {"jsd": jsd(student, informed, 0.5)}
            likely.append(likeliest(informed))
        entries = jnp.concatenate(likely, axis=-1)
        at = lambda some: jnp.take_along_axis(some, entries, axis=-1)
        found |= {"candidates": entries, "candidates_student": at(student)}
        found |= {} if teacher is None else {"candidates_teacher": at(dist[teacher])}
        return found | {f"own/{name}": x for name, x in (own(dist, token) if own else {}).items()}

    return signals


def likeliest(dist: Array) -> Array:
    """Ids of a distribution's likeliest entries, `[..., V] -> [..., ALTERNATIVES]`."""
    return jax.lax.top_k(dist, min(ALTERNATIVES, dist.shape[-1]))[1]


# ---- what the method makes of it ------------------------------------------------------------------------------------


def method_signals(objective: Objective, batch: Batch, found: Mapping[str, Array], step: int) -> dict[str, Array]:
    """What a method's terms give each token `[B, T]`: their values, their weights where there are any, and the credit.

    Credit is `-d loss / d log p(token)` before averaging: for a policy gradient the token's advantage times whatever
    weighs it.  Log-probabilities of sampled tokens are those recorded at sampling; all else is of the saved parameters.
    Credit is left out for methods whose loss does not act on the sampled token's log-probability.
    """
    own = {name.removeprefix("own/"): x for name, x in found.items() if name.startswith("own/")}
    if "logprobs" in own:
        # As in the first update on the batch: ratios of what is sampled to what is trained are 1, nothing is clipped.
        recorded = batch.behavior_logprobs
        own["logprobs"] = jnp.where(recorded != 0, recorded, own["logprobs"])
    made: dict[str, Array] = {}
    if "logprobs" in own:
        credit = -jax.grad(lambda x: total(objective, batch, {**own, "logprobs": x}, step))(own["logprobs"])
        made |= {"credit": credit} if jnp.any(credit != 0) else {}
    per_token = {name: term for name, term in objective.terms(batch, own, step).items() if jnp.ndim(term.value) == 2}
    for name, term in per_token.items():
        made |= {f"value of {name}": jnp.where(population(term.over, batch), term.value, 0.0)}
        made |= {f"weight of {name}": w for w in [whole_weight(term)] if jnp.any(w != 1)}
    return made


def total(objective: Objective, batch: Batch, own: Mapping[str, Array], step: int) -> Array:
    """The sum of all terms over all their tokens, not averaged."""

    def one(term: Any) -> Array:
        over = population(term.over, batch)
        over = over.any(-1) if jnp.ndim(term.value) == 1 else over
        return jnp.asarray(term.coef) * masked_sum(term.value * whole_weight(term), over)

    return sum(map(one, objective.terms(batch, own, step).values()), jnp.zeros(()))


def population(over: Array | None, batch: Batch) -> Array:
    """The tokens `[B, T]` a term is about."""
    trained = batch.mask & batch.valid[:, None]
    return trained if over is None else trained & (over[:, None] if over.ndim == 1 else over)


# ---- back to the host -----------------------------------------------------------------------------------------------


def scored_rows(
    rollouts: Sequence[Rollout], batch: Batch, signals: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[Scored]:
    """Each rollout's own numbers.  Rows about which the teacher has nothing to say lose what comes from it."""
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(i)
    order = [i for members in groups.values() for i in members]
    views = [name for name in batch.contexts if name != "student"]
    teacher = teacher_of(dict.fromkeys(views))
    rows: dict[int, Scored] = {}
    for i, row in zip(order, np.flatnonzero(np.asarray(batch.valid)), strict=True):
        length = len(rollouts[i].tokens)
        taught = teacher is not None and bool(batch.contexts[teacher].valid[row])
        kept = {name: x for name, x in signals.items() if taught or name not in FROM_TEACHER}
        rows[i] = Scored(
            {name: [float(v) for v in x[row, :length]] for name, x in kept.items()},
            [alternatives(found, row, t, taught) for t in range(length)],
        )
    return [rows[i] for i in range(len(rollouts))]


FROM_TEACHER = ("teacher", "teacher_entropy", "log_ratio", "forward_kl", "reverse_kl", "jsd")
"""Signals that mean nothing for a row the teacher does not read."""


def alternatives(
    found: Mapping[str, np.ndarray], row: int, place: int, taught: bool
) -> list[tuple[int, float, float | None]]:
    """The likeliest entries at one place, each once, the student's first."""
    own = found["candidates_student"][row, place]
    told = found["candidates_teacher"][row, place] if taught else [math.nan] * len(own)
    entries: dict[int, tuple[int, float, float | None]] = {}
    count = len(own) if taught else min(ALTERNATIVES, len(own))
    for token, mine, theirs in zip(found["candidates"][row, place][:count], own, told, strict=False):
        entries.setdefault(int(token), (int(token), float(mine), float(theirs) if taught else None))
    return list(entries.values())
