"""Rollouts as a run leaves them for `sdjax report`: one JSON line each, with everything the token microscope shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.collect.diagnostics import epistemic_count, per_thousand
from sdjax.engine.policies import grouped
from sdjax.tasks.completions import split
from sdjax.types import STUDENT, ByField, Rollout, Scored, View

ROLLOUTS = "rollouts.jsonl"

LONGEST_CHARACTER = 4
"""Bytes of one character in UTF-8, and so the most tokens it can be spread over."""


def append_rollouts(
    path: Path, step: int, rollouts: Sequence[Rollout], tokenizer: Any, views: Mapping[str, View], most: int = 4
) -> None:
    """Appends the first whole groups of a step, at least `most` rollouts if there are, at most `4 most`."""
    templates = {name: dict(view.template) for name, view in views.items() if view.template}
    with open(path, "a", encoding="utf-8") as file:
        for rollout, rewards in first_groups(rollouts, most):
            line = {
                "step": step,
                **described(rollout, tokenizer),
                "rewards": rewards,
                "policies": policies_of(views, rollout),
                "templates": templates,
            }
            file.write(json.dumps(line, allow_nan=False) + "\n")


def policies_of(views: Mapping[str, View], rollout: Rollout) -> dict[str, str]:
    """Who reads a rollout, by view: a policy's or a server's name, by field that of the example's own."""

    def named(policy: str | ByField | Scored) -> str:
        if isinstance(policy, ByField):
            return str(rollout.example.meta.get(policy.field, ""))
        return policy.server if isinstance(policy, Scored) else policy

    return {name: named(view.policy) for name, view in views.items()}


def first_groups(rollouts: Sequence[Rollout], most: int) -> list[tuple[Rollout, list[float]]]:
    """The rollouts of the first groups, each with the rewards of its whole group, which advantages come from."""
    kept: list[tuple[Rollout, list[float]]] = []
    for rows in grouped(rollouts).values():
        if len(kept) >= most:
            break
        kept += [(row, [r.reward for r in rows]) for row in rows]
    return kept[: 4 * most]


def row(step: int, rollout: Rollout) -> dict[str, Any]:
    """A rollout as a row of a table for people."""
    read = rollout.contexts.get("student") or rollout.example.prompt
    prompt = "\n".join(f"[{turn['role']}] {turn['content']}" for turn in read)
    told = {"reward": float(rollout.reward), "tokens": len(rollout.tokens), "feedback": rollout.feedback or ""}
    return {"step": step, "example": rollout.example.id, "prompt": prompt, "completion": rollout.text, **told}


def described(rollout: Rollout, tokenizer: Any) -> dict[str, Any]:
    """A rollout as JSON has it.  `pieces` are the tokens' texts; numbers that are not finite become `null`."""
    chat = lambda turns: None if turns is None else [dict(turn) for turn in turns]
    return {
        "id": rollout.example.id,
        "group": rollout.group,
        "source": rollout.source,
        "reward": rollout.reward,
        "finished": rollout.finished,
        "feedback": rollout.feedback,
        "text": rollout.text,
        "tokens": [int(t) for t in rollout.tokens],
        "pieces": pieces(tokenizer, rollout.tokens),
        "logprobs": numbers(rollout.logprobs),
        "trained": None if rollout.trained is None else [bool(t) for t in rollout.trained],
        "turns": [{**turn._asdict(), "observations": chat(turn.observations)} for turn in rollout.turns],
        "contexts": {name: chat(turns) for name, turns in rollout.contexts.items()},
        "extras": {name: numbers(value) for name, value in rollout.extras.items()},
    }


def numbers(values: Any) -> Any:
    """An array or a number as JSON has it: booleans and integers stay, floats keep six digits."""
    array = np.asarray(values)
    if array.dtype.kind in "bui":
        return array.tolist()
    short = lambda x: float(f"{x:.6g}") if math.isfinite(x) else None
    return short(float(array)) if array.ndim == 0 else [short(float(x)) for x in array.ravel()]


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to the text before it, special tokens included.

    A character may be spread over several tokens: the last of them brings it, those before it bring nothing.
    """
    found, start, told, ids = [], 0, 0, [int(t) for t in tokens]
    decode = lambda some: tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:told]), decode(ids[start:end])
        waiting = now.endswith("\ufffd") and end < len(ids) and end - told < LONGEST_CHARACTER
        found.append("" if waiting else now[len(before) :])
        if not waiting:
            start, told = told, end
    return found


def hedging(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Epistemic words per completion and per 1,000 tokens of the student's own rollouts; nothing without tokens.

    Where a text has thinking, `epistemic_in_answer` counts those after it: doubts that the reader of the answer meets.
    Source: Kim et al. 2026, arXiv:2603.24472, `E(y)`.
    """
    own = [r for r in rollouts if r.source == STUDENT]
    tokens = sum(len(r.tokens) for r in own)
    if not tokens:
        return {}
    count = sum(epistemic_count(r.text) for r in own)
    found = {"epistemic": count / len(own), "epistemic_per_thousand": per_thousand(count, tokens)}
    parts = [split(r.text) for r in own]
    if not any(part.thinking for part in parts):
        return found
    return found | {"epistemic_in_answer": sum(epistemic_count(part.answer) for part in parts) / len(own)}


def measured(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The means of what the verifier measured of the student's own rollouts."""
    own = [r for r in rollouts if r.source == STUDENT]
    names = sorted({name for r in own for name in r.measures})
    return {name: float(np.mean([r.measures.get(name, 0.0) for r in own])) for name in names}
