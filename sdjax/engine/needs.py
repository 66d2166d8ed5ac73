"""What a run needs of each device's memory: an estimate from sizes alone, and the compiler's word for its programs.

An update needs the state, the gradients and what lies between; the estimate counts what is kept of each token in each
layer, and says which of two choices needs less.  What a program really needs is read from the compiled one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdjax.devices import programs
from sdjax.devices.layout import bytes_beside_data, laid_parameters, laid_rows, laid_whole
from sdjax.devices.sharding import DATA, MODEL, axis_size
from sdjax.engine import master_weights, train
from sdjax.engine.generate import Sampling, generate
from sdjax.engine.score import policies_of, row_units
from sdjax.engine.snapshots import begun
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.models import adapters
from sdjax.models.attention import SCORES
from sdjax.models.configs import ModelConfig
from sdjax.models.transformer import Transformer, initialise, period_of
from sdjax.types import Batch, Method, Objective

WIDTHS, MLP_WIDTHS, SCORE_COPIES = 15, 5, 3
"""What the backward pass keeps of a token in a layer, in widths of the model and of its MLP, and copies of its scores:
fitted to compiled updates of SmolLM2-135M."""


class Sizes(NamedTuple):
    """How much is done at a time: changes memory and time, never what is learnt."""

    rows: int  # that one call of the sampler writes
    rows_per_chunk: int | None
    tokens_per_chunk: int | None
    remat: bool

    def of(self, shapes: Shapes) -> Shapes:
        """Shapes with these sizes."""
        return dataclasses.replace(shapes, **{k: v for k, v in self._asdict().items() if k != "remat"})


class Load(NamedTuple):
    """What is done: an experiment without its arrays, the shapes of its largest batch, the tokens of its longest context."""

    experiment: Experiment
    batch: Batch
    context: int


# ---- the state ------------------------------------------------------------------------------------------------------


def shallow(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The same network with its first `layers` layers."""
    return config if layers is None else config.first(layers)


class State(NamedTuple):
    """Shapes of what is there all the time, with their places on the mesh."""

    params: Any
    opt_state: Any
    snapshots: dict[str, Any]
    others: dict[str, Any]  # teachers, and the frozen weights under adapters

    def parts(self) -> dict[str, float]:
        """Bytes on one device by what they are."""
        size = programs.bytes_on_device
        found = {"parameters": size(self.params), "optimizer": size(self.opt_state), "snapshots": size(self.snapshots)}
        return {k: v for k, v in {**found, "frozen weights and teachers": size(self.others)}.items() if v}


def state_of(experiment: Experiment, layers: int | None = None) -> State:
    """The state of an experiment, or of the same with few layers."""
    e, student = experiment, shallow(experiment.student.config, layers)
    weights, others = laid_parameters(parameters_of(student, e.params_dtype)), {}
    params = weights
    if e.lora is not None:
        others = {adapters.BASE: jax.eval_shape(lambda x: adapters.base(student, x, e.lora), weights)}
        params = laid_parameters(jax.eval_shape(lambda: adapters.initial(student, e.lora, jax.random.key(0))))
    for name, teacher in e.teachers.items():
        kind = e.teacher_dtype or jax.tree.leaves(teacher.params)[0].dtype
        others[name] = laid_parameters(parameters_of(shallow(teacher.config, layers), kind))
    return State(params, *laid_beside(e.method, e.optimizer, params), others)


def gradient_bytes(params: Any) -> float:
    """Bytes on one device of the gradients of parameters."""
    return programs.bytes_on_device(laid_parameters(jax.eval_shape(master_weights.wide, params)))


def laid_beside(method: Method, optimizer: optax.GradientTransformation, params: Any) -> tuple[Any, dict[str, Any]]:
    """Shapes of the optimizer's state and of a method's snapshots, by those of the parameters, split by the rules."""
    laid = lambda begin: laid_parameters(jax.eval_shape(begin, params))
    snapshots = {name: laid(functools.partial(begun, rule)) for name, rule in method.snapshots.items()}
    return laid(functools.partial(master_weights.initial, optimizer)), snapshots


@functools.lru_cache(maxsize=16)
def parameters_of(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """Shapes of a network's parameters."""
    tree = jax.eval_shape(lambda: initialise(Transformer(config), jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


# ---- estimates ------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """Rows that one view reads at a time, on one device."""

    contexts: float
    context: int
    rows: float
    completion: int

    @property
    def tokens(self) -> float:
        return self.contexts * self.context + self.rows * self.completion

    def scores(self, heads: float) -> tuple[float, float]:
        """Scores of the contexts' and of the completions' tokens."""
        before = self.contexts * heads * self.context**2
        return before, self.rows * heads * self.completion * (self.context + self.completion)


def estimated_update(load: Load, objective: Objective, sizes: Sizes) -> float:
    """Bytes beside the state that one update takes of a device, about."""
    e, batch = load.experiment, load.batch
    rows, length = batch.completion.shape
    counts = {name: batch.contexts[name].tokens.shape[0] for name in objective.views}
    units, chunks = row_units(counts.values(), rows, per_device(sizes.rows_per_chunk))
    networks, item, spread = configs(e), jnp.dtype(e.dtype).itemsize, axis_size(DATA)
    total, working = 0.0, 0.0
    for name, view in objective.views.items():
        count, width = math.lcm(counts[name], units), batch.contexts[name].tokens.shape[1]
        reading = Reading(count / chunks / spread, width, rows / chunks / spread, length)
        for config in (networks[policy] for policy in policies_of(view)):
            total += rows * length * config.width * item / spread  # hidden states
            kept = kept_per_layer(config, reading, item, remat=sizes.remat) if view.trainable else 0.0
            total += config.layers * kept
            working = max(working, in_one_layer(config, reading, item))
    positions = min(rows * length / chunks / spread, sizes.tokens_per_chunk or math.inf)
    vocabulary = max(c.vocab_size for c in networks.values()) / axis_size(MODEL)
    heads = 4.0 * positions * vocabulary * (2 + 2 * len(objective.views))
    gradients = gradient_bytes(state_of(e).params) * (2 if chunks > 1 else 1)
    cast = whole_weights(e) if item < 4 else 0.0
    return total + working + heads + gradients + cast


def per_device(size: int | None) -> int | None:
    """Rows of all devices of the data axis for those of one."""
    return size and size * axis_size(DATA)


def configs(experiment: Experiment) -> dict[str, ModelConfig]:
    """The network of every policy."""
    return {name: model.config for name, model in train.models(experiment).items()}


def whole_weights(experiment: Experiment) -> float:
    """Bytes of the student's weights in the type that it computes in, where they are kept in another."""
    if jnp.dtype(experiment.dtype) == jnp.dtype(experiment.params_dtype) and experiment.lora is None:
        return 0.0
    return bytes_beside_data(parameters_of(experiment.student.config), experiment.dtype)


def kept_per_layer(config: ModelConfig, reading: Reading, item: int, *, remat: bool) -> float:
    """Bytes that the backward pass keeps of one layer."""
    parts = axis_size(MODEL)
    if remat:
        return reading.tokens * item * (config.width + 2 * config.kv_heads * config.head_dim) / parts
    own = reading.tokens * item * (WIDTHS * config.width + MLP_WIDTHS * config.hidden_units / parts)
    scores = [s for s in reading.scores(config.heads / parts) if s <= SCORES]  # others are computed again
    return own + SCORE_COPIES * 4.0 * sum(scores)


def in_one_layer(config: ModelConfig, reading: Reading, item: int) -> float:
    """Bytes that lie about while one layer is read, or read backwards."""
    own = reading.tokens * item * (WIDTHS * config.width + MLP_WIDTHS * config.hidden_units / axis_size(MODEL))
    return own + 2 * SCORE_COPIES * 4.0 * min(SCORES, max(reading.scores(config.heads / axis_size(MODEL))))


def estimated_sampler(load: Load, rows: int) -> float:
    """Bytes beside the state that a call of the sampler takes of a device, about: every row has a prompt of its own."""
    e, config = load.experiment, load.experiment.student.config
    item, spread = jnp.dtype(e.dtype).itemsize, axis_size(DATA)
    width, length = load.context, e.shapes.completion
    own = max(1.0, rows / spread)
    cache = own * (width + 2 * length) * config.layers * 2 * config.kv_heads * config.head_dim * item
    reading = Reading(own, width, 0, 0)
    logits = 4.0 * own * config.vocab_size * 4
    weights = whole_weights(e) if item < 4 or e.lora is not None else 0.0
    return cache / axis_size(MODEL) + in_one_layer(config, reading, item) + logits + weights


# ---- compiled -------------------------------------------------------------------------------------------------------

FEW = 2
"""Periods of layers of the smaller of two programs from whose memory that of a deep one is told."""


def by_depth(load: Load, needed: Any) -> float:
    """`needed(layers)` of all layers, from programs of few layers where that is much less to compile.

    All layers are alike: what a program needs grows by the same for each.
    """
    config = load.experiment.student.config
    step = FEW * period_of(config)
    same = all(t.config.layers == config.layers for t in load.experiment.teachers.values())
    if 2 * step > config.layers // 2 or not same:
        return needed(None)
    few, more = needed(step), needed(2 * step)
    return more + max(0.0, more - few) / step * (config.layers - 2 * step)


def compiled_update(load: Load, objective: Objective, sizes: Sizes, layers: int | None = None) -> float:
    """Bytes beside the state that one update takes of a device, by the compiler."""
    e = dataclasses.replace(load.experiment, remat=sizes.remat)
    state = state_of(e, layers)
    networks = {name: model.clone(config=shallow(model.config, layers)) for name, model in train.models(e).items()}
    update = train.make_update(objective, networks, e.optimizer, sizes.of(e.shapes), e.reduce, e.router)
    lowered = update.lower(
        state.params, state.opt_state, {**state.others, **state.snapshots}, laid_rows(load.batch), laid_whole()
    )
    return beside_state(programs.memory(lowered.compile()))


def compiled_sampler(load: Load, rows: int, layers: int | None = None) -> float:
    """Bytes beside the state that a call of the sampler takes of a device, by the compiler."""
    e = load.experiment
    state, network = state_of(e, layers), train.models(e)["live"].clone(config=shallow(e.student.config, layers))
    params = adapters.completed({**state.others, "live": state.params})["live"]
    tokens = jax.ShapeDtypeStruct((rows, load.context), jnp.int32)
    contexts = laid_rows((tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)))
    keys = laid_rows(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)))
    arguments = ((network,), (params,), (contexts,), keys, Sampling(), laid_whole(1), laid_whole())
    return beside_state(programs.memory(generate.lower(*arguments, length=e.shapes.completion).compile()))


def beside_state(memory: Mapping[str, float]) -> float:
    """What a program takes beside its arguments."""
    return memory["temporary"] + max(memory["outputs"] - memory["donated"], 0.0)
