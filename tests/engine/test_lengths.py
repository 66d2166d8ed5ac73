"""What a teacher reads, made to fit: privileged text first, demonstrations next, the question never."""

import dataclasses

import pytest
import tiny

from sdjax.collect.contexts import after_demonstrations, question, with_solution
from sdjax.collect.rollouts import attempts
from sdjax.engine import policies
from sdjax.engine.chats import render
from sdjax.engine.lengths import encoded, fitted, marked, shortened
from sdjax.engine.policies import Policy
from sdjax.engine.tokens import LengthError, Shapes
from sdjax.types import Rollout, View

EXAMPLE = tiny.TASK.train[0]
PROMPT = EXAMPLE.prompt
SECRET = " ".join(["key"] * 30)
VIEWS = {"student": View(trainable=True), "teacher": View("teacher", per_rollout=True)}


def count(chat):
    return len(render(tiny.tokenizer(), chat))


def shapes(teacher):
    return Shapes(context=count(PROMPT) + 1, completion=8, rows=8, teacher_context=teacher)


def rollout(lesson, tokens=(7, 8)):
    row = Rollout(EXAMPLE, tokens, (-1.0,) * len(tokens), "", 0)
    return row.read_by(student=PROMPT, teacher=lesson)


def test_privileged_text_goes_first_and_the_question_never():
    lesson = with_solution(PROMPT, SECRET)
    limit = count(lesson) - 10
    found, cut, left_out = fitted([rollout(lesson)], VIEWS, tiny.tokenizer(), shapes(limit))
    read = found[0].contexts["teacher"]
    assert (cut, left_out) == (1, 0) and count(read) == limit
    assert PROMPT[-1]["content"] in read[-1]["content"] and found[0].contexts["student"] == PROMPT
    assert found[0].trained is None


def test_privileged_text_that_nobody_named_is_found():
    """A lesson of somebody's own: a text around the question."""
    asked = PROMPT[-1]["content"]
    for content in (f"{asked} {SECRET}", f"{SECRET} {asked}"):
        chat = ({"role": "user", "content": content},)
        read = shortened(chat, PROMPT, count, count(chat) - 10)
        assert asked in read[-1]["content"] and count(read) <= count(chat) - 10
        assert read[-1]["content"].count("key") < content.count("key")


def test_what_nobody_named_is_the_longer_side_of_the_question_and_after_it_where_both_are_as_long():
    asked = PROMPT[-1]["content"]
    told = {("", "key key"): "key key", ("key key", ""): "key key", ("abc ", " def"): " def", ("abcd ", " ef"): "abcd "}
    for (before, after), privileged in told.items():
        (turn,) = marked(({"role": "user", "content": before + asked + after},), PROMPT)
        assert turn["privileged"] == privileged
        assert turn.get("question", asked) == (before + asked if privileged == after else asked)
    # A question that is said twice counts where it is said first, and turns before the last one stay as they are.
    chat = ({"role": "system", "content": "a"}, PROMPT[-1], {"role": "user", "content": f"{asked} key {asked} key"})
    assert marked(chat, PROMPT)[:2] == chat[:2] and marked(chat, PROMPT)[2]["privileged"] == f" key {asked} key"


def test_demonstrations_go_before_turns_of_the_prompt():
    turns = ({"role": "user", "content": "key key"}, {"role": "assistant", "content": "key"}, *PROMPT)
    shown = ({"role": "user", "content": SECRET}, {"role": "assistant", "content": "key"})
    chat = after_demonstrations(with_solution(turns, "key key key"), shown)
    read = shortened(chat, turns, count, count(turns) + 20)
    assert [turn["content"] for turn in read[:2]] == ["key key", "key"] and PROMPT[-1]["content"] in read[-1]["content"]


@pytest.mark.parametrize("left", [0, 1])
def test_a_system_turn_stays_where_demonstrations_go(left):
    """The oldest go first, question and answer together; what stays is as many of them as fit."""
    system = ({"role": "system", "content": "key"},)
    shown = [({"role": "user", "content": "key " * n}, {"role": "assistant", "content": "key"}) for n in (8, 9)]
    whole = (*system, *shown[0], *shown[1], *PROMPT)
    wanted = (*system, *(shown[1] if left else ()), *PROMPT)
    said = lambda chat: [(turn["role"], turn["content"]) for turn in chat]
    assert said(shortened(whole, (*system, *PROMPT), count, count(wanted))) == said(wanted)
    assert shortened(whole, (*system, *PROMPT), count, count(whole)) == whole
    assert shortened(whole, (*system, *PROMPT), count, count((*system, *PROMPT)) - 1) is None


def test_a_row_whose_lesson_cannot_be_read_is_not_trained_and_counted():
    lesson = with_solution(PROMPT, SECRET)
    rows = [rollout(lesson), rollout(PROMPT), rollout(None)]
    found, cut, left_out = fitted(rows, VIEWS, tiny.tokenizer(), shapes(count(PROMPT)))
    assert (cut, left_out) == (0, 1)
    assert found[0].contexts["teacher"] is None and found[0].trained == (False, False)
    assert found[1:] == rows[1:]
    batch = policies.collate(found, VIEWS, tiny.tokenizer(), shapes(count(PROMPT)))
    assert not batch.mask[0].any() and batch.mask[1].any()


def test_without_a_limit_of_its_own_it_is_an_error_as_before():
    lesson = with_solution(PROMPT, SECRET)
    rows, cut, left_out = fitted([rollout(lesson)], VIEWS, tiny.tokenizer(), shapes(None))
    assert (rows, cut, left_out) == ([rollout(lesson)], 0, 0)
    with pytest.raises(LengthError, match="of --context"):
        policies.collate(rows, VIEWS, tiny.tokenizer(), shapes(None))


def test_what_somebody_writes_after_is_cut_too():
    lesson, limit = with_solution(PROMPT, SECRET), count(PROMPT) + 20
    assert len(encoded(tiny.tokenizer(), lesson, shapes(limit))) == limit
    assert encoded(tiny.tokenizer(), lesson, shapes(count(PROMPT))) is None
    assert encoded(tiny.tokenizer(), PROMPT, shapes(limit)) == render(tiny.tokenizer(), PROMPT)


def test_a_chat_of_exactly_the_context_is_whole():
    """However little a lesson may have; one token more is a lesson to cut, a prompt to shorten, or an error."""
    lesson = with_solution(PROMPT, SECRET)
    own = Shapes(context=count(lesson), completion=8, rows=8, teacher_context=count(PROMPT))
    assert encoded(tiny.tokenizer(), lesson, own) == render(tiny.tokenizer(), lesson)
    shorter = dataclasses.replace(own, context=own.context - 1)
    assert encoded(tiny.tokenizer(), lesson, shorter) is None
    with pytest.raises(LengthError, match="of --context"):
        encoded(tiny.tokenizer(), lesson, dataclasses.replace(shorter, teacher_context=None))
    prompt, seen = ({"role": "user", "content": SECRET},), []
    shown = lambda chat, counted, limit: seen.append((chat, counted(chat), limit)) or PROMPT
    given = dataclasses.replace(own, context=count(prompt) - 1, teacher_context=99, too_long=shown)
    assert encoded(tiny.tokenizer(), prompt, given) == render(tiny.tokenizer(), PROMPT)
    assert seen == [(prompt, count(prompt), count(prompt) - 1)]


def test_a_writer_who_can_read_nothing_writes_nothing():
    policy = Policy(tiny.model(), tiny.pretrained().params, tiny.tokenizer(), shapes(count(PROMPT)))
    chats = [PROMPT, with_solution(PROMPT, SECRET)]
    read, unread = policies.sample(policy, chats, tiny.jax.random.key(0), n=2)
    assert read[0].tokens and unread == [policies.Sample((), (), "", False)] * 2


def test_rows_of_one_prompt_may_take_several_calls():
    """A call of two rows writes what a call of all writes: a row's sample depends on its key alone."""
    wide = dataclasses.replace(shapes(None), rows=8)
    ask = lambda own: policies.sample(tiny.policy(shapes=own), [question(EXAMPLE)], tiny.jax.random.key(1), n=6)
    assert [s.tokens for s in ask(dataclasses.replace(wide, rows=2))[0]] == [s.tokens for s in ask(wide)[0]]
    assert len(attempts(tiny.environment(shapes=wide), [EXAMPLE], tiny.jax.random.key(1), n=3)) == 3
