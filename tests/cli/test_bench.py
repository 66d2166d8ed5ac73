"""`sdjax bench`: the FLOP it counts, and that it measures what it says."""

import jax
import pytest
import tiny

from sdjax.__main__ import main
from sdjax.cli import bench
from sdjax.cli.options import OptionError
from sdjax.engine.train import make_update
from sdjax.models import pretrained
from sdjax.planning.flops import product_flops


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
    assert 0 < found["peak resident GB"] < 24
    assert 0 < found["update share of matrix product ceiling"] < 1.5


def test_sampling_is_timed_at_full_length(tmp_path):
    pretrained.save(tmp_path, *tiny.pretrained())
    step = bench.a_step(str(tmp_path), 2, 2, tiny.SHAPES, "float32", False)
    written = bench.writer(step, step.examples, 3)(0)
    assert jax.device_get(written.present).all() and written.tokens.shape == (6, tiny.SHAPES.completion)


@pytest.mark.parametrize("option", ["prompts", "group", "completion", "rollout_rows", "repeats"])
def test_a_size_of_nothing_is_refused(option):
    with pytest.raises(OptionError, match=f"--{option.replace('_', '-')} 0: expected at least 1"):
        bench.bench(**{option: 0})
