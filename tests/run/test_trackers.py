"""Trackers: what each is given is there to be read, a resumed run goes to the same place, and nothing ends a run."""

import json
import sqlite3
import time
from pathlib import Path

import pytest

from sdjax.run.logs import trackers
from sdjax.run.logs.trackers import Run, TrackerError, Trackers, chosen

ROWS = [{"step": 3, "prompt": "2+2?", "completion": "4", "reward": 1.0}]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder, with every tracker's data below it."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def known_of(folder, step=0):
    return Run(folder, "my-run", "proj", {"steps": 9, "method.group_size": 4}, step)


def recorded(folder, *names, step=0, steps=(1, 2)):
    """What is said while some steps are recorded."""
    said = []
    own = Trackers(names, known_of(folder, step), said.append)
    for number in steps:
        own.numbers(number, {"reward": 0.1 * number, "evaluation/pass@8": 0.5})
        own.completions(number, ROWS)
    own.close()
    return said


def test_mlflow_has_numbers_completions_and_configuration_and_goes_on(run):
    mlflow = pytest.importorskip("mlflow")
    assert recorded(run, "mlflow") == []
    known = json.loads((run / "trackers.json").read_text())["mlflow"]
    assert recorded(run, "mlflow", step=2, steps=(3,)) == []
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    found = client.get_run(known)
    assert [m.value for m in client.get_metric_history(known, "reward")] == pytest.approx([0.1, 0.2, 0.3])
    assert found.data.metrics["evaluation/pass-at-8"] == 0.5
    assert found.data.params["method.group_size"] == "4" and found.data.params["revision"] == trackers.revision()
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert len(list((run / "mlflow").rglob("completions/step-*.json"))) == 3 and not list(Path().glob("mlruns"))


def test_wandb_has_them_too(run):
    pytest.importorskip("wandb")
    assert recorded(run, "wandb") == []
    known = json.loads((run / "trackers.json").read_text())["wandb"]
    assert recorded(run, "wandb", step=2, steps=(3,)) == []
    files = list((run / "wandb").glob(f"offline-run-*{known}/run-{known}.wandb"))
    assert files and b"method.group_size" in files[0].read_bytes()
    assert list((run / "wandb").glob("offline-run-*/files/media/table/completions_*.table.json"))


def test_trackio_has_them_too(run):
    pytest.importorskip("trackio")
    assert recorded(run, "trackio") == []
    assert recorded(run, "trackio", step=2, steps=(3,)) == []
    with sqlite3.connect(run.parent / "trackio" / "proj.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in rows} == {json.loads((run / "trackers.json").read_text())["trackio"]}
    assert [json.loads(m)["reward"] for _, _, m in rows if "reward" in json.loads(m)] == pytest.approx([0.1, 0.2, 0.3])


class Broken:
    id = "1"

    def __init__(self, run):
        pass

    def numbers(self, step, values):
        raise SystemExit("no key")

    def completions(self, step, rows):
        raise AssertionError

    close = completions


class Stuck(Broken):
    def numbers(self, step, values):
        time.sleep(30)


class Refusing:
    def __init__(self, run):
        raise ConnectionError("the server is away")


@pytest.mark.parametrize(
    "kind, words",
    [(Broken, "SystemExit: no key"), (Refusing, "ConnectionError: the server is away"), (Stuck, "not everything")],
)
def test_what_a_tracker_does_ends_no_run(run, monkeypatch, kind, words):
    monkeypatch.setitem(trackers.KINDS, "wandb", kind)
    said = []
    own = Trackers(["wandb"], known_of(run), said.append)
    for step in range(5):
        own.numbers(step, {"reward": 1.0})
    started = time.monotonic()
    own.all[0].close(0.5)
    assert time.monotonic() - started < 5
    assert len(said) == 1 and words in said[0] and said[0].startswith("--log wandb: ")


def test_calls_that_pile_up_are_given_up(run, monkeypatch):
    monkeypatch.setitem(trackers.KINDS, "wandb", Stuck)
    monkeypatch.setattr(trackers.Background, "MOST", 10)
    said = []
    own = Trackers(["wandb"], known_of(run), said.append)
    for step in range(20):
        own.numbers(step, {"reward": 1.0})
    assert len(said) == 1 and "10 calls are waiting" in said[0]


def test_names_are_checked_before_anything(monkeypatch):
    assert chosen("wandb, tensorboard") == ["wandb", "tensorboard"] and chosen("") == []
    with pytest.raises(TrackerError, match="--log wandv: there is no 'wandv'.*wandb"):
        chosen("wandv")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"pip install 'sdjax\[trackio\]'"):
        chosen("trackio")
