"""A tiny model that can copy an answer it is shown and otherwise guesses: what every method can teach something to."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from sdjax.collect.contexts import (
    question,
    rewrite_last,
    with_demonstration,
    with_feedback,
    with_reference,
    with_solution,
)
from sdjax.collect.rollouts import written
from sdjax.engine import train
from sdjax.engine.tokens import Shapes, collate
from sdjax.methods.sft import sft
from sdjax.models.configs import from_hf
from sdjax.models.pretrained import Pretrained
from sdjax.models.transformer import Transformer, initialise
from sdjax.tasks.recall import ASKERS, WORDS
from sdjax.types import REFERENCE, Example

SHAPES = Shapes(context=96, completion=4, rows=64, tokens_per_chunk=None)


def config():
    return from_hf(
        {
            "model_type": "llama",
            "vocab_size": len(tiny.tokenizer()),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        }
    )


def told(example, rng):
    """The question with the answer somewhere in the context, in one of the ways teachers are told.

    A worked solution may follow an attempt, a word by itself that is right or wrong: the solution is what counts.
    """
    solution, asked = rng.choice([example.solution, example.answer]), question(example)
    if solution == example.solution and rng.random() < 0.5:
        attempt = f"{asked[-1]['content']}\n\nYour previous attempt:\n{rng.choice(WORDS)}"
        asked = rewrite_last(asked, attempt)
    ways = (
        lambda q: with_solution(q, solution),
        lambda q: with_reference(q, solution),
        lambda q: with_demonstration(q, solution),
        lambda q: with_feedback(q, solution=solution),
    )
    return rng.choice(ways)(asked)


def lecture(rng, rows):
    """Rollouts to pre-train on: a random word for every key, shown in half of the contexts."""
    policy = tiny.policy(shapes=SHAPES)
    for group in range(rows):
        key, word = rng.randrange(tiny.KEYS), rng.choice(WORDS)
        prompt = ({"role": "user", "content": f"{rng.choice(ASKERS)} key {key} ->"},)
        example = Example(str(group), prompt, word, f"key {key} -> {word}")
        context = told(example, rng) if group % 2 else question(example)
        yield written(example, word, policy, group=group, source=REFERENCE).read_by(student=context)


def fresh(seed):
    """Random parameters."""
    return jax.jit(initialise, static_argnums=0)(Transformer(config()), jax.random.key(seed))


@functools.cache
def hint_reader(seed=0, steps=400):
    """The pre-trained model: greedy accuracy near 1 where the answer is shown, at chance (1/8) where it is not."""
    rng, model, method = random.Random(seed), Transformer(config()), sft()
    params = fresh(seed)
    optimizer = optax.adam(optax.schedules.cosine_decay_schedule(3e-3, steps))
    opt_state = optimizer.init(params)
    update = train.make_update(method.objectives[0], {"live": model}, optimizer, SHAPES)
    for step in range(steps):
        batch = collate(list(lecture(rng, 64)), method.objectives[0].views, tiny.tokenizer(), SHAPES)
        # One context bucket, so that one program serves all steps.
        batch = batch.replace(contexts={n: widened(c, 64) for n, c in batch.contexts.items()})
        params, opt_state, _ = update(params, opt_state, {}, batch, jnp.int32(step))
    return Pretrained(config(), jax.device_get(params), tiny.tokenizer())


def widened(context, width):
    pad = lambda x: np.pad(x, ((0, 0), (max(width - x.shape[1], 0), 0)))
    return context.replace(tokens=pad(context.tokens), mask=pad(context.mask))
