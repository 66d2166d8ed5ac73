"""Ids that a model embeds and its tokenizer does not have: embeddings are padded, each model's to a size of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from sdjax.models.pretrained import Pretrained
from sdjax.models.transformer import Transformer


def limited(model: Transformer, tokenizer: Any) -> Transformer:
    """The network in which ids without a token have no mass: they are never sampled, and no signal counts them.

    Where every id has its token it is the same network, and the same programs.
    """
    unused = unused_ids(tokenizer, len(tokenizer), model.config.vocab_size)
    return model if unused == model.unused else model.clone(unused=unused)


@functools.lru_cache(maxsize=32)
def unused_ids(tokenizer: Any, tokens: int, size: int) -> tuple[tuple[int, int], ...]:
    """Ranges `(first, end)` of the ids below `size` without a token.  `tokens`, the tokenizer's length, keys the cache."""
    there = np.zeros(size, bool)
    there[[i for i in tokenizer.get_vocab().values() if 0 <= i < size]] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[True], there, [True]]).astype(np.int8)))
    return tuple((int(first), int(end)) for first, end in edges.reshape(-1, 2))


def is_token(model: Transformer, number: Any) -> bool:
    """Whether a number is the id of a token that the model can write."""
    known = isinstance(number, int) and 0 <= number < model.config.vocab_size
    return known and not any(first <= number < end for first, end in model.unused)


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same tokens at the same ids."""
    return one is other or one.get_vocab() == other.get_vocab()


def difference(one: Any, other: Any) -> str:
    """How two vocabularies differ, in words: their sizes, and the first id at which they have different tokens."""
    ours, theirs = ({number: token for token, number in x.get_vocab().items()} for x in (one, other))
    first = min(i for i in {*ours, *theirs} if ours.get(i) != theirs.get(i))
    shown = " and ".join(repr(some[first]) if first in some else "nothing" for some in (ours, theirs))
    return f"{len(ours)} and {len(theirs)} tokens; id {first} is {shown}"


def with_rows(model: Pretrained, rows: int) -> Pretrained:
    """The model with `rows` embedding rows: some of its padding cut off, or zeros added.

    Two models over one tokenizer then score the same ids.  The caller makes sure that no token is cut off.
    """
    had = model.config.vocab_size
    if had == rows:
        return model

    def changed(x: Any) -> Any:
        return x[:rows] if rows < had else np.concatenate([np.asarray(x), np.zeros((rows - had, x.shape[1]), x.dtype)])

    params = {name: changed(x) if name in ("embed", "head") else x for name, x in model.params.items()}
    return model._replace(config=dataclasses.replace(model.config, vocab_size=rows), params=params)
