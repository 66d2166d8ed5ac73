"""Lessons about conversations: each part alone, at the threshold of a success, and what is said where there is nothing."""

import dataclasses

import talks

from sdjax.collect.hindsight import ASK, hindsight, observed
from sdjax.types import Rollout, Turn


def turn(*said):
    return Turn(0, 1, "a", tuple({"role": "tool", "name": "calculator", "content": text} for text in said))


def row(text, reward, turns=(), feedback="wrong", group=0):
    return Rollout(talks.EXAMPLES[0], (1,), (0.0,), text, group, reward=reward, feedback=feedback, turns=turns)


HEARD = (turn("7"), turn(), turn("8", "9"))
FAILED, SOLVED = row("try 0", 0.4, HEARD), row("<think>hm</think>try 1", 0.5, HEARD)
SEEN = "After message 1:\n[calculator]\n7\n\nAfter message 3:\n[calculator]\n8\n\nAfter message 3:\n[calculator]\n9"
PEER, OBSERVED, OUTCOME = (
    "A successful conversation:\n\ntry 1",
    f"What you will observe:\n\n{SEEN}",
    "What is said of the outcome:\n\nwrong",
)


def told(rollout, rollouts, **how):
    """The privileged text of a lesson, which stands between the question and the request."""
    lesson = hindsight(**how)(rollout, rollouts)
    if lesson is None:
        return None
    (last,) = lesson
    assert last["content"] == f"a\n\n{last['privileged']}\n\n{ASK}" and last["question"] == "a"
    return last["privileged"]


def test_what_was_observed_stands_under_the_number_of_its_turn():
    assert observed(FAILED) == SEEN and observed(row("x", 0.0)) == ""


def test_a_failure_is_told_all_and_a_success_what_it_will_observe():
    rows = [FAILED, SOLVED]
    assert told(FAILED, rows) == f"{PEER}\n\n{OBSERVED}\n\n{OUTCOME}"
    assert told(SOLVED, rows) == OBSERVED  # half a reward is a success: no remark on it, and it is not its own peer
    assert told(SOLVED, rows, success=0.6) == f"{OBSERVED}\n\n{OUTCOME}"
    assert told(FAILED, rows, success=0.6) == f"{OBSERVED}\n\n{OUTCOME}"


def test_parts_can_be_left_out():
    rows = [FAILED, SOLVED]
    assert told(FAILED, rows, peers=False) == f"{OBSERVED}\n\n{OUTCOME}"
    assert told(FAILED, rows, observations=False) == f"{PEER}\n\n{OUTCOME}"
    assert told(dataclasses.replace(FAILED, feedback=None), rows, observations=False) == PEER
    assert told(SOLVED, rows, observations=False) is None
    assert told(FAILED, [FAILED, dataclasses.replace(SOLVED, group=1)], observations=False) == OUTCOME
