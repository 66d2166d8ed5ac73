"""Data that a model helps to write: two contexts decoded together (MixSD), two models taking turns (TESSY), and files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.collect.rollouts import to_file
from sdjax.devices.sharding import to_host
from sdjax.engine import policies
from sdjax.engine.chats import encode_text
from sdjax.engine.generate import Sampling, first, generate
from sdjax.engine.lengths import encoded
from sdjax.engine.policies import Environment, Policy, Sample
from sdjax.engine.tokens import left_pad
from sdjax.types import Example, Messages, Method, Rollout

# ---- sampling ---------------------------------------------------------------------------------------------------------


def ask(policy: Policy, chats: Sequence[Messages], key: Array, *, slots: int, **how: Any) -> list[Sample]:
    """One completion after each chat, however many there are.

    Chats are padded to `slots`, twice or four times as many, and so on, from `shapes.rows` on to a multiple: a number
    that differs from call to call compiles few programs, and less than half of what is written is padding.
    """
    if not chats:
        return []
    while slots < min(len(chats), policy.shapes.rows):
        slots *= 2
    padded = [*chats, *[chats[-1]] * (-len(chats) % slots)]
    return [s for (s,) in policies.sample(policy, padded, key, **how)][: len(chats)]


def together(
    pair: Sequence[Policy],
    examples: Sequence[Example],
    contexts: Sequence[Sequence[Messages]],
    key: Array,
    *,
    n: int = 1,
    choose: Callable = first,
    sampling: Sampling | None = None,
) -> list[Rollout]:
    """`n` rollouts per example, decoded after several contexts at once; log-probs are the first policy's."""
    written = policies.sample(pair, contexts, key, n=n, choose=choose, sampling=sampling)
    return [
        Rollout(example, s.tokens, s.logprobs, s.text, group, finished=s.finished)
        for group, (example, samples) in enumerate(zip(examples, written, strict=True))
        for s in samples
    ]


def until_accepted(
    pair: Sequence[Policy],
    examples: Sequence[Example],
    contexts: Sequence[Sequence[Messages]],
    key: Array,
    accept: Callable[[Example, Rollout], bool],
    *,
    retries: int,
    choose: Callable,
    sampling: Sampling,
) -> tuple[list[str | None], int]:
    """Texts decoded after several contexts at once, each written anew until accepted, and how many attempts there were.

    Empty texts and those that the length limit cut are never accepted.  `None` after `1 + retries` attempts.  Every attempt has fresh coins and the same compiled shape.
    """
    texts: list[str | None] = [None] * len(examples)
    for attempt in range(1 + retries):
        missing = [i for i, text in enumerate(texts) if text is None]
        if not missing:
            return texts, attempt
        rows = (missing * len(examples))[: len(examples)]
        some = [[c[i] for i in rows] for c in contexts]
        own = jax.random.fold_in(key, attempt)
        written = together(pair, [examples[i] for i in rows], some, own, choose=choose, sampling=sampling)
        for i, rollout in zip(missing, written, strict=False):
            whole = rollout.finished and rollout.text
            texts[i] = rollout.text if whole and accept(examples[i], rollout) else None
    return texts, 1 + retries


# ---- two models taking turns ------------------------------------------------------------------------------------------

Boundary = Callable[[Sequence[str], Sequence[str]], list[tuple[int, bool]]]
"""`(texts so far, new chunks) -> (characters of the chunk that are kept, whether the other model goes on)`."""


ANSWER = 2**31 - 1
"""The number of the turn that is the answer; those before count from 0."""


class Writer(NamedTuple):
    """One of two authors: who writes, after what chats (one per sample), and where its turns end."""

    policy: Policy
    chats: Sequence[Messages]
    boundary: Boundary
    chunk: int = 20


class Trace(NamedTuple):
    """What two authors wrote: `(author, text)` in order, and the answer, which is the student's."""

    spans: tuple[tuple[str, str], ...]
    answer: str = ""

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.spans) + self.answer


def continued(
    policy: Policy,
    chats: Sequence[Messages],
    texts: Sequence[str],
    keys: Sequence[Array],
    *,
    length: int,
    slots: int,
    sampling: Sampling,
) -> list[tuple[str | None, bool]]:
    """At most `length` tokens more after each chat and the beginning of its answer: `(new text, whether it ended)`.

    Hand-over is by text, so policies of different vocabularies may take turns; `None` where the text does not survive
    the policy's tokenizer, or the chat does not fit.
    """
    encode = lambda text: encode_text(policy.tokenizer, text)
    decode = lambda tokens: policy.tokenizer.decode(tokens, skip_special_tokens=True)
    read = [encoded(policy.tokenizer, chat, policy.shapes, policy.template) for chat in chats]
    rows = [(ids or [0]) + encode(text) for ids, text in zip(read, texts, strict=True)]
    fill = lambda some: [*some, *[some[-1]] * (-len(some) % slots)]
    done = generate(
        (policy.model,),
        (policy.params,),
        (left_pad(fill(rows), max(policy.shapes.context, policy.shapes.lesson) + policy.shapes.completion),),
        jnp.stack(fill(list(keys))),
        sampling,
        jnp.asarray(policy.stop, jnp.int32),
        length,
        length=length,
    )
    tokens, present, finished = to_host((done.tokens, done.present, done.finished))
    found = []
    for i, text in enumerate(texts):
        whole = decode([*encode(text), *(int(t) for t in tokens[i][present[i]])])
        good = read[i] is not None and whole.startswith(text)
        found.append((whole[len(text) :] if good else None, bool(finished[i])))
    return found


def repetitive(text: str, *, tail: int = 1000, least: int = 3, most: int = 50, times: int = 8) -> bool:
    """Whether a fragment of `least` to `most` words stands `times` times in a row in the last `tail` characters.

    Fragments of symbols alone, such as a table's bars, do not count.
    Source: TESSY's code (arXiv:2604.14164), whose own exception for symbols never applies: its pattern allows no blank.
    """
    words = text[-tail:].split()
    spoken = [any(c.isalnum() for c in word) for word in words]
    for length in range(least, min(most, len(words) // times) + 1):
        equal = 0  # words in a row that are what stands one fragment before them
        for i in range(length, len(words)):
            equal = equal + 1 if words[i] == words[i - length] else 0
            if equal >= length * (times - 1) and any(spoken[i - length + 1 : i + 1]):
                return True
    return False


def whole_texts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those that a student may imitate: not cut, not empty, not `repetitive`.

    Source: the cold start of Li et al. 2026 (Rethinking OPD), arXiv:2604.13016, which rejects truncated and degenerate
    texts without saying what is degenerate.
    """
    return [r for r in rollouts if r.finished and r.text and not repetitive(r.text)]


@dataclasses.dataclass
class _Draft:
    """A trace under way."""

    spans: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    author: str = "student"
    state: str = "writing"  # "writing", "answering", "done" or "failed"

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.spans)

    def add(self, new: str | None, ended: bool, kept: tuple[int, bool], end: str) -> None:
        """Takes over what is kept of a chunk.  Only `end` closes the thinking; without it the student closes the text.

        After a stop token the text goes on, and fails where nothing more comes.
        """
        if new is None or (not new and (end or not ended)):
            self.state = "failed"
            return
        count, hand_over = kept
        text, closed = self.text + new[:count], ended and count >= len(new)
        if end and end in text:
            new, count, self.state = text[: text.index(end) + len(end)][len(self.text) :], None, "answering"
        elif closed and not end:
            self.state, hand_over = ("done", False) if self.author == "student" else (self.state, True)
        self.spans.append((self.author, new[:count]))
        if hand_over:
            self.author = {"student": "teacher", "teacher": "student"}[self.author]


def weave(
    writers: dict[str, Writer], key: Array, *, end: str = "</think>", sampling: Sampling, tries: int = 5
) -> list[Trace | None]:
    """Traces that "student" and "teacher" write in turns, beginning with the student; the answer after `end` is its own.

    Without `end` there is no separate answer, and it is the student's stop token that ends the text.

    Every turn is a chunk, cut where the author's `boundary` says that the other's kind of token comes next.  A trace
    that is too long for the student's completions, repeats itself, or does not survive a tokenizer is written anew, up
    to `tries` times in all; then it is `None`.  Sample `i` draws from `fold_in(fold_in(key, i), try)`.

    Source: TESSY (Huang et al. 2026), arXiv:2604.14164, Algorithm 1.
    """
    count = len(writers["student"].chats)
    traces: list[Trace | None] = [None] * count
    for attempt in range(tries):
        missing = [i for i in range(count) if traces[i] is None]
        keys = {i: jax.random.fold_in(jax.random.fold_in(key, i), attempt) for i in missing}
        for i, trace in _attempt(writers, keys, end, sampling, count).items():
            traces[i] = trace
    return traces


def _attempt(writers, keys: dict[int, Array], end: str, sampling: Sampling, slots: int) -> dict[int, Trace]:
    """One try at all samples of `keys`; those that failed are missing from the result."""
    drafts = {i: _Draft() for i in keys}
    student = writers["student"].policy
    limit = student.shapes.completion
    length = lambda text: len(student.tokenizer.encode(text, add_special_tokens=False)) + 1
    for turn in itertools.count():
        writing = {i: d for i, d in drafts.items() if d.state == "writing"}
        if not writing:
            break
        authors = {i: d.author for i, d in writing.items()}
        for name, writer in writers.items():
            own = [i for i in writing if authors[i] == name]
            if own:
                turn_keys = [jax.random.fold_in(keys[i], turn) for i in own]
                _take_turn(writer, {i: drafts[i] for i in own}, turn_keys, end, sampling, slots)
        for draft in writing.values():
            if draft.state == "writing" and (length(draft.text) > limit or repetitive(draft.text)):
                draft.state = "failed"
    answers = _answers(writers["student"], drafts, keys, sampling, slots)
    traces = {i: Trace(tuple(d.spans), answers.get(i, "")) for i, d in drafts.items() if d.state == "done"}
    return {i: t for i, t in traces.items() if length(t.text) <= limit and not repetitive(t.text)}


def _take_turn(writer: Writer, drafts: dict[int, _Draft], keys, end: str, sampling: Sampling, slots: int) -> None:
    """One chunk for each of the drafts, all of one author."""
    before = [d.text for d in drafts.values()]
    how = {"length": writer.chunk, "slots": slots, "sampling": sampling}
    found = continued(writer.policy, [writer.chats[i] for i in drafts], before, keys, **how)
    kept = writer.boundary(before, [new or "" for new, _ in found])
    for draft, (new, ended), cut in zip(drafts.values(), found, kept, strict=True):
        draft.add(new, ended, cut, end)


def _answers(student: Writer, drafts: dict[int, _Draft], keys, sampling: Sampling, slots: int) -> dict[int, str]:
    """The student's answers to all traces whose thinking has ended, which are then done."""
    open_ = {i: d for i, d in drafts.items() if d.state == "answering"}
    if not open_:
        return {}
    turn = [jax.random.fold_in(keys[i], ANSWER) for i in open_]
    how = {"length": student.policy.shapes.completion, "slots": slots, "sampling": sampling}
    chats, texts = [student.chats[i] for i in open_], [d.text for d in open_.values()]
    found = dict(zip(open_, continued(student.policy, chats, texts, turn, **how), strict=True))
    for i, draft in open_.items():
        draft.state = "done" if found[i][0] is not None and found[i][1] else "failed"
    return {i: text or "" for i, (text, _) in found.items()}


# ---- files ------------------------------------------------------------------------------------------------------------


def to_dataset(
    path: str | Path,
    method: Method,
    environment: Environment,
    examples: Sequence[Example],
    key: Array,
    *,
    size: int = 8,
) -> int:
    """Runs a method's host half over examples, `size` at a time, and writes its rows as JSON lines; returns how many.

    `sdjax.tasks.data` reads the file, and `sft` then trains on it: the text is each example's `solution`.
    """
    rows, memory = [], method.memory
    for number, start in enumerate(range(0, len(examples), size)):
        own = jax.random.fold_in(key, number)
        found, memory = method.collect(environment, examples[start : start + size], own, memory)
        rows += found
    to_file(path, rows)
    return len(rows)
