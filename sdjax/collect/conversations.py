"""Conversations of a policy with a world: its turns and what it observes between them, in one stream of token ids.

All unfinished conversations go on in waves, one turn each.  Ids are never made again from text: what is trained on and scored
is what was sampled, after what was read then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from sdjax.devices.processes import divided_parts
from sdjax.engine import lengths, policies
from sdjax.engine.bridges import bridge
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Policy, Sample
from sdjax.engine.tokens import thinking_opened
from sdjax.engine.waves import continued
from sdjax.tasks.judging import CUT_OFF, side_by_side, threads_for
from sdjax.types import Example, Messages, Rollout, Step, Turn, World

LATER = 1 << 30
"""Turn `t` of a row, counted from 0, draws from `fold_in(row's key, LATER + t)`; the first one from the row's key itself."""


@dataclasses.dataclass(frozen=True)
class Talk:
    """One conversation under way.  `messages` are the world's view of it, `said` the sample that the world has not answered."""

    example: Example
    group: int
    key: Array
    context: tuple[int, ...]
    messages: Messages
    said: Sample | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    trained: tuple[bool, ...] = ()
    turns: tuple[Turn, ...] = ()
    reward: float = 0.0
    feedback: str | None = None
    measures: tuple[tuple[str, float], ...] = ()
    staleness: int | None = None
    going: bool = True
    finished: bool = False

    @property
    def read(self) -> tuple[int, ...]:
        """All that the policy reads before its next turn."""
        return (*self.context, *self.tokens)


def converse(
    policy: Policy,
    examples: Sequence[Example],
    chats: Sequence[Messages],
    key: Array,
    *,
    n: int,
    sampling: Sampling,
    source: int,
    limit: int,
) -> list[Rollout]:
    """`n` conversations about each example, one group per example, in order; the policy reads its `chats` first.

    The world sees the example's prompt in their place.  All that is written and observed has at most `limit` tokens: a
    conversation that reaches them is not `finished`, and its last turn is not answered.  The first turns are what the policy
    would write without a world, for the same key.
    """
    talks = begun(policy, examples, chats, key, n, sampling, limit)
    for turn in range(1, policy.world.turns + 1):
        talks = answered(policy, talks, limit, last=turn == policy.world.turns)
        going = [i for i, talk in enumerate(talks) if talk.going]
        if not going:
            break
        keys = jnp.stack([jax.random.fold_in(talks[i].key, LATER + turn) for i in going])
        left = [limit - len(talks[i].tokens) for i in going]
        samples = continued(policy, [talks[i].read for i in going], keys, sampling=sampling, limit=max(left))
        for i, sample, most in zip(going, samples, left, strict=True):
            talks[i] = dataclasses.replace(talks[i], said=within(sample, most))
    return [rollout(talk, source) for talk in talks]


def begun(
    policy: Policy,
    examples: Sequence[Example],
    chats: Sequence[Messages],
    key: Array,
    n: int,
    sampling: Sampling,
    limit: int,
) -> list[Talk]:
    """Conversations in which the policy has said its first turn."""
    first = policies.sample(policy, chats, key, n=n, sampling=sampling, limit=limit)
    encode = functools.partial(lengths.encoded, policy.tokenizer, shapes=policy.shapes, template=policy.template)
    contexts = [tuple(encode(chat) or ()) for chat in chats]
    keys = policies.row_keys(key, jnp.arange(len(examples)), n).reshape(len(examples), n)
    return [
        Talk(example, group, keys[group, j], contexts[group], example.prompt, said=sample)
        for group, example in enumerate(examples)
        for j, sample in enumerate(first[group])
    ]


def within(sample: Sample, most: int) -> Sample:
    """A sample cut to `most` tokens."""
    if len(sample.tokens) <= most:
        return sample
    return sample._replace(tokens=sample.tokens[:most], logprobs=sample.logprobs[:most], finished=False)


def answered(policy: Policy, talks: Sequence[Talk], limit: int, *, last: bool) -> list[Talk]:
    """The conversations with what the policy has said and what the world said to it; `last`: they are over then."""
    heard = [spoken(policy, talk) for talk in talks]
    asked = [i for i, talk in enumerate(heard) if talk.going]
    steps = steps_of(policy.world, [(heard[i].example, heard[i].messages) for i in asked])
    for i, step in zip(asked, steps, strict=True):
        heard[i] = told(policy, heard[i], step, limit, last=last)
    return heard


def spoken(policy: Policy, talk: Talk) -> Talk:
    """A conversation with the policy's turn; one that was cut off ends it."""
    if not talk.going or talk.said is None:
        return talk
    sample, start = talk.said, len(talk.tokens)
    raw = policy.tokenizer.decode(sample.tokens[: -1 if sample.finished else None], skip_special_tokens=False)
    opening = thinking_opened(policy.tokenizer, talk.read)
    raw = f"{opening}\n{raw}" if opening else raw
    ended = {} if sample.finished else {"going": False, "feedback": talk.feedback or CUT_OFF}
    return dataclasses.replace(
        talk,
        said=None,
        messages=(*talk.messages, {"role": "assistant", "content": sample.text, "raw": raw}),
        tokens=(*talk.tokens, *sample.tokens),
        logprobs=(*talk.logprobs, *sample.logprobs),
        trained=(*talk.trained, *(True,) * len(sample.tokens)),
        turns=(*talk.turns, Turn(start, start + len(sample.tokens), sample.text)),
        staleness=sample.staleness if talk.staleness is None else talk.staleness,
        **ended,
    )


def steps_of(world: World, asked: Sequence[tuple[Example, Messages]]) -> list[Step]:
    """What the world says to each conversation; each is answered by one of several processes."""
    one, threads = lambda pair: world.step(*pair), threads_for(world.step)
    found = divided_parts(lambda some: side_by_side(one, some, threads=threads), asked)
    return [Step(tuple(messages), *rest) for messages, *rest in found]


def told(policy: Policy, talk: Talk, step: Step, limit: int, *, last: bool) -> Talk:
    """A conversation with the world's answer; it is over where that says so, where it is the last, or where no room is left."""
    measures = {**dict(talk.measures)}
    for name, value in step.measures.items():
        measures[name] = measures.get(name, 0.0) + value
    turn = talk.turns[-1]._replace(observations=step.messages, reward=float(step.reward))
    talk = dataclasses.replace(
        talk,
        turns=(*talk.turns[:-1], turn),
        reward=talk.reward + float(step.reward),
        feedback=step.feedback or talk.feedback,
        measures=tuple(measures.items()),
    )
    if step.done or last or not step.messages:
        return dataclasses.replace(talk, going=False, finished=True)
    ids = bridge(policy.tokenizer, step.messages, policy.stop, policy.template)
    if len(talk.tokens) + len(ids) >= limit:
        return dataclasses.replace(talk, going=False, feedback=talk.feedback or CUT_OFF)
    return dataclasses.replace(
        talk,
        messages=(*talk.messages, *step.messages),
        tokens=(*talk.tokens, *ids),
        logprobs=(*talk.logprobs, *(0.0,) * len(ids)),
        trained=(*talk.trained, *(False,) * len(ids)),
    )


def rollout(talk: Talk, source: int) -> Rollout:
    """A conversation that is over, as a row."""
    return Rollout(
        talk.example,
        talk.tokens,
        talk.logprobs,
        transcript(talk.turns),
        talk.group,
        source=source,
        reward=talk.reward,
        feedback=talk.feedback,
        measures={**dict(talk.measures), "turns": float(len(talk.turns))},
        finished=talk.finished,
        trained=None if all(talk.trained) else talk.trained,
        extras={} if talk.staleness is None else {"staleness": talk.staleness},
        turns=talk.turns,
    )


def transcript(turns: Sequence[Turn]) -> str:
    """A conversation for people: the policy's turns as they stand, observations under who made them."""
    pieces = []
    for number, turn in enumerate(turns):
        pieces.append(turn.text)
        # What followed the last turn was not read any more.
        pieces += [titled(message) for message in turn.observations] if number + 1 < len(turns) else []
    return "\n\n".join(pieces)


def titled(message) -> str:
    """An observation under the name of who made it."""
    return f"[{message.get('name') or message['role']}]\n{message['content']}"
