"""Other samplers by option: whole runs from the command line, and what contradicts itself."""

import pytest
import tiny
import tiny_run
import whole_runs
from completions_server import serving
from whole_runs import FILE, lines, run_here

from sdjax.devices.http_json import KEY, EngineError
from sdjax.methods.grpo import grpo
from sdjax.samplers.options import sampled


@pytest.fixture(autouse=True)
def kept(programs):
    with whole_runs.compiled_into(programs):
        yield


def run(folder, *more, method="grpo", steps=4):
    """The metrics of a run's steps."""
    options = ("--method", method, "--steps", steps, "--save-every", 0, "--evaluation", 0, "--no-replay", *more)
    assert run_here("train", FILE, "--out", folder, *options) == 0
    return lines(folder)


def test_nothing_asked_is_the_method_as_it_was():
    method = grpo(group_size=2)
    assert sampled(method) is method


def test_refilled_slots_write_what_the_plain_sampler_writes(tmp_path):
    plain, refilled = run(tmp_path / "a"), run(tmp_path / "b", "--sampler.slots", 3)
    for name in ("reward", "length", "loss"):
        assert [row[name] for row in refilled] == pytest.approx([row[name] for row in plain], abs=1e-5)
    text = lambda folder: [(r["tokens"], r["group"]) for r in lines(tmp_path / folder, "rollouts.jsonl")]
    assert text("a") == text("b") and text("a")


def test_weights_of_some_batches_ago(tmp_path):
    ages = [
        row["staleness/age"] for row in run(tmp_path / "a", "--sampler.lag", 2, "--sampler.cap", 2.0, method="sdpo")
    ]
    assert ages == [0, 1, 2, 0]
    dropped = run(tmp_path / "b", "--sampler.lag", 2, "--sampler.most", 1)
    assert "loss" not in dropped[2] and "loss" in dropped[3]  # all rows of the third batch are too old


def test_a_server_that_is_sent_weights_every_second_batch(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "a secret")
    weights = tmp_path / "weights"
    with serving(tiny.policy(tiny_run.student().params)) as served:
        options = {"server": f"{served.url}/v1", "engine": "sglang", "weights": weights, "every": 2, "model": "tiny"}
        rows = run(tmp_path / "run", *(x for name, value in options.items() for x in (f"--sampler.{name}", value)))
    assert [row["staleness/age"] for row in rows] == [0, 1, 0, 1]
    # Where the weights are new, the server's log-probabilities are the student's.
    assert [row["staleness/importance"] for row in rows[::2]] == pytest.approx([1, 1], abs=1e-4)
    asked = [path for path, _ in served.requests]
    assert asked.count("/update_weights_from_disk") == 2 and (weights / "model.safetensors").exists()
    assert {body["authorization"] for path, body in served.requests if "completions" in path} == {"Bearer a secret"}
    assert "a secret" not in (tmp_path / "run" / "arguments.json").read_text()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"server": "http://x/v1", "slots": 2, "weights": "w"}, "give one of them"),
        ({"server": "http://x/v1", "lag": 2, "weights": "w"}, "with one, every does"),
        ({"server": "http://x/v1"}, "server needs weights"),
        ({"server": "localhost", "weights": "w"}, "not the address of a server"),
        ({"every": 2}, "name it with server"),
        ({"server": "http://x/v1", "weights": "w", "every": 0}, "every=0: expected at least 1"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_loaded(tmp_path, capfd, monkeypatch, options, why):
    with pytest.raises(EngineError, match=why):
        sampled(grpo(group_size=2), **options)
    monkeypatch.setattr(tiny, "pretrained", lambda *_: pytest.fail("a model was loaded"))
    given = [x for name, value in options.items() for x in (f"--sampler.{name}", value)]
    assert run_here("train", FILE, "--out", tmp_path / "run", *given) == 2
    said = capfd.readouterr().err
    assert why in said and said.startswith("sdjax: ") and said.count("\n") == 1
