"""Every method starts from the command line on a model, a tokenizer and problems that are none of ours."""

import json

import pytest
from run.test_foreign_models import saved

from sdjax.__main__ import main
from sdjax.cli.options import method_names

NEED_A_TEACHER = ("brts", "gkd", "iw_opd", "minillm", "opd", "power_opd", "rethinking_opd", "stable_opd")
NEED_A_TEACHER += ("tessy", "topd", "vopd")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model of 320 embedding rows over 272 tokens, and 40 problems with solutions and feedback."""
    folder = tmp_path_factory.mktemp("given")
    saved(folder / "model", 320, 0)
    rows = [
        {"prompt": f"What is {i} + 2?", "answer": [f"{i + 2}", f"{i + 2}.0"], "solution": f"{i} + 2 = {i + 2}"}
        for i in range(40)
    ]
    (folder / "problems.jsonl").write_text("\n".join(json.dumps(row | {"feedback": "Add again."}) for row in rows))
    return folder


def command(given, method, out, *more):
    files = ["--model", str(given / "model"), "--data", str(given / "problems.jsonl"), "--out", str(out)]
    sizes = ["--completion", "16", "--context", "256", "--method", method]
    return ["train", "experiments/own_data.py", "--smoke", *files, *sizes, *more]


def test_dapo_says_that_a_model_without_successes_cannot_learn_from_it(given, tmp_path, capfd):
    """Groups of equal rewards are dropped, and a random model has no others."""
    assert main(command(given, "dapo", tmp_path / "run")) == 2
    assert "only 0 of 2 groups were kept in 10 rounds of sampling" in capfd.readouterr().err


@pytest.mark.parametrize("method", [name for name in method_names() if name != "dapo"])
def test_it_takes_two_steps(given, tmp_path, method):
    more = ["--lesson", "solution"] if method in NEED_A_TEACHER else []
    assert main(command(given, method, tmp_path / "run", *more)) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "evaluation" not in line] == [1, 2]
    assert json.loads((tmp_path / "run" / "result.json").read_text())
    assert (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize("method", NEED_A_TEACHER)
def test_a_missing_teacher_is_refused_before_the_model_is_loaded(given, tmp_path, method, capfd, monkeypatch):
    monkeypatch.setattr("sdjax.models.pretrained.load", None)
    assert main(command(given, method, tmp_path / "run")) == 2
    assert f"{method} needs a teacher: name one with --teacher" in capfd.readouterr().err
