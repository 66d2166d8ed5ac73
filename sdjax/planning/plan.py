"""`sdjax plan`: one training step of a method compiled for devices that need not be here, and what it costs on each.

The very update and sampler that a run uses are compiled, for the shapes and the mesh of the plan: what the table says
of memory and exchanges is the compiler's word, what it says of seconds is a roofline.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax import programs, sharding, train
from sdjax.contexts import question, with_solution
from sdjax.generate import Sampling, generate
from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.presets import PRESETS
from sdjax.models.transformer import Transformer, empty_cache, initialise
from sdjax.options import Choice, nearest
from sdjax.planning import chips, flops, sketch
from sdjax.planning.chips import Chip, PlanError
from sdjax.tokens import Shapes
from sdjax.types import Batch, Method


class Cost(NamedTuple):
    """One program on one device: bytes, FLOP, bytes exchanged by kind, seconds to compile."""

    memory: dict[str, float]
    flops: float
    exchanged: dict[str, float]
    accessed: float  # bytes of memory read and written, as XLA counts them
    compiling: float


class Plan(NamedTuple):
    """What a step costs; bytes of one device."""

    device: str
    chip: Chip | None
    devices: int
    state: dict[str, float]  # parameters, optimizer, snapshots: there all the time
    updates: tuple[Cost, ...]
    gradients: float
    sampler: Cost
    cache: float
    decoding: float  # bytes that one decoding step reads
    steps: int  # decoding steps


# ---- shapes of everything ---------------------------------------------------------------------------------------------


def model_config(name: str) -> ModelConfig:
    """A public model's shape by name, or that of a folder with a config.json.  Raises `PlanError` for another name."""
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_dir():
        return from_hf(name)
    raise PlanError(
        f"model={name}: there is no such shape{nearest(name, list(PRESETS))}: expected {', '.join(PRESETS)}, or a "
        "folder with a config.json"
    )


def laid(tree: Any, specs: Any) -> Any:
    """Shapes with these shardings over the entered mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree, specs
    )


def laid_parameters(tree: Any) -> Any:
    """Shapes of parameters or an optimizer's state, split by the rules."""
    return laid(tree, sharding.parameter_specs(tree, sharding.current().shape))


def laid_rows(tree: Any) -> Any:
    """Shapes with a first axis of rows, split over the data axis where they divide."""
    size = sharding.axis_size(sharding.DATA)
    return laid(tree, jax.tree.map(lambda x: P(sharding.DATA) if x.ndim and x.shape[0] % size == 0 else P(), tree))


def laid_whole(*shape: int, dtype: Any = jnp.int32) -> Any:
    """A shape that every device holds whole."""
    return laid(jax.ShapeDtypeStruct(shape, dtype), P())


def laid_state(method: Method, network: Transformer, optimizer: optax.GradientTransformation) -> tuple[Any, Any, dict]:
    """Shapes of the parameters, the optimizer's state and the snapshots, split by the rules."""
    params = laid_parameters(jax.eval_shape(lambda: initialise(network, jax.random.key(0))))
    opt_state = laid_parameters(jax.eval_shape(optimizer.init, params))
    return params, opt_state, dict.fromkeys(method.snapshots, params)


# ---- compiling --------------------------------------------------------------------------------------------------------


def cost(function: Any, *arguments: Any, devices: int, trips: int = 1, **static: Any) -> Cost:
    """Traces and compiles a jitted function for shapes.  Raises `PlanError` if the compiler finds it too large."""
    start = time.perf_counter()
    traced = function.trace(*arguments, **static)
    total = flops.product_flops(traced.jaxpr, trips)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        if not used:
            raise
        raise PlanError(
            f"it does not fit: the compiler needs {used[1]} of the {used[2]} that a device has; use more devices, "
            "fewer rows or tokens per chunk, or a shorter completion"
        ) from error
    analysis = compiled.cost_analysis() or {}
    exchanged = programs.collective_bytes(compiled.as_text(), trips)
    accessed = float(analysis.get("bytes accessed", 0.0))
    return Cost(programs.memory(compiled), total / devices, exchanged, accessed, time.perf_counter() - start)


def plan(
    *,
    method: Choice,
    topology: str = chips.HERE,
    model: str = "smollm2-135m",
    mesh: str = "",
    prompts: int = 8,
    context: int = 256,
    teacher_context: int = 0,
    completion: int = 512,
    rows_per_chunk: int | None = None,
    tokens_per_chunk: int | None = 2048,
    bf16: bool = True,
    remat: bool = True,
) -> Plan:
    """What one step of a method costs on every device of a slice.

    Args:
      topology: "v5e:4x8", "v5p:4x4x4" and so on, or "here": this machine's devices.
      model: a public model's name, or a folder with a config.json; weights are not read.
      mesh: devices along the data and the model axis, "8x4"; by default all along data.
      prompts: problems per step; the method says how many attempts at each.
      context: tokens of the student's context.
      teacher_context: tokens of the other views' contexts; 0: the student's and a completion.
      completion: tokens of an attempt.
      rows_per_chunk: rows whose activations are held at once.
      tokens_per_chunk: positions whose logits are held at once.
      bf16: compute in bfloat16; parameters and the optimizer stay float32.
      remat: recompute blocks in the backward pass.
    """
    train.check_numbers({"prompts": prompts, "context": context, "completion": completion})
    config, over = model_config(model), chips.mesh_of(topology, mesh)
    built, sketched, own = self_taught(method)
    rows, other = sketch.rows_per_prompt(sketched), teacher_context or context + completion
    lengths = {v: context if v == "student" else other for v in sketched.contexts}
    batch = sketch.sized(sketched, prompts, rows, completion, lengths, own)
    network = Transformer(config, jnp.bfloat16 if bf16 else jnp.float32, remat)
    shapes = Shapes(context, completion, prompts * rows, rows_per_chunk, tokens_per_chunk)
    with sharding.on(over):
        return compiled_plan(built, network, batch, shapes, prompts, rows)


def self_taught(method: Choice) -> tuple[Method, Batch, set[str]]:
    """The method with solutions as lessons, a small batch of it, and the views whose own lessons differ within a group.

    Raises `PlanError` if another model teaches.
    """
    built = method(lesson=lambda rollout, rollouts: with_solution(question(rollout.example), rollout.example.solution))
    refuse_other_teachers(built)
    own = {name for name, view in train.all_views(method()).items() if view.per_rollout}
    return built, sketch.sketched(built), own


def refuse_other_teachers(method: Method) -> None:
    """Raises `PlanError` for a method whose teacher is another model."""
    others = {v.policy for v in train.all_views(method).values()} - {"live", *method.snapshots}
    if others:
        raise PlanError(
            f"the method reads {', '.join(sorted(others))}, another model: plans hold only the student's own"
        )


def compiled_plan(method: Method, network: Transformer, batch: Any, shapes: Shapes, prompts: int, rows: int) -> Plan:
    """The plan on the entered mesh."""
    mesh = jax.sharding.get_mesh()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    params, opt_state, snapshots = laid_state(method, network, optimizer)
    networks = dict.fromkeys(("live", *method.snapshots), network)
    updates = tuple(
        cost(
            train.make_update(objective, networks, optimizer, shapes),
            *(params, opt_state, snapshots, laid_rows(batch), laid_whole()),
            devices=mesh.size,
        )
        for objective in method.objectives
    )
    sampler, decoding = sampler_cost(network, params, shapes, prompts, rows, mesh.size)
    size = programs.bytes_on_device
    cache = jax.eval_shape(lambda: empty_cache(network, prompts * rows, shapes.completion))
    device, chip = chips.chip_of(mesh.devices.flat[0])
    return Plan(
        device=device,
        chip=chip,
        devices=mesh.size,
        state={"parameters": size(params), "optimizer": size(opt_state), "snapshots": size(snapshots)},
        updates=updates,
        gradients=size(params),
        sampler=sampler,
        cache=size(cache) / mesh.size,
        decoding=decoding + size(cache) / mesh.size,
        steps=shapes.completion,
    )


def sampler_cost(
    network: Transformer, params: Any, shapes: Shapes, prompts: int, rows: int, devices: int
) -> tuple[Cost, float]:
    """The sampler's cost for all rows at once, and the bytes of weights that a decoding step reads on one device."""
    tokens = jax.ShapeDtypeStruct((prompts, shapes.context), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts * rows))
    found = cost(
        generate,
        *(
            (network,),
            (params,),
            (laid_rows((tokens, mask)),),
            laid_rows(keys),
            Sampling(),
            laid_whole(1),
            laid_whole(),
        ),
        length=shapes.completion,
        devices=devices,
        trips=shapes.completion,
    )
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return found, count * jnp.dtype(network.dtype).itemsize / sharding.axis_size(sharding.MODEL)


# ---- what it means ----------------------------------------------------------------------------------------------------


def totals(plan: Plan) -> dict[str, float]:
    """Bytes of one device while it updates and while it samples; the state is there in both."""
    state = sum(plan.state.values())
    beside = lambda cost: cost.memory["temporary"] + max(cost.memory["outputs"] - cost.memory["donated"], 0.0)
    return {"update": state + max(map(beside, plan.updates)), "sampler": state + beside(plan.sampler)}


def seconds(plan: Plan) -> dict[str, float]:
    """A roofline of one step: products at the peak, memory and links at their full speed, exchanges not hidden.

    `update = max(FLOP / peak, bytes / bandwidth) + exchanged / link speed`; decoding reads weights and cache every step.
    """
    chip = plan.chip
    exchange = lambda cost: sum(cost.exchanged.values()) / (2 * chip.link)  # a ring uses two links
    update = sum(max(c.flops / chip.flops, c.accessed / chip.bandwidth) + exchange(c) for c in plan.updates)
    reading = plan.steps * plan.decoding / chip.bandwidth
    return {"update": update, "sampler": max(plan.sampler.flops / chip.flops, reading) + exchange(plan.sampler)}


def advice(plan: Plan) -> str:
    """What to change where it does not fit, by the largest part."""
    needed = totals(plan)
    if sum(plan.state.values()) > 0.7 * plan.chip.memory:
        return "parameters, optimizer and snapshots alone fill the device: use more devices"
    if needed["sampler"] > needed["update"]:
        return "sampling needs most: a longer model axis splits the weights, fewer prompts shorten the cache"
    return "the update's temporaries need most: fewer rows or tokens per chunk, more devices, or shorter completions"


def report(plan: Plan) -> str:
    """The plan as text."""
    gigabytes = lambda name, value: f"  {name:34s}{value / 1e9:10.2f} GB"
    activations = max(c.memory["temporary"] for c in plan.updates) - plan.gradients
    needed = totals(plan)
    lines = [f"{plan.devices} x {plan.device}, on each:", "memory"]
    lines += [gigabytes(name, value) for name, value in plan.state.items()]
    lines += [
        gigabytes("gradients", plan.gradients),
        gigabytes("activations, logits, gathered weights", max(activations, 0.0)),
        gigabytes("update, in all", needed["update"]),
        gigabytes("cache", plan.cache),
        gigabytes("sampler, in all", needed["sampler"]),
    ]
    for name, costs in (("update", plan.updates), ("sampler", (plan.sampler,))):
        exchanged: dict[str, float] = {}
        for one in costs:
            exchanged = {k: exchanged.get(k, 0.0) + one.exchanged.get(k, 0.0) for k in {**exchanged, **one.exchanged}}
        lines += [name, f"  {'matrix products':34s}{sum(c.flops for c in costs) / 1e12:10.2f} TFLOP"]
        lines += [gigabytes(kind, value) for kind, value in sorted(exchanged.items())]
        lines.append(f"  {'compiled in':34s}{sum(c.compiling for c in costs):10.0f} s")
    return "\n".join(lines + verdict(plan, needed))


def verdict(plan: Plan, needed: Mapping[str, float]) -> list[str]:
    """Whether it fits, and the estimated seconds, where the chip is known."""
    if plan.chip is None:
        return [f"nothing is known of the speed and memory of {plan.device!r}"]
    lines = ["at best, by the roofline"]
    lines += [f"  {name:34s}{value:10.3f} s" for name, value in seconds(plan).items()]
    most = max(needed.values())
    if most <= plan.chip.memory:
        return [*lines, f"fits: {most / 1e9:.1f} of {plan.chip.memory / 1e9:.0f} GB"]
    return [*lines, f"does not fit: {most / 1e9:.1f} of {plan.chip.memory / 1e9:.0f} GB; {advice(plan)}"]
