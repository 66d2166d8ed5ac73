"""Your model on your problems: a file of JSON lines, any method.

    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method grpo

A line has `prompt` (text) or `messages` (a chat that ends with a user turn) and `answer`; `solution` (a worked
reference, which only teachers read) and `feedback` (a fixed remark for wrong answers) are optional.  Answers are compared
as mathematics.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from sdjax.cli.options import Choice
from sdjax.devices.sharding import mesh_shape
from sdjax.engine.tokens import Shapes, refuse, shorten
from sdjax.engine.train import Experiment
from sdjax.models import adapters, pretrained
from sdjax.tasks.jsonl import jsonl

METHOD = "sdpo"


def experiment(
    *,
    method: Choice,
    data: str,
    test_data: str | None = None,
    test_fraction: float | None = None,
    skip_bad_rows: bool = False,
    model: str = "smollm2",
    steps: int = 100,
    prompts: int = 8,
    rounds: int = 1,
    minibatches: int = 1,
    lr: float = 1e-6,
    warmup: int = 10,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    context: int = 1024,
    completion: int = 512,
    shorten_prompts: bool = False,
    rows: int = 64,
    rows_per_chunk: int | None = None,
    tokens_per_chunk: int | None = 512,
    remat: bool = False,
    scan: bool = False,
    bf16: bool = False,
    lora_rank: int = 0,
    lora_base: Literal["float", "int8", "nf4"] = "float",
    evaluation: int = 200,
    evaluate_every: int = 25,
    save_every: int = 25,
    mesh: str = "",
    seed: int = 0,
    smoke: bool = False,
) -> Experiment:
    """Any method on a file of problems.

    Args:
      data: JSON lines to train on; `test_data` is held out, or else `test_fraction` of `data` (0.1), split by question.
      skip_bad_rows: count and list bad lines instead of refusing the file.
      model: a hub name, a folder in the transformers format, or "smollm2" (embedded).
      steps: batches of `prompts` problems; the method's group size is attempts per problem.
      rounds: batches in a row with the same problems and fresh attempts (RESD: 4).
      minibatches: updates per batch, of whole groups.
      lr: peak learning rate of AdamW, after `warmup` steps of linear rise.
      clip_norm: the gradient's largest norm.
      context: most tokens of a prompt; a longer one is refused, or with `shorten_prompts` loses its oldest turns, then
        the end of its privileged text, never the question.
      completion: most tokens of an attempt.
      rows: attempts sampled by one call; `rows_per_chunk` and `tokens_per_chunk` bound activations and logits.
      remat: recompute blocks in the backward pass, for memory.
      scan: loop over the layers instead of compiling each, for deep models on TPUs.
      bf16: compute in bfloat16 (parameters stay float32).
      lora_rank: train adapters of this rank on frozen weights instead of the weights; 0 is none.  A larger `lr` suits
        them.
      lora_base: how the frozen matrices are kept: as they are, in int8 or in NF4 (needs `sdjax[lora]`).
      evaluation: held-out problems, read greedily before, after and every `evaluate_every` steps.
      mesh: devices as DATAxMODEL, 4x2 say; by default all on the data axis.
      smoke: two steps on a few problems.
    """
    if smoke:
        steps, prompts, evaluation, evaluate_every, save_every = 2, 2, 4, 0, 0
    lora = adapters.chosen(lora_rank, lora_base)
    task = jsonl(data, test_path=test_data, test_fraction=test_fraction, skip_bad_rows=skip_bad_rows)
    schedule = optax.schedules.warmup_constant_schedule(lr / max(warmup, 1), lr, warmup)
    return Experiment(
        method=method(),
        task=task,
        student=pretrained.load(model),
        optimizer=optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)),
        shapes=Shapes(
            context, completion, rows, rows_per_chunk, tokens_per_chunk, shorten if shorten_prompts else refuse
        ),
        steps=steps,
        prompts=prompts,
        rounds=rounds,
        minibatches=minibatches,
        seed=seed,
        dtype=jnp.bfloat16 if bf16 else jnp.float32,
        lora=lora,
        remat=remat,
        scan=scan,
        evaluation=evaluation,
        evaluate_every=evaluate_every,
        save_every=save_every,
        mesh=mesh_shape(mesh),
    )
