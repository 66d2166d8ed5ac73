"""Every family trains from the command line: plain, split over eight virtual devices, and by adapters."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sdjax.models import pretrained
from sdjax.models.configs import from_hf
from sdjax.models.families import FAMILIES
from sdjax.models.transformer import Transformer, initialise

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = GOLDEN.parents[1]
EIGHT = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}

pytestmark = pytest.mark.slow


def given(folder, family):
    """A folder with a random model of a family over a tokenizer of 272, and problems."""
    tokenizer = importlib.import_module("engine.test_chats").family("qwen3")
    config = dataclasses.replace(from_hf(GOLDEN / family), vocab_size=320, max_context=1024)
    params = jax.jit(initialise, static_argnums=0)(Transformer(config), jax.random.key(0))
    pretrained.save(folder / "model", config, jax.device_get(params), tokenizer)
    rows = [{"prompt": f"What is {i} + 2?", "answer": f"{i + 2}", "solution": f"{i} + 2 = {i + 2}"} for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))


def trained(folder, out, programs, *more, **environment):
    """A run in a process of its own; its output if it fails."""
    files = ["--model", str(folder / "model"), "--data", str(folder / "problems.jsonl"), "--out", str(out)]
    sizes = ["--completion", "16", "--context", "128", "--prompts", "4", "--save-every", "1", "--steps", "2"]
    command = [sys.executable, "-m", "sdjax", "train", "experiments/own_data.py", *files, *sizes, *more]
    own = {"JAX_COMPILATION_CACHE_DIR": str(programs), **environment}
    ended = subprocess.run(command, env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(lines):
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_trains(family, tmp_path, programs):
    given(tmp_path, family)
    short = ["--evaluation", "0", "--method.group-size", "2"]
    plain = trained(tmp_path, tmp_path / "plain", programs, "--method", "sdpo", *short)
    meshed = trained(tmp_path, tmp_path / "mesh", programs, "--method", "sdpo", *short, "--mesh", "4x2", **EIGHT)
    assert steps_of(plain) == steps_of(meshed) == [1, 2]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, meshed)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-5)
    lora = ["--method", "grpo", *short, "--lora-rank", "2"]
    assert steps_of(trained(tmp_path, tmp_path / "lora", programs, *lora)) == [1, 2]
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").exists()
