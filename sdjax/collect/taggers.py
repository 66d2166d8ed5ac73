"""Boundary taggers: small networks that say whether the *next* token of a text is style or capability.

Source: TESSY (Huang et al. 2026), arXiv:2604.14164 and its code: style is transitions, fillers and tone; the tagger is
a language model's body with a two-way head, trained on snippets in which style phrases are marked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sdjax.collect.rollouts import RolloutError
from sdjax.collect.synthesis import Boundary, ask
from sdjax.devices.sharding import to_host
from sdjax.engine.policies import Policy
from sdjax.engine.tokens import bucket
from sdjax.kernels.reductions import masked_mean
from sdjax.models.transformer import Transformer, hidden
from sdjax.types import Messages

CONNECTIVES = (
    *("okay", "so", "well", "now", "then", "next", "first", "second", "third", "finally", "also", "again", "actually"),
    *("maybe", "perhaps", "wait", "hmm", "alright", "therefore", "thus", "hence", "because", "however", "but", "and"),
    *("let me check", "let me", "let us", "let's see", "let's", "i think", "i need to", "we need to", "we have"),
    *("the answer is", "in other words", "for example", "that means"),
)
"""What `connectives` takes for style."""

IGNORE = -1
"""The label of a token without a next one."""


# ---- annotation -------------------------------------------------------------------------------------------------------


def connectives(text: str) -> list[str]:
    """Style phrases of a text by a fixed list: a rule in the place of TESSY's annotating model."""
    pattern = "|".join(map(re.escape, sorted(CONNECTIVES, key=len, reverse=True)))
    return [m.group() for m in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)]


def annotation(snippet: str) -> Messages:
    """The request to list a snippet's style phrases as JSON."""
    content = (
        "List, word for word and in order, the phrases of this text that are only transitions, fillers or tone; no "
        f"reasoning, code or formulas. Reply with a JSON list of strings.\n\n{snippet}"
    )
    return ({"role": "user", "content": content},)


def annotated_by(policy: Policy, snippets: Sequence[str], key: Array) -> list[list[str] | None]:
    """A policy's lists of style phrases, `None` where its reply is no JSON list of strings."""

    def parsed(text: str) -> list[str] | None:
        try:
            found = json.loads(text[text.index("[") : text.rindex("]") + 1])
        except ValueError:
            return None
        return found if all(isinstance(x, str) for x in found) else None

    return [parsed(s.text) for s in ask(policy, [annotation(s) for s in snippets], key, slots=max(1, len(snippets)))]


def located(text: str, phrases: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the phrases stand, each after the one before; `None` if one is not found in order."""
    spans, start = [], 0
    for phrase in phrases:
        place = text.find(phrase, start)
        if not phrase or place < 0:
            return None
        spans.append((place, start := place + len(phrase)))
    return spans


def token_types(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 (style) for tokens that begin inside a span or contain a span's beginning, else 0."""
    inside = lambda a, b: any(s <= a < e or a <= s < b for s, e in spans)
    return [int(inside(a, b)) for a, b in offsets]


def next_types(types: Sequence[int]) -> list[int]:
    """What is learnt at every token: the type of the token after it; nothing at the last."""
    return [*types[1:], IGNORE] if types else []


def snippets(texts: Sequence[str], count: int, seed: int, words: int = 60) -> list[str]:
    """Random windows of whitespace-separated words; a short text is taken whole."""
    rng, texts = random.Random(seed), [t for t in texts if len(t.split()) > 1]
    found = []
    for _ in range(count if texts else 0):
        split = rng.choice(texts).split()
        start = rng.randrange(max(1, len(split) - words + 1))
        found.append(" ".join(split[start : start + words]))
    return list(dict.fromkeys(found))


# ---- the network ------------------------------------------------------------------------------------------------------


class Tagger(NamedTuple):
    """A body with a two-way head, and its accuracy on the held-out snippets."""

    model: Transformer
    params: dict[str, Any]  # "fixed" (the embedding) and "trained" (blocks, norm and head)
    tokenizer: Any
    accuracy: float


def initial_tagger(policy: Policy, layers: int, seed: int) -> Tagger:
    """The policy's first `layers` blocks with a new head; the embedding stays as it is."""
    c = policy.model.config
    layers = min(layers, c.layers)
    model = Transformer(dataclasses.replace(c.first(layers), tied_embeddings=True), policy.model.dtype)
    # Copies: a tagger outlives the step, whose snapshots are donated to the next.
    own = lambda name: jax.tree.map(jnp.array, policy.params[name])
    body = {name: own(name) for name in (*(f"layers_{i}" for i in range(layers)), "final_norm")}
    head = 0.02 * jax.random.normal(jax.random.key(seed), (c.width, 2))
    params = {"fixed": {"embed": own("embed")}, "trained": {"body": body, "head": head}}
    return Tagger(model, params, policy.tokenizer, float("nan"))


def _logits(model: Transformer, trained: Any, fixed: Any, tokens: Array, mask: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    states, _ = hidden(model, {**jax.lax.stop_gradient(fixed), **trained["body"]}, tokens, positions, mask)
    return states.astype(jnp.float32) @ trained["head"]


@functools.partial(jax.jit, static_argnames="model")
def _predicted(model: Transformer, params: Any, tokens: Array, mask: Array) -> Array:
    return _logits(model, params["trained"], params["fixed"], tokens, mask).argmax(-1)


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def _step(model, optimizer, trained, state, fixed, tokens, mask, labels):
    def loss(trained):
        dist = jax.nn.log_softmax(_logits(model, trained, fixed, tokens, mask))
        chosen = jnp.take_along_axis(dist, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return masked_mean(-chosen, labels != IGNORE)

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value


def fit_tagger(
    policy: Policy,
    texts: Sequence[str],
    phrases: Callable[[str], list[str] | None],
    *,
    layers: int = 2,
    epochs: int = 3,
    batch: int = 32,
    lr: float = 1e-3,
    held_out: float = 0.05,
    most: int = 512,
    seed: int = 0,
) -> Tagger:
    """A tagger of a policy's kind of text, trained on snippets whose style phrases `phrases` lists.

    Snippets whose phrases are not found in order are left out.  The parameters of the best epoch by held-out accuracy
    are kept.  TESSY trains Qwen3-0.6B with lr 1e-5; two blocks of the policy want a larger one.

    Raises: RolloutError if no snippet is left.
    """
    tagger = initial_tagger(policy, layers, seed)
    rows = []
    for text in texts:
        spans = located(text, listed) if (listed := phrases(text)) is not None else None
        ids, offsets = encode(tagger.tokenizer, text)
        if spans is not None and len(ids) > 1:
            rows.append((ids[:most], next_types(token_types(offsets, spans))[:most]))
    if not rows:
        raise RolloutError(
            "no snippet is left to train a boundary tagger on: the texts are empty, or the annotator's phrases are not "
            "in them; use another annotator"
        )
    tokens, mask, labels = padded(rows, bucket(max(len(ids) for ids, _ in rows), most))
    order = np.random.default_rng(seed)
    test = order.permutation(len(rows))[: max(1, round(held_out * len(rows)))]
    train = np.setdiff1d(np.arange(len(rows)), test) if len(rows) > 1 else test
    optimizer = _adamw(lr)
    trained, fixed = tagger.params["trained"], tagger.params["fixed"]
    state, best = optimizer.init(trained), tagger
    for _ in range(epochs):
        for start in range(0, len(train), batch):
            # The last batch is filled up, so that all have one shape.
            chosen = np.resize(order.permutation(train)[start : start + batch], batch)
            arrays = (tokens[chosen], mask[chosen], labels[chosen])
            trained, state, _ = _step(tagger.model, optimizer, trained, state, fixed, *arrays)
        params = {"fixed": fixed, "trained": trained}
        found = to_host(_predicted(tagger.model, params, tokens[test], mask[test]))
        accuracy = float((found == labels[test])[labels[test] != IGNORE].mean())
        if not accuracy < best.accuracy:
            best = tagger._replace(params=params, accuracy=accuracy)
    return best


@functools.cache
def _adamw(lr: float) -> optax.GradientTransformation:
    """One object per learning rate: it keys the compiled step."""
    return optax.adamw(lr)


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and where each stands in it."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [tuple(x) for x in found["offset_mapping"]]


def padded(rows: Sequence[tuple[list[int], list[int]]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and labels `[rows, length]`, padded on the right."""
    tokens, labels = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), IGNORE, np.int32)
    for i, (ids, types) in enumerate(rows):
        tokens[i, : len(ids)], labels[i, : len(types)] = ids, types
    mask = np.arange(length) < np.asarray([len(ids) for ids, _ in rows])[:, None]
    return tokens, mask, labels


# ---- boundaries -------------------------------------------------------------------------------------------------------


def kept(labels: Sequence[int], *, skip_first: bool = False) -> tuple[int, bool]:
    """Tokens of a chunk that are kept, and whether the other model goes on.

    `labels` say of every token whether the *next* one is of the other type; the chunk is cut after the first such
    token, even if it is the last one.  With `skip_first` the first token is never a cut (TESSY's code).
    """
    for i, label in enumerate(labels):
        if label and not (skip_first and i == 0):
            return i + 1, True
    return len(labels), False


Swap = Literal["trigger", "cut"]
Word = Literal["complete", "drop"]


def between_words(text: str, place: int, word: Word) -> int:
    """A place near `place` at which no word is split: after the word there or, to "drop" it, before it.

    After white space it stays: what follows is the other author's.  A word that the text ends with may go on; a turn that
    has no other word keeps it.
    """
    if text[:place][-1:].isspace() or text[place : place + 1].isspace():
        return place
    dropped = len(re.sub(r"\S+\Z", "", text[:place])) if word == "drop" else 0
    return dropped or place + re.search(r"\s|\Z", text[place:]).start()


def boundary(
    tagger: Tagger,
    other: int,
    *,
    skip_first: bool = False,
    swap: Swap = "trigger",
    word: Word = "complete",
    window: int = 200,
    slots: int = 8,
) -> Boundary:
    """Where a chunk ends because a token of type `other` (1: style, 0: capability) comes next.

    The tagger reads the last `window` tokens.  No word is split, see `between_words`.  The other goes on wherever there is
    such a token ("trigger", TESSY's code), or only if something of the chunk is cut off for it ("cut", the paper).
    """

    def find(texts: Sequence[str], chunks: Sequence[str]) -> list[tuple[int, bool]]:
        coded = [encode(tagger.tokenizer, text + new) for text, new in zip(texts, chunks, strict=True)]
        rows = [(ids[-window:], []) for ids, _ in coded]
        rows += [([0], [])] * (-len(rows) % slots)
        tokens, mask, _ = padded(rows, bucket(max(len(ids) for ids, _ in rows), window))
        found = to_host(_predicted(tagger.model, tagger.params, tokens, mask))
        cuts = []
        for (_, offsets), types, before, new in zip(coded, found, texts, chunks, strict=False):
            ends = [(end, int(types[i]) == other) for i, (_, end) in enumerate(offsets[-window:]) if end > len(before)]
            count, hand_over = kept([label for _, label in ends], skip_first=skip_first)
            place = ends[count - 1][0] - len(before) if count else len(new)
            place = between_words(new, place, word) if hand_over else len(new)
            cuts.append((place, hand_over and (swap == "trigger" or place < len(new))))
        return cuts

    return find
