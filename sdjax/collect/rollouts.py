"""Rollouts on the host: sampling answers to examples, judging them, finding a peer's success, files of rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax import Array

from sdjax.collect.contexts import question
from sdjax.collect.conversations import converse
from sdjax.devices.processes import by_first, divided_parts
from sdjax.engine import policies
from sdjax.engine.chats import encode_text
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment, Policy, grouped
from sdjax.engine.tokens import encode_context, thinking_opened
from sdjax.errors import InputError
from sdjax.tasks import judging
from sdjax.tasks.completions import split
from sdjax.tasks.data.rows import TURN
from sdjax.tasks.judging import Case
from sdjax.types import REFERENCE, STUDENT, Example, Messages, Rollout, Verdict


class RolloutError(InputError, RuntimeError):
    """No batch can be collected; the message says why and what to do."""


def sample(
    policy: Policy,
    examples: Sequence[Example],
    key: Array,
    *,
    n: int = 1,
    context: Callable[[Example], Messages] = question,
    sampling: Sampling | None = None,
    source: int = STUDENT,
    limit: int | None = None,
) -> list[Rollout]:
    """`n` rollouts of each example, one group per example, in order.  `context` is what the policy reads.

    Where the policy has a world, each is a conversation with it (`sdjax.collect.conversations`).
    """
    if policy.world is not None:
        how = {"sampling": sampling or Sampling(), "limit": limit or policy.shapes.completion}
        return converse(policy, examples, [context(e) for e in examples], key, n=n, source=source, **how)
    written = policies.sample(policy, [context(e) for e in examples], key, n=n, sampling=sampling, limit=limit)
    age = lambda s: {} if s.staleness is None else {"staleness": s.staleness}
    return [
        Rollout(example, s.tokens, s.logprobs, s.text, group, source=source, finished=s.finished, extras=age(s))
        for group, (example, samples) in enumerate(zip(examples, written, strict=True))
        for s in samples
    ]


def judge(environment: Environment, rollouts: Sequence[Rollout]) -> list[Rollout]:
    r"""The rollouts with all that the verifier says, and with what a control adds for advantages (`Rollout.shaped`).

    With a verifier that reads answers, a completion that was cut off earns nothing without a complete, marked answer
    (`\boxed{}`, `<answer>`) after its thinking; verdicts that other processes work out are asked for side by side (see
    `sdjax.tasks.judging`).
    """
    said = [
        {**verdict._asdict(), "reward": float(verdict.reward)} for verdict in verdicts(environment.verify, rollouts)
    ]
    judged = [dataclasses.replace(rollout, **verdict) for rollout, verdict in zip(rollouts, said, strict=True)]
    if environment.shape is None:
        return judged
    return [r.shaped(environment.shape(r)) for r in judged]


def verdicts(verify: Callable[[Example, str], Verdict], rollouts: Sequence[Rollout]) -> list[Verdict]:
    """The verdict on each rollout, by `sdjax.tasks.judging`; each is given by one of several processes, or all by the first.

    Of a conversation the world has said it.
    """
    cases = [Case(r.example, r.text, r.finished) for r in rollouts if not r.turns]
    given = lambda some: judging.verdicts(verify, some)
    said = iter(by_first(lambda: given(cases)) if judging.marked_from_first(verify) else divided_parts(given, cases))
    return [Verdict(r.reward, r.feedback, r.measures) if r.turns else Verdict(*next(said)) for r in rollouts]


def attempts(
    environment: Environment, examples: Sequence[Example], key: Array, *, n: int, sampling: Sampling | None = None
) -> list[Rollout]:
    """`n` judged rollouts of the live policy per example, each with its question as the student's context."""
    written = judge(environment, sample(environment.live, examples, key, n=n, sampling=sampling))
    return [r.read_by(student=question(r.example)) for r in written]


def solved_peer(rollout: Rollout, rollouts: Sequence[Rollout], success: float = 0.5) -> Rollout | None:
    """The first *other* rollout of the same group with a reward of at least `success` and an answer, or `None`.

    One that is all thinking has nothing to show, whatever it earned.
    """
    others = (r for r in rollouts if r.group == rollout.group and r is not rollout and r.reward >= success)
    return next((r for r in others if split(r.text).answer or not r.text.strip()), None)


def written(example: Example, text: str, policy: Policy, *, group: int, source: int, finished: bool = True) -> Rollout:
    """A rollout of given text (a reference, synthetic data), ended by the policy's end token; log-probs are unknown (0).

    What exceeds the completion limit is cut off, and such a row is not `finished`.
    """
    opened = thinking_opened(policy.tokenizer, encode_context(policy.tokenizer, question(example), policy.shapes))
    said = text.removeprefix(opened).removeprefix("\n") if opened else text  # the prompt holds the tag already
    tokens = encode_text(policy.tokenizer, said)
    if finished and policy.tokenizer.eos_token_id is not None:
        tokens = [*tokens, policy.tokenizer.eos_token_id]
    finished = finished and len(tokens) <= policy.shapes.completion
    tokens = tokens[: policy.shapes.completion]
    return Rollout(example, tuple(tokens), (0.0,) * len(tokens), text, group, source=source, finished=finished)


def references(
    environment: Environment, examples: Sequence[Example], text: Callable[[Example], str | None] | None = None
) -> list[Rollout]:
    """The examples' solutions, or `text(example)`, as judged rows, each with its question as the student's context.

    Examples without a text (`None`) are left out.
    """
    text = text or (lambda example: example.solution)
    said = [(group, e, text(e)) for group, e in enumerate(examples)]
    rows = [written(e, t, environment.live, group=g, source=REFERENCE) for g, e, t in said if t is not None]
    return [r.read_by(student=question(r.example)) for r in judge(environment, rows)]


def resample(
    environment: Environment,
    examples: Sequence[Example],
    key: Array,
    attempt: Callable[[Sequence[Example], Array], Sequence[Rollout]],
    keep: Callable[[Sequence[Rollout]], bool],
    *,
    rounds: int = 10,
) -> list[Rollout]:
    """Rollouts of as many groups as there are examples, all of which `keep` accepts: dynamic sampling.

    `attempt(examples, key)` writes groups; as long as some are missing it is asked again, with further examples from
    the data.  Groups are renumbered and never split; the surplus of the last round is cut off.

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476; verl gives up after 10 rounds too.
    Raises: RolloutError after `rounds`, or if there are no further examples.
    """
    kept: list[list[Rollout]] = []
    for number, own_key in enumerate(jax.random.split(key, rounds)):
        if number and environment.more is None:
            raise RolloutError("groups were dropped, and this environment has no further examples to replace them")
        rollouts = attempt(environment.more() if number else examples, own_key)
        kept += [rows for rows in grouped(rollouts).values() if keep(rows)]
        if len(kept) >= len(examples):
            groups = enumerate(kept[: len(examples)])
            return [dataclasses.replace(r, group=group) for group, rows in groups for r in rows]
    raise RolloutError(
        f"only {len(kept)} of {len(examples)} groups were kept in {rounds} rounds of sampling: the problems are too easy "
        "or too hard for this model; change them, take larger groups, or allow more rounds"
    )


def to_file(path: str | Path, rollouts: Sequence[Rollout]) -> None:
    """Writes rollouts as JSON lines that `sdjax.tasks.data` reads: messages, answer, solution (the text), reward.

    Further rollouts of an example get the ids `id#2`, `id#3`, ...; an empty text is no solution.
    """
    seen: dict[str, int] = {}
    with open(path, "w", encoding="utf-8") as file:
        for r in rollouts:
            seen[r.example.id] = number = seen.get(r.example.id, 0) + 1
            row = {
                "id": r.example.id if number == 1 else f"{r.example.id}#{number}",
                "messages": [{name: m[name] for name in TURN if name in m} for m in r.example.prompt],
                "answer": r.example.answer if isinstance(r.example.answer, str) else [*r.example.answer],
                "solution": r.text or None,
                "reward": r.reward,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
