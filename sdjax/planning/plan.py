"""`sdjax plan`: one training step of a method compiled for devices that need not be here, and what it costs on each.

The very update and sampler that a run uses are compiled, for the shapes and the mesh of the plan: what the table says
of memory and exchanges is the compiler's word, what it says of seconds is a roofline.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdjax.cli.options import Choice
from sdjax.collect.contexts import question, with_solution
from sdjax.devices import programs, sharding
from sdjax.devices.layout import bytes_beside_data, laid_parameters, laid_rows, laid_whole
from sdjax.devices.platforms import on_nvidia
from sdjax.engine import optimizers, sketch, train
from sdjax.engine.generate import Sampling, generate
from sdjax.engine.needs import gradient_bytes, laid_beside, parameters_of
from sdjax.engine.tokens import Shapes
from sdjax.errors import nearest
from sdjax.models.attention import prefixes
from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.presets import PRESETS
from sdjax.models.transformer import Transformer, empty_cache
from sdjax.planning import chips, flops, gpus, traffic
from sdjax.planning.chips import Chip, PlanError
from sdjax.types import Batch, Method, Objective


class Cost(NamedTuple):
    """One program on one device: bytes, FLOP, bytes exchanged by kind, seconds to compile."""

    memory: dict[str, float]
    flops: float
    exchanged: dict[str, float]
    accessed: float  # bytes of memory read and written
    compiling: float
    network: float = 0.0  # bytes that come from other hosts, where those are joined by a network


class Plan(NamedTuple):
    """What a step costs; bytes of one device."""

    device: str
    chip: Chip | None
    devices: int
    state: dict[str, float]  # parameters, optimizer, snapshots, another teacher: there all the time
    updates: tuple[Cost, ...]
    gradients: float
    sampler: Cost
    cache: float
    decoding: float  # bytes that one decoding step must read, on average over completions of full length
    steps: int  # decoding steps
    memory: float | None = None  # that a device has for the run; `None` where nothing is known


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


# ---- compiling --------------------------------------------------------------------------------------------------------


TOO_LARGE = "it does not fit"

LITTLE_EFFORT = {"exec_time_optimization_effort": -1.0}
"""What the compiler is told for a quick plan: the program's speed is not worth its time.  That for GPUs has no such option."""

NO_CUDNN = "cuDNN not found", "cuDNN is not detected"
"""What is said where cuDNN is missing, when compiling and when tracing."""


def cost(function: Any, *arguments: Any, devices: int, trips: int = 1, quick: bool = False, **static: Any) -> Cost:
    """Traces and compiles a jitted function for shapes.

    Raises `PlanError` if the compiler finds it too large, or needs something that is not installed.
    """
    start = time.perf_counter()
    little = LITTLE_EFFORT if quick and not on_nvidia() else None
    try:
        traced = function.trace(*arguments, **static)
        total = flops.product_flops(traced.jaxpr, trips)
        compiled = traced.lower().compile(compiler_options=little)
    except RuntimeError as error:
        if any(said in str(error) for said in NO_CUDNN):
            raise PlanError("cuDNN is not installed; pip install 'sdjax[cuda-compiler]', which needs no GPU") from error
        used = re.search(
            r"Used ([\d.]+\w) of ([\d.]+\w) hbm|\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
        )
        if not used:
            raise
        needed, there = [size for size in used.groups() if size]
        raise PlanError(
            f"{TOO_LARGE}: the compiler needs {needed} of the {there} that a device has; use more devices, a longer "
            "model axis, fewer rows or tokens per chunk, or a shorter completion"
        ) from error
    text = compiled.as_text()
    exchanged, accessed = programs.collective_bytes(text, trips), traffic.accessed_bytes(text, trips)
    network = programs.network_bytes(text, gpus.PER_HOST, trips) if on_nvidia() else 0.0
    return Cost(programs.memory(compiled), total / devices, exchanged, accessed, time.perf_counter() - start, network)


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
    tokens_per_chunk: int | None = 512,
    bf16: bool = True,
    params_dtype: optimizers.Type = "float32",
    optimizer: optimizers.Name = "adamw",
    first_moment_dtype: optimizers.Type = "float32",
    remat: bool = True,
    scan: bool = False,
    quick: bool = False,
    teacher: str = "",
) -> Plan:
    """What one step of a method costs on every device of a slice, or of hosts with GPUs.

    Args:
      topology: "v5e:4x8", "v5p:4x4x4" and so on; "h100:8" for the GPUs of a host, "h100:2x8" for two hosts (a100, h100,
        h200, b200); or "here": this machine's devices.
      model: a public model's name, or a folder with a config.json; weights are not read.
      mesh: devices along the data and the model axis, "8x4", or along those and an expert axis, "4x2x4"; by default all
        along data.
      prompts: problems per step; the method says how many attempts at each.
      context: tokens of the student's context.
      teacher_context: tokens of the other views' contexts; 0: the student's and a completion.
      completion: tokens of an attempt.
      rows_per_chunk: rows whose activations are held at once, on each device of the data axis.
      tokens_per_chunk: positions whose logits are held at once, likewise.
      bf16: compute in bfloat16.
      params_dtype: what the parameters are kept in; with bfloat16 the rest of each number is part of the optimizer's state.
      optimizer: adamw, or adafactor, which keeps nearly nothing.
      first_moment_dtype: the type of AdamW's first moment.
      remat: recompute blocks in the backward pass.
      scan: loop over the layers: deep models compile many times faster, for a copy of the parameters and gradients.
      quick: let the compiler for TPUs optimise little: three times as fast; the program overlaps less and so needs less
        memory.  That for GPUs is quick by itself.
      teacher: a public model's name or a folder: the external policy of methods that read one (opd, gkd, vopd, ...), in
        float32 beside the student as in a run; by default the student's initial parameters teach, told the solution.
    """
    train.check_numbers({"prompts": prompts, "context": context, "completion": completion})
    config, over = model_config(model), chips.mesh_of(topology, mesh)
    built, sketched, own = taught_by_another(method) if teacher else self_taught(method)
    rows, other = sketch.rows_per_prompt(sketched), teacher_context or context + completion
    lengths = {v: context if v == "student" else other for v in sketched.contexts}
    batch = sketch.sized(sketched, prompts, rows, completion, lengths, own)
    network = lambda config: Transformer(config, jnp.bfloat16 if bf16 else jnp.float32, remat, scan)
    networks = dict.fromkeys(("live", *built.snapshots), network(config))
    if teacher:
        networks[TEACHER] = network(teacher_config(teacher, built, config))
    shapes = Shapes(context, completion, prompts * rows, rows_per_chunk, tokens_per_chunk)
    with sharding.on(over):
        chosen = optimizers.chosen(optimizer, 1e-6, first_moment=first_moment_dtype)
        return compiled_plan(built, networks, chosen, jnp.dtype(params_dtype), batch, shapes, prompts, rows, quick)


PADDING = 0.01
"""Sizes that differ by no more than this share are taken for one vocabulary, padded differently: tokenizers are not read."""

TEACHER = "teacher"
"""The name of an external policy, unless the method's options name it."""


def teacher_config(name: str, method: Method, student: ModelConfig) -> ModelConfig:
    """The teacher's shape.  Raises `PlanError` if a view reads it and it has not the student's vocabulary."""
    config = model_config(name)
    read = any(view.policy == TEACHER for view in train.all_views(method).values())
    sizes = config.vocab_size, student.vocab_size
    if read and max(sizes) > (1 + PADDING) * min(sizes):
        raise PlanError(
            f"teacher={name} has {sizes[0]} vocabulary entries and the student {sizes[1]}: it cannot score the student's "
            "tokens"
        )
    return dataclasses.replace(config, vocab_size=sizes[1]) if read else config


def self_taught(method: Choice) -> tuple[Method, Batch, set[str]]:
    """The method with solutions as lessons, a small batch of it, and the views whose own lessons differ within a group.

    Raises `PlanError` if another model teaches.
    """
    built = method(lesson=lambda rollout, rollouts: with_solution(question(rollout.example), rollout.example.solution))
    refuse_other_teachers(built)
    return built, sketch.sketched(built), own_contexts(method())


def taught_by_another(method: Choice) -> tuple[Method, Batch, set[str]]:
    """The method with an external policy as teacher, and the same of it.  Raises `PlanError` if it takes none."""
    if TEACHER not in inspect.signature(method.factory).parameters:
        raise PlanError(f"{method.factory.__name__} reads no other model: leave out --teacher")
    if method.options.get(TEACHER) is not None:
        raise PlanError("--method.teacher names a policy that the plan does not know: leave it out beside --teacher")
    built = Choice(method.factory, {**method.options, TEACHER: TEACHER}, method.change)()
    return built, sketch.sketched(built), own_contexts(built)


def own_contexts(method: Method) -> set[str]:
    """The views whose contexts may differ within a group."""
    return {name for name, view in train.all_views(method).items() if view.per_rollout}


def refuse_other_teachers(method: Method) -> None:
    """Raises `PlanError` for a method whose teacher is another model."""
    others = {v.policy for v in train.all_views(method).values()} - {"live", *method.snapshots}
    if others:
        raise PlanError(f"the method reads {', '.join(sorted(others))}, another model: name its shape with --teacher")


def costliest(method: Method) -> list[Objective]:
    """The objectives of the batch at which most views are read: after a cold start, and before what a schedule ends."""
    due = lambda step: [objective for objective in method.objectives if objective.due(step)]
    views = lambda step: sum(len(objective.views) for objective in due(step))
    return due(max(sorted({0, *(objective.since for objective in method.objectives)}), key=views))


def compiled_plan(
    method: Method,
    networks: Mapping[str, Transformer],
    optimizer: optax.GradientTransformation,
    dtype: Any,
    batch: Any,
    shapes: Shapes,
    prompts: int,
    rows: int,
    quick: bool = False,
) -> Plan:
    """The plan on the entered mesh, of a batch of `prompts` x `rows`; `networks` by the name of their policy.

    `dtype` is what the student's parameters are kept in.
    """
    mesh = jax.sharding.get_mesh()
    network, size = networks["live"], programs.bytes_on_device
    params = laid_parameters(parameters_of(network.config, dtype))
    opt_state, snapshots = laid_beside(method, optimizer, params)
    state = {"parameters": size(params), "optimizer": size(opt_state), "snapshots": size(snapshots)}
    others = {
        name: laid_parameters(parameters_of(networks[name].config))
        for name in networks.keys() - snapshots.keys() - {"live"}
    }
    state |= {name: size(tree) for name, tree in others.items()}
    device, chip = chips.chip_of(mesh.devices.flat[0])
    memory = chips.memory_of(mesh.devices.flat[0], chip)
    check_state(state, device, memory, mesh.size)
    updates = tuple(
        cost(
            train.make_update(objective, dict(networks), optimizer, shapes),
            *(params, opt_state, {**snapshots, **others}, laid_rows(batch), laid_whole()),
            devices=mesh.size,
            quick=quick,
        )
        for objective in costliest(method)
    )
    sampler, decoding = sampler_cost(network, params, shapes, prompts, rows, quick)
    bytes_of_cache = lambda count, length: size(jax.eval_shape(lambda: empty_cache(network, count, length))) / mesh.size
    own, before = bytes_of_cache(prompts * rows, shapes.completion), bytes_of_cache(prompts, shapes.context)
    return Plan(
        device=device,
        chip=chip,
        devices=mesh.size,
        state=state,
        updates=updates,
        gradients=gradient_bytes(params),
        sampler=sampler,
        cache=own + before,
        decoding=decoding + before + own * (1.0 if on_nvidia() else share_read(shapes.completion)),
        steps=shapes.completion,
        memory=memory,
    )


def share_read(length: int) -> float:
    """The share of a cache that a step of decoding reads, on average over a completion as long as the cache."""
    sizes = prefixes(length)
    return sum((size - last) * size for last, size in itertools.pairwise([0, *sizes])) / length**2


def check_state(state: Mapping[str, float], device: str, memory: float | None, devices: int) -> None:
    """Raises `PlanError`, before anything is compiled, if what is there all the time does not fit a device."""
    needed = sum(state.values())
    if memory is not None and needed > memory:
        parts = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in state.items() if value)
        raise PlanError(
            f"{TOO_LARGE}: {parts} on each {device} of {memory / 1e9:.0f} GB: use at least "
            f"{math.ceil(devices * needed / memory * 1.4)} devices, or adapters (--lora-rank), which need no more "
            "than the parameters"
        )


def sampler_cost(
    network: Transformer, params: Any, shapes: Shapes, prompts: int, rows: int, quick: bool = False
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
        devices=jax.sharding.get_mesh().size,
        trips=shapes.completion,
        quick=quick,
    )
    return found, bytes_beside_data(params, network.dtype)
