"""`sdjax evaluate` of adapters, by refilled slots and a server, of programs, killed; what cannot be measured is refused."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import scripted_server
import talks
import tiny
import whole_runs
from whole_runs import run_here

from sdjax.cli import measure, models
from sdjax.models import adapters, pretrained
from sdjax.models.adapters import Lora
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an adapter of it that changes much, and problems."""
    folder, model = tmp_path_factory.mktemp("measure"), tiny.pretrained()
    pretrained.save(folder / "model", model.config, model.params, model.tokenizer)
    lora = Lora(rank=2)
    own = adapters.initial(model.config, lora, jax.random.key(1))
    own = jax.tree.map(lambda x: x + 0.5, own)
    peft_files.save(folder / "adapter", model.config, own, lora, str(folder / "model"))
    rows = [{"prompt": f"ask key {k} ->", "answer": str(k)} for k in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_adapter_is_folded_into_its_model(place):
    whole, plain = models.named(str(place / "adapter")), models.named(str(place / "model"))
    changed = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(plain.params), strict=True)
    ]
    assert max(changed) > 0.1 and whole.config == plain.config


@pytest.mark.slow
def test_model_and_adapter_are_compared_and_slots_write_the_same(place, capfd):
    how = ("--data", place / "p.jsonl", "--completion", 4, "--context", 32, "--out", place / "answers", "--as-json")
    how += ("--samples", 2, "--temperature", 1.0)
    found = []
    for more in ((), ("--slots", 2)):
        assert run_here("evaluate", place / "model", place / "adapter", *how, *more) == 0
        found.append(json.loads(capfd.readouterr().out))
    texts = [
        [
            [a["text"] for a in json.loads(line)["answers"]]
            for line in Path(m["folder"], "answers.jsonl").read_text().splitlines()
        ]
        for one in found
        for m in one["models"].values()
    ]
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]
    assert len(list((place / "answers").glob("*-minus-*.json"))) == 2


@pytest.mark.parametrize(
    "given, sentence",
    [
        (("model", "model"), "is named twice"),
        (("model", "adapter", "none"), "one or two models, and 3 are named"),
        (("model", "--caps", "x"), "--caps x: expected numbers of tokens, as 1024,4096"),
        (("model", "--out", "gs://bucket/folder"), "on a disk|gs:// needs a client"),
        (("nothing@7",), "nothing"),
        (("run",), "is a run without a model, which it leaves at its end: name a checkpoint, .*run@20"),
        (("lost",), "is an adapter and does not name its model: name it with --base"),
    ],
)
def test_what_cannot_be_measured_is_refused(place, capfd, given, sentence):
    (place / "run" / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
    (place / "run" / "arguments.json").write_text("{}")
    (place / "lost").mkdir(exist_ok=True)
    told = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (place / "lost" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    names = [
        place / name if not name.startswith("-") and "/" not in name and i < 3 and name != "x" else name
        for i, name in enumerate(given)
    ]
    assert run_here("evaluate", *names, "--data", place / "p.jsonl", "--completion", 4, "--context", 32) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(sentence, said)


# ---- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """A model whose tokens are bytes, the options that measure it, and problems whose answers are programs."""
    folder, policy = tmp_path_factory.mktemp("spelled"), talks.policy()
    pretrained.save(folder / "model", policy.model.config, policy.params, policy.tokenizer)
    rows = [
        {"prompt": "double", "tests": {"inputs": ["2", "5"], "outputs": ["4", "10"]}},  # TACO
        {"prompt": "add 1", "fn_name": "f", "tests": [{"input": "1", "output": "2"}, {"input": "7", "output": "8"}]},
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("--data", folder / "p.jsonl", "--context", 32, "--completion", 96, "--as-json")
    return folder, how


def scripted(speak):
    return scripted_server.scripted(talks.tokenizer(), talks.stop()[0], speak)


def answers_in(folder):
    (file,) = folder.glob("*/answers.jsonl")
    return file.read_text()


@pytest.mark.slow
def test_programs_are_judged_by_their_tests(spelled, tmp_path, capfd):
    """Of four programs for one problem two are right, of those for the other none: avg@4, pass@k as by hand."""
    folder, how = spelled
    fenced = ["print(2*int(input()))", "x=int(input());print(x+x)", "while 1: pass", "def f(x): return 9"]

    def speak(prompt, body, number):
        return f"So:\n```python\n{fenced[number if 'double' in prompt else 3]}\n```" if number < 3 else "none"

    with scripted(speak) as server:
        command = ("evaluate", folder / "model", *how, "--verifier", "tests", "--server", server.url)
        command += ("--samples", 4, "--temperature", 1.0, "--out", tmp_path, "--program-seconds", 1)
        assert run_here(*command) == 0
        found = json.loads(capfd.readouterr().out)["models"][str(folder / "model")]
        assert found["shares"] == [0.5, 0.0] and len(server.requests) == 2
        value = {name: each["value"] for name, each in found["measures"].items()}
        assert value["avg@4"] == 0.25 and value["pass@2"] == pytest.approx((1 - 1 / 6) / 2) and value["pass@4"] == 0.5
        assert not any(name.startswith("maj") for name in value)
        assert run_here(*command) == 0  # nothing is asked again, and that is said
        assert len(server.requests) == 2
        assert "name another folder with --out" in capfd.readouterr().err
    file = folder / "p.jsonl"
    file.write_text(file.read_text().replace('"10"', '"11"'))
    with scripted(speak) as server:  # other tests are another evaluation
        assert run_here(*(server.url if str(c).startswith("http") else c for c in command)) == 0
        assert json.loads(capfd.readouterr().out)["models"][str(folder / "model")]["shares"] == [0.0, 0.0]


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_where_it_was(spelled, tmp_path):
    """By SIGKILL in the middle: what was written stays and is not asked for again, and the end is that of an undisturbed one."""
    folder, _ = spelled
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pause = threading.Event()

    def speak(prompt, body, number):
        if pause.is_set() and "9?" in prompt:
            time.sleep(60)
        return f"It is {body['seed'] % 7} or {number}"

    with scripted(speak) as server:
        how = ("evaluate", folder / "model", "--data", tmp_path / "p.jsonl", "--context", 32, "--completion", 32)
        how += ("--server", server.url, "--samples", 16, "--temperature", 1.0)
        assert run_here(*how, "--out", tmp_path / "whole") == 0
        whole = answers_in(tmp_path / "whole")
        assert len(server.requests) == 12
        pause.set()
        command = [sys.executable, "-m", "sdjax", *map(str, how), "--out", str(tmp_path / "killed")]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(whole_runs.ROOT)})
        whole_runs.wait_for(lambda: sum("9?" in asked for asked in server.requests) == 2, process)
        process.kill()
        process.wait()
        begun = answers_in(tmp_path / "killed")
        assert whole.startswith(begun) and begun.count("\n") == 8  # two blocks of four problems
        pause.clear()
        server.requests.clear()
        assert run_here(*how, "--out", tmp_path / "killed") == 0
        assert len(server.requests) == 4 and answers_in(tmp_path / "killed") == whole


def test_a_server_is_asked_for_one_model_at_its_address(spelled, tmp_path, capfd):
    folder, how = spelled
    with scripted(lambda *_: "x") as server:
        more = ("--verifier", "tests", "--out", tmp_path, "--server")
        assert run_here("evaluate", folder / "model", folder, *how, *more, server.url) == 2
        assert "serves one model, and two are named: measure them one after the other" in capfd.readouterr().err
        assert run_here("evaluate", folder / "model", *how, *more, server.url.removesuffix("/v1")) == 2
        assert "an address mostly ends in /v1, as http://localhost:8000/v1" in capfd.readouterr().err


def test_problems_are_named_once(place, capfd):
    for more in ((), ("--data", place / "p.jsonl", "--task", "humaneval")):
        assert run_here("evaluate", place / "model", *more) == 2
        assert "Name the problems: --data FILE, or --task humaneval, one of the two." in capfd.readouterr().err


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_blocks_keep_the_sampler_busy():
    setting = measure.Setting(None, measure.Protocol(4, 1.0), tiny.SHAPES, (), False, 0, "", "", None)
    assert [measure.block(setting._replace(**c)) for c in ({}, {"slots": 8}, {"server": "http://x"})] == [2, 8, 16]


def test_an_unfit_adapter_is_refused(place, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        models.named(str(tmp_path))
