"""SmolLM2-135M learns one-digit sums from itself: the student reads the question, the teacher also a worked solution.

    sdjax train experiments/chain_sum.py                    self-distillation (SDPO with a forward KL)
    sdjax train experiments/chain_sum.py --method grpo      the same rollouts, rewards only

The teacher is the initial model reading four worked demonstrations and the worked solution of the problem at hand (or
another correct attempt, with `--peers`).  Problems are split by expression.  Results: experiments/README.md.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from sdjax.cli.options import Choice
from sdjax.collect.contexts import after_demonstrations, question, with_solution
from sdjax.collect.rollouts import solved_peer
from sdjax.devices.sharding import mesh_shape
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.models import adapters, pretrained
from sdjax.tasks.reasoning_gym import chain_sum, worked_demonstrations

METHOD = "sdpo"
OPTIONS = {
    "sdpo": {"group_size": 4, "alpha": 0.0, "top_k": None, "ema_rate": 0.0},
    "grpo": {"group_size": 4, "normalised": False},
}


def experiment(
    *,
    method: Choice,
    model: str = "smollm2",
    terms: int = 2,
    demonstrations: int = 4,
    peers: bool = False,
    steps: int = 40,
    prompts: int = 4,
    rounds: int = 1,
    lr: float = 2e-5,
    warmup: int = 5,
    completion: int = 28,
    train_size: int = 100,
    evaluation: int = 100,
    evaluate_every: int = 0,
    save_every: int = 20,
    bf16: bool = False,
    remat: bool = False,
    lora_rank: int = 0,
    lora_base: Literal["float", "int8", "nf4"] = "float",
    mesh: str = "",
    seed: int = 0,
    smoke: bool = False,
) -> Experiment:
    """Chain sums with `terms` one-digit terms.

    Args:
      model: a hub name, a folder, or "smollm2" (embedded).
      terms: numbers per problem; two make 200 distinct problems.
      demonstrations: solved problems that the teacher reads before the question.
      peers: the teacher reads another correct attempt of the group where there is one, instead of the reference.
      steps: batches.
      prompts: problems per batch; the method's group size is attempts per problem.
      rounds: batches in a row with the same problems and fresh attempts (RESD: 4).
      lr: peak learning rate of AdamW, after `warmup` steps of linear rise.
      completion: most tokens of an attempt.
      train_size: distinct training problems.
      evaluation: held-out problems, read greedily before and after, and every `evaluate_every` steps.
      save_every: steps between checkpoints.
      bf16: compute in bfloat16 (parameters stay float32).
      remat: recompute blocks in the backward pass: less memory, more time.
      lora_rank: train adapters of this rank on frozen weights instead of the weights; 0 is none.  A larger `lr` suits
        them.
      lora_base: how the frozen matrices are kept: as they are, in int8 or in NF4 (needs `sdjax[lora]`).
      mesh: devices as DATAxMODEL, 4x2 say; by default all on the data axis.
      smoke: two steps on a few problems.
    """
    if smoke:
        steps, prompts, evaluation, save_every = 2, 2, 4, 0
    lora = adapters.chosen(lora_rank, lora_base)
    task = chain_sum(terms=(terms, terms), train_size=train_size, test_size=evaluation, seed=seed)
    shown = worked_demonstrations(task, demonstrations, seed=seed)
    # The demonstrations show what to do with a solution, too: each is asked as the teacher is asked.
    told = tuple(
        turn
        for user, answer in zip(shown[::2], shown[1::2], strict=True)
        for turn in (*with_solution((user,), answer["content"]), answer)
    )

    def lesson(rollout, rollouts):
        peer = solved_peer(rollout, rollouts) if peers else None
        solution = rollout.example.solution if peer is None else peer.text
        return after_demonstrations(with_solution(question(rollout.example), solution), told)

    return Experiment(
        method=method(lesson=lesson),
        task=task,
        student=pretrained.load(model),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.schedules.warmup_constant_schedule(lr / max(warmup, 1), lr, warmup)),
        ),
        shapes=Shapes(context=512, completion=completion, rows=64, tokens_per_chunk=256),
        steps=steps,
        prompts=prompts,
        rounds=rounds,
        seed=seed,
        dtype=jnp.bfloat16 if bf16 else jnp.float32,
        remat=remat,
        lora=lora,
        evaluation=evaluation,
        evaluate_every=evaluate_every,
        save_every=save_every,
        mesh=mesh_shape(mesh),
    )
