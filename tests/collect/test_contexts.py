"""Chats for students and teachers: what each says, in which order, and which part of it is privileged."""

import pytest

from sdjax.collect import contexts
from sdjax.types import Example

SYSTEM = {"role": "system", "content": "be brief"}
ASKED = "what is 2 + 2 ?"
CHAT = (SYSTEM, {"role": "user", "content": ASKED})
SECRET = "two and two make 4"

BUILDERS = {
    "with_solution": contexts.with_solution(CHAT, SECRET),
    "with_feedback_solution": contexts.with_feedback(CHAT, solution=SECRET),
    "with_feedback_feedback": contexts.with_feedback(CHAT, feedback=SECRET),
    "with_reference": contexts.with_reference(CHAT, SECRET),
    "with_demonstration": contexts.with_demonstration(CHAT, SECRET),
}


@pytest.fixture(params=list(BUILDERS))
def built(request):
    return BUILDERS[request.param]


def test_the_student_reads_the_prompt_and_nothing_privileged():
    example = Example("1", CHAT, answer="4", solution=SECRET, feedback="no")
    assert contexts.question(example) == CHAT
    assert all(set(turn) == {"role", "content"} for turn in contexts.question(example))


def test_a_builder_rewrites_only_the_last_turn_and_begins_it_with_the_question(built):
    assert built[:-1] == CHAT[:-1]
    assert built[-1]["role"] == "user" and built[-1]["content"].startswith(ASKED + "\n\n")


def test_privileged_text_is_recorded_and_stands_after_the_question(built):
    last = built[-1]
    assert last["privileged"] == SECRET and last["question"] == ASKED
    assert last["content"][len(ASKED) :].count(SECRET) == 1


def test_a_builder_says_what_to_do_after_the_privileged_text(built):
    after = built[-1]["content"].split(SECRET)[1].strip()
    assert after and not after.startswith(ASKED)


def test_builders_leave_their_argument_alone(built):
    assert CHAT == (SYSTEM, {"role": "user", "content": ASKED})


def test_the_words_around_a_solution_can_be_chosen():
    chat = contexts.with_solution(CHAT, SECRET, header="Answer:", instruction="Go.")
    assert chat[-1]["content"] == f"{ASKED}\n\nAnswer:\n\n{SECRET}\n\nGo."


def test_feedback_stands_between_solution_and_instruction():
    content = contexts.with_feedback(CHAT, solution=SECRET, feedback="too small", instruction="Go.")[-1]["content"]
    assert content.index(ASKED) < content.index(SECRET) < content.index("too small") < content.index("Go.")
    assert contexts.with_feedback(CHAT, feedback="too small")[-1]["privileged"] == "too small"


def test_with_neither_solution_nor_feedback_nothing_is_privileged():
    last = contexts.with_feedback(CHAT, instruction="Go.")[-1]
    assert last == {"role": "user", "content": f"{ASKED}\n\nGo."}


def test_demonstrations_stand_between_system_turn_and_question():
    shown = ({"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"})
    assert contexts.after_demonstrations(CHAT, shown) == (SYSTEM, *shown, CHAT[-1])
    assert contexts.after_demonstrations(CHAT[1:], shown) == (*shown, CHAT[-1])


def test_a_suffix_keeps_what_is_privileged():
    last = contexts.with_suffix(contexts.with_solution(CHAT, SECRET), " /think")[-1]
    assert last["content"].endswith(" /think") and last["privileged"] == SECRET and last["question"] == ASKED
    assert contexts.with_suffix(CHAT, "!") == (SYSTEM, {"role": "user", "content": ASKED + "!"})


THINKING = {
    "a</think> b": "b",
    "<think>a</think>\n b": "b",
    "no tags at all": "no tags at all",
    "<think>\nlong\n\nthought\n</think>\n\nthe answer\n\nis 4": "the answer\n\nis 4",
    "<think></think>b": "b",
    "a</think> b <think>c</think> d": "b  d",
    "<think>a</think>b<think>c</think>d": "bd",
    "a</think>": "",
    "1 < 2 and <b>bold</b>": "1 < 2 and <b>bold</b>",
}


@pytest.mark.parametrize("text", list(THINKING))
def test_thinking_is_removed_also_where_its_opening_tag_stands_in_the_prompt(text):
    assert contexts.without_thinking(text) == THINKING[text]


def test_an_attempt_without_an_answer_says_so():
    assert contexts.attempt_text("<think>a</think>b") == "b"
    assert contexts.attempt_text("<think>a") == "(no answer was reached)"
