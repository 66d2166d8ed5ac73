"""Between text and arrays: chats to token ids, rollouts to one padded batch, token ids to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.engine.chats import render
from sdjax.errors import InputError
from sdjax.tasks.completions import ANSWER, CLOSING, OPENING, opens_thinking
from sdjax.types import UNUSED, Batch, ByField, Context, Example, Messages, Rollout, Scored, Scores, View

ROWS = 64
"""Completions that one call of the sampler writes, where nothing says how many."""

Fit = Callable[[Messages, Callable[[Messages], int], int], Messages]
"""What to do with a chat that is too long: `(chat, count tokens, limit) -> chat`."""


class LengthError(InputError, ValueError):
    """A prompt does not fit into the context."""


class FieldError(InputError, ValueError):
    """An example does not say which of several policies reads it."""


def refuse(messages: Messages, count: Callable[[Messages], int], limit: int) -> Messages:
    """Accepts a chat of at most `limit` tokens.  Raises `LengthError` otherwise."""
    length = count(messages)
    if length > limit:
        start = messages[-1]["content"][:60].replace("\n", " ")
        raise LengthError(
            f"a prompt of {length} tokens exceeds the {limit} of --context (it begins {start!r}): raise --context, or "
            "shorten the prompt"
        )
    return messages


def shorten(messages: Messages, count: Callable[[Messages], int], limit: int) -> Messages:
    """Drops the oldest turns before the last one (not the system turn), then cuts privileged text from its end.

    Everything else, the question above all, is never touched: if that does not fit, raises `LengthError`.
    """
    system = messages[:1] if messages[0]["role"] == "system" else ()
    turns = messages[len(system) :]
    while len(turns) > 1 and count((*system, *turns)) > limit:
        turns = turns[2:] if len(turns) > 2 else turns[1:]
    return refuse(cut_privileged((*system, *turns), count, limit), count, limit)


def cut_privileged(messages: Messages, count: Callable[[Messages], int], limit: int) -> Messages:
    """The chat without as much of the end of its privileged text as must go to fit; without all of it if none does.

    A turn's privileged text is what stands under its key `privileged` and occurs in its `content` after what stands
    under `question`.
    """
    last, privileged = messages[-1], messages[-1].get("privileged", "")
    if not privileged or count(messages) <= limit:
        return messages

    def keeping(characters: int) -> Messages:
        kept = privileged[:characters]
        # The question may contain the same words.
        asked, content = last.get("question", ""), last["content"]
        cut = content[: len(asked)] + content[len(asked) :].replace(privileged, kept, 1)
        return (*messages[:-1], {**last, "content": cut, "privileged": kept})

    low, high = 0, len(privileged)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(keeping(middle)) <= limit else (low, middle - 1)
    return keeping(low)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes programs are compiled for.

    `context` and `completion` are the most tokens of a prompt and of a completion; `rows` is how many completions are
    sampled by one call; `rows_per_chunk` and `tokens_per_chunk` bound activations and logits in the engine, on each device
    of the data axis.  A run chooses those that are `None` by the memory there is; elsewhere `None` is `ROWS` and no
    bound.  `too_long` says what happens to a prompt that exceeds `context`.

    `teacher_context` is the most tokens of any other chat, such as a lesson: one that exceeds it loses privileged text,
    and where that is not enough its row is not trained (`sdjax.engine.lengths`).  `None`: as many as `context`, and one
    that exceeds it is an error; a run chooses enough.  `lengths` above 1: rows are scored and trained in the order of their
    lengths, cut to one of so many (`sdjax.engine.by_length`).
    """

    context: int = 512
    completion: int = 128
    rows: int | None = None
    rows_per_chunk: int | None = None
    tokens_per_chunk: int | None = None
    too_long: Fit = refuse
    teacher_context: int | None = None
    lengths: int = 1

    @property
    def lesson(self) -> int:
        """The most tokens of a chat that is not a prompt as it stands in the data."""
        return self.context if self.teacher_context is None else self.teacher_context


def bucket(length: int, limit: int) -> int:
    """The padded length for `length` tokens: the least of 16, 24, 32, 48, 64, 96, ... that holds it, at most `limit`.

    Lengths differ from batch to batch; few buckets mean few compilations and at most a third of padding.
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, max(limit, length))


def encode_context(
    tokenizer: Any,
    messages: Messages,
    shapes: Shapes,
    template: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[int]:
    """Token ids of a chat, made to fit `limit`, or `shapes.context`, by `shapes.too_long`.  Raises `LengthError` or `ChatError`.

    `template` are options of the chat template (`View.template`).
    """
    limit = shapes.context if limit is None else limit
    ids = render(tokenizer, messages, template)
    if len(ids) <= limit:
        return ids
    count = lambda messages: len(render(tokenizer, messages, template))
    return render(tokenizer, shapes.too_long(messages, count, limit), template)


def left_pad(rows: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as `[C, P]` int32 and their mask, padded on the left to a bucket of the longest."""
    width = bucket(max((len(r) for r in rows), default=1), limit)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for tokens_row, mask_row, row in zip(tokens, mask, rows, strict=True):
        if len(row):
            tokens_row[-len(row) :], mask_row[-len(row) :] = row, True
    return tokens, mask


def decode_text(tokenizer: Any, tokens: Sequence[int], opening: str = "") -> str:
    """The text of completion tokens, without special tokens but for the tags of `sdjax.tasks.completions`.

    `opening` is the tag with which the prompt has opened the thinking (see `thinking_opened`): it comes first, so that
    the text can be split by itself.
    """
    kept, pieces, run = special_tags(tokenizer), [], []
    decode = lambda some: tokenizer.decode(some, skip_special_tokens=True)
    for token in map(int, tokens):
        if token in kept:
            pieces += [decode(run), kept[token]]
            run = []
        else:
            run.append(token)
    text = "".join([*pieces, decode(run)]).strip()
    return f"{opening}\n{text}" if opening else text


def special_tags(tokenizer: Any) -> dict[int, str]:
    """The tags of thinking and answers that are special tokens, by id."""
    tags, known = {*OPENING, *CLOSING, *ANSWER}, getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in known.items() if token.special and token.content.strip() in tags}


def thinking_opened(tokenizer: Any, context: Sequence[int]) -> str:
    """The tag with which a rendered chat opens the thinking; empty where its end opens none."""
    return opens_thinking(tokenizer.decode(list(context[-16:]), skip_special_tokens=False))


def collate(
    rollouts: Sequence[Rollout],
    views: Mapping[str, View],
    tokenizer: Any,
    shapes: Shapes,
    groups: int = 1,
    multiple: int = 1,
) -> Batch:
    """One padded batch of rollouts: groups in order of appearance, every group padded to the largest.

    Args:
      rollouts: at least one.  Rows of a group share the context of every view that is not `per_rollout`, and of one
        that is where no group of the batch differs.
      views: whose contexts go into the batch.
      groups: pad to at least this many groups, so that a short batch keeps its shape, and to a `multiple` of groups,
        so that devices have equally many.

    Returns:
      A `Batch` of `B = groups * rows per group` rows; padding rows have `valid=False`.

    Raises:
      ValueError: rollouts of a group disagree about a shared context.
      FieldError: an example names none of the policies that a view chooses from.
      LengthError: a context does not fit.
    """
    members: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        members.setdefault(rollout.group, []).append(rollout)
    per_group, count = max(len(m) for m in members.values()), max(groups, len(members))
    count = -(-count // multiple) * multiple
    slots: list[Rollout | None] = []
    for rows in members.values():
        slots += [*rows, *[None] * (per_group - len(rows))]
    slots += [None] * ((count - len(members)) * per_group)

    length = padded_length(max(len(r.tokens) for r in rollouts), shapes.completion)
    fill = lambda default, dtype, of: rows_of(slots, length, default, dtype, of)
    per_row = lambda dtype, of, default=0: np.asarray([default if r is None else of(r) for r in slots], dtype)
    present = fill(False, bool, lambda r: [True] * len(r.tokens))
    trained = fill(False, bool, lambda r: [True] * len(r.tokens) if r.trained is None else r.trained)
    batch = Batch(
        completion=fill(0, np.int32, lambda r: r.tokens),
        present=present,
        mask=trained & present,
        behavior_logprobs=fill(0.0, np.float32, lambda r: r.logprobs),
        contexts={
            name: collate_context(slots, name, view, per_group, tokenizer, shapes).replace(
                member=members_of(slots, name, view, per_group), scores=collate_scores(slots, name, view, length)
            )
            for name, view in views.items()
        },
        reward=per_row(np.float32, lambda r: r.reward),
        group=np.repeat(np.arange(count, dtype=np.int32), per_group),
        source=per_row(np.int32, lambda r: r.source),
        finished=per_row(bool, lambda r: r.finished, True),
        valid=per_row(bool, lambda r: True, False),
        extras=collate_extras(slots, length),
    )
    return batch


def padded_length(longest: int, limit: int) -> int:
    """To how many tokens completions are padded: `limit`, or its half, quarter, ..., at least 128 from the quarter on.

    A program is compiled for each, so there are few.
    """
    length, longest = limit, max(longest, 1)
    while 2 * longest <= length and (length == limit or length >= 256):
        length //= 2
    return max(length, longest)


def rows_of(slots, length: int, default, dtype, of) -> np.ndarray:
    """`[B, length]` array with a row's values from the left and `default` after them."""
    array = np.full((len(slots), length), default, dtype)
    for row, rollout in zip(array, slots, strict=True):
        if rollout is not None:
            values = of(rollout)
            row[: len(values)] = values
    return array


def collate_context(slots, name: str, view: View, per_group: int, tokenizer: Any, shapes: Shapes) -> Context:
    """The context of one view: one per group, or, if `view.per_rollout` and a group does differ, one per row."""
    chats = [None if r is None else r.contexts.get(name) for r in slots]
    shared = 1 if view.per_rollout and not alike(chats, per_group) else per_group
    rows: list[Sequence[int]] = []
    longest = shapes.context
    own = lambda r: shapes.context if r.contexts[name] == r.example.prompt else shapes.lesson
    for start in range(0, len(chats), shared):
        some = range(start, min(start + shared, len(chats)))
        spoken = [chats[i] for i in some if chats[i] is not None]
        limit = next((own(slots[i]) for i in some if chats[i] is not None), shapes.context)
        longest = max(longest, limit)
        if any(c != spoken[0] for c in spoken[1:]):
            raise ValueError(
                f"view {name!r}: rollouts of one group read different contexts; declare it View(per_rollout=True)"
            )
        rows.append(encode_context(tokenizer, spoken[0], shapes, view.template, limit) if spoken else ())
    tokens, mask = left_pad(rows, longest)
    # A context nobody speaks still needs one real token, or its rows would attend to nothing.
    mask[~mask.any(-1), -1] = True
    return Context(tokens, mask, np.asarray([c is not None for c in chats]))


def members_of(slots, name: str, view: View, per_group: int) -> np.ndarray | None:
    """For a view that reads `ByField`: which of its policies reads each row, `[B]` int32, the same in all of a group.

    Raises: FieldError.
    """
    if not isinstance(view.policy, ByField):
        return None
    found = []
    for start in range(0, len(slots), per_group):
        rows = [r for r in slots[start : start + per_group] if r is not None and r.contexts.get(name) is not None]
        found += [member_of(rows[0].example, view.policy) if rows else 0] * per_group
    return np.asarray(found, np.int32)


def member_of(example: Example, policy: ByField) -> int:
    """The place, among the policies, of the one that an example's field names.  Raises `FieldError`."""
    value = str(example.meta.get(policy.field, ""))
    if value not in policy.policies:
        said = f"has {policy.field}={value!r}" if policy.field in example.meta else f"has no field {policy.field!r}"
        raise FieldError(
            f"example {example.id!r} {said}: it must name one of the teachers {', '.join(policy.policies)}"
        )
    return policy.policies.index(value)


def collate_scores(slots, name: str, view: View, length: int) -> Scores | None:
    """For a view that reads `Scored`: the scores of all rollouts, `[B, length, K]`, unused where there are none."""
    if not isinstance(view.policy, Scored):
        return None
    given = [None if r is None else r.scores.get(name) for r in slots]
    width = max((s.tokens.shape[-1] for s in given if s is not None), default=1)
    tokens = np.full((len(slots), length, width), UNUSED, np.int32)
    logprobs = np.zeros(tokens.shape, np.float32)
    for row, scores in enumerate(given):
        if scores is not None:
            count, entries = scores.tokens.shape
            tokens[row, :count, :entries], logprobs[row, :count, :entries] = scores
    return Scores(tokens, logprobs)


def alike(chats: Sequence[Messages | None], per_group: int) -> bool:
    """Whether some rows have a context and no group has two different ones: it need then be read only once."""
    groups = [[c for c in chats[i : i + per_group] if c is not None] for i in range(0, len(chats), per_group)]
    return any(groups) and all(c == spoken[0] for spoken in groups for c in spoken)


def collate_extras(slots, length: int) -> dict[str, np.ndarray]:
    """Extras of all rollouts: one value per token `[B, T]`, or one per row `[B]`; rows without one get 0 (False)."""
    names = {name for r in slots if r is not None for name in r.extras}
    arrays = {}
    for name in sorted(names):
        values = [None if r is None or name not in r.extras else np.asarray(r.extras[name]) for r in slots]
        sample = next(v for v in values if v is not None)
        dtype = {"b": bool, "i": np.int32}.get(sample.dtype.kind, np.float32)
        array = np.zeros((len(slots), length) if sample.ndim else (len(slots),), dtype)
        for i, value in enumerate(values):
            if value is not None and value.ndim:
                array[i, : len(value)] = value
            elif value is not None:
                array[i] = value
        arrays[name] = array
    return arrays
