"""Speed and memory of one training step on this machine, beside what the machine can do at best."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdjax import train
from sdjax.contexts import question, with_feedback
from sdjax.generate import Sampling, generate
from sdjax.methods.sdpo import sdpo
from sdjax.models import pretrained
from sdjax.models.configs import ModelConfig
from sdjax.policies import row_keys
from sdjax.tokens import Shapes, collate, encode_context, left_pad
from sdjax.types import Example, Rollout, Task, Verdict


class Timing(NamedTuple):
    """Seconds: the first call (compilation included) and the median of the following ones."""

    first: float
    median: float


def timed(function: Callable[[int], Any], repeats: int) -> Timing:
    """Times `function(i)` for `i = 0 ... repeats`, the first apart, each until its result is there."""
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(i))
        seconds.append(time.perf_counter() - start)
    return Timing(seconds[0], statistics.median(seconds[1:]))


def matrix_product_ceiling(dtype: Any, size: int = 2048) -> float:
    """Multiply-adds that this machine does in a large matrix product, in FLOP/s (two per multiply-add)."""
    product = jax.jit(lambda a, b: a @ b)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return 2 * size**3 / timed(lambda _: product(a, a), 5).median


def bandwidth_ceiling(dtype: Any, size: int = 8192) -> float:
    """Bytes per second at which this machine streams a matrix through a product with a few rows, as decoding does."""
    product = jax.jit(lambda a, b: b @ a)
    a = jnp.ones((size, size), dtype)
    return a.nbytes / timed(lambda _: product(a, jnp.ones((16, size), dtype)), 5).median


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters in the blocks' matrix products, and in the head's."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * config.width * config.mlp_width), config.vocab_size * config.width


def update_flops(config: ModelConfig, prompts: int, group: int, student: int, teacher: int, completion: int) -> float:
    """FLOP of one update: student forward and backward (3 x 2 per parameter and token), teacher forward, without
    attention scores and without recomputation.  `student` and `teacher` are context lengths in tokens, read once per
    group."""
    block, head = parameter_counts(config)
    answers = prompts * group * completion
    tokens = 3 * (prompts * student + answers) + prompts * teacher + answers
    return 2.0 * (block * tokens + head * 4 * answers)


def bench(
    *,
    model: str = "smollm2",
    prompts: int = 4,
    group: int = 4,
    completion: int = 64,
    rollout_rows: int = 16,
    repeats: int = 3,
    tokens_per_chunk: int = 256,
    rows_per_chunk: int | None = None,
    bf16: bool = False,
    remat: bool = False,
) -> dict[str, float]:
    """One step of SDPO over the full vocabulary (Jensen-Shannon, a frozen teacher that is told the answer).

    Args:
      model: a hub name, a folder, or "smollm2".
      prompts: distinct prompts; `group` completions of exactly `completion` tokens each are sampled and trained on.
      rollout_rows: also times sampling this many rows of one prompt each, nothing shared.
      repeats: timed calls after the first; medians are reported.
      tokens_per_chunk: positions whose logits are held at once.
      rows_per_chunk: rows whose activations are held at once, for one more forward pass of the student.
      bf16: compute in bfloat16.
      remat: recompute blocks in the backward pass.
    """
    student, dtype = pretrained.load(model), jnp.bfloat16 if bf16 else jnp.float32
    shapes = Shapes(256, completion, prompts * group, rows_per_chunk, tokens_per_chunk)
    examples = [
        Example(str(i), ({"role": "user", "content": f"What is {i}+{i + 7}? Answer with the number."},), str(2 * i + 7))
        for i in range(max(prompts, rollout_rows))
    ]
    method = sdpo(group_size=group, alpha=0.5, top_k=None, ema_rate=0.0, is_cap=None)
    task = Task("bench", tuple(examples), (), lambda example, text: Verdict(0.0))
    optimizer = optax.adamw(1e-5)
    experiment = train.Experiment(method, task, student, optimizer, shapes, prompts=prompts, dtype=dtype, remat=remat)
    networks = train.models(experiment)
    state = train.initial_state(experiment, student.params)
    student = student._replace(params=None)  # the state is a copy
    del experiment

    def write(chats: list, n: int) -> Callable[[int], Any]:
        padded = left_pad([encode_context(student.tokenizer, c, shapes) for c in chats], shapes.context)
        run = lambda i: generate(
            (networks["live"],),
            (state.params,),
            (padded,),
            row_keys(jax.random.key(i), jnp.arange(len(chats)), n),
            Sampling(),
            jnp.asarray([-1]),
            completion,
            length=completion,
        )
        return run

    chats = [question(e) for e in examples]
    rollout = timed(write(chats[:prompts], group), repeats)
    alone = timed(write(chats[:rollout_rows], 1), repeats)
    written = jax.device_get(write(chats[:prompts], group)(0))
    rollouts = [
        Rollout(example, tuple(written.tokens[row].tolist()), tuple(written.logprobs[row].tolist()), "", g).read_by(
            student=question(example),
            teacher=with_feedback(question(example), feedback=f"The answer is {example.answer}."),
        )
        for g, example in enumerate(examples[:prompts])
        for row in range(g * group, (g + 1) * group)
    ]
    views = {name: view._replace(per_rollout=False) for name, view in train.all_views(method).items()}
    batch = collate(rollouts, views, student.tokenizer, shapes)
    update = train.make_update(method.objectives[0], networks, optimizer, shapes)

    def learn(_: int) -> Any:
        nonlocal state
        params, opt_state, outcome = update(state.params, state.opt_state, state.snapshots, batch, state.step)
        state = state.replace(params=params, opt_state=opt_state)
        return outcome, params

    updated = timed(learn, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lengths = {name: int(c.mask.sum(-1).max()) for name, c in batch.contexts.items()}
    flops = update_flops(student.config, prompts, group, lengths["student"], lengths["teacher"], completion)
    weights = sum(parameter_counts(student.config)) * jnp.dtype(dtype).itemsize
    product, stream = matrix_product_ceiling(dtype), bandwidth_ceiling(dtype)
    return {
        "student context tokens": lengths["student"],
        "teacher context tokens": lengths["teacher"],
        "rollout tokens/s": prompts * group * completion / rollout.median,
        f"rollout tokens/s, {rollout_rows} prompts": rollout_rows * completion / alone.median,
        "rollout seconds": rollout.median,
        "update seconds": updated.median,
        "step seconds": rollout.median + updated.median,
        "rollout compile seconds": rollout.first - rollout.median,
        "update compile seconds": updated.first - updated.median,
        "peak resident GB": peak / 1e9,
        "matrix product ceiling GFLOP/s": product / 1e9,
        "bandwidth ceiling GB/s": stream / 1e9,
        "update share of matrix product ceiling": flops / updated.median / product,
        "rollout share of bandwidth ceiling": weights * completion / rollout.median / stream,
        "load average": os.getloadavg()[0],
    }
