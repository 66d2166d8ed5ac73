"""A run goes on with the problems that it began with, in their order, or says what has changed; what was lost is named."""

import dataclasses
import json

import pytest
import talks
import tiny

from sdjax.run import data
from sdjax.run.fit import going_on, steps_recorded
from sdjax.run.folder import RunError
from sdjax.tasks.code.judging import ScriptTests
from sdjax.tasks.data.problems import task

TASK = tiny.TASK._replace(train=tiny.TASK.train[:6], test=tiny.TASK.test[:2])


@pytest.fixture
def begun(tmp_path):
    data.write(tmp_path, TASK)
    return tmp_path


def test_the_same_problems_are_the_same(begun):
    data.check(begun, TASK)
    data.check(begun / "nothing", TASK)


CHANGED = dataclasses.replace(TASK.train[2], answer="another")
TOLD = dataclasses.replace(TASK.train[2], solution="another")
ASKED = ({"role": "user", "content": "  " + TASK.test[1].prompt[0]["content"].upper()},)
LEAKED = dataclasses.replace(TASK.train[0], id="new", prompt=ASKED)


@pytest.mark.filterwarnings("ignore:task recall")
@pytest.mark.parametrize(
    ("train", "said"),
    [
        ((*TASK.train, *tiny.TASK.train[6:9]), "there were 6 training rows and are 9; 3 of the training rows are new"),
        (TASK.train[::-1], "the training rows are in another order"),
        (
            TASK.train[1:],
            "there were 6 training rows and are 5; 0 of the training rows are new or changed, and 1 are no",
        ),
        ((*TASK.train[:2], CHANGED, *TASK.train[3:]), rf"1 of the training rows are new or changed .*{CHANGED.id}"),
        ((*TASK.train[:2], TOLD, *TASK.train[3:]), "1 of the training rows are new or changed"),
        ((LEAKED, *TASK.train), "1 rows that were held out would be trained on .the first is 'new'."),
    ],
)
def test_changes_are_named(begun, train, said):
    with pytest.raises(RunError, match=said):
        data.check(begun, TASK._replace(train=tuple(train)))


def test_held_out_questions_that_are_learned_are_said(begun):
    """A run that begins so goes on; one that began without them does not.  In a world the same words may begin another problem."""
    leaking = TASK._replace(train=(*TASK.train, LEAKED))
    said = "task recall: 1 training rows ask held-out questions .the first is 'new'."
    with pytest.warns(UserWarning, match=said):
        data.check(begun / "new", leaking)
    with pytest.raises(RunError, match="1 rows that were held out would be trained on .the first is 'new'."):
        data.check(begun, leaking._replace(test=TASK.test[:1]))
    data.write(begun, leaking)
    with pytest.warns(UserWarning, match=said):
        data.check(begun, leaking)
    data.check(begun / "new", leaking._replace(world=talks.echo()))
    with pytest.warns(UserWarning, match="1 training rows ask held-out questions"):
        data.check(begun / "new", TASK._replace(train=TASK.test[:1], world=talks.echo()))


def test_a_file_that_grew_is_refused(tmp_path):
    """B20; what was held out still is: a question's side depends on its text alone."""
    row = lambda i: json.dumps({"prompt": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n"
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(map(row, range(40))))
    data.write(tmp_path, task(file))
    file.write_text("".join(map(row, range(90))))
    with pytest.raises(RunError, match=r"training rows are new or changed .*resume with the same") as refused:
        data.check(tmp_path, task(file))
    assert "would be trained on" not in str(refused.value)


def test_tests_of_programs_count(tmp_path):
    """Another expected output is another problem, though the tests are no JSON."""
    with_tests = lambda out: dataclasses.replace(TASK.train[0], meta={"tests": ScriptTests(("1",), (out,), 1)})
    assert data.marked(with_tests("2")) == data.marked(with_tests("2")) != data.marked(with_tests("3"))


def test_what_was_lost_is_named(tmp_path):
    assert steps_recorded(tmp_path) == 0
    lines = [{"step": 1}, {"step": 2, "loss": 1.0}, {"step": 2, "evaluation": {}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert steps_recorded(tmp_path) == 2
    assert going_on(0, 2) == "no checkpoint yet: from the beginning; steps 1 to 2 were not saved and are done again"
    assert going_on(2, 2) == "going on after step 2"
