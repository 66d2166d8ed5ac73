"""A completion is split once, in one place; what was cut off or never ended earns nothing."""

import dataclasses
import json
import re
import threading
import time

import pytest

from sdjax.__main__ import main
from sdjax.collect import rollouts
from sdjax.collect.peers import peers
from sdjax.engine.policies import Environment
from sdjax.engine.tokens import decode_text, thinking_opened
from sdjax.methods.sdpo import peer_or_feedback
from sdjax.run.logs import log, records
from sdjax.tasks import bounded, exact, judging, maths
from sdjax.tasks.answers import extraction, numbers
from sdjax.tasks.completions import Completion, split
from sdjax.tasks.data import problems
from sdjax.tasks.errors import TaskError
from sdjax.types import Example, Rollout, Verdict
from tests import tiny

ENDLESS = r"\boxed{x^{999}+(x+y+z+1)^{99}}"
"""Looks harmless, and never ends."""


def example(*answers, **fields) -> Example:
    return Example("q", ({"role": "user", "content": "q"},), answers if len(answers) > 1 else answers[0], **fields)


# ---- the split


@pytest.mark.parametrize(
    "text, thinking, answer, is_open",
    [
        ("4", "", "4", False),
        ("<think>2+2</think>4", "2+2", "4", False),
        ("2+2</think>\n4", "2+2", "4", False),
        ("<think>2+2", "2+2", "", True),
        ("It is 4. <think>or 5", "It is 4.\nor 5", "", True),
        ("<THINK>2+2</ think>4", "2+2", "4", False),
        ("[THINK]2+2[/THINK]4", "2+2", "4", False),
        ("<reasoning>2+2</reasoning>4", "2+2", "4", False),
        ("<think>a</think>x<think>b</think>y", "a\nb", "xy", False),
        ("<think></think>", "", "", False),
        ("", "", "", False),
    ],
)
def test_a_completion_is_split(text, thinking, answer, is_open):
    assert split(text) == Completion(thinking, answer, is_open)


@pytest.fixture(scope="module")
def tagged():
    """The tiny tokenizer with its own copy of the tags as special tokens, and a template that opens the thinking."""
    from sdjax.tasks.words import CHAT, word_tokenizer

    made = word_tokenizer(("ask", "key", "secret", "plan", "The", "answer", "is", "4"))
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    made.chat_template = CHAT + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    return made


def test_tags_that_are_special_tokens_survive_decoding(tagged):
    ids = tagged.encode("<think> secret plan </think> The answer is 4", add_special_tokens=False)
    text = decode_text(tagged, [*ids, tagged.eos_token_id])
    assert split(text) == Completion("secret plan", "The answer is 4")


def test_thinking_that_the_prompt_opens_is_open(tagged):
    context = tagged.apply_chat_template(
        [{"role": "user", "content": "ask key"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    opening = thinking_opened(tagged, context)
    assert opening == "<think>"
    said = tagged.encode("The answer is 4", add_special_tokens=False)
    assert split(decode_text(tagged, said, opening)) == Completion("The answer is 4", "", open=True)
    assert thinking_opened(tagged, said) == ""


def test_samples_of_a_template_that_opens_the_thinking_say_so(tagged):
    policy = dataclasses.replace(tiny.policy(), tokenizer=tagged)
    (found,) = rollouts.sample(policy, [example("4")], tiny.jax.random.key(0))
    assert found.text.startswith("<think>\n") and split(found.text).open
    row = rollouts.written(example("4"), "<think>\nsecret plan</think> The", policy, group=0, source=0)
    assert tagged.convert_ids_to_tokens(row.tokens)[:2] == ["secret", "plan"]  # the prompt has the tag already


# ---- what was cut off


def row(text, finished=True, reward=0.0, **fields) -> Rollout:
    return Rollout(example("12"), (1,), (0.0,), text, 0, finished=finished, reward=reward, **fields)


@pytest.mark.parametrize(
    "text, reward",
    [
        (r"so \boxed{12}. Let me check", 1.0),
        ("<answer>12</answer> and", 1.0),
        (r"<think>x</think>\boxed{12} is", 1.0),
        ("The answer is 12", 0.0),
        ("so 3*4 = 12", 0.0),
        (r"\boxed{12} or \boxed{1", 0.0),
        ("<answer>12", 0.0),
        (r"<think>\boxed{12}", 0.0),
    ],
)
def test_a_completion_that_was_cut_off_needs_a_complete_mark(text, reward):
    environment = Environment({}, maths.verify)
    assert rollouts.judge(environment, [row(text, finished=False)])[0].reward == reward
    whole = rollouts.judge(environment, [row(text)])[0].reward
    assert whole == (0.0 if "<think>\\" in text or text == "<answer>12" or r"or \boxed{1" in text else 1.0)


def test_only_verifiers_that_read_answers_are_not_asked_about_what_was_cut_off():
    asked = lambda example, text: Verdict(0.25, text)
    environment = Environment({}, asked)
    assert rollouts.judge(environment, [row("w1", finished=False)])[0].reward == 0.25
    judged = rollouts.judge(Environment({}, exact.verify), [row("The answer is 12", finished=False), row("12")])
    assert [(r.reward, r.feedback) for r in judged] == [(0.0, judging.CUT_OFF), (1.0, None)]


# ---- who else uses the split


@pytest.mark.parametrize("text", ["<think>2+2 = 4</think>", "<think>2+2 = 4 so the sum is 4"])
def test_a_peer_that_never_reached_an_answer_is_no_lesson(text):
    own, empty, good = row("no"), row(text, reward=1.0), row("<think>4</think>It is 4.", reward=1.0)
    for lesson in (peer_or_feedback(), peers()):
        assert lesson(own, [own, empty]) is None
        told = lesson(own, [own, empty, good])[-1]["content"]
        assert "It is 4." in told and "2+2" not in told and "<think>" not in told


def test_hedges_are_counted_in_the_answer_too():
    found = records.hedging([row("<think>wait, wait</think>maybe 4")])
    assert (found["epistemic"], found["epistemic_in_answer"]) == (3.0, 1.0)


def test_the_text_of_rollouts_shows_thinking_and_answer(tmp_path):
    file = log.RunLog(tmp_path, steps=1)
    file.rollouts(1, [row("<think>2+2</think>4"), row("<think>2+2"), row("4")])
    file.close()
    text = (tmp_path / "rollouts.txt").read_text()
    assert "-- thinking\n2+2\n-- answer\n4\n" in text and "-- thinking (does not end)\n2+2\n-- answer\n\n" in text
    assert "-- completion\n4\n" in text


# ---- several right answers, and answers that are none


def test_several_answers_are_right(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "half?", "answer": ["1/2", "50 %", 0.5]}))
    (both,) = problems.problems(path).examples
    assert both.answers == ("1/2", "50 %", "0.5") and both.main_answer == "1/2"
    two = example("red", "blue")
    assert [maths.verify(two, f"The answer is {c}.").reward for c in ("red", "blue", "green")] == [1, 1, 0]
    assert [exact.verify(two, f"The answer is {c}.").reward for c in ("red", "blue", "green")] == [1, 1, 0]
    assert example("4").answers == ("4",) and Example("q", (), ["4"]).main_answer == "4"
    rollouts.to_file(tmp_path / "out.jsonl", [dataclasses.replace(row("1"), example=two)])
    assert problems.problems(tmp_path / "out.jsonl").examples[0].answers == ("red", "blue")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"prompt": "q", "answer": NaN}', "line 1: this is not JSON (NaN is not a number"),
        ('{"prompt": "q", "answer": 1e400}', "line 1: this is not JSON (1e400 exceeds every number"),
        ('{"prompt": "q", "answer": ["1", -Infinity]}', "line 1: this is not JSON (-Infinity is not a number"),
        ('{"prompt": "q", "answer": "1", "answer": "2"}', "the key 'answer' stands twice"),
        ('{"prompt": "q", "answer": []}', "`answer` must be a text or a number; found an empty list"),
        ('{"prompt": "q", "answer": ["1", ""]}', "`answer, number 2` is empty"),
        ('{"prompt": "q", "answer": ["1", ["2"]]}', "`answer, number 2` must be a text or a number; found a list"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path, line, sentence):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(TaskError, match=re.escape(sentence)):
        problems.problems(path)


# ---- exact numbers, and what may take for ever


def test_large_powers_are_compared_without_being_evaluated():
    value = lambda text: numbers.exact(text)
    assert numbers.same_value(value("2^{2024}"), value("4^{1012}"))
    assert numbers.same_value(value("12^{100000}"), value(r"2^{200000} \cdot 3^{100000}"))
    assert not numbers.same_value(value("12^{100000}"), value(r"2^{200001} \cdot 3^{100000}"))
    assert numbers.same_value(value(r"\sqrt{2^{4048}}"), value("2^{2024}"))
    assert value("9^{9^{9^9}}") is None and value("x") is None and value("1/0") is None


@pytest.mark.parametrize(
    "answer",
    [r"\sum_{k=1}^{3} k", r"\int_0^1 x dx", r"\prod_{k=1}^{9} k", r"\lim_{x\to 0} x", r"\iint x", "x^{9999}", "(" * 30],
)
def test_what_may_take_for_ever_is_refused(answer):
    assert maths.costly(answer)


@pytest.mark.parametrize("answer", ["{x}_1 " * 60, r"\summit + 1", r"\frac{1}{2}", r"\int" + "o"])
def test_what_is_cheap_is_not_refused(answer):
    assert not maths.costly(answer)


def test_a_verdict_for_which_there_was_no_time_is_counted(monkeypatch):
    monkeypatch.setattr(bounded, "LIMIT_S", 0.5)
    before = bounded.out_of_time()
    assert maths.verify(example("x+42"), ENDLESS).reward == 0.0
    assert maths.verify(example("x+42"), ENDLESS).reward == 0.0  # remembered, and counted again
    assert bounded.out_of_time() == before + 2
    assert maths.verify(example("x+y"), r"\boxed{y+x}").reward == 1.0


def test_verdicts_are_given_side_by_side_in_order(monkeypatch):
    """In as many threads as there are cores; a verifier without the mark keeps to the caller's thread."""
    monkeypatch.setattr(bounded, "cores", lambda: 4)
    together = threading.Barrier(4, timeout=20)

    @judging.from_threads
    def waits(example, text):
        together.wait()
        return Verdict(float(text))

    cases = [judging.Case(example("1"), str(i)) for i in range(8)]
    assert [v.reward for v in judging.verdicts(waits, cases)] == list(map(float, range(8)))
    where = lambda example, text: Verdict(float(threading.current_thread() is threading.main_thread()))
    assert all(v.reward for v in judging.verdicts(where, cases))


def test_judges_answer_many_threads_with_an_endless_answer_among_them(monkeypatch):
    monkeypatch.setattr(bounded, "LIMIT_S", 1.0)
    rewards = {}

    def judge(i):
        text = ENDLESS if i == 3 else rf"\boxed{{{i}+z}}"
        rewards[i] = maths.verify(example(f"z+{i}"), text).reward

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert rewards == {i: float(i != 3) for i in range(8)}


def test_the_limit_is_processor_time(monkeypatch):
    """The clock's own limit, for a judge that neither answers nor computes, is a hundred times as long here."""
    monkeypatch.setattr(bounded, "LIMIT_S", 0.5)
    monkeypatch.setattr(bounded, "PATIENCE", 400.0)
    judge = bounded.Judge("same_maths", ["1", "1"])
    assert judge.score("x+1", "1+x") == 1.0
    started = time.monotonic()
    assert judge.score("x+42", ENDLESS[len(r"\boxed{") : -1]) is None and time.monotonic() - started < 100


HOSTILE = (
    *(
        "\n" * 50_000 + "x",
        "a" + "\n" * 50_000 + "x",
        "$$" * 20_000,
        "The answer is $$" + "\n" * 20_000 + "5x",
        "\\(" * 9_000,
    ),
    *(
        "1 " * 20_000 + "x",
        "\\frac{" * 5_000,
        "\\boxed{" + "{" * 20_000,
        ". check" * 10_000,
        "answer " * 9_000,
        "**" * 20_000,
    ),
    *(
        "\\boxed{" + "x<" * 1_000 + "}",
        "\\boxed{" + "\\sqrt" * 1_000 + "}",
        "\\boxed{" + "a=" * 1_500 + "}",
        "<think>" * 9_000,
    ),
    *(
        "\\boxed{" + "2^" * 500 + "2}",
        "\\boxed{1" + "0" * 390 + "^{" + "9" * 15 + "}}",
        "\\boxed{" + "(1," * 300 + "1}",
    ),
)


def test_verdicts_on_hostile_texts_are_quick():
    started = time.monotonic()
    for text in HOSTILE:
        for gold in ("42", r"\sqrt{2}", "(1,2)", "Paris", "[0,1)", "1, 2, 3", "2^{2024}"):
            assert maths.verify(example(gold), text).reward == 0.0, text[:30]
    assert time.monotonic() - started < 20


def test_a_blank_line_with_spaces_in_it_ends_a_paragraph():
    text = "First $x=1$.\n   \nSo the root is less than 2"
    assert extraction.taken(text, r"\sqrt{2}").answer == "So the root is less than 2"  # not the formula before it


# ---- the command


def written(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture
def two_problems(tmp_path):
    lines = {"prompt": "2+2?", "answer": 4, "id": "sum"}, {"prompt": "half?", "answer": ["1/2", "0.5"]}
    return written(tmp_path / "problems.jsonl", *lines)


def test_the_command_shows_rewards_and_what_was_taken(tmp_path, two_problems, capsys):
    texts = written(tmp_path / "t.jsonl", "The answer is 4. I checked 3 times.", {"text": r"so \boxed{2}", "reward": 1})
    assert main(["verify", texts, "--data", two_problems]) == 0
    said = capsys.readouterr().out
    assert "1  sum: took '4' (stated as the answer); right is '4'" in said
    assert "0  problems:2: took '2' (the last \\boxed{}); right is '1/2' or '0.5'  (recorded: 1)" in said
    assert "2 texts, mean reward 0.500, 0 without an answer; 1 of 1 recorded rewards differ" in said
    named = [
        {"prompt": "half?", "response": "<think>so 0.5"},
        {"id": "sum#2", "completion": "It is 4", "finished": False},
    ]
    assert main(["verify", written(tmp_path / "n.jsonl", *named), "--data", two_problems, "--as-json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["reward"], first["answer"], first["why"]) == (
        "problems:2",
        0.0,
        None,
        "the thinking does not end",
    )
    assert second["id"] == "sum" and second["why"].startswith("cut off") and second["feedback"] == judging.CUT_OFF


@pytest.mark.parametrize(
    "line, sentence",
    [
        ({"id": "sun", "text": "4"}, "line 1: no problem of {data} has the `id` 'sun'; did you mean sum?"),
        ({"prompt": "3?", "text": "4"}, "line 1: no problem of {data} has this prompt"),
        ({"id": "sum"}, "line 1: expected a text under `text` (or completion, response)"),
        ({"id": "sum", "text": "4", "reward": "1"}, "line 1: `reward` must be a number, found '1'"),
        ("4", "has 1 texts and {data} 2 problems: give each text the `id` or `prompt`"),
    ],
)
def test_texts_without_a_problem_are_refused(tmp_path, two_problems, capsys, line, sentence):
    assert main(["verify", written(tmp_path / "t.jsonl", line), "--data", two_problems]) == 2
    assert sentence.format(data=two_problems) in capsys.readouterr().err
