"""The scratchpad task: its arithmetic, the known rates of its authors, its verdicts and its splits."""

import itertools
import random
import re

import pytest

from sdjax.study import testbed
from sdjax.tasks import scratchpad
from sdjax.tasks.errors import TaskError
from sdjax.tasks.scratchpad import ALONE, FAMILIES, HEDGES, IN_DOMAIN, Author, Problem, applied, with_care
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Verdict

NEVER = Author(0.0, 0.0, 0.0)
PROBLEM = Problem(37, (("*", 4), ("+", 58)), 2)
EXAMPLE = scratchpad.example(PROBLEM, "in_domain")
SLIPPED = "<think> 3 7 ; a * 4 = 5 8 ; b + 5 8 = 1 6 ; </think> a 5 8 ; answer 1 6"
REPAIRED = "<think> 3 7 ; a * 4 = 5 8 wait 7 * 4 = 2 8 , 3 * 4 = 1 2 + 2 = 1 4 , so 4 8 ; b + 5 8 = 0 6 ; </think> a 4 8 ; answer 0 6"


def drawn(family, size, seed=0):
    rng = random.Random(seed)
    return [scratchpad.draw(family, rng) for _ in range(size)]


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_careful_steps_arrive_at_the_result_and_every_line_of_them_is_true(digits):
    rng = random.Random(digits)
    for operation in "+-*":
        for _ in range(300):
            left, right = rng.randrange(10**digits), rng.randrange(10 if operation == "*" else 10**digits)
            lines = [line for line in with_care(left, operation, right, digits).split(" ,") if line]
            units = "".join(line[-1] for line in reversed(lines))
            assert int(units) == applied(left, operation, right, digits)
            for line in lines:
                first, *rest = line.split(" = ")
                value = eval(first)  # digits and signs that the task wrote
                for said in rest:
                    carry, unit, *more = said.split()
                    assert value == (int(unit) - 10 * int(carry) if operation == "-" else 10 * int(carry) + int(unit))
                    value += int("".join(more) or "0")


def test_a_question_and_its_reference():
    assert EXAMPLE.prompt[0]["content"] == "3 7 a * 4 b + 5 8 ="
    assert EXAMPLE.answer == "0 6"
    assert EXAMPLE.solution == "<think> 3 7 ; a * 4 = 4 8 ; b + 5 8 = 0 6 ; </think> a 4 8 ; answer 0 6"
    assert EXAMPLE.meta["results"] == [48, 6] and EXAMPLE.meta["plan"] == "a * 4 ; b + 5 8"


def test_a_slip_is_one_digit_off_by_one():
    rng = random.Random(0)
    for value in range(1000):
        near = scratchpad.slipped(value, 3, rng)
        apart = [(int(a) - int(b)) % 10 for a, b in zip(f"{value:03d}", f"{near:03d}", strict=True) if a != b]
        assert len(apart) == 1 and apart[0] in (1, 9)


# ---- authors ------------------------------------------------------------------------------------------------------


def test_an_author_who_never_slips_writes_the_reference_and_one_who_notices_everything_is_right():
    for family in FAMILIES:
        for problem in drawn(family, 50):
            example, rng = scratchpad.example(problem, family.name), random.Random(1)
            assert scratchpad.trace(problem, NEVER, rng) == example.solution
            noticing = scratchpad.trace(problem, Author(3.0, 1.0, 1.0), rng)
            assert scratchpad.verify(example, noticing).reward == 1.0
            assert scratchpad.verify(example, scratchpad.peer(problem, rng)).reward == 1.0


def test_steps_of_which_an_author_is_sure_are_right_and_not_hedged():
    for seed, problem in enumerate(drawn(IN_DOMAIN, 50)):
        text = scratchpad.trace(problem, Author(10.0, 10.0, 0.0), random.Random(seed), sure=range(3))
        assert text == scratchpad.solution(problem)


def test_slips_and_hedges_occur_at_their_known_rates():
    rng, counts = random.Random(0), {}
    for problem in drawn(IN_DOMAIN, 4000):
        text = scratchpad.trace(problem, ALONE, rng).split("</think>")[0].removeprefix("<think>")
        start, *steps = text.split(";")[:-1]
        number = lambda text: int(text.replace(" ", ""))
        left = number(start)
        for step in steps:
            operation, right, said = re.match(r" [a-c] ([-+*]) ([\d ]+) = (\d \d)", step).groups()
            wrong = number(said) != applied(left, operation, number(right), 2)
            left = number(step[-4:])
            seen = counts.setdefault((operation, wrong), [0, 0])
            seen[0] += 1
            seen[1] += any(word in step.split() for word in HEDGES)
    for operation in "+*":
        (right, doubts), (wrong, noticed) = counts[operation, False], counts[operation, True]
        assert wrong / (right + wrong) == pytest.approx(scratchpad.SLIP[operation], abs=0.02)
        assert doubts / right == pytest.approx(scratchpad.DOUBT[operation], abs=0.03)
        assert noticed / wrong == pytest.approx(ALONE.notice, abs=0.04)


# ---- verdicts -----------------------------------------------------------------------------------------------------


def test_verdicts_and_the_first_error():
    judged = lambda text: scratchpad.verify(EXAMPLE, text)
    assert judged(EXAMPLE.solution) == Verdict(1.0, None)
    assert judged(REPAIRED) == Verdict(1.0, None)
    assert judged(SLIPPED) == Verdict(0.0, "The answer is wrong: step 1 is the first error.")
    late = REPAIRED.replace("= 0 6 ;", "= 0 7 ;").replace("answer 0 6", "answer 0 7")
    assert judged(late) == Verdict(0.0, "The answer is wrong: step 2 is the first error.")
    miscopied = EXAMPLE.solution.replace("answer 0 6", "answer 0 5")
    assert judged(miscopied) == Verdict(0.0, "The answer is wrong.")
    assert judged("answer 0 7 answer 0 6").reward == 1.0
    assert judged("answer 0 6 1").reward == 0.0


@pytest.mark.parametrize("text", ["", "answer", "= = ; so ;" * 50, "0 6", "<think> 3 7 ; a * 4 = wait so ;"])
def test_garbage_is_no_answer(text):
    assert scratchpad.verify(EXAMPLE, text) == Verdict(0.0, "No answer was found in your response.")


# ---- splits and vocabulary ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_task_has_distinct_problems_of_its_family_and_none_on_both_sides(family):
    task = scratchpad.scratchpad(train_size=40, test_size=40, family=family)
    train, test = ({e.prompt[0]["content"] for e in side} for side in (task.train, task.test))
    assert len(train) == len(test) == 40 and not train & test
    for text in train | test:
        operations = re.findall(r"[-+*]", text)
        assert family.steps[0] <= len(operations) <= family.steps[1]
        assert set(operations) <= {operation for operation, _, _ in family.operations}
    assert scratchpad.scratchpad(train_size=40, test_size=40, family=family) == task
    assert scratchpad.scratchpad(train_size=40, test_size=40, seed=1, family=family).train != task.train


def test_pre_training_reads_no_held_out_question():
    held_out = {e.prompt[0]["content"] for some in testbed.held_out_problems(300).values() for e in some}
    seen = {chat[-1]["content"].split(" =")[0] + " =" for chat, _ in itertools.islice(testbed.texts(0), 3000)}
    assert not held_out & seen


def test_every_word_has_a_token():
    tokenizer = word_tokenizer(testbed.words())
    for chat, text in itertools.islice(testbed.texts(0), 1000):
        ids = tokenizer.encode(f"{chat[-1]['content']} {text}")
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for step in (None, *range(8)):
        assert tokenizer.unk_token_id not in tokenizer.encode(scratchpad.remark(step))


def test_impossible_sizes_are_refused():
    with pytest.raises(TaskError, match="train_size=0: expected at least 1"):
        scratchpad.scratchpad(train_size=0)
    few = scratchpad.Family("few", 1, (1, 1), (("*", 2, 2),))
    with pytest.raises(TaskError, match="only [0-9]+ problems of few"):
        scratchpad.problems(few, 10, 0)
