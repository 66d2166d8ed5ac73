"""What a teacher reads about an attempt, word for word: whose text, which verdict, and when there is nothing to say."""

import dataclasses

import pytest
import tiny

from sdjax.collect import plans
from sdjax.collect.annotators import Span
from sdjax.collect.critiques import critique_request
from sdjax.collect.lessons import (
    attempt_and_verdict,
    before_writing,
    english_version,
    peer_or_feedback,
    private_note,
)
from sdjax.collect.selection import alignment, choose, cut, with_key

EXAMPLE = dataclasses.replace(tiny.TASK.train[0], answer=("k3", "three"), solution="look it up: k3")
QUESTION = EXAMPLE.prompt[-1]["content"]
at = lambda text, reward=0.0, tokens=(1,), **more: tiny.row(text, reward, example=EXAMPLE, tokens=tokens, **more)
RIGHT, OTHER, WRONG = at("<think>so</think>it is k3", 0.5), at("k3!", 1.0, (2,)), at("k4", 0.4, (3,), feedback="no")

THRESHOLD = at("k9", 0.5, (4,))


def told(messages):
    """What the last turn says after the question."""
    assert messages[:-1] == EXAMPLE.prompt[:-1] and messages[-1]["content"].startswith(QUESTION)
    return messages[-1]["content"].removeprefix(QUESTION).strip()


# ---- attempts and verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own, verdict", [(OTHER, "correct"), (THRESHOLD, "correct"), (WRONG, "incorrect")])
def test_another_success_beside_the_verdict_on_this_one(own, verdict):
    wanted = (
        f"Previous attempt:\n\nit is k3\n\nAssessment of the attempt: {verdict}.\n\nSolve the problem step by step."
    )
    found = attempt_and_verdict(own, [own, WRONG, RIGHT, OTHER])
    assert told(found) == wanted and found[-1]["privileged"] == "it is k3"


def test_the_reference_stands_in_for_a_success():
    assert "Previous attempt:\n\nlook it up: k3\n\n" in told(attempt_and_verdict(RIGHT, [RIGHT, WRONG]))
    assert "look it up" in told(attempt_and_verdict(WRONG, [RIGHT, WRONG], 0.6))  # another threshold
    assert "correct." in told(attempt_and_verdict(RIGHT, [RIGHT]))
    silent = dataclasses.replace(WRONG, example=dataclasses.replace(EXAMPLE, solution=None))
    assert attempt_and_verdict(silent, [silent]) is None


SHOWN, HEARD = (
    "Correct solution:\n\nit is k3",
    "The following is feedback from your unsuccessful earlier attempt:\n\nno",
)
LAST = "Correctly solve the original question."


@pytest.mark.parametrize(
    "options, own, others, wanted",
    [
        ({}, WRONG, [RIGHT, OTHER], [SHOWN, LAST]),
        ({}, WRONG, [], [HEARD, LAST]),
        ({}, RIGHT, [WRONG], None),
        ({}, OTHER, [RIGHT], [SHOWN, LAST]),
        ({"use_feedback": False}, WRONG, [], None),
        ({"feedback_beside_solution": True}, WRONG, [RIGHT], [SHOWN, HEARD, LAST]),
        ({"feedback_beside_solution": True}, OTHER, [RIGHT], [SHOWN, LAST]),
        ({"thinking": True}, WRONG, [RIGHT], ["Correct solution:\n\n<think>so</think>it is k3", LAST]),
        ({"shown_itself": True}, RIGHT, [OTHER], [SHOWN, LAST]),
        ({"shown_itself": True}, WRONG, [RIGHT], [SHOWN, LAST]),
        ({"success": 0.6}, WRONG, [RIGHT, OTHER], ["Correct solution:\n\nk3!", LAST]),
        ({"success": 0.4}, WRONG, [], None),  # a success hears no feedback
    ],
)
def test_a_peer_or_feedback(options, own, others, wanted):
    found = peer_or_feedback(**options)(own, [own, *others])
    assert (None if found is None else told(found)) == (None if wanted is None else "\n\n".join(wanted))


def test_the_request_for_a_critique_shows_the_whole_attempt_and_the_first_answer():
    found = told(critique_request(at("<think>so</think>k4")))
    assert found.startswith(
        "A wrong attempt:\n<think>so</think>k4\n\nThe correct answer is k3. In two or three sentences"
    )


# ---- other lessons ------------------------------------------------------------------------------------------------


def test_a_note_names_kinds_of_steps_and_nothing_else():
    spans = [Span(0, 1, " sums "), Span(2, 3, "cases"), Span(4, 5, "sums"), Span(6, 7, "")]
    right, wrong = (told(private_note(EXAMPLE, spans, correct)) for correct in (True, False))
    assert right.startswith("Successful solutions of this problem rely on these kinds of steps: cases, sums.")
    assert wrong.startswith("A sampled solution has a problem of this kind: cases, sums.")
    assert all(text.endswith("Do not mention this note.") for text in (right, wrong))
    assert private_note(EXAMPLE, [Span(0, 1, " ")], True) is None and private_note(EXAMPLE, [], False) is None


def test_the_english_version_is_privileged():
    plain = english_version(RIGHT, [])
    assert told(plain).startswith("First judge in English") and "privileged" not in plain[-1]
    english = dataclasses.replace(RIGHT, example=dataclasses.replace(EXAMPLE, meta={"english": "what is it"}))
    found = english_version(english, [])
    assert (
        told(found).startswith("In English:\n\nwhat is it\n\nFirst judge") and found[-1]["privileged"] == "what is it"
    )


def test_an_author_reads_its_lesson_about_nothing():
    assert before_writing(None)(EXAMPLE) == EXAMPLE.prompt
    seen = []
    lesson = lambda rollout, rollouts: seen.append((rollout.text, rollout.tokens, rollouts)) or "told"
    assert before_writing(lesson)(EXAMPLE) == "told" and seen == [("", (), [])]


# ---- plans --------------------------------------------------------------------------------------------------------


def test_answers_are_taken_out_of_plans():
    assert plans.redacted("K3, or three; not k33, xk3, .k3 or k3.5; k3.", ("k3", "Three")) == (
        "..., or ...; not k33, xk3, .k3 or k3.5; ...."
    )
    assert plans.redacted("a b", " a ") == "... b" and plans.redacted("a", ("", " ")) == "a"
    asked = plans.plan_request(EXAMPLE)
    assert (
        "A solution without its answer:\nlook it up: ...\n" in told(asked)
        and asked[-1]["privileged"] == "look it up: ..."
    )


def test_a_plan_is_privileged():
    found = plans.with_plan(EXAMPLE.prompt, "first, then")
    assert told(found) == "A plan for the solution:\nfirst, then\n\nSolve the problem by this plan."
    assert found[-1]["privileged"] == "first, then" and plans.with_plan(EXAMPLE.prompt, " \n") == EXAMPLE.prompt


# ---- which of several texts ---------------------------------------------------------------------------------------


def test_a_correct_candidate_then_a_correct_retry_then_the_closest():
    assert choose([False, True, True], [9.0, 0.1, 0.2], True, True) == (2, 1)
    assert choose([True, True], [0.3, 0.3], None, False) == (0, 1)
    assert choose([False, False], [0.1, 0.2], True, True) == (None, 2)
    for retried in (False, None):
        assert choose([False, False, False], [0.1, 0.3, 0.3], retried, False) == (1, 3)
        assert choose([False, False], [0.1, 0.2], retried, True) == (None, 3)


def test_alignment_is_over_the_positions_of_both():
    likeliest = [[1, 2], [3, 4], [5, 6]]
    assert alignment((2, 9, 5), likeliest) == pytest.approx(2 / 3)
    assert alignment((2, 9, 5, 1), likeliest) == pytest.approx(2 / 3) and alignment((2,), likeliest) == 1.0
    assert alignment((), likeliest) == alignment((1,), []) == 0.0


def test_a_row_is_trained_on_its_first_tokens():
    row = cut(at("x", tokens=(5, 6, 7)), 2)
    assert row.trained == (True, True, False) and row.tokens == (5, 6, 7)
    assert "The correct answer is k3. It is a key" in told(with_key(EXAMPLE.prompt, EXAMPLE.main_answer))
