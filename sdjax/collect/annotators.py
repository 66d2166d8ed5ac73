"""Annotators: which spans of an answer matter, `(environment, rollouts, key) -> [spans of each rollout]`.

A rule, the policy itself, or any callable: an annotator sees problem, answer and verdict, never log-probabilities.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax import Array

from sdjax.collect.contexts import question, rewrite_last
from sdjax.collect.rollouts import RolloutError
from sdjax.collect.synthesis import ask
from sdjax.engine.generate import GREEDY
from sdjax.engine.policies import Environment
from sdjax.types import Messages, Rollout

MOST_SPANS, MOST_SEGMENTS = 3, 3
"""An answer has at most so many spans, each of at most so many consecutive segments (TRACE, arXiv:2605.10194)."""

EQUATION = re.compile(r"(-?\d+)\s*([-+*])\s*(-?\d+)\s*=\s*(-?\d+)")
KINDS = {
    "final verification": r"\b(check|verify|confirm)",
    "case split": r"\b(case|if|otherwise)\b",
    "substitution": r"\b(substitut|plug)",
    "key formula": r"=|->",
}
"""Kinds of decisive steps and what gives them away, the most telling first."""


class Span(NamedTuple):
    """Characters `start` to `end` of a rollout's text, and what kind of step they are."""

    start: int
    end: int
    kind: str


Annotator = Callable[[Environment, Sequence[Rollout], Array], Sequence[Sequence[Span]]]
Mask = Literal["annotated", "random", "inverted", "all"]


def segments(text: str) -> list[tuple[int, int]]:
    """Where the lines and sentences of a text lie, without the blanks around them."""
    cuts = [0, *(m.end() for m in re.finditer(r"\n+|[.!?;]\s+", text)), len(text)]
    parts = [(start, text[start:end]) for start, end in itertools.pairwise(cuts)]
    lead = lambda part: len(part) - len(part.lstrip())
    return [(start + lead(part), start + len(part.rstrip())) for start, part in parts if part.strip()]


def right(equation: re.Match) -> bool:
    """Whether an equation between whole numbers holds."""
    left, sign, other, result = equation.groups()
    a, b = int(left), int(other)
    return int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]


def by_rule(
    environment: Environment, rollouts: Sequence[Rollout], key: Array, success: float = 0.5
) -> list[list[Span]]:
    """Decisive steps of correct answers by their words; of wrong ones the first false equation, else the last segment.

    Correct is a reward of at least `success`.
    """
    return [key_steps(r.text) if r.reward >= success else first_error(r.text) for r in rollouts]


def key_steps(text: str) -> list[Span]:
    """The first segments that look like one of `KINDS`, or the last segment."""
    said = [(span, text[slice(*span)].lower()) for span in segments(text)]
    kinds = ((span, next((k for k, pattern in KINDS.items() if re.search(pattern, s)), None)) for span, s in said)
    found = [Span(*span, kind) for span, kind in kinds if kind is not None][:MOST_SPANS]
    return found or [Span(*span, "conclusion") for span, _ in said[-1:]]


def first_error(text: str) -> list[Span]:
    """The first false equation, or the last segment."""
    wrong = next((e for e in EQUATION.finditer(text) if not right(e)), None)
    if wrong is not None:
        return [Span(*wrong.span(), "arithmetic slip")]
    return [Span(*span, "premature conclusion") for span in segments(text)[-1:]]


def by_policy(name: str = "live", success: float = 0.5) -> Annotator:
    """The policy `name` names decisive or wrong steps of numbered segments, as JSON; what cannot be read marks nothing.

    "live" is the student itself; an external policy may have another vocabulary, since all is text.  It is told which
    answers are correct, those with a reward of at least `success`.
    The annotator raises RolloutError where there is no policy of that name.
    """

    def annotate(environment: Environment, rollouts: Sequence[Rollout], key: Array) -> list[list[Span]]:
        if name not in environment.policies:
            known = ", ".join(sorted(environment.policies))
            raise RolloutError(f"annotator={name}: there is no policy of this name; there are {known}, and the rule")
        replies = ask(
            environment.policies[name], [request(r, success) for r in rollouts], key, slots=8, sampling=GREEDY
        )
        return [parse(said.text, r.text) for said, r in zip(replies, rollouts, strict=True)]

    return annotate


def request(rollout: Rollout, success: float = 0.5) -> Messages:
    """What an annotator is asked about a rollout: problem, numbered segments and outcome."""
    steps = "\n".join(f"[{i}] {rollout.text[a:b]}" for i, (a, b) in enumerate(segments(rollout.text)))
    correct = rollout.reward >= success
    wanted, outcome = ("decisive steps", "correct") if correct else ("root causes of the error", "wrong")
    messages = question(rollout.example)
    content = (
        f"{messages[-1]['content']}\n\nA solution in numbered segments, known to be {outcome}:\n\n{steps}\n\n"
        f"Name its {wanted}, at most {MOST_SPANS}, as a JSON list such as "
        '[{"first": 0, "last": 1, "kind": "case split"}]; an empty list if there are none.'
    )
    return rewrite_last(messages, content, steps)


def parse(reply: str, text: str) -> list[Span]:
    """The spans that a reply names.  Entries that make no sense, or name no kind of step, are left out."""
    where, found = segments(text), re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        entries = json.loads(found.group()) if found else []
    except json.JSONDecodeError:
        return []
    spans = []
    for entry in entries:
        try:
            first, last, kind = int(entry["first"]), int(entry["last"]), str(entry["kind"]).strip()
        except (TypeError, KeyError, ValueError):
            continue
        if kind and 0 <= first <= last < len(where) and last - first < MOST_SEGMENTS:
            spans.append(Span(where[first][0], where[last][1], kind))
    return spans[:MOST_SPANS]


def marked(rollout: Rollout, spans: Sequence[Span], tokenizer: Any) -> np.ndarray:
    """Which tokens of a rollout touch one of the spans: `[T]` bool.

    Tokens are decoded one by one and found in the text from left to right; one that is not found touches nothing.
    """
    place, chosen = 0, np.zeros(len(rollout.tokens), bool)
    for i, token in enumerate(rollout.tokens):
        piece = tokenizer.decode([token], skip_special_tokens=True).strip()
        start = rollout.text.find(piece, place) if piece else -1
        # Not far ahead: a piece that the text spells otherwise must not skip to its next occurrence.
        if 0 <= start <= place + 8:
            place = start + len(piece)
            chosen[i] = any(s.start < place and start < s.end for s in spans)
    return chosen


def ablated(marks: np.ndarray, mask: Mask, share: float, chance: np.random.Generator) -> np.ndarray:
    """The tokens that a control marks instead of those that an annotator marked: `[T]` bool -> `[T]` bool.

    "random": `floor(share * T)` of all tokens; "inverted": as many of those that are not marked; "all": every token.
    Where nothing is marked nothing will be.
    Source: the mask ablations of TRACE, arXiv:2605.10194 (random 25 %, inverted 25 %, all tokens).
    """
    if mask == "annotated" or not marks.any():
        return marks
    if mask == "all":
        return np.ones_like(marks)
    places = np.flatnonzero(~marks) if mask == "inverted" else np.arange(len(marks))
    chosen = chance.permutation(places)[: int(share * len(marks))]
    return np.isin(np.arange(len(marks)), chosen)


def step_numbers(tokens: Sequence[int], tokenizer: Any) -> np.ndarray:
    """The number of the step, from 0, that each token belongs to: `[T]` int.  Blank lines end a step."""
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    starts = np.cumsum([0, *map(len, pieces)])[: len(pieces)]
    ends = [found.end() for found in re.finditer(r"\n\s*\n", "".join(pieces))]
    return np.searchsorted(ends, starts, side="right").astype(np.int32)
