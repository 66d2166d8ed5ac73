"""The command line: what it lists, what it refuses before it loads anything, and what a finished run leaves."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import whole_runs
from rich.console import Console
from whole_runs import FILE, STEPS, arguments, lines, run_here

import sdjax
from sdjax.__main__ import main
from sdjax.cli import options
from sdjax.devices.compilation import keep_programs
from sdjax.models import pretrained
from sdjax.run.interrupts import Interrupted
from sdjax.run.logs import log
from sdjax.run.logs.log import RunLog
from sdjax.types import Rollout


@pytest.fixture(autouse=True)
def unloaded(monkeypatch, programs):
    """Loading a model is an error, and nothing is kept in the user's cache folder."""

    def load(*_):
        raise AssertionError("a model was loaded before the options were checked")

    monkeypatch.setattr(tiny, "pretrained", load)
    with whole_runs.compiled_into(programs):
        yield


def refused(capfd, *command) -> str:
    """The sentence with which a command is refused: status 2, one line, no traceback."""
    try:
        status = main([str(c) for c in command])
    except SystemExit as end:  # tyro's own
        status = end.code
    said = capfd.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    return said


def sentence(capfd, *command) -> str:
    """The same, where it is our own sentence."""
    said = refused(capfd, *command)
    assert said.startswith("sdjax: ") and said.count("\n") == 1, said
    return said


# ---- names ----------------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest(capfd, tmp_path):
    assert "there is no command 'trian'; did you mean train?" in sentence(capfd, "trian")
    assert "there is no method 'sdop'; did you mean sdpo" in sentence(capfd, "train", FILE, "--method", "sdop")
    assert "there is no method 'grp'; did you mean grpo" in sentence(capfd, "methods", "grp")
    near = sentence(capfd, "train", "experiments/chain_sums.py")
    assert "there is no experiment file experiments/chain_sums.py; did you mean experiments/chain_sum.py" in near
    assert "no option --jsno; did you mean --json?" in sentence(capfd, "methods", "--jsno")
    assert "name an experiment file" in sentence(capfd, "train")
    assert "--method needs a value" in sentence(capfd, "train", FILE, "--method")
    unknown = {"--evaluations=3": "--evaluation", "--method.alhpa": "--method.alpha", "--mehtod": "--method"}
    for given, near in unknown.items():
        said = sentence(capfd, "train", FILE, given, "3", "--out", tmp_path / "run")
        assert f"there is no option {given.split('=')[0]}; did you mean {near}" in said
    assert "no option --dat; did you mean --data" in sentence(capfd, "evaluate", "model", "--dat", "x.jsonl")
    assert "steps" in refused(capfd, "train", FILE, "--steps", "many", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


BROKEN = {
    "x = 1\n": "has no function `experiment",
    "def experiment(:\n": r"line 1: invalid syntax",
    "import os\n\nimport no_such_module_here\n": r"line 3: ModuleNotFoundError: No module named 'no_such_module_here'",
    "\nundefined\n": r"line 2: NameError: name 'undefined' is not defined",
    "def experiment(*, method): pass\n": r"needs --method NAME: one of .*grpo.*sdpo",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_experiment_files(tmp_path, capfd, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    said = sentence(capfd, "train", file)
    assert str(file) in said
    assert re.search(BROKEN[text], said), said


def test_an_experiment_without_methods_takes_none(tmp_path, capfd):
    file = tmp_path / "mine.py"
    file.write_text("def experiment(*, steps: int = 3): pass\n")
    assert "takes no --method" in sentence(capfd, "train", file, "--method", "grpo")


VALUES = {
    ("--steps", "0"): "steps=0: expected at least 1",
    ("--prompts", "0"): "prompts=0: expected at least 1",
    ("--lr", "-0.1"): "lr=-0.1: expected a number above 0",
    ("--lr", "nan"): "lr=nan: expected a number above 0",
    ("--prompts", "4", "--minibatches", "3"): "minibatches=3 does not divide prompts=4",
    ("--method.group-size", "0"): "--method.group-size 0: expected at least 1",
    ("--save-every", "-1"): "save_every=-1: expected at least 0",
}


@pytest.mark.parametrize("given", VALUES)
def test_values_that_make_no_sense(tmp_path, capfd, given):
    assert VALUES[given] in sentence(capfd, "train", FILE, "--out", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


# ---- run folders ----------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(tmp_path, capfd, reference):
    assert "already holds a run: go on with --resume, or name" in sentence(capfd, *arguments(reference))
    copy = shutil.copytree(reference, tmp_path / "quickstart-sdpo")
    assert f"holds no run to resume; did you mean {copy}?" in sentence(
        capfd, *arguments(tmp_path / "quickstart-sdp", "--resume")
    )
    (tmp_path / "empty").mkdir()
    assert "empty holds no run to resume" in sentence(capfd, *arguments(tmp_path / "empty", "--resume"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    assert "notes is not empty and holds no run" in sentence(capfd, *arguments(tmp_path / "notes"))
    (copy / "arguments.json").write_text("{")
    assert "arguments.json cannot be read" in sentence(capfd, *arguments(copy, "--resume"))


def test_a_run_goes_on_with_a_version_that_has_more_options(tmp_path, capfd, reference):
    """Where they have their defaults; the file keeps what it was begun with."""
    copy = shutil.copytree(reference, tmp_path / "run")
    begun = json.loads((copy / "arguments.json").read_text())
    added = ("sampler.lag", "sampler.cap", "method.alpha", "save_every")
    older = {name: value for name, value in begun.items() if name not in added}
    assert len(older) == len(begun) - len(added)
    (copy / "arguments.json").write_text(json.dumps(older))
    said = sentence(capfd, *arguments(copy, "--resume", "--save-every", "7"))
    assert "started with other arguments: save_every was None and is 7: resume with" in said
    assert json.loads((copy / "arguments.json").read_text()) == older


def test_a_folder_that_cannot_be_written(tmp_path, capfd, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in sentence(capfd, *arguments(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "interrupt, status",
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 143)],
)
def test_interrupted_before_the_run_began(capfd, monkeypatch, interrupt, status):
    def load(_):
        raise interrupt

    monkeypatch.setattr(options, "load_experiment", load)
    assert main(["train", str(FILE)]) == status
    assert capfd.readouterr().err.startswith("sdjax: SIG")


def test_compiled_programs_are_kept_in_the_cache_folder(monkeypatch, tmp_path):
    """Unless JAX's own setting says where."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = jax.config.jax_compilation_cache_dir
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == there
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "sdjax"))


FREED = """if True:
    import ctypes
    import jax
    from sdjax.devices.compilation import give_back_memory
    c = ctypes.CDLL(None)
    c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [c.malloc(1000) for _ in range(100_000)]
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        c.free(block)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
    give_back_memory()
    print(resident())
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
    print(resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_what_a_compilation_has_freed_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, check=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before - 50e6


# ---- what is listed -------------------------------------------------------------------------------------------------


def test_help_shows_every_option_with_type_and_default(capfd):
    with pytest.raises(SystemExit) as end:
        main(["train", str(FILE), "--help"])
    shown = capfd.readouterr().out
    assert end.value.code == 0
    for option, kind, default in (
        ("--steps", "INT", "6"),
        ("--lr", "FLOAT", "0.01"),
        ("--out", "STR", ""),
        ("--method.alpha", "FLOAT", "0.5"),
        ("--method.top-k", "None.*INT|INT.*None", "None"),
        ("--method.ema-rate", "FLOAT", "0.5"),
        ("--method.group-size", "INT", "2"),
    ):
        entry = re.search(rf"{re.escape(option)}\b(.*?)(?=--\w|\Z)", shown, re.DOTALL)
        assert entry, option
        assert re.search(kind, entry[1]) and default in entry[1], entry[0]
    assert "--resume" in shown and "--smoke" in shown
    assert "peak learning rate" in shown
    with pytest.raises(SystemExit):
        main(["train", str(FILE), "--method", "grpo", "--help"])
    shown = capfd.readouterr().out
    assert "--method.clip" in shown and "--method.alpha" not in shown


def test_usage(capfd):
    for command in ([], ["--help"], ["train", "--help"], ["methods", "--help"]):
        assert main(command) == 0
        assert "usage: sdjax COMMAND" in capfd.readouterr().out


def test_methods_are_listed_and_described(capfd):
    assert run_here("methods") == 0
    listing = capfd.readouterr().out
    assert all(re.search(rf"^{name}\b", listing, re.MULTILINE) for name in options.method_names())
    assert run_here("methods", "sdpo") == 0
    page = capfd.readouterr().out
    assert "arXiv:2601.20802" in page and "ema_rate = 0.05" in page
    assert run_here("methods", "--json") == 0
    everything = json.loads(capfd.readouterr().out)
    assert [d["name"] for d in everything] == options.method_names()
    assert run_here("methods", "grpo", "--json") == 0
    assert json.loads(capfd.readouterr().out)["options"]["group_size"]["default"] == 8
    assert run_here("methods", "grpo", "sdpo", "--json") == 0
    assert [d["name"] for d in json.loads(capfd.readouterr().out)] == ["grpo", "sdpo"]


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_finished_run(reference):
    metrics = [line for line in lines(reference) if "evaluation" not in line]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    wanted = {"reward", "divergence", "loss", "grad_norm", "length", "tokens_per_second", "rollout_seconds"}
    assert all(wanted <= line.keys() for line in metrics)
    evaluations = {line["step"]: line["evaluation"] for line in lines(reference) if "evaluation" in line}
    assert list(evaluations) == [0, 3, 6, 9, 10]
    result = json.loads((reference / "result.json").read_text())
    assert result["before"]["solved"] == evaluations[0]["accuracy"]
    assert result["after"]["solved"] == evaluations[10]["accuracy"]
    assert (result["steps"], result["skipped_updates"]) == (STEPS, 0)
    told = json.loads((reference / "arguments.json").read_text())
    assert told["method"] == "sdpo" and told["method.ema_rate"] == 0.5 and told["steps"] == STEPS
    text = (reference / "rollouts.txt").read_text()
    assert re.findall(r"^==== step (\d+) ", text, re.MULTILINE)[::4] == ["1", "10"]
    for part in ("-- student reads\n[user] ", "-- teacher reads\n[user] ", "Correct solution:", "-- completion\n"):
        assert part in text
    assert not (reference / "model").exists()  # tiny_run.py switches it off


def test_events_can_be_read(reference):
    from tensorboardX.proto.event_pb2 import Event

    file = next((reference / "tensorboard").iterdir())
    data, events, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        events.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 12 + size + 4
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert {step for tag, step in scalars if tag == "reward"} == set(range(1, STEPS + 1))
    assert {step for tag, step in scalars if tag == "evaluation/accuracy"} == {0, 3, 6, 9, 10}


def test_smoke_exports_a_model_that_evaluate_reads(tmp_path, capfd, monkeypatch, programs):
    """`--smoke` takes two steps; the exported model opens with transformers; `sdjax evaluate` measures it."""
    monkeypatch.undo()
    run = tmp_path / "run"
    with whole_runs.compiled_into(programs):
        assert run_here("train", FILE, "--out", run, "--smoke", "--export") == 0
    said = capfd.readouterr().out
    assert "step 2/2" in said and f"model written to {run / 'model'}" in said
    assert re.search(r"after +│ +\d+\.\d %", said)
    _, params, *_ = pretrained.load(run / "model")
    final, _ = whole_runs.saved(run, 2)
    name = next(n for n in final if "params" in n and "embed" in n)
    leaf = {f"['params']{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}[name]
    np.testing.assert_array_equal(np.asarray(leaf), final[name])
    data = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"ask key {k} ->", "answer": str(k)} for k in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("--data", data, "--completion", 4, "--context", 32, "--out", tmp_path / "answers")
    for model in (run / "model", run):
        assert run_here("evaluate", model, *how) == 0
        assert re.search(r"problems\.jsonl: \d+\.\d % \[\d+\.\d, \d+\.\d\] of 5", capfd.readouterr().out)
    assert run_here("evaluate", model, *how, "--first-rows", 2) == 0
    assert "of 2" in capfd.readouterr().out
    sampled = (
        *how,
        "--base",
        run / "model",
        "--samples",
        3,
        "--temperature",
        0.6,
        "--top-p",
        0.9,
        "--caps",
        "2,3",
        "--as-json",
    )
    written = []
    for _ in range(2):  # the second time nothing is written again
        assert run_here("evaluate", run, f"{run}@2", *sampled) == 0
        shown = capfd.readouterr()
        both = json.loads(shown.out)
        assert both["difference"]["value"] == 0.0 < both["difference"]["high"]  # the same weights
        first, second = both["models"].values()
        assert first["measures"] == second["measures"] and first["samples"] == 3
        assert {"avg@3", "pass@3", "maj@3", "avg@3 within 2 tokens", "hedges", "tokens"} <= {*first["measures"]}
        written.append((both, (Path(first["folder"]) / "answers.jsonl").read_text()))
    assert written[0] == written[1] and "15 of 15 answers were written before" in shown.err
    assert "exceed" in sentence(capfd, "evaluate", run, *how, "--context", 10**6)
    assert "--caps 9: 9 is more than the 4 tokens" in sentence(capfd, "evaluate", run, *how, "--caps", 9)
    assert "at temperature 0 are all the same" in sentence(capfd, "evaluate", run, *how, "--samples", 2)
    assert "does not exist" in sentence(capfd, "evaluate", run, "--data", tmp_path / "none.jsonl")
    assert "there is no folder" in sentence(capfd, "evaluate", tmp_path / "none", "--data", data)
    assert "rows=0: expected at least 1" in sentence(capfd, "evaluate", run, "--data", data, "--rows", 0)


# ---- the log --------------------------------------------------------------------------------------------------------


def logged(tmp_path, steps=4, step=0):
    """A log that writes to a text."""
    tmp_path.mkdir(exist_ok=True)
    text = io.StringIO()
    return RunLog(tmp_path, steps, step, Console(file=text, width=80)), text


def test_without_a_terminal_a_line_at_most_every_ten_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    own, text = logged(tmp_path, steps=50)
    own.progress.get_time = lambda: now[0]
    for step in range(1, 51):
        now[0] += 3.0
        values = {"reward": 0.5, "divergence": 0.1, "loss": 0.1, "length": 9.0, "tokens_per_second": 100.0}
        own.metrics(step, values | {"other": 1.0})
    own.close()
    printed = text.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/50", line)[1]) for line in printed] == [*range(1, 50, 4), 50]
    assert printed[3].startswith("step 13/50  reward 0.50  divergence 0.100  loss 0.1  9 tokens  100 tok/s")
    assert int(re.search(r"  (\d+) s left$", printed[3])[1]) == pytest.approx(37 * 3, abs=2)
    assert "left" not in printed[-1]


def test_numbers_that_are_not_finite_are_still_json(tmp_path):
    own, _ = logged(tmp_path)
    own.metrics(1, {"loss": float("nan"), "grad_norm": float("inf"), "reward": 1.0})
    own.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "reward": 1.0}]


def test_going_on_drops_what_comes_again(tmp_path):
    own, _ = logged(tmp_path)
    rollout = Rollout(tiny.TASK.train[0], (1, 2), (-1.0, -1.0), "two words", 0, contexts={"student": None})
    for step in range(1, 5):
        own.evaluation(step - 1, {"accuracy": 0.5})
        own.metrics(step, {"loss": 1.0})
        own.rollouts(step, [rollout])
    own.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    logged(tmp_path, step=2)[0].close()
    assert [(line["step"], "evaluation" in line) for line in lines(tmp_path)] == [
        *((0, True), (1, False)),
        *((1, True), (2, False)),
    ]
    assert re.findall("step (.)", (tmp_path / "rollouts.txt").read_text()) == ["1", "2"]
    assert "-- student reads\n(nothing)\n-- completion\ntwo words\n" in (tmp_path / "rollouts.txt").read_text()
    logged(tmp_path, step=0)[0].close()
    assert lines(tmp_path) == []


def test_the_version_is_told(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"sdjax {sdjax.__version__}\n"


EXPERIMENTS = sorted(p for p in Path("experiments").rglob("*.py") if "def experiment(" in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_option_of_an_experiment_file_says_what_it_is(path):
    """Those of methods have a test of their own."""
    from sdjax.cli.training import train_options

    texts = options.help_texts(train_options(options.load_experiment(str(path)), options.method_factory("grpo")))
    assert len(texts) > 30
    assert not [name for name, text in texts.items() if not text and not name.startswith("method.")]
