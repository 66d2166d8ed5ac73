"""Lessons about conversations: a teacher reads what was observed after each turn, a peer's success, what the world said at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sdjax.collect.contexts import question, rewrite_last, without_thinking
from sdjax.collect.conversations import titled
from sdjax.collect.rollouts import solved_peer
from sdjax.types import Messages, Rollout

ASK = "Now go through the conversation again, knowing this, and answer the original question correctly."
OBSERVE, OUTCOME = "What you will observe:", "What is said of the outcome:"


def observed(rollout: Rollout) -> str:
    """What followed each turn of a conversation, turn by turn; empty where nothing did."""
    return "\n\n".join(filter(None, (followed(rollout, number) for number in range(len(rollout.turns)))))


def followed(rollout: Rollout, number: int) -> str:
    """What followed one turn, counted from 0; empty where nothing did."""
    heard = map(titled, rollout.turns[number].observations)
    return "\n\n".join(f"After message {number + 1}:\n{text}" for text in heard)


def aftermath(rollout: Rollout, number: int, *, success: float = 0.5) -> Messages | None:
    """A lesson for one turn, counted from 0: what followed it; of a failure's last turn also what is said of the outcome.

    `None` where there is nothing of that.
    """
    last = number + 1 == len(rollout.turns)
    outcome = rollout.feedback if last and rollout.reward < success else None
    return lesson_of(rollout, {OBSERVE: followed(rollout, number), OUTCOME: outcome})


def lesson_of(rollout: Rollout, parts: Mapping[str, str | None]) -> Messages | None:
    """The question with what is told below it, each part under its title; `None` where no part says anything."""
    told = "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items() if text)
    if not told:
        return None
    asked = question(rollout.example)
    return rewrite_last(asked, f"{asked[-1]['content']}\n\n{told}\n\n{ASK}", told)


def hindsight(
    *, success: float = 0.5, peers: bool = True, observations: bool = True
) -> Callable[[Rollout, list[Rollout]], Messages | None]:
    """A lesson for SDPO and others: what this attempt will observe, another success of its group, feedback on a failure.

    `None` where there is nothing of that.  A teacher that knows what a tool will say to a turn grades that turn with hindsight.
    """

    def lesson(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
        peer = solved_peer(rollout, rollouts, success) if peers else None
        parts = {
            "A successful conversation:": "" if peer is None else without_thinking(peer.text),
            OBSERVE: observed(rollout) if observations else "",
            OUTCOME: rollout.feedback if rollout.reward < success else "",
        }
        return lesson_of(rollout, parts)

    return lesson
