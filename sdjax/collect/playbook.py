"""A playbook: short lessons that a policy writes about its failures and reads again as a teacher (RESD).

A playbook is a JSON-able dictionary; every function returns a new one, and the same inputs give the same playbook.
Source: Zhang et al. 2026 (RESD), arXiv:2605.12741, and its code; the format is that of ACE.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import Array

from sdjax.collect.contexts import attempt_text, question, rewrite_last, without_thinking
from sdjax.collect.synthesis import ask
from sdjax.engine.chats import render
from sdjax.engine.policies import Environment
from sdjax.engine.tokens import LengthError, shorten
from sdjax.types import Messages, Rollout

Playbook = dict[str, Any]

SECTIONS = {
    "STRATEGIES": "str",
    "FORMULAS": "frm",
    "CODE": "cod",
    "MISTAKES": "err",
    "HEURISTICS": "heu",
    "CONTEXT": "ctx",
    "OTHERS": "oth",
}
"""The seven fixed sections and what their entries' ids begin with."""


def empty() -> Playbook:
    """A playbook without entries: `updates` counts context updates, `issued` the ids ever given."""
    return {"entries": [], "issued": 0, "updates": 0}


def render_text(playbook: Playbook) -> str:
    """One line per entry under its section, `[slug-00001] helpful=h harmful=d :: text`; empty for an empty playbook."""
    lines = []
    for section in SECTIONS:
        entries = [e for e in playbook["entries"] if e["section"] == section]
        lines += [f"## {section}"] if entries else []
        lines += [f"[{e['id']}] helpful={e['helpful']} harmful={e['harmful']} :: {e['text']}" for e in entries]
    return "\n".join(lines)


def tagged(playbook: Playbook, tags: Mapping[str, str]) -> Playbook:
    """Counts "helpful" and "harmful" tags of entries by id.  Neutral tags and unknown ids change nothing."""

    def counted(entry):
        tag = tags.get(entry["id"])
        if tag not in ("helpful", "harmful"):
            return entry
        return {**entry, tag: entry[tag] + 1, "tagged": playbook["updates"]}

    return {**playbook, "entries": [counted(e) for e in playbook["entries"]]}


def extended(playbook: Playbook, additions: Sequence[Mapping[str, str]]) -> Playbook:
    """With new entries, `{"section": ..., "text": ...}`.  Unknown sections go to OTHERS; ids are never used again."""
    entries, issued = list(playbook["entries"]), playbook["issued"]
    for addition in additions:
        text = " ".join(str(addition.get("text", "")).split())
        if text:
            issued += 1
            section = str(addition.get("section", "")).upper()
            section = section if section in SECTIONS else "OTHERS"
            name = f"{SECTIONS[section]}-{issued:05d}"
            new = {"id": name, "section": section, "text": text, "helpful": 0, "harmful": 0}
            entries.append({**new, "tagged": playbook["updates"]})
    return {**playbook, "entries": entries, "issued": issued}


def concise(playbook: Playbook, rule: Literal["prioritized", "staleness"], cap: int | None = None) -> Playbook:
    """Without what does not help: unused (never tagged) and harmful (`harmful >= helpful`) entries.

    "staleness" keeps unused ones for one more update.  With a `cap`, helpful
    ones go too: at random, or those tagged longest ago first.  Chance is the update counter's: replays agree.
    """
    now = playbook["updates"]
    unused = lambda e: e["helpful"] + e["harmful"] == 0
    recent = lambda e: rule == "staleness" and unused(e) and now - e["tagged"] <= 1
    entries = [e for e in playbook["entries"] if e["helpful"] > e["harmful"] or recent(e)]
    if cap is not None and len(entries) > cap:
        order = random.Random(now).sample(entries, len(entries))
        if rule == "staleness":
            order.sort(key=lambda e: -e["tagged"])
        kept = {e["id"] for e in order[:cap]}
        entries = [e for e in entries if e["id"] in kept]
    return {**playbook, "entries": entries}


def pruned(playbook: Playbook, rule: Literal["prioritized", "staleness"], cap: int, every: int) -> Playbook:
    """`concise` if it is due: after every `every`-th update, or when there are more than `cap` entries.

    The cap is enforced in the second case only.
    """
    over = len(playbook["entries"]) > cap
    due = every and playbook["updates"] > 0 and playbook["updates"] % every == 0
    return concise(playbook, rule, cap if over else None) if over or due else playbook


# ---- what the policy is asked, and what its replies say ------------------------------------------------------------------


def asking(messages: Messages, parts: Mapping[str, str | None], instruction: str) -> Messages:
    """A question followed by titled parts (those that are not empty) and an instruction."""
    blocks = [f"{title}\n{text}" for title, text in parts.items() if text]
    return rewrite_last(messages, "\n\n".join([messages[-1]["content"], *blocks, instruction]))


def fitted(messages: Messages, parts: Sequence[str | None], environment: Environment) -> Messages:
    """The chat cut to the context's length: of the parts that occur in it, the first is cut from its end, then the next.

    What a policy writes has no bounded length; the question and the instruction are never cut.
    """
    live = environment.live
    count = lambda m: len(render(live.tokenizer, m))
    for part in filter(None, parts):
        messages = (*messages[:-1], {**messages[-1], "privileged": part})
        try:
            return shorten(messages, count, live.shapes.context)
        except LengthError:
            messages = rewrite_last(messages, messages[-1]["content"].replace(part, "", 1))
    return messages


REFLECT = (
    'Say what went wrong. Reply with JSON: {"reasoning": "", "error": "", "root_cause": "", "right_approach": "", '
    '"key_insight": "", "tags": {"entry id": "helpful, harmful or neutral"}}'
)
TAG = 'The attempt was correct. Reply with JSON: {"tags": {"entry id": "helpful, harmful or neutral"}}'
CURATE = (
    "Feedback will not be available later. Add new, non-redundant, actionable lessons to the playbook, or none. Reply "
    'with JSON: {"additions": [{"section": "' + ", ".join(SECTIONS) + '", "text": ""}]}'
)


def parsed(text: str) -> dict[str, Any]:
    """The JSON object in a reply; an empty one where there is none."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        value = json.loads(found.group()) if found else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def reflection_of(text: str) -> str:
    """What a reflection says: its diagnosis and advice, or the whole reply where it is not JSON."""
    reply = parsed(text)
    said = [str(reply[k]) for k in ("error", "root_cause", "right_approach", "key_insight") if reply.get(k)]
    return "\n".join(said) if reply else text.strip()


def tags_of(text: str) -> dict[str, str]:
    """The tags of a reply."""
    tags = parsed(text).get("tags")
    return {str(k): str(v) for k, v in tags.items()} if isinstance(tags, dict) else {}


def additions_of(text: str) -> list[dict[str, str]]:
    """The entries that a reply adds; what is not a list of objects is skipped."""
    additions = parsed(text).get("additions")
    return [a for a in additions if isinstance(a, dict)] if isinstance(additions, list) else []


# ---- one update -----------------------------------------------------------------------------------------------------------

Write = Callable[[Environment, Sequence[Messages], Array], list[str]]
"""Who reflects and curates: `(environment, chats, key) -> replies`."""


def policy_writes(environment: Environment, chats: Sequence[Messages], key: Array) -> list[str]:
    """The live policy's replies."""
    return [without_thinking(s.text) for s in ask(environment.live, chats, key, slots=8)]


class Rules(NamedTuple):
    """What is written, and how the playbook is pruned."""

    reflection: bool = True
    playbook: bool = True
    cap: int = 200
    prune: Literal["prioritized", "staleness"] = "staleness"
    every: int = 4


def updated(
    environment: Environment, rollouts: Sequence[Rollout], key: Array, playbook: Playbook, rules: Rules, write: Write
) -> tuple[dict[int, str], Playbook]:
    """Reflections on the failures (by row; rewards below 1), and the playbook after tags, additions and pruning.

    All replies see the playbook as it was, and all additions land together.
    """
    playbook = pruned(playbook, rules.prune, rules.cap, rules.every)
    shown, keys = render_text(playbook) if rules.playbook else "", jax.random.split(key, 3)
    wrong = [i for i, r in enumerate(rollouts) if r.reward < 1.0] if rules.reflection or rules.playbook else []
    right = [i for i, r in enumerate(rollouts) if r.reward >= 1.0] if shown else []

    def replies(rows, instruction, own, reflections=None):
        chats = [_asked(environment, rollouts[i], shown, instruction, (reflections or {}).get(i)) for i in rows]
        return dict(zip(rows, write(environment, chats, own), strict=True)) if rows else {}

    said = replies(wrong, REFLECT, keys[0])
    praised = replies(right, TAG, keys[1])
    reflections = {i: reflection_of(text) for i, text in said.items()}
    curated = replies(wrong, CURATE, keys[2], reflections) if rules.playbook else {}
    for text in [*said.values(), *praised.values()]:
        playbook = tagged(playbook, tags_of(text))
    playbook = extended(playbook, [a for text in curated.values() for a in additions_of(text)])
    if len(playbook["entries"]) > rules.cap:
        playbook = concise(playbook, rules.prune, rules.cap)
    return (reflections if rules.reflection else {}), {**playbook, "updates": playbook["updates"] + 1}


def _asked(environment: Environment, r: Rollout, shown: str, instruction: str, reflection: str | None) -> Messages:
    attempt = attempt_text(r.text)
    parts = {"Playbook:": shown, "Attempt:": attempt, "Feedback:": r.feedback, "Reflection:": reflection}
    chat = asking(question(r.example), parts, instruction)
    return fitted(chat, [shown, attempt, reflection, r.feedback], environment)


def teacher_context(
    environment: Environment, r: Rollout, shown: str, reflection: str | None, solution: str | None
) -> Messages | None:
    """What the self-teacher reads; `None` without solution, feedback and reflection.  A solution hides raw feedback."""
    feedback = r.feedback if solution is None and r.reward < 1.0 else None
    if not (solution or feedback or reflection):
        return None
    attempt = attempt_text(r.text)
    parts = {
        "Playbook of earlier lessons:": shown,
        "Your previous attempt:": attempt,
        "Feedback on it:": feedback,
        "Reflection on it:": reflection,
        "A successful attempt:": solution,
    }
    chat = asking(question(r.example), parts, "Now answer the question correctly.")
    return fitted(chat, [shown, attempt, reflection, solution, feedback], environment)
