"""The shape of a method's batches, found by letting a tiny random model collect a few rows: before anything is spent."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.engine.policies import Environment, Policy, Sample
from sdjax.engine.score import policies_of
from sdjax.engine.tokens import Shapes, collate, decode_text
from sdjax.engine.train import all_views
from sdjax.errors import InputError
from sdjax.models.configs import from_hf
from sdjax.models.transformer import Transformer, initialise
from sdjax.tasks.completions import CLOSING
from sdjax.tasks.recall import recall, vocabulary
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Batch, Context, Example, Method, Rollout, Verdict

KEYS = 8
SHAPES = Shapes(context=160, completion=8, rows=8, tokens_per_chunk=None)


class SketchError(InputError, ValueError):
    """Nothing is known of a method's batches."""


@functools.cache
def policy() -> Policy:
    """A random model that knows the recall task's words, and how thinking ends."""
    return little(word_tokenizer([CLOSING[0], *vocabulary(keys=KEYS)]), SHAPES)


def little(tokenizer: Any, shapes: Shapes) -> Policy:
    """A random model of two layers whose texts end, behind a tokenizer."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    longest = max(512, shapes.context + shapes.completion)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": longest}
    rest = {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    model = Transformer(from_hf({**sizes, **heads, **rest}))
    params = initialise(model, jax.random.key(0))
    # A part that all hidden states have in common speaks for the end.
    head, stop = 12.5 * params["head"], tokenizer.eos_token_id
    head = head.at[stop].set(0.5 * head[stop]).at[stop, 0].add(0.3)
    params = {**params, "embed": params["embed"].at[:, 0].add(0.04), "head": head}
    return Policy(model, params, tokenizer, shapes, writer=random_words)


def random_words(policy: Policy, chats: Sequence[Sequence[int]], key: Array, *, n: int, limit: int, **_: Any) -> Any:
    """What the sampler would write, without compiling one: a few words and the end, `[len(chats)][n]` samples.

    Where there is room the words are thinking and an answer: some methods keep no text without the two.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    closing = policy.tokenizer.encode(CLOSING[0], add_special_tokens=False)

    def one() -> Sample:
        words = rng.integers(len(policy.tokenizer) // 2, len(policy.tokenizer), rng.integers(1, max(2, limit)))
        room = len(words) + len(closing) < limit
        tokens = (*map(int, words[:-1]), *(closing if room else ()), int(words[-1]), policy.tokenizer.eos_token_id)
        tokens = tokens[:limit]
        finished = tokens[-1] == policy.tokenizer.eos_token_id
        return Sample(tokens, (-1.0,) * len(tokens), decode_text(policy.tokenizer, tokens), finished)

    return [[one() for _ in range(n)] for _ in chats]


def coin(example: Any, text: str) -> Verdict:
    """A verdict that differs between answers of a random model."""
    return Verdict(float(sum(map(ord, text)) % 2), "try again")


def sketched(method: Method, prompts: int = 2) -> Batch:
    """A batch of rows that the method collects for a few prompts of the recall task, with the tiny model as every policy.

    Raises `SketchError` if it keeps no row of them in ten tries.
    """
    rollouts = collected(method, policy(), recall(keys=KEYS).train, prompts)
    return collate(rollouts, all_views(method), policy().tokenizer, SHAPES)


def collected(method: Method, policy: Policy, examples: Sequence[Example], prompts: int = 2) -> list[Rollout]:
    """Rollouts that the method collects for a few prompts, with one policy in every place and a coin as the verifier.

    Raises `SketchError` if it keeps no row of them in ten tries.
    """
    names = {
        "live",
        "teacher",
        *method.snapshots,
        *(policy for view in all_views(method).values() for policy in policies_of(view)),
    }
    take = itertools.cycle(examples)
    more = lambda: [next(take) for _ in range(prompts)]
    environment = Environment(dict.fromkeys(names, policy), coin, more)
    memory = method.memory
    for attempt in range(10):
        rollouts, memory = method.collect(environment, more(), jax.random.key(attempt), memory)
        if rollouts:
            return rollouts
    raise SketchError("the method kept no rollout in ten batches of a random model, so nothing is known of its batches")


def rows_per_prompt(batch: Batch, prompts: int = 2) -> int:
    """Rows of a sketched batch per prompt that was taken."""
    return max(1, math.ceil(len(batch.reward) / prompts))


def sized(
    batch: Batch, prompts: int, rows: int, completion: int, contexts: Mapping[str, int], own: Collection[str] = ()
) -> Batch:
    """The shapes (`jax.ShapeDtypeStruct`) of a batch of `prompts` x `rows` completions of `completion` tokens.

    `contexts` gives tokens by view.  A context that a group shares in the sketch is shared here, but for views of `own`,
    which may differ in every row.
    """
    total, (few, length) = prompts * rows, batch.completion.shape

    def grown(x: Any) -> jax.ShapeDtypeStruct:
        shape = [total, *x.shape[1:]]
        if x.ndim > 1 and x.shape[1] == length:
            shape[1] = completion
        return jax.ShapeDtypeStruct(tuple(shape), jnp.asarray(x).dtype)

    def read(name: str, context: Context) -> Context:
        count = total if name in own else max(1, total * len(context.tokens) // few)
        tokens = jax.ShapeDtypeStruct((count, contexts[name]), jnp.int32)
        mask, rest = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), (context.valid, context.member, context.scores)
        return Context(tokens, mask, *jax.tree.map(grown, rest))

    plain = {f: jax.tree.map(grown, getattr(batch, f)) for f in batch.__dataclass_fields__ if f != "contexts"}
    return Batch(contexts={name: read(name, c) for name, c in batch.contexts.items()}, **plain)
