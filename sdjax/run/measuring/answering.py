"""Answers to problems, written block by block into a folder: what ends a process at any time loses one block."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdjax.collect.contexts import question
from sdjax.collect.rollouts import sample, verdicts
from sdjax.engine.policies import Policy
from sdjax.engine.protocol import Protocol
from sdjax.run.folder import RunError
from sdjax.run.storage import places
from sdjax.types import Example, Rollout, Verdict

ANSWERS, ABOUT = "answers.jsonl", "evaluation.json"


class Answer(NamedTuple):
    """One judged answer."""

    text: str
    tokens: Sequence[int]
    finished: bool
    reward: float

    def right(self, success: float = 0.5) -> bool:
        """Whether it solves its problem."""
        return self.reward >= success


def answered(
    policy: Policy, examples: Sequence[Example], verify: Callable[[Example, str], Verdict], protocol: Protocol, key: Any
) -> list[list[Answer]]:
    """Judged answers to some problems, `protocol.samples` to each."""
    rollouts = sample(policy, examples, key, n=protocol.samples, context=question, sampling=protocol.sampling())
    return by_problem(rollouts, verdicts(verify, rollouts), protocol.samples)


def by_problem(rollouts: Sequence[Rollout], said: Sequence[Verdict], samples: int) -> list[list[Answer]]:
    """Rollouts in order, with their verdicts, as the answers to each problem."""
    each = [Answer(r.text, r.tokens, r.finished, float(v.reward)) for r, v in zip(rollouts, said, strict=True)]
    return [each[i : i + samples] for i in range(0, len(each), samples)]


def all_answers(
    policy: Policy,
    examples: Sequence[Example],
    verify: Callable[[Example, str], Verdict],
    protocol: Protocol,
    folder: Path,
    *,
    about: Mapping[str, Any],
    block: int,
    say: Callable[[str], None] = lambda message: None,
) -> list[list[Answer]]:
    """Answers to all problems: those in the folder, and the missing ones, which are written there `block` at a time.

    Block `b` is sampled with `fold_in(key(seed), b)`, whole: where some of it is missing all of it is done again, and a
    process that was killed leads to the same answers.  `about` says what is measured: another thing is never mixed in; the
    size of the blocks is that of the first call.

    Raises: RunError if the folder is of another evaluation, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        block = begun(folder, about, block)
        there = read(folder / ANSWERS, examples, protocol.samples)
        key, progress = jax.random.key(protocol.seed), Progress(len(examples), protocol.samples, len(there), say)
        for number, indices in enumerate(blocks(len(examples), block)):
            if all(i in there for i in indices):
                continue
            known = sum(i in there for i in indices)
            found = answered(policy, [examples[i] for i in indices], verify, protocol, jax.random.fold_in(key, number))
            append(folder / ANSWERS, {i: (examples[i], own) for i, own in zip(indices, found, strict=True)})
            there |= dict(zip(indices, found, strict=True))
            progress.went_on(len(indices) - known, found)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}: answers written before it are kept") from error
    return [there[i] for i in range(len(examples))]


def blocks(count: int, size: int) -> Iterator[range]:
    """Problems in order, `size` at a time."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def begun(folder: Path, about: Mapping[str, Any], block: int) -> int:
    """Writes what is measured into a new folder; returns the size of the folder's blocks.  Raises: RunError."""
    wanted, file = {"block": block, **json.loads(json.dumps(about))}, folder / ABOUT
    if not file.exists():
        places.replace_text(file, json.dumps(wanted, indent=1))
        return block
    try:
        there = places.read_json(file)
        changed = [name for name in wanted if name != "block" and there.get(name) != wanted[name]]
        size = int(there["block"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({error}): name another folder with --out") from error
    if changed:
        raise RunError(
            f"{folder} holds another evaluation ({', '.join(changed)} differ): name another folder with --out"
        )
    return size


def read(file: Path, examples: Sequence[Example], samples: int) -> dict[int, list[Answer]]:
    """The answers in a file by their problem's number; a last line that is not whole is cut off the file."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            index, answers = row["problem"], [Answer(**each) for each in row["answers"]]
            good = examples[index].id == row["id"] and len(answers) == samples
        except (ValueError, KeyError, TypeError, IndexError):
            good = False
        if not good:
            raise RunError(f"{file}, line {number} is damaged: remove the line, and its problem is answered again")
        found[index] = answers
    return found


def append(file: Path, rows: Mapping[int, tuple[Example, Sequence[Answer]]]) -> None:
    """Appends a block's answers, one line a problem, to the disk in one go."""
    lines = [
        json.dumps({"problem": i, "id": example.id, "answers": [as_json(each) for each in answers]}) + "\n"
        for i, (example, answers) in rows.items()
    ]
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("".join(lines))
        stream.flush()
        os.fsync(stream.fileno())


def as_json(answer: Answer) -> dict[str, Any]:
    """An answer as a file has it."""
    return {**answer._asdict(), "tokens": [int(token) for token in answer.tokens]}


class Progress:
    """Says how far the answers are, how fast they come and how long the rest takes."""

    def __init__(self, problems: int, samples: int, done: int, say: Callable[[str], None]):
        self.samples, self.total, self.done, self.say = samples, problems * samples, done * samples, say
        self.new, self.tokens, self.started = 0, 0, time.monotonic()
        if done:
            say(f"{self.done} of {self.total} answers were written before")

    def went_on(self, problems: int, found: Sequence[Sequence[Answer]]) -> None:
        """Some problems more have their answers."""
        self.done += problems * self.samples
        self.new += problems * self.samples
        self.tokens += sum(len(answer.tokens) for own in found for answer in own)
        took = time.monotonic() - self.started
        left = took / max(self.new, 1) * (self.total - self.done)
        rest = f", about {span(left)} left" if self.done < self.total else f" in {span(took)}"
        self.say(f"{self.done} of {self.total} answers, {self.tokens / max(took, 1e-9):.0f} tokens/s{rest}")


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
