"""The device half of training: the state, one compiled update per objective, and snapshots."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from sdjax.devices.sharding import (
    DATA,
    MeshError,
    along,
    constrain_parameters,
    current,
    devices_along,
    make_mesh,
    named,
    own_parameters,
    parameter_specs,
    place_whole,
)
from sdjax.engine import master_weights, routers
from sdjax.engine.policies import unchanged
from sdjax.engine.protocol import Protocol
from sdjax.engine.routers import Router
from sdjax.engine.score import ROUTERS, policies_of, token_signals
from sdjax.engine.sensible import ExperimentError, check_numbers
from sdjax.engine.snapshots import begun
from sdjax.engine.tokens import Shapes, member_of
from sdjax.engine.vocabulary import difference, limited, same_vocabulary, with_rows
from sdjax.kernels.reductions import Reducer, reduce_terms, token_mean
from sdjax.models import adapters
from sdjax.models.pretrained import Pretrained, kept_in
from sdjax.models.transformer import Transformer
from sdjax.types import Batch, ByField, Method, Objective, Task, View


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of, as Python objects.

    `prompts` examples are taken per step, and attempted again in each of `rounds` steps in a row; a batch is split into
    `minibatches` of whole groups, one update each, and read `epochs` times.  `teachers` are external policies by name; one over
    the student's vocabulary is given as many embedding rows as the student has.
    `dtype` is what the models compute in, `params_dtype` what the student's weights are kept in: float32, or bfloat16 with the
    rest of each number in the optimizer's state (`sdjax.engine.master_weights`); adapters stay float32.  `teacher_dtype`, if it
    is given, is what teachers compute in and what their parameters are kept in.  `remat` and `scan` are those of
    `Transformer`: less memory for more time, and less compiling for more memory.  `memory` is what a device may give
    ("auto" looks, "off" does not, "12GB" says): by it a run chooses `remat` and the sizes of `shapes` that are `None`.
    `reduce` averages the terms that
    do not say how.  Evaluation answers `evaluation` test examples by `protocol` every `evaluate_every` steps (0: only before
    and after); `save_every` likewise (0: only at the end).  The newest `keep` checkpoints stay, those of every `keep_every`
    steps (0: none) and, with `keep_best`, that of the highest held-out accuracy.  A signal ends the run, saved, within
    `grace` seconds (0: no limit), `most_skipped` updates in a row that were not finite end it, too, and so do, with
    `stop_on="collapse"`, sentinels that say so (`sdjax.run.logs.sentinels`).  Completions are recorded every `completions_every`
    steps; `log` names the trackers that get numbers and completions (`sdjax.run.logs.trackers`).  With `export`
    the final model is also written to the run folder's `model/`, for sdjax and the transformers library, in
    `export_dtype` (`None`: the type that the student was loaded in).  `mesh` is
    how many devices lie on the data axis and on the model axis, by default all on the data axis (`sdjax.devices.sharding`).
    With `lora` the student's weights are frozen and adapters trained: they are what is saved and what snapshots hold.
    With `router` every objective has two terms more, for the routers of a mixture of experts (`sdjax.engine.routers`).

    Raises `ExperimentError` where that cannot work.
    """

    method: Method
    task: Task
    student: Pretrained
    optimizer: optax.GradientTransformation
    shapes: Shapes = dataclasses.field(default_factory=Shapes)
    steps: int = 100
    prompts: int = 4
    rounds: int = 1
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0
    dtype: Any = jnp.float32
    params_dtype: Any = jnp.float32
    memory: str = "auto"
    remat: bool | None = None
    scan: bool = False
    teachers: Mapping[str, Pretrained] = dataclasses.field(default_factory=dict)
    teacher_dtype: Any = None
    reduce: Reducer = token_mean
    evaluation: int = 100
    evaluate_every: int = 0
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    save_every: int = 25
    keep: int = 2
    keep_every: int = 0
    keep_best: bool = False
    grace: float = 0.0
    most_skipped: int = 3
    stop_on: str = "nothing"
    completions_every: int = 10
    log: tuple[str, ...] = ("tensorboard",)
    log_project: str = "sdjax"
    export: bool = True
    export_dtype: str | None = None
    mesh: tuple[int, ...] | None = None
    lora: adapters.Lora | None = None
    router: Router | None = None

    def __post_init__(self):
        check_numbers({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        check_numbers({f.name: getattr(self.shapes, f.name) for f in dataclasses.fields(self.shapes)})
        master_weights.check_dtype(self.params_dtype)
        if not self.task.train:
            raise ExperimentError(f"task {self.task.name} has no training examples")
        if self.keep_best and not (self.evaluation and self.evaluate_every and self.save_every):
            raise ExperimentError("keep_best needs evaluation, evaluate_every and save_every: what is best is measured")
        routers.check(self.router, self.student.config)
        check_groups(self)
        check_views(self)
        object.__setattr__(self, "teachers", over_shared_ids(self.teachers, self.student))


def check_groups(experiment: Experiment) -> None:
    """Raises `ExperimentError` if the groups that a method adds to the prompts' cannot be dealt out to the minibatches."""
    prompts, parts = experiment.prompts, experiment.minibatches
    added = experiment.method.groups(prompts) - prompts
    if added % parts:
        raise ExperimentError(
            f"minibatches={parts} does not divide the {added} groups that this method adds to prompts={prompts}: every "
            "minibatch must hold equally many of them; change either, or the method's share of further groups"
        )


def check_views(experiment: Experiment) -> None:
    """Raises `ExperimentError` if a policy that is read does not exist or has another vocabulary."""
    student, method = experiment.student, experiment.method
    for name in sorted({"live", *method.snapshots} & {*experiment.teachers}):
        raise ExperimentError(f"teacher {name!r} goes by the name of one of the method's own policies; rename it")
    policies = {"live", *method.snapshots, *experiment.teachers}
    for name in (name for name in method.writers if name not in policies):
        raise ExperimentError(
            f"the method writes with policy {name!r}, which is neither live, a snapshot nor a teacher; there are "
            f"{', '.join(sorted(policies))}"
        )
    for name, view in all_views(method).items():
        for policy in policies_of(view):
            if policy not in policies:
                raise ExperimentError(
                    f"view {name!r} reads policy {policy!r}, which is neither live, a snapshot nor a teacher; there "
                    f"are {', '.join(sorted(policies))}"
                )
            check_vocabulary(name, policy, experiment.teachers.get(policy, student), student)
        if isinstance(view.policy, ByField):
            for example in experiment.task.train:
                member_of(example, view.policy)


def check_vocabulary(view: str, policy: str, teacher: Pretrained, student: Pretrained) -> None:
    """Raises `ExperimentError` if a teacher has another vocabulary than the student."""
    if not same_vocabulary(teacher.tokenizer, student.tokenizer):
        raise ExperimentError(
            f"teacher {policy!r} and the student have different vocabularies "
            f"({difference(teacher.tokenizer, student.tokenizer)}), so view {view!r} cannot score the student's tokens"
        )


def over_shared_ids(teachers: Mapping[str, Pretrained], student: Pretrained) -> dict[str, Pretrained]:
    """The teachers, those with the student's vocabulary with as many embedding rows: their padding may differ."""
    rows, own = student.config.vocab_size, student.tokenizer
    padded = lambda t: t.config.vocab_size != rows and same_vocabulary(t.tokenizer, own)
    return {name: with_rows(t, rows) if padded(t) else t for name, t in teachers.items()}


def mesh_of(experiment: Experiment) -> Mesh | None:
    """The mesh that an experiment runs on; `None` is one device.

    Raises `MeshError` if it does not fit the devices, a model or the number of prompts, or rows are to be sorted.
    """
    mesh = make_mesh(experiment.mesh)
    if mesh.size == 1:
        return None
    groups, shape = experiment.prompts // experiment.minibatches, named(tuple(mesh.shape.values()))
    spread = devices_along(mesh.shape, along(DATA, mesh.shape))
    if groups % spread:
        raise MeshError(
            f"mesh={shape}: prompts={experiment.prompts} in minibatches={experiment.minibatches} do not divide by the "
            f"{spread} devices that rows are split over: take a multiple, or put devices on the model axis"
        )
    if experiment.shapes.lengths > 1:
        raise MeshError(
            f"lengths={experiment.shapes.lengths} sorts the rows of one device, and mesh={shape} has {mesh.size}: leave "
            "--lengths out"
        )
    for model in (experiment.student, *experiment.teachers.values()):
        parameter_specs(model.params, mesh.shape)
    return mesh


ROUNDING = 1e-6
"""A gradient norm that only rounding makes (a teacher that equals the student, read in batches of another shape): an
adaptive optimizer would scale it up to whole steps in random directions."""


@flax.struct.dataclass
class State:
    """What an update changes: a pytree, saved and restored whole.  `snapshots` are those that are not the start for good."""

    step: Array  # [] int32: batches trained on
    params: Any
    opt_state: Any
    snapshots: dict[str, Any]
    key: Array  # typed random key; step `t` uses `fold_in(key, t)`


class Outcome(NamedTuple):
    """What one update did."""

    loss: Array  # []
    terms: dict[str, Array]  # {name: []}, without coefficients
    grad_norm: Array  # [], before clipping
    finite: Array  # [] bool: False: skipped, the state is unchanged
    useful: Array  # [] bool: False: no gradient at all (or not finite), the state is unchanged


def frozen_and_trained(experiment: Experiment) -> tuple[dict[str, Any], Any]:
    """What an experiment keeps by name among the parameters of other policies, and what it trains.

    Nothing and the student's parameters; with `lora` the frozen weights and the first adapters.
    """
    student, lora = experiment.student, experiment.lora
    params = kept_in(student.params, experiment.params_dtype)
    if lora is None:
        return {}, params
    frozen = adapters.base(student.config, params, lora)
    return {adapters.BASE: frozen}, adapters.initial(student.config, lora, jax.random.key(experiment.seed))


def initial_state(experiment: Experiment, params: Any) -> State:
    """The state before the first step, without the snapshots that are `frozen`: those are `params` for good.

    Others start as copies of `params`, which are read once if they lie in files.
    """
    params, start = own_parameters(params), functools.partial(master_weights.initial, experiment.optimizer)
    if current() is not None:  # split from the start: no device could hold it whole
        start = jax.jit(lambda params: constrain_parameters(master_weights.initial(experiment.optimizer, params)))
    return State(
        step=place_whole(jnp.zeros((), jnp.int32)),
        params=params,
        opt_state=start(params),
        snapshots={n: begun(rule, params) for n, rule in experiment.method.snapshots.items() if rule is not unchanged},
        key=place_whole(jax.random.key(experiment.seed)),
    )


def models(experiment: Experiment) -> dict[str, Transformer]:
    """The network of every policy: live, snapshots, external teachers."""
    student, teachers, remat = experiment.student, experiment.teachers, bool(experiment.remat)
    reach = experiment.shapes.context + experiment.shapes.completion
    build = lambda p, dtype: limited(Transformer(p.config, dtype, remat, experiment.scan, reach=reach), p.tokenizer)
    own = {name: build(student, experiment.dtype) for name in ("live", *experiment.method.snapshots)}
    return {**own, **{name: build(t, experiment.teacher_dtype or experiment.dtype) for name, t in teachers.items()}}


def all_views(method: Method) -> dict[str, View]:
    """The views of all objectives of a method, by name."""
    return {name: view for objective in method.objectives for name, view in objective.views.items()}


def template_of(method: Method, policy: str) -> Mapping[str, Any]:
    """The options of the chat template with which a policy writes: those of the first view of it, a trained one first."""
    views = [v for v in all_views(method).values() if policy in policies_of(v)]
    return next((v.template for v in sorted(views, key=lambda v: not v.trainable)), {})


def make_update(
    objective: Objective,
    models: Mapping[str, Transformer],
    optimizer: optax.GradientTransformation,
    shapes: Shapes,
    reduce: Reducer = token_mean,
    router: Router | None = None,
) -> Callable[[Any, Any, Mapping[str, Any], Batch, Array], tuple[Any, Any, Outcome]]:
    """One compiled step of an objective: `(params, opt_state, other policies' params, batch, step)` -> new, `Outcome`.

    `params` and `opt_state` are donated.  They come back unchanged if the loss or a gradient is not finite, or if the
    gradient is zero up to rounding: weight decay and momentum alone would move a model to which nothing was said.
    """

    def loss(params, others, batch, step):
        sig = token_signals(
            objective.views,
            objective.signals,
            models,
            adapters.completed({**others, "live": params}),
            batch,
            rows=shapes.rows_per_chunk,
            tokens=shapes.tokens_per_chunk,
            lengths=shapes.lengths,
            routers=router is not None,
        )
        terms = dict(objective.terms(batch, sig, step))
        if router is not None:
            terms |= routers.router_terms(sig[ROUTERS], router)
        return reduce_terms(terms, batch.mask & batch.valid[:, None], reduce)

    def update(params, opt_state, others, batch, step):
        read = master_weights.wide(params)
        (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(read, others, batch, step)
        grads = constrain_parameters(grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        useful = finite & (norm > ROUNDING)
        # A branch, not a selection: the optimizer's temporaries then never lie beside the loss's.
        params, opt_state = jax.lax.cond(
            useful, apply, lambda params, opt_state, _: (params, opt_state), params, opt_state, grads
        )
        params, opt_state = constrain_parameters(params), constrain_parameters(opt_state)
        return params, opt_state, Outcome(value, terms, norm, finite, useful)

    def apply(params, opt_state, grads):
        return master_weights.stepped(optimizer, grads, opt_state, params)

    return jax.jit(update, donate_argnums=(0, 1))


def minibatches(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in `parts` of whole groups, dealt out in turn: part `i` holds groups `i`, `i + parts`, ...

    So every part has as many of the groups that a method adds to those of the prompts.
    Raises `ExperimentError` if `parts` does not divide the number of groups.
    """
    groups = int(np.max(batch.group)) + 1
    if groups % parts:
        raise ExperimentError(f"minibatches={parts} does not divide the {groups} groups of a batch")
    for part in range(parts):
        dealt = lambda x: x.reshape(groups, len(x) // groups, *x.shape[1:])[part::parts]  # noqa: B023
        yield jax.tree.map(lambda x: dealt(x).reshape(-1, *x.shape[1:]), batch)  # noqa: B023
