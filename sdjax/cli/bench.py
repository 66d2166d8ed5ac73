"""Speed and memory of one training step on this machine, beside what the machine can do at best."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.cli.options import OptionError
from sdjax.collect.contexts import question, with_feedback
from sdjax.devices import ceilings, memory
from sdjax.devices.ceilings import timed
from sdjax.devices.memory import MemoryShortage
from sdjax.engine import needs, train
from sdjax.engine.by_length import positions_read
from sdjax.engine.generate import Sampling, generate
from sdjax.engine.policies import row_keys
from sdjax.engine.snapshots import frozen_snapshots
from sdjax.engine.tokens import Shapes, collate, encode_context, left_pad
from sdjax.errors import nearest
from sdjax.methods.sdpo import sdpo
from sdjax.models import pretrained
from sdjax.models.configs import ModelConfig
from sdjax.models.presets import PRESETS
from sdjax.models.pretrained import Pretrained
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Batch, Example, Rollout, Task, Verdict


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters in the blocks' matrix products, and in the head's."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * config.width * config.hidden_units), config.vocab_size * config.width


def update_flops(config: ModelConfig, prompts: int, group: int, student: int, teacher: int, completion: float) -> float:
    """FLOP of one update: student forward and backward (3 x 2 per parameter and token), teacher forward, without
    attention scores and without recomputation.  `student` and `teacher` are context lengths in tokens, read once per
    group."""
    block, head = parameter_counts(config)
    answers = prompts * group * completion
    tokens = 3 * (prompts * student + answers) + prompts * teacher + answers
    return 2.0 * (block * tokens + head * 4 * answers)


def rollout_bytes(config: ModelConfig, rows: int, context: int, completion: int, item: int) -> tuple[float, float]:
    """Bytes that decoding reads: weights, and keys and values written so far, once for every token of a row.

    `context` is the length of prompts in tokens; `item` the bytes of a number.  Prompts that rows share count for each.
    """
    weights = float(sum(parameter_counts(config)) * item * completion)
    of_token = 2 * config.layers * config.kv_heads * config.head_dim * item
    return weights, float(rows * of_token * completion * (context + completion / 2))


class Step(NamedTuple):
    """What is timed: networks and state of one step of SDPO over the full vocabulary, and its problems."""

    student: Any  # without parameters: the state is a copy
    networks: dict[str, Any]
    state: train.State
    teacher: dict[str, Any]  # the frozen snapshot
    method: Any
    optimizer: optax.GradientTransformation
    shapes: Shapes
    examples: list[Example]


RANDOM = "random:"
"""Before the name of a public shape: a model of this shape with random weights, which costs what a trained one costs."""


def loaded(model: str) -> Pretrained:
    """A model by name or folder, or "random:SHAPE".  Raises `OptionError` for a shape that is not known."""
    if not model.startswith(RANDOM):
        return pretrained.load(model)
    shape = model.removeprefix(RANDOM)
    if shape not in PRESETS:
        raise OptionError(f"--model {model}: there is no shape {shape!r}{nearest(shape, [*PRESETS])}")
    key, tokenizer = jax.random.key(0), word_tokenizer(["What", "is", "Answer", "with", "the", "number."])
    normal = jax.jit(lambda like: 0.02 * jax.random.normal(key, like.shape), static_argnums=0)
    drawn = lambda path, like: jnp.ones(like.shape) if path[-1].key == "scale" else normal(like)
    params = jax.tree_util.tree_map_with_path(drawn, needs.parameters_of(PRESETS[shape]))
    return Pretrained(PRESETS[shape], params, tokenizer)


def a_step(model: str, prompts: int, group: int, shapes: Shapes, dtype: Any, remat: bool, scan: bool = False) -> Step:
    """SDPO with the Jensen-Shannon divergence and a frozen teacher, on `prompts` easy sums."""
    student = loaded(model)
    sums = [(i, f"What is {i}+{i + 7}? Answer with the number.", str(2 * i + 7)) for i in range(prompts)]
    examples = [Example(str(i), ({"role": "user", "content": text},), answer) for i, text, answer in sums]
    method = sdpo(group_size=group, alpha=0.5, top_k=None, ema_rate=0.0, is_cap=None)
    task = Task("bench", tuple(examples), (), lambda example, text: Verdict(0.0))
    optimizer = optax.adamw(1e-5)
    how = {"prompts": prompts, "dtype": dtype, "remat": remat, "scan": scan}
    experiment = train.Experiment(method, task, student, optimizer, shapes, **how)
    check_room("the state", sum(needs.state_of(experiment).parts().values()), "take a smaller --model")
    networks, state = train.models(experiment), train.initial_state(experiment, student.params)
    teacher = frozen_snapshots(method, student.params)
    return Step(student._replace(params=None), networks, state, teacher, method, optimizer, shapes, examples)


def check_room(what: str, needed: float, instead: str) -> None:
    """Raises `MemoryShortage` where something needs more than is free on a device."""
    room = memory.room()
    if needed > room.free:
        raise MemoryShortage(f"{what} needs about {memory.gigabytes(needed)}, and there are {room}: {instead}")


def estimate(step: Step, batch: Batch) -> float:
    """Bytes that an update takes beside the state, about."""
    method, live = step.method, step.networks["live"]
    task = Task("bench", tuple(step.examples), (), lambda example, text: Verdict(0.0))
    experiment = train.Experiment(
        method, task, step.student, step.optimizer, step.shapes, dtype=live.dtype, remat=live.remat
    )
    sizes = needs.Sizes(step.shapes.rows, step.shapes.rows_per_chunk, step.shapes.tokens_per_chunk, live.remat)
    return needs.estimated_update(needs.Load(experiment, batch, 0), method.objectives[0], sizes)


def writer(step: Step, examples: list[Example], n: int) -> Callable[[int], Any]:
    """Samples `n` completions of full length after every question; the argument is the seed."""
    encoded = [encode_context(step.student.tokenizer, question(e), step.shapes) for e in examples]
    padded = left_pad(encoded, step.shapes.context)
    live, length = step.networks["live"], step.shapes.completion
    never = jnp.asarray([-1])
    keys = lambda seed: row_keys(jax.random.key(seed), jnp.arange(len(examples)), n)
    return lambda i: generate(
        (live,), (step.state.params,), (padded,), keys(i), Sampling(), never, length, length=length
    )


def written_batch(step: Step, examples: list[Example], n: int, spread: float = 1.0) -> Batch:
    """The batch of sampled completions, cut to lengths of a spread; the teacher is told the answer."""
    written = jax.device_get(writer(step, examples, n)(0))
    lengths = log_normal_lengths(*written.tokens.shape, spread)
    said = lambda values, row: tuple(values[row, : lengths[row]].tolist())
    rollouts = [
        Rollout(example, said(written.tokens, row), said(written.logprobs, row), "", g).read_by(
            student=question(example),
            teacher=with_feedback(question(example), feedback=f"The answer is {example.main_answer}."),
        )
        for g, example in enumerate(examples)
        for row in range(g * n, (g + 1) * n)
    ]
    # All attempts at a problem are told the same here: the teacher's prompt is read once per group.
    views = {name: view._replace(per_rollout=False) for name, view in train.all_views(step.method).items()}
    return collate(rollouts, views, step.student.tokenizer, step.shapes)


def log_normal_lengths(rows: int, longest: int, spread: float, seed: int = 0) -> np.ndarray:
    """Log-normal lengths in tokens, `[rows]`: 95 % are within a factor of `spread`, up to `longest`, which all are where it is 1."""
    deviation = math.log(spread) / (2 * 1.96)
    drawn = np.exp(deviation * (np.random.default_rng(seed).standard_normal(rows) - 1.96)) * longest
    return np.clip(np.round(drawn), 1, longest).astype(int)


def learner(step: Step, batch: Batch) -> Callable[[int], Any]:
    """One update after another; the argument means nothing."""
    update = train.make_update(step.method.objectives[0], step.networks, step.optimizer, step.shapes)
    params, opt_state = step.state.params, step.state.opt_state

    def learn(_: int) -> Any:
        nonlocal params, opt_state
        params, opt_state, outcome = update(params, opt_state, step.teacher, batch, step.state.step)
        return outcome, params

    return learn


def check_sizes(**sizes: int) -> None:
    """Raises `OptionError` for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise OptionError(f"--{name.replace('_', '-')} {size}: expected at least 1")


def bench(
    *,
    model: str = "smollm2",
    prompts: int = 4,
    group: int = 4,
    completion: int = 64,
    rollout_rows: int = 16,
    repeats: int = 3,
    tokens_per_chunk: int = 64,
    rows_per_chunk: int | None = None,
    bf16: bool = False,
    remat: bool = True,
    scan: bool = False,
    lengths: int = 1,
    spread: float = 1.0,
    profile: str = "",
) -> dict[str, float]:
    """One step of SDPO over the full vocabulary (Jensen-Shannon, a frozen teacher that is told the answer).

    Args:
      model: a hub name, a folder, "smollm2", or random:SHAPE for a shape of `sdjax plan` with random weights.
      prompts: distinct prompts.
      group: completions of each prompt, sampled and trained on.
      completion: tokens of each completion, exactly.
      rollout_rows: also times sampling this many rows of one prompt each, nothing shared.
      repeats: timed calls after the first; medians are reported.
      tokens_per_chunk: positions whose logits are held at once.
      rows_per_chunk: rows whose activations are held at once, for one more forward pass of the student.
      bf16: compute in bfloat16.
      remat: recompute blocks in the backward pass, which keeps one block's activations instead of all.
      scan: loop over the layers of an update: compiled many times faster, for a copy of parameters and gradients.
      lengths: to how many lengths rows are cut in an update.
      spread: completions are trained on at log-normal lengths, 95 % within this factor; 1: all as long as they were written.
      profile: a folder to which one more update is recorded, for XProf or TensorBoard.

    Raises: `OptionError` for a number below 1.
    """
    check_sizes(
        prompts=prompts, group=group, completion=completion, rollout_rows=rollout_rows, repeats=repeats, lengths=lengths
    )
    if spread < 1:
        raise OptionError(f"--spread {spread:g}: expected at least 1, the longest completion by the shortest")
    dtype = jnp.bfloat16 if bf16 else jnp.float32
    shapes = Shapes(256, completion, prompts * group, rows_per_chunk, tokens_per_chunk, lengths=lengths)
    there = memory.room()
    step = a_step(model, max(prompts, rollout_rows), group, shapes, dtype, remat, scan)
    rollout = timed(writer(step, step.examples[:prompts], group), repeats)
    alone = timed(writer(step, step.examples[:rollout_rows], 1), repeats)
    batch = written_batch(step, step.examples[:prompts], group, spread)
    fewer = "take fewer --prompts or a smaller --group, a shorter --completion, --remat, or --rows-per-chunk 1"
    check_room("an update", estimate(step, batch), fewer)
    learn = learner(step, batch)
    updated = timed(learn, repeats)
    peak = memory.peak()
    if profile:
        with jax.profiler.trace(profile):
            jax.block_until_ready(learn(0))
    config, told = step.student.config, {name: int(c.mask.sum(-1).max()) for name, c in batch.contexts.items()}
    used = batch.present.sum(-1)
    flops = update_flops(config, prompts, group, told["student"], told["teacher"], used.mean())
    positions = positions_read(used, batch.present.shape[1], rows_per_chunk, lengths)
    weights, cache = rollout_bytes(config, prompts * group, told["student"], completion, jnp.dtype(dtype).itemsize)
    product, stream = ceilings.matrix_product(dtype), ceilings.bandwidth(dtype)
    return {
        "student context tokens": told["student"],
        "teacher context tokens": told["teacher"],
        "rollout tokens/s": prompts * group * completion / rollout.median,
        f"rollout tokens/s, {rollout_rows} prompts": rollout_rows * completion / alone.median,
        "rollout seconds": rollout.median,
        "update seconds": updated.median,
        "step seconds": rollout.median + updated.median,
        "rollout compile seconds": rollout.first - rollout.median,
        "update compile seconds": updated.first - updated.median,
        "peak memory GB": peak / 1e9,
        "memory there GB": there.total / 1e9,
        "free before GB": there.free / 1e9,
        "matrix product ceiling GFLOP/s": product / 1e9,
        "bandwidth ceiling GB/s": stream / 1e9,
        "update share of matrix product ceiling": flops / updated.median / product,
        "update share of positions that are padding": 1 - used.sum() / positions,
        "rollout share of bandwidth ceiling": weights / rollout.median / stream,
        "the same with the cache": (weights + cache) / rollout.median / stream,
        "load average": os.getloadavg()[0],
    }
