"""Recorded rollouts as the page's data: pieces of text, signals, marks, prompts; plain values for JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.collect.diagnostics import EPISTEMIC
from sdjax.report.microscope import Scored
from sdjax.tasks.completions import split

ABOUT = {
    "log_ratio": (
        "log-ratio, teacher − student",
        "log q − log p of the token: positive where the teacher likes it more",
    ),
    "credit": ("credit", "−∂ loss / ∂ log p of the token, before averaging: what the method pushes it by"),
    "advantage": ("advantage of the attempt", "reward − mean reward of its group, the same for every token"),
    "forward_kl": ("forward KL", "KL(teacher ‖ student) of the whole distributions, in nats"),
    "reverse_kl": ("reverse KL", "KL(student ‖ teacher) of the whole distributions, in nats"),
    "jsd": ("Jensen–Shannon divergence", "of the whole distributions, weights one half, in nats"),
    "student_entropy": ("student’s entropy", "in nats, over the whole vocabulary"),
    "teacher_entropy": ("teacher’s entropy", "in nats, over the whole vocabulary"),
    "student": ("student’s log-probability", "of the token, saved parameters"),
    "teacher": ("teacher’s log-probability", "of the token, saved parameters"),
    "recorded": ("log-probability when sampled", "of the token, recorded in its own step"),
}
"""What the signals are called and what they are, in the order in which they are offered."""


def page_data(
    runs: Mapping[str, tuple[Sequence[dict[str, Any]], Sequence[Scored] | None, Any]], after: Mapping[str, int]
) -> dict[str, Any]:
    """Everything the microscope shows.

    Args:
      runs: by label, recorded rollouts, the same ones scored (or `None`) and the tokenizer (read only where scored).
      after: by label, the step whose parameters scored them.
    """
    chats, vocabulary = Table(), Table()
    rollouts = [
        entry(number, line, None if scored is None else scored[i], tokenizer, chats, vocabulary)
        for number, (lines, scored, tokenizer) in enumerate(runs.values())
        for i, line in enumerate(lines)
    ]
    names = {name for rollout in rollouts for name in rollout["signals"]}
    ordered = [*(n for n in ABOUT if n in names), *sorted(names - {*ABOUT})]
    signals = {
        name: described(name, [r["signals"][name] for r in rollouts if name in r["signals"]]) for name in ordered
    }
    return {
        "runs": [{"label": label, "after": after.get(label)} for label in runs],
        "signals": signals,
        "chats": chats.entries,
        "vocabulary": vocabulary.entries,
        "rollouts": rollouts,
    }


class Table:
    """Values by number, each kept once."""

    def __init__(self):
        self.entries: list[Any] = []
        self.numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        key = repr(value)
        if key not in self.numbers:
            self.numbers[key] = len(self.entries)
            self.entries.append(value)
        return self.numbers[key]


def entry(run: int, line: Mapping[str, Any], scored: Scored | None, tokenizer: Any, chats: Table, words: Table) -> dict:
    """One rollout."""
    rewards = [r for r in line["rewards"] if r is not None]
    reward = line.get("reward")
    length = len(line["tokens"])
    signals = {"recorded": line["logprobs"]} if any(x for x in line["logprobs"]) else {}
    if reward is not None and len(rewards) > 1:
        signals["advantage"] = [reward - float(np.mean(rewards))] * length
    signals |= {f"recorded {n}": v for n, v in per_token(line, length) if not is_mask(v)}
    signals |= scored.signals if scored else {}
    masks = {n: [int(x) for x in v] for n, v in per_token(line, length) if is_mask(v)}
    return {
        "run": run,
        "step": line["step"],
        "id": line["id"],
        "reward": reward,
        "rewards": rewards,
        "finished": line["finished"],
        "feedback": line.get("feedback"),
        "facts": answered(line["text"]) | {n: v for n, v in line["extras"].items() if not isinstance(v, list)},
        "ids": line["tokens"],
        "pieces": line["pieces"],
        "skipped": [i for i, trained in enumerate(line.get("trained") or []) if not trained],
        "hedges": hedges(line["pieces"]),
        "spans": masks,
        "chats": {name: None if chat is None else chats.number(chat) for name, chat in line["contexts"].items()},
        "signals": {name: [rounded(x) for x in values] for name, values in signals.items()},
        "alternatives": named(scored, line["tokens"], tokenizer, words) if scored else None,
    }


def answered(text: str) -> dict[str, str]:
    """What the answer after the thinking is; nothing where there is no thinking."""
    thinking, answer, is_open = split(text)
    if not thinking:
        return {}
    return {"answer": "none: the thinking does not end" if is_open else answer or "none after the thinking"}


def per_token(line: Mapping[str, Any], length: int) -> Iterable[tuple[str, list]]:
    """The recorded extras that have a value per token."""
    return [(n, v) for n, v in line["extras"].items() if isinstance(v, list) and len(v) == length]


def is_mask(values: Sequence[Any]) -> bool:
    """Whether a list marks tokens rather than measuring them."""
    return all(isinstance(x, bool) for x in values)


def rounded(value: float | None, decimals: int = 3) -> float | None:
    """A number as short as can be seen; `None` for one that is not finite."""
    return None if value is None or not np.isfinite(value) else round(value, decimals) + 0.0


def named(scored: Scored, tokens: Sequence[int], tokenizer: Any, words: Table) -> list[list[list]]:
    """Alternatives as `[text's number, student, teacher]`, with a further 1 for the token that was sampled."""
    text = {i: spelled(tokenizer, i) for i in {a[0] for some in scored.alternatives for a in some}}
    return [
        [
            [words.number(text[i]), rounded(student, 2), rounded(teacher, 2), *([1] if i == token else [])]
            for i, student, teacher in some
        ]
        for token, some in zip(tokens, scored.alternatives, strict=True)
    ]


def spelled(tokenizer: Any, token: int) -> str:
    """The text of one token; a part of a character by its name in the vocabulary."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text


def hedges(pieces: Sequence[str], words: Sequence[str] = EPISTEMIC) -> list[int]:
    """Which tokens have a part in one of the words, anywhere in the text and whatever its case."""
    ends = np.cumsum([len(piece) for piece in pieces])
    found = re.finditer("|".join(map(re.escape, words)), "".join(pieces), re.IGNORECASE)
    return sorted(
        {
            i
            for match in found
            for i in range(int(np.searchsorted(ends, match.start(), "right")), len(pieces))
            if ends[i] - len(pieces[i]) < match.end() and pieces[i]
        }
    )


def described(name: str, values: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """What a signal is called, what it is, and its scale: `most` is what the strongest colour stands for."""
    plain = name.replace("value of", "loss term:").replace("weight of", "weight of term:")
    label, about = ABOUT.get(name, (plain, "as the method computes it, per token, before averaging"))
    known = np.array([x for some in values for x in some if x is not None], float)
    # Nearly all tokens are near zero: the scale ends where one in a hundred is.
    most = float(np.quantile(np.abs(known), 0.99)) if len(known) else 1.0
    return {
        "label": label,
        "about": about,
        "signed": bool((known < 0).any() and (known > 0).any()),
        "most": most or 1.0,
    }


def chosen(lines: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The rollouts of whole steps, about `most` of them, spread evenly over the run, first and last step included."""
    steps = sorted({line["step"] for line in lines})
    if len(lines) <= most:
        return list(lines)
    count = max(1, most * len(steps) // len(lines))
    kept = {steps[round(i)] for i in np.linspace(len(steps) - 1, 0, count)}
    return [line for line in lines if line["step"] in kept]
