"""Lessons about conversations: a teacher reads what was observed after each turn, a peer's success, what the world said at the end."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.collect.contexts import question, rewrite_last, without_thinking
from sdjax.collect.conversations import titled
from sdjax.collect.rollouts import solved_peer
from sdjax.types import Messages, Rollout

ASK = "Now go through the conversation again, knowing this, and answer the original question correctly."


def observed(rollout: Rollout) -> str:
    """What followed each turn of a conversation, turn by turn; empty where nothing did."""
    heard = [(number, titled(message)) for number, turn in enumerate(rollout.turns, 1) for message in turn.observations]
    return "\n\n".join(f"After message {number}:\n{text}" for number, text in heard)


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
            "What you will observe:": observed(rollout) if observations else "",
            "What is said of the outcome:": rollout.feedback if rollout.reward < success and rollout.feedback else "",
        }
        told = "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items() if text)
        if not told:
            return None
        asked = question(rollout.example)
        return rewrite_last(asked, f"{asked[-1]['content']}\n\n{told}\n\n{ASK}", told)

    return lesson
