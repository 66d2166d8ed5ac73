"""Tasks: what is drawn, read, extracted and judged."""

import ast
import inspect
import json
import pathlib
import re
import threading
import time

import pytest

from sdjax.tasks import bounded, exact, maths, recall
from sdjax.tasks import reasoning_gym as gym
from sdjax.tasks.answers import marks
from sdjax.tasks.data import problems
from sdjax.tasks.errors import TaskError
from sdjax.tasks.splits import question_key, split_by_question
from sdjax.types import Example, Task, Verdict

NASTY = (
    *("", " \n ", "\0", "\ud800", "\\boxed{", "\\boxed{}}", "<answer></answer>", "[[", "{", "None", "nan", "1e999"),
    *("__import__('os').abort()", "\\boxed{(lambda: 1)()}", "9**9**9**9", "The answer is ", "x.__class__"),
    *("7" * 5000, "\n" * 50_000, "\\boxed{" * 10_000, "<answer>" * 10_000, "1,000" + ",000" * 10_000 + "0", "(" * 5000),
)


def example(answer: str, question: str = "q", **fields) -> Example:
    return Example(id=question, prompt=({"role": "user", "content": question},), answer=answer, **fields)


def questions(examples) -> set[str]:
    return {question_key(each.prompt) for each in examples}


# ---- answers


@pytest.mark.parametrize(
    "text, number",
    [
        ("4 + 3 = 7", "7"),
        ("10-7=3 and 4 -9", "-9"),
        ("10-7", "7"),
        ("it is (-4).", "-4"),
        ("\N{MINUS SIGN}4", "-4"),
        ("about 1,000,000 apples", "1000000"),
        ("1,2,3", "3"),
        ("$5.50 in all", "5.50"),
        ("the odds are 1/60.", "1/60"),
        ("8.05e-06", "8.05e-06"),
        ("H2O and x2", None),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert marks.last_number(text) == number


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}} or \boxed{x_{1}}.", "x_{1}"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{a} and \boxed{cut", None),
        (r"The answer is 3. \boxed{4}", "4"),
        ("<answer> blue\n</answer> bye", "blue"),
        ("The answer is red. No, the final answer is: **blue**\nbye", "blue"),
        ("reasoning\n#### 288", "288"),
        ("first\n\nlast line\n", "last line"),
        ("", None),
        ("The answer is", None),
    ],
)
def test_stated_answer(text, answer):
    assert marks.stated_answer(text) == answer


def test_stated_answer_with_several_lines():
    assert marks.stated_answer("The board:\n1 2\n3 4", lines=2) == "1 2\n3 4"
    assert marks.stated_answer("The answer is\n1 2\n3 4\n\nBye", lines=2) == "1 2\n3 4"
    assert marks.stated_answer("a\nb\nc", lines=0) == "a\nb\nc"


def test_numeric_answer_prefers_what_is_marked():
    assert marks.numeric_answer(r"\boxed{x = 5}; check: 2 + 3") == "5"
    assert marks.numeric_answer(r"\boxed{none}: 3") == "3"


def test_parse_number_is_exact_and_bounded():
    assert marks.parse_number("0.1") * 10 == 1
    assert marks.parse_number("-1,000.50") == marks.parse_number("-2001/2")
    for text in ("", "x", "1/0", "1e99999", "1 2", "7" * 5000):
        assert marks.parse_number(text) is None


def test_remarks():
    assert marks.outcome("7", "9") == "Your answer 7 is wrong."
    assert marks.direction("7", "9") == "Your answer 7 is wrong: it is too small."
    assert marks.distance("7", "9") == "Your answer 7 is wrong: it is too small by 2."
    assert marks.distance("1/2", "1/3") == "Your answer 1/2 is wrong: it is too large by 1/6."
    assert marks.distance("1.25", "1") == "Your answer 1.25 is wrong: it is too large by 0.25."
    assert marks.distance("blue", "9") == "Your answer blue is wrong."
    assert marks.reveal("7", "9") == "Your answer 7 is wrong; the correct answer is 9."


def test_extraction_is_linear_on_any_text():
    start = time.monotonic()
    for text in NASTY:
        for extract in (marks.last_boxed, marks.last_tagged, marks.last_number, marks.stated_answer):
            extract(text * 5)
    assert time.monotonic() - start < 5


# ---- maths and exact


@pytest.mark.parametrize(
    "correct, text",
    [
        ("7", "I think it is 7."),
        ("1/2", r"so \boxed{\frac12}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        ("0.5", "that makes 1/2"),
        ("x+1", "The answer is $1+x$."),
        (r"\{1,2\}", r"\boxed{2,1}"),
        (r"$\boxed{3}$", r"\boxed{x=3}"),
        ("7", r"\boxed{7 \text{ cm}}"),
        ("1000", "1,000"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        ("10^{5000}", r"\boxed{10^{5000}}"),
        ("yes", "The answer is yes."),
    ],
)
def test_maths_accepts(correct, text):
    assert maths.verify(example(correct), text) == Verdict(1.0, None)


@pytest.mark.parametrize(
    "correct, text", [("7", r"7, no \boxed{8}"), ("x+1", r"\boxed{x-1}"), ("7", r"\boxed{5 apples}")]
)
def test_maths_rejects(correct, text):
    assert maths.verify(example(correct), text).reward == 0.0


def test_maths_feedback():
    wrong = example("9")
    assert maths.verify(wrong, "7").feedback == "Your answer 7 is wrong: it is too small."
    assert maths.verify(wrong, "7", remark=marks.distance).feedback.endswith("too small by 2.")
    assert maths.verify(wrong, "7", reveal_answer=True).feedback.endswith("the correct answer is 9.")
    assert maths.verify(wrong, "no idea").feedback == "No answer was found in your response."
    assert maths.verify(example("9", feedback="Carry the one."), "7").feedback == "Carry the one."


def test_maths_never_raises_and_never_hangs(monkeypatch):
    monkeypatch.setattr(bounded, "LIMIT_S", 2.0)
    for text in (*NASTY, r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}", r"\boxed{\prod_{k=1}^{10000000} k}"):
        assert maths.verify(example("42"), text).reward == 0.0
    start = time.monotonic()
    assert maths.verify(example("42"), r"\boxed{x^{999}+(x+y+z+1)^{99}}").reward == 0.0  # looks harmless, is not
    assert time.monotonic() - start < 30
    assert maths.verify(example("y+x"), r"\boxed{x+y}").reward == 1.0  # with a new process


def test_maths_works_in_threads():
    rewards = {}

    def judge(i):
        rewards[i] = maths.verify(example(f"x+{i}"), rf"\boxed{{{i % 3}+x}}").reward

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert rewards == {0: 1, 1: 1, 2: 1, 3: 0, 4: 0, 5: 0}


def test_exact():
    assert exact.verify(example("blue sky"), "I see.\nThe answer is  blue  sky.").reward == 1.0
    assert exact.verify(example("blue"), "Blue").reward == 0.0
    assert exact.verify(example("blue"), "red") == Verdict(0.0, "Your answer red is wrong.")
    assert exact.verify(example("1 2\n3 4"), "1 2\n3 4").reward == 1.0
    assert all(exact.verify(example("blue"), text).reward == 0.0 for text in NASTY)


# ---- reasoning-gym


@pytest.fixture(scope="module")
def sums() -> Task:
    return gym.chain_sum(train_size=120, test_size=80, seed=3)


def test_chain_sum_uses_every_expression_once(sums):
    assert len(sums.train) == 120 and len(sums.test) == 80
    assert len(questions(sums.train) | questions(sums.test)) == 200  # all that two one-digit terms can make
    text = sums.train[0].prompt[0]["content"]
    assert re.fullmatch(r"State the final answer to the following arithmetic problem: \d [+-] \d =", text)
    assert len({each.id for each in sums.train + sums.test}) == 200


def test_chain_sum_runs_out():
    with pytest.raises(TaskError, match="only 200 distinct questions .* 201 were asked for"):
        gym.chain_sum(train_size=121, test_size=80)


def test_solutions_are_right_and_verify(sums):
    for each in sums.train:
        steps, last = each.solution.split("\n")
        left, right = steps.split(" = ")
        assert eval(left) == int(right) == int(each.answer) and last == f"The answer is {right}."
        assert sums.verify(each, each.solution) == Verdict(1.0, None)
    assert gym.chain_sum_solution("4 - 1 - 7") == "4 - 1 = 3\n3 - 7 = -4\nThe answer is -4."


def test_longer_sums():
    task = gym.chain_sum(terms=(3, 4), digits=(2, 2), train_size=20, test_size=5)
    assert all(task.verify(each, each.solution).reward == 1.0 for each in task.train)
    assert {each.solution.count("\n") for each in task.train} == {2, 3}


def test_problems_depend_on_seed_only(sums):
    again = gym.chain_sum(train_size=120, test_size=80, seed=3)
    assert again[:3] == sums[:3]
    shorter = gym.chain_sum(train_size=10, test_size=80, seed=3)
    assert shorter.test == sums.test and shorter.train == sums.train[:10]
    near = gym.chain_sum(digits=(3, 3), train_size=50, test_size=0, seed=4)
    far = gym.chain_sum(digits=(3, 3), train_size=50, test_size=0, seed=5)
    assert not questions(near.train) & questions(far.train)  # the library's own neighbouring seeds share all but one


def test_no_part_of_the_answer_is_rewarded():
    ten = next(each for each in gym.chain_sum(train_size=200, test_size=0).train if each.answer == "0")
    strict, lenient = (gym.chain_sum(train_size=200, test_size=0, partial_credit=p) for p in (False, True))
    assert strict.verify(ten, "10").reward == 0.0
    assert lenient.verify(ten, "10").reward == 0.5  # "0" is half of "10", says the family


def test_feedback_of_sums_does_not_reveal(sums):
    problem = sums.train[0]
    wrong = str(int(problem.answer) - 2)
    assert sums.verify(problem, f"It is {wrong}").feedback == f"Your answer {wrong} is wrong: it is too small."
    assert sums.verify(problem, "Hm").feedback == "No answer was found in your response."
    telling = gym.chain_sum(train_size=120, test_size=80, seed=3, reveal_answer=True)
    assert telling.verify(problem, wrong).feedback.endswith(f"the correct answer is {problem.answer}.")


def test_gsm_symbolic_has_worked_solutions():
    task = gym.reasoning_gym("gsm_symbolic", size=5, test_size=2)
    for each in task.train:
        assert "####" not in each.solution and each.solution.endswith(f"The answer is {each.answer}.")
        assert task.verify(each, each.solution).reward == 1.0


@pytest.mark.parametrize(
    "family", ["knights_knaves", "sentence_reordering", "mini_sudoku", "dice", "bitwise_arithmetic", "simple_equations"]
)
def test_reference_answers_verify_however_they_are_put(family):
    task = gym.reasoning_gym(family, size=4, test_size=0)
    for each in task.train:
        for form in ("{}", "The answer is {}", "So\n<answer>{}</answer>", "Thus \\boxed{{{}}}."):
            assert task.verify(each, form.format(each.answer)).reward == 1.0, form
        assert each.answer not in (task.verify(each, "no").feedback or "")


@pytest.mark.parametrize(
    "family", ["prime_factorization", "game_of_life_halting", "n_queens", "spiral_matrix", "boxnet"]
)
def test_families_never_raise_nor_run_the_answer(family):
    task = gym.reasoning_gym(family, size=3, test_size=0)
    for each in task.train:
        assert all(task.verify(each, text).reward == 0.0 for text in NASTY)


def test_formulas_are_judged_in_bounded_time(monkeypatch):
    monkeypatch.setattr(bounded, "LIMIT_S", 2.0)
    task = gym.reasoning_gym("countdown", size=3, test_size=0)
    assert all(task.verify(each, each.answer).reward == 1.0 for each in task.train)
    assert all(task.verify(task.train[0], text).reward == 0.0 for text in (*NASTY, "9**(9*9**9)"))


def test_the_table_of_families_that_evaluate_answers_is_complete():
    found = set()
    for name, (dataset, _) in gym._families().items():
        source = inspect.getsource(dataset.score_answer)
        if re.search(r"\beval\((?!entry)|\bexec\(|parse_expr\(answer|sympify\(", source):
            found.add(name)
    assert found == gym.READ_AS_LITERALS | gym.READ_AS_FORMULAS


def test_families_that_follow_the_hash_seed_say_so(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.warns(UserWarning, match="ransom_note differ from process to process; set PYTHONHASHSEED"):
        gym.reasoning_gym("ransom_note", size=1, test_size=0)


@pytest.mark.parametrize(
    "family, options, sentence",
    [
        ("chainsum", {}, "no family 'chainsum'; did you mean chain_sum"),
        ("gsm", {}, "did you mean gsm_symbolic"),
        ("chain_sum", {"min_term": 2}, "no option 'min_term'; it has allow_negation, max_digits"),
        ("chain_sum", {"min_terms": 7, "max_terms": 2}, "refuses min_terms=7, max_terms=2: max_terms must be"),
        ("chain_sum", {"min_terms": "2"}, "refuses min_terms='2'"),
        ("composite", {}, "Must specify at least one dataset"),
        ("chain_sum", {"size": -1}, "size is -1"),
    ],
)
def test_what_reasoning_gym_is_not_given(family, options, sentence):
    with pytest.raises(TaskError, match=re.escape(sentence)):
        gym.reasoning_gym(family, **{"size": 1, "test_size": 1, **options})


def test_verify_of_another_tasks_example(sums):
    with pytest.raises(TaskError, match="is not of this chain_sum task"):
        sums.verify(example("7"), "7")


def test_worked_demonstrations(sums):
    turns = gym.worked_demonstrations(sums, 3)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    by_text = {each.prompt[0]["content"]: each.solution for each in sums.train}
    assert all(
        by_text[user["content"]] == assistant["content"]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True)
    )
    for each in sums.train:
        others = gym.worked_demonstrations(sums.train, 3, example=each)
        assert len(others) == 6 and each.prompt[0] not in others
    unshown = next(each for each in sums.train if each.prompt[0] not in turns)
    assert gym.worked_demonstrations(sums, 3, example=unshown) == turns  # a shared prefix
    assert gym.worked_demonstrations(sums, 0) == ()
    with pytest.raises(TaskError, match="3 demonstrations were asked for, but only 2"):
        gym.worked_demonstrations(sums.train[:3], 3, example=sums.train[0])


# ---- recall


def test_recall():
    task = recall.recall(keys=16, seed=1)
    assert len(task.train) == 48 and len(task.test) == 16
    assert not questions(task.train) & questions(task.test)
    words = {each.meta["key"]: each.answer for each in task.train}
    assert all(words[each.meta["key"]] == each.answer for each in task.test)
    assert sorted(words.values()) == sorted(recall.WORDS * 2)
    each = task.train[0]
    assert task.verify(each, f"{each.answer} and more").reward == 1.0
    assert task.verify(each, each.answer[:2]).reward == 0.0 and task.verify(each, "").feedback == marks.NO_ANSWER
    used = " ".join(f"{e.prompt[0]['content']} {e.solution}" for e in task.train + task.test).split()
    assert set(used) == set(recall.vocabulary(keys=16))
    assert recall.recall(keys=16, seed=2).train != task.train
    assert recall.recall(keys=16, seed=1).train == task.train
    with pytest.raises(TaskError, match="at least 1 key"):
        recall.recall(keys=0)


# ---- files


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_jsonl_reads_prompts_and_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}]
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"prompt": "1 + 1?", "answer": 2, "level": 5}).encode(),
        b"  ",
        {"messages": chat, "answer": "7", "solution": "3 + 4 = 7", "feedback": "Count.", "id": 12},
    )
    (first, second), bad = problems.problems(path)[:2]
    assert (first.id, first.answer, first.meta, bad) == ("data:1", "2", {"level": 5}, [])
    assert first.prompt == ({"role": "user", "content": "1 + 1?"},)
    assert second.prompt == tuple(chat) and second.id == "12"
    assert (second.solution, second.feedback) == ("3 + 4 = 7", "Count.")


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row, sentence",
    [
        (b'{"prompt": ', "line 2: this is not JSON (Expecting value at column 12); each line must be one JSON object."),
        (b"[" * 100_000, "line 2: this is not JSON"),
        (
            b'{"prompt": "q", "answer": NaN}',
            "line 2: this is not JSON (NaN is not a number in JSON; write it as a text",
        ),
        (b'{"prompt": "q", "answer": -Infinity}', "line 2: this is not JSON (-Infinity is not a number in JSON"),
        (b'{"prompt": "q", "answer": 1e400}', "line 2: this is not JSON (1e400 exceeds every number that can be"),
        (b'{"prompt": "q", "answer": "1", "answer": "2"}', "(the key 'answer' stands twice in one object)"),
        (b'{"prompt": "q", "answer": "1", "x": {"a": 1, "a": 2}}', "(the key 'a' stands twice in one object)"),
        (b'"text"', "line 2: expected a JSON object with `prompt` and `answer`, found a text."),
        (b'{"prompt": "\xff"}', "line 2: byte 13 of the line is not UTF-8"),
        (
            {"answer": "1"},
            "line 2: `prompt` or `messages` must be given, one of the two; found only answer; name its column, as --fields prompt=COLUMN.",
        ),
        ({"prompt": "q", "messages": [], "answer": "1"}, "both are there"),
        (
            {"prompt": "q"},
            "line 2: `answer` is missing; found prompt; name its column, as --fields answer=COLUMN, or only",
        ),
        ({"prompt": " ", "answer": "1"}, "line 2: `prompt` is empty"),
        ({"prompt": 3, "answer": "1"}, "`prompt` must be a text; found a number."),
        ({"prompt": "q", "answer": True}, "`answer` must be a text or a number; found true or false."),
        ({"prompt": "q", "answer": "1", "solution": ["s"]}, "`solution` must be a text; found a list."),
        ({"prompt": "\ud800", "answer": "1"}, "`prompt` holds half a surrogate pair"),
        ({"messages": "q", "answer": "1"}, "`messages` must be a list of turns"),
        ({"messages": [], "answer": "1"}, "found an empty list"),
        (
            {"messages": ["q"], "answer": "1"},
            "`messages, turn 1` must be an object with `role` and `content`; found a text",
        ),
        ({"messages": [{"role": "user"}], "answer": "1"}, "found the fields role."),
        (
            {"messages": [{"role": "narrator", "content": "q"}], "answer": "1"},
            "has the role 'narrator'; expected one of system",
        ),
        ({"messages": [{"role": "user", "content": ""}], "answer": "1"}, "line 2, turn 1: `content` is empty"),
        (
            {"messages": [USER, ASSISTANT, ASSISTANT], "answer": "1"},
            "must end with a user turn; the last turn is the assist",
        ),
        ({"prompt": "q", "answer": "1", "id": "one"}, "line 2: `id` is 'one', which line 1 has already"),
    ],
)
def test_bad_rows(tmp_path, row, sentence):
    path = write(tmp_path, {"prompt": "first", "answer": "1", "id": "one"}, row, {"prompt": "third", "answer": "3"})
    with pytest.raises(TaskError, match=re.escape(sentence)) as error:
        problems.problems(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    examples, bad = problems.problems(path, skip_bad_rows=True)[:2]
    assert [each.answer for each in examples] == ["1", "3"] and bad == [str(error.value)]


def test_bad_files(tmp_path):
    with pytest.raises(TaskError, match="does not exist"):
        problems.task(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="holds no files of rows"):
        problems.task(tmp_path)
    with pytest.raises(TaskError, match="has no examples: the file is empty"):
        problems.task(write(tmp_path, b"\n\n"))
    with pytest.raises(TaskError, match="all 2 rows are bad; the first: .* line 1"):
        problems.task(write(tmp_path, b"{", b"{"), skip_bad_rows=True)


def rows(count, start=0):
    return [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(start, start + count)]


def test_jsonl_split(tmp_path):
    task = problems.task(write(tmp_path, *rows(20), {"prompt": "what  is 3?", "answer": "three"}), test_fraction=0.25)
    assert task.name == "data" and 0 < len(questions(task.test)) < 20 and len(task.train) + len(task.test) == 21
    assert not questions(task.train) & questions(task.test)
    backwards = problems.task(write(tmp_path, *rows(20)[::-1], name="b.jsonl"), test_fraction=0.25)
    assert questions(backwards.test) == questions(task.test)
    assert questions(problems.task(tmp_path / "data.jsonl", test_fraction=0.25, seed=1).test) != questions(task.test)
    assert task.verify(task.train[0], task.train[0].answer).reward == 1.0
    assert problems.task(tmp_path / "b.jsonl", verify=exact.verify).verify is exact.verify
    for examples, fraction, sentence in (
        (task.train, 0.0, "between 0 and 1"),
        (task.train[:1], 0.5, "leaves none to train on"),
    ):
        with pytest.raises(TaskError, match=sentence):
            split_by_question(examples, fraction)


def test_a_question_stays_on_its_side_when_a_file_grows():
    """The share is right up to chance; a side is never empty."""
    ask = lambda i: Example(str(i), ({"role": "user", "content": f"What is {i} + {i}?"},), str(2 * i))
    examples = [ask(i) for i in range(2000)]
    train, test = split_by_question(examples[:400], 0.1)
    more_train, more_test = split_by_question(examples[::-1], 0.1)
    assert questions(train) <= questions(more_train) and questions(test) <= questions(more_test)
    assert abs(len(more_test) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    for fraction in (1e-9, 1 - 1e-9):
        assert min(map(len, split_by_question(examples[:5], fraction))) == 1


def test_jsonl_with_a_test_file(tmp_path):
    path, test_path = write(tmp_path, *rows(6)), write(tmp_path, *rows(3, start=6), name="test.jsonl")
    task = problems.task(path, test=test_path)
    assert (len(task.train), len(task.test)) == (6, 3)
    with pytest.raises(TaskError, match="not both"):
        problems.task(path, test=test_path, test_fraction=0.5)
    shared = write(tmp_path, *rows(3, start=4), name="shared.jsonl")
    with pytest.raises(TaskError, match=r"the question of row 'data:5' is in .*shared.jsonl too \(2 such rows\)"):
        problems.task(path, test=shared)
    with pytest.warns(UserWarning, match="2 rows were left out"):
        task = problems.task(path, test=shared, skip_bad_rows=True)
    assert (len(task.train), len(task.test)) == (4, 3)


# ---- imports


def test_slow_libraries_are_imported_late():
    """Importing reasoning-gym or sympy takes seconds, which `import sdjax` must not."""
    for path in pathlib.Path(bounded.PROGRAM).parent.glob("*.py"):
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in tops for alias in node.names} | {getattr(node, "module", None) for node in tops}
        assert not names & {"reasoning_gym", "math_verify", "sympy"}, path.name
