"""`sdjax bench`: the FLOP it counts, and that it measures what it says."""

import json

import jax
import pytest
import tiny

from sdjax.__main__ import main
from sdjax.cli import bench
from sdjax.cli.options import OptionError
from sdjax.devices import ceilings
from sdjax.engine.train import make_update
from sdjax.models import pretrained
from sdjax.planning.flops import product_flops


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """What the processor can do at best takes seconds to measure, and means nothing here."""
    monkeypatch.setitem(ceilings.SIZES, "cpu", (128, 256, 1))


def test_an_update_costs_what_is_counted(tmp_path):
    """Against the traced program, whose attention scores are not counted and whose head is read again backwards."""
    pretrained.save(tmp_path, *tiny.pretrained())
    step = bench.a_step(str(tmp_path), 2, 2, tiny.SHAPES, "float32", False)
    batch = bench.written_batch(step, step.examples, 2)
    update = make_update(step.method.objectives[0], step.networks, step.optimizer, step.shapes)
    state = step.state
    arguments = (state.params, state.opt_state, step.teacher, batch, state.step)
    length = lambda view: batch.contexts[view].tokens.shape[1]
    counted = bench.update_flops(tiny.config(), 2, 2, length("student"), length("teacher"), tiny.SHAPES.completion)
    assert counted < product_flops(update.trace(*arguments).jaxpr) < 1.35 * counted


def test_the_command(tmp_path, capsys):
    pretrained.save(tmp_path, *tiny.pretrained())
    sizes = ["--prompts", "2", "--group", "2", "--completion", "4", "--rollout-rows", "4", "--repeats", "1"]
    assert main(["bench", "--model", str(tmp_path), *sizes]) == 0
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    found = {name.strip(): float(value) for name, value in shown.items()}
    assert found["rollout tokens/s"] > 0 and found["rollout tokens/s, 4 prompts"] > 0
    assert found["step seconds"] >= found["update seconds"] > 0
    assert 0 < found["peak memory GB"] < 24
    assert 0 < found["update share of matrix product ceiling"]


def test_sampling_is_timed_at_full_length(tmp_path):
    pretrained.save(tmp_path, *tiny.pretrained())
    step = bench.a_step(str(tmp_path), 2, 2, tiny.SHAPES, "float32", False)
    written = bench.writer(step, step.examples, 3)(0)
    assert jax.device_get(written.present).all() and written.tokens.shape == (6, tiny.SHAPES.completion)


@pytest.mark.parametrize("option", ["prompts", "group", "completion", "rollout_rows", "repeats"])
def test_a_size_of_nothing_is_refused(option):
    with pytest.raises(OptionError, match=f"--{option.replace('_', '-')} 0: expected at least 1"):
        bench.bench(**{option: 0})


@pytest.mark.slow
def test_the_suite_writes_both_types_with_machine_and_versions(tmp_path, capsys):
    pretrained.save(tmp_path, *tiny.pretrained())
    sizes = ["--prompts", "2", "--group", "2", "--completion", "4", "--rollout-rows", "4", "--repeats", "1"]
    out = tmp_path / "found.json"
    assert main(["bench", "--suite", "--model", str(tmp_path), *sizes, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written to {out}\n"
    found = json.loads(out.read_text())
    assert found["machine"]["platform"] == "cpu" and found["versions"]["jax"] == jax.__version__
    assert found["sizes"]["completion"] == 4
    for kind in ("bfloat16", "float32"):
        numbers = found[kind]
        assert numbers["bandwidth ceiling GB/s"] > 0 and numbers["matrix product ceiling GFLOP/s"] > 0
        assert numbers["rollout share of bandwidth ceiling"] < numbers["the same with the cache"]
        assert numbers["update share of matrix product ceiling"] > 0 and numbers["peak memory GB"] > 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--rollout-rows", "0"], "--rollout-rows 0: expected at least 1"),
        (["--model", "random:qwen3-1.7"], "there is no shape 'qwen3-1.7'"),
        (["--out", "nowhere/found.json"], "--out nowhere/found.json: expected a file in a folder that exists"),
        (["--rolout-rows", "1"], "--rolout-rows"),
    ],
)
def test_what_the_suite_cannot_do_is_said_in_a_sentence(options, said, capsys):
    assert main(["bench", "--suite", *options]) == 2
    assert said in capsys.readouterr().err


def test_decoding_reads_weights_once_and_the_cache_as_it_grows():
    """Counted column by column."""
    config, rows, context, completion = tiny.config(), 3, 5, 4
    weights, cache = bench.rollout_bytes(config, rows, context, completion, 2)
    assert weights == 2 * completion * sum(bench.parameter_counts(config))
    columns = sum(context + written + 0.5 for written in range(completion))
    assert cache == pytest.approx(rows * columns * config.layers * 2 * config.kv_heads * config.head_dim * 2)


def test_a_model_with_random_weights_has_the_shape_that_is_named(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "tiny", tiny.config())
    model = bench.loaded("random:tiny")
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert model.config == tiny.config() and shapes(model.params) == shapes(tiny.pretrained().params)
    assert all(float(abs(x).sum()) > 0 for x in jax.tree.leaves(model.params))
