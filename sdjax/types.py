"""The types that flow through every method: what is sampled, who reads it, what is learnt from it.

Sizes: `B` rows, `C` contexts (`C` divides `B`), `P` context tokens, `T` completion tokens, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
from jax import Array

Messages = tuple[Mapping[str, Any], ...]
"""A chat: turns with `role` ("system", "user", "assistant" or "tool") and `content`, and further keys that no model reads."""

STUDENT, TEACHER, REFERENCE, SYNTHETIC = range(4)
"""Who wrote a completion (`Rollout.source`, `Batch.source`)."""

SHAPING = "shaping"
"""The extra, one number per row, that is added to a reward for advantages only: a length penalty, say."""


# ---- host ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem.  `prompt` is a chat that ends with a user turn; `answer` is what the verifier compares with.

    Where several answers are right, `answer` is all of them; `answers` always is, and `main_answer` is the first.

    `solution` is a worked reference, `feedback` a fixed remark for wrong answers; both are privileged: the student
    never reads them.  `meta` is whatever the task's verifier needs.
    """

    id: str
    prompt: Messages
    answer: str | Sequence[str] = ""
    solution: str | None = None
    feedback: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer,) if isinstance(self.answer, str) else tuple(self.answer)

    @property
    def main_answer(self) -> str:
        """The first right answer, for texts that name one; empty without any."""
        return next(iter(self.answers), "")


class Verdict(NamedTuple):
    """What a verifier says of a completion: a reward (1 is solved) and, if it can, why not.

    `measures` are numbers about the judgement for the run's log: a limit that was hit, say.
    """

    reward: float
    feedback: str | None = None
    measures: Mapping[str, float] = {}


class Step(NamedTuple):
    """What a world says after a turn of the policy.

    `messages` are the turns that the policy reads next ("tool" or "user"); after `done` nothing is read any more.  Rewards and
    `measures` (numbers for the run's log) are added up; `feedback` says why the conversation did not go better.
    """

    messages: Messages = ()
    reward: float = 0.0
    done: bool = False
    feedback: str | None = None
    measures: Mapping[str, float] = {}


class World(NamedTuple):
    """An environment in the sense of RL: whom a policy talks with.  Both functions are pure, and what they say is JSON-able.

    `reset(example)` is the chat that the policy reads first.  `step(example, messages)` reads the conversation so far, the
    policy's turn last, which also has the key `raw`: its text with all special tokens.  A state is kept in the messages, under
    keys that no chat template reads.  The policy has at most `turns` turns.  `step` may have the mark `judging.from_threads`.
    """

    reset: Callable[[Example], Messages]
    step: Callable[[Example, Messages], Step]
    turns: int = 8


class Task(NamedTuple):
    """Problems and how to judge answers to them.

    `train` and `test` are disjoint; `verify(example, text)` is deterministic and safe on any text, thinking included.
    `sdjax.tasks.judging` has two marks for it: `reads_answers` (a text that was cut off earns nothing without a marked
    answer) and `from_threads` (many verdicts are worked out at once).  `read` says, as JSON, how the problems were read
    and split; a run keeps it, and prints the lines under "said".  With a `world` the policy's attempts are
    conversations, which the world rewards; `sdjax.tasks.worlds.in_world` makes such a task.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    verify: Callable[[Example, str], Verdict]
    read: Mapping[str, Any] = {}
    world: World | None = None


class Scores(NamedTuple):
    """Some entries of the distribution that a completion token was scored with: `K` of them per position.

    On the host `[T, K]` arrays of one completion, in a batch `[B, T, K]`.  The sampled token is one of the entries; an
    entry that is not used has the id `UNUSED`.
    """

    tokens: Any  # [..., K] int32
    logprobs: Any  # [..., K] float32


UNUSED = 2**30
"""The token id of an entry of `Scores` that says nothing."""


class Turn(NamedTuple):
    """One turn of the policy, `tokens[start:end]` of a rollout; the `observations` that followed, and what it earned."""

    start: int
    end: int
    text: str
    observations: Messages = ()
    reward: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion of one example, with what each view reads before it.

    `logprobs` has one float per token, under whatever wrote the completion, at temperature 1.  `group` is the same for
    all rollouts of one prompt.  `trained` is False for tokens the policy did not produce (tool output) or that are
    kept out of the loss.  `contexts` maps a view's name to a chat, or to `None`: nothing to say about this row.
    `finished` is False when the completion was cut by the length limit.  `scores` holds what a server said of the tokens,
    by the view that it stands for.

    A conversation is one completion, too: `tokens` are what the policy wrote in its `turns` (`trained`) and what it read
    between them, in order; `text` is all of it for people, and the reward is the world's.
    """

    example: Example
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    group: int
    source: int = STUDENT
    reward: float = 0.0
    feedback: str | None = None
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    finished: bool = True
    contexts: Mapping[str, Messages | None] = dataclasses.field(default_factory=dict)
    trained: tuple[bool, ...] | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Scores] = dataclasses.field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @property
    def returns(self) -> float:
        """What an advantage is made of: the verifier's reward and what shapes it.  Outcomes are told by `reward`."""
        return self.reward + float(self.extras.get(SHAPING, 0.0))

    def shaped(self, amount: float) -> Rollout:
        """The same rollout with `amount` added to its reward, for advantages only."""
        return self.with_extras(**{SHAPING: self.extras.get(SHAPING, 0.0) + amount})

    def read_by(self, **contexts: Messages | None) -> Rollout:
        """The same rollout with these views' contexts added."""
        return dataclasses.replace(self, contexts={**self.contexts, **contexts})

    def scored(self, **scores: Scores) -> Rollout:
        """The same rollout with what servers said of its tokens, by view."""
        return dataclasses.replace(self, scores={**self.scores, **scores})

    def with_extras(self, **extras: Any) -> Rollout:
        """The same rollout with these extras added: a float per row, or one per token."""
        return dataclasses.replace(self, extras={**self.extras, **extras})


# ---- device -------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Context:
    """What one view reads before the completions.  Row `r` of the batch reads context `r // (B / C)`.

    Left-padded, so that in every view the completion starts at column `P`.  `valid` is per *row* `[B]`: False where
    this view has nothing to say about the row.  `member` and `scores` are there for views that read `ByField` and
    `Scored`.
    """

    tokens: Array  # [C, P] int32
    mask: Array  # [C, P] bool
    valid: Array  # [B] bool
    member: Array | None = None  # [B] int32: which of the view's policies reads the row
    scores: Scores | None = None  # [B, T, K]: what the view's server said


@flax.struct.dataclass
class Batch:
    """Completions and everything a loss may read about them."""

    completion: Array  # [B, T] int32, right-padded
    present: Array  # [B, T] bool: real tokens
    mask: Array  # [B, T] bool: tokens to train on, a subset of `present`
    behavior_logprobs: Array  # [B, T] float32: under whatever generated the row, at temperature 1; 0 where unknown
    contexts: dict[str, Context]
    reward: Array  # [B] float32
    group: Array  # [B] int32: rows of one prompt share it
    source: Array  # [B] int32: STUDENT, TEACHER, REFERENCE or SYNTHETIC
    finished: Array  # [B] bool: ended by itself, not by the length limit
    valid: Array  # [B] bool: False for padding rows
    extras: dict[str, Array]  # [B, T] or [B]: whatever `collect` adds

    @property
    def returns(self) -> Array:
        """What advantages are made of, `[B]`: as `Rollout.returns`."""
        return self.reward + self.extras[SHAPING] if SHAPING in self.extras else self.reward


# ---- methods ------------------------------------------------------------------------------------------------------


class ByField(NamedTuple):
    """A policy that depends on the example: the one of `policies` that the field `field` of its `meta` names."""

    field: str
    policies: tuple[str, ...]


class Scored(NamedTuple):
    """No policy of this process: `Rollout.scores` says what a server with the name `server` made of the tokens."""

    server: str


class View(NamedTuple):
    """One named reader of the completion; its context goes by the view's own name.

    `policy` is "live", a snapshot's name or an external policy's name, or else `ByField` or `Scored`; gradients flow
    through trainable views only.
    A view's context is the same for all rollouts of a prompt, and is read once for all of them; with `per_rollout` it
    may differ, and is read once per rollout in a batch where it does.
    `entries` is how much of the view's distribution `signals` reads: all of it (`None`), or the sampled token and so
    many of the likeliest entries, the others only as their total mass.
    `told`: its context says more than the question; controls change what such views read, and no others.
    `template` are options of the chat template with which the view's context is written: `{"enable_thinking": True}`.
    """

    policy: str | ByField | Scored = "live"
    trainable: bool = False
    per_rollout: bool = False
    entries: int | None = None
    told: bool = False
    template: Mapping[str, Any] = {}

    def __hash__(self) -> int:  # of what programs depend on; a mapping has none
        return hash(self[:5])


class Term(NamedTuple):
    """One addend of the loss: how much, of what, over whom, averaged how.

    `coef * reduce(value * stop_gradient(weight * importance), over)`; `value` is `[B, T]` or `[B]`, `weight` says how
    much each token or row counts, `importance` corrects for who wrote it (`p/b`); both broadcast to the value.  `over`
    is the boolean population (default: all trained tokens of valid rows), `reduce` one of `sdjax.kernels.reductions`
    (default: the experiment's).
    """

    value: Array
    weight: Array | float = 1.0
    over: Array | None = None
    reduce: Callable[[Array, Array], Array] | None = None
    coef: Array | float = 1.0
    importance: Array | float = 1.0


class Objective(NamedTuple):
    """The device half of a method.

    `signals({view: log-probabilities [..., V]}, token [...]) -> {name: [...]}` sees one position at a time: the
    vocabulary axis lives here.  `terms(batch, {name: [B, T]}, step) -> {name: Term}` sees the whole batch: the time
    axis lives here.  The objective is applied on every `every`-th batch (0, `every`, ...), of those from `since` on and
    before `until`: what a schedule has ended costs nothing any more.

    The rest says what a control can change.  `credit` names the terms whose `weight` `[B, T]` says how much each token
    counts; a pair of names holds the positive and the negative part of one credit that has a sign.  `rewarded`: there
    is an advantage made of `Batch.returns`.
    """

    views: Mapping[str, View]
    signals: Callable[[dict[str, Array], Array], dict[str, Array]]
    terms: Callable[[Batch, dict[str, Array], Array], dict[str, Term]]
    every: int = 1
    since: int = 0
    until: int | None = None
    credit: tuple[str | tuple[str, str], ...] = ()
    rewarded: bool = False

    def due(self, step: int) -> bool:
        """Whether the objective is applied on batch `step`, counted from 0."""
        return step % self.every == 0 and self.since <= step and (self.until is None or step < self.until)


class Method(NamedTuple):
    """A training method: a host half, a device half, and what they remember.

    `collect(environment, examples, key, memory) -> (rollouts, memory)` samples, judges and writes contexts.
    `objectives` are applied in order to the same batch.  `snapshots` maps a name to a rule
    `(live, old, step) -> new`, applied after every batch, or as `sdjax.engine.policies.Follows` says.  `memory` is the
    initial host state, JSON-able; what grows from batch to batch is `sdjax.collect.remembered`.  `writers` names the
    policies, besides the live one, that `collect` itself asks to write or to score.  `groups(prompts)` is how many groups
    a batch of so many examples has: more, where `collect` adds some of its own.  `early` are the views that `collect`
    scores, with parameters as they are at rollout time, and that no objective reads.
    """

    collect: Callable[..., tuple[list[Rollout], Any]]
    objectives: tuple[Objective, ...]
    snapshots: Mapping[str, Callable] = {}
    memory: Any = None
    writers: tuple[str, ...] = ()
    groups: Callable[[int], int] = lambda prompts: prompts
    early: Mapping[str, View] = {}


class Card(NamedTuple):
    """What a method is, for people: `sdjax methods` and the README's table show it.

    `student` and `teacher` say what each reads; `differences` where paper and official code disagree and which of them
    is the default here; `status` is "paper" where the source is complete, else what it is (a reconstruction, say).
    """

    paper: str
    arxiv: str
    equation: str
    student: str
    teacher: str
    reduction: str
    differences: tuple[str, ...] = ()
    status: str = "paper"
