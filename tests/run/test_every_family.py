"""Every family trains from the command line: plain and resumed, split over eight virtual devices, and by adapters."""

import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.models import pretrained, transformer
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
    if config.shapes and config.shapes.inputs:
        config = dataclasses.replace(config, shapes=dataclasses.replace(config.shapes, input_vocabulary=320))
    draw = np.random.default_rng(0).normal
    drawn = lambda path, x: np.float32(draw(size=x.shape) * 0.02 + (path[-1].key == "scale"))  # nothing is compiled
    shapes = jax.eval_shape(lambda: initialise(Transformer(config), jax.random.key(0)))
    pretrained.save(folder / "model", config, jax.tree_util.tree_map_with_path(drawn, shapes), tokenizer)
    rows = [{"prompt": f"What is {i} + 2?", "answer": f"{i + 2}", "solution": f"{i} + 2 = {i + 2}"} for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))


def as_after_the_first_step(out):
    """What a run of two steps had left, had it been killed in the second."""
    for place in (out / "checkpoints" / "2", out / "model"):
        shutil.rmtree(place)
    for file in (out / "checkpoints" / "2.json", out / "result.json"):
        file.unlink()


def trained(folder, out, programs, *more, experiment="experiments/own_data.py", **environment):
    """A run in a process of its own; its output if it fails."""
    files = ["--out", str(out)]
    if experiment == "experiments/own_data.py":
        files += ["--model", str(folder / "model"), "--data", str(folder / "problems.jsonl")]
    sizes = ["--completion", "16", "--context", "128", "--prompts", "4", "--save-every", "1", "--steps", "2"]
    command = [sys.executable, "-m", "sdjax", "train", str(experiment), *files, *sizes, "--evaluation", "0", *more]
    own = {"JAX_COMPILATION_CACHE_DIR": str(programs), "PYTHONPATH": str(ROOT), **environment}
    ended = subprocess.run(command, env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def steps_of(lines):
    return [line["step"] for line in lines]


def opens_in_transformers(folder):
    """An exported model gives the same logits there; nothing is compared where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch
    import transformers

    config, params, *_ = pretrained.load(folder)
    tokens, mask = np.random.default_rng(0).integers(5, 250, (1, 24)).astype(np.int32), jnp.ones((1, 24), bool)
    states, _ = transformer.hidden(Transformer(config, reach=24), params, tokens, jnp.arange(24)[None], mask)
    ours = np.asarray(transformer.logits(Transformer(config), params, states))
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = opened(input_ids=torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_trains(family, tmp_path, programs):
    """SDPO alone, resumed after its first step and on a mesh; GRPO with adapters.  What they leave is opened elsewhere."""
    given(tmp_path, family)
    short = ["--method.group-size", "2"]
    plain = trained(tmp_path, tmp_path / "plain", programs, "--method", "sdpo", *short)
    left = (tmp_path / "plain" / "model" / "model.safetensors").read_bytes()
    as_after_the_first_step(tmp_path / "plain")
    resumed = trained(tmp_path, tmp_path / "plain", programs, "--method", "sdpo", *short, "--resume")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in plain]
    assert (tmp_path / "plain" / "model" / "model.safetensors").read_bytes() == left
    meshed = trained(tmp_path, tmp_path / "mesh", programs, "--method", "sdpo", *short, "--mesh", "4x2", **EIGHT)
    assert steps_of(plain) == steps_of(meshed) == [1, 2]
    losses = [[line["loss"] for line in lines] for lines in (plain, meshed)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-5)
    lora = ["--method", "grpo", *short, "--lora-rank", "2"]
    assert steps_of(trained(tmp_path, tmp_path / "lora", programs, *lora)) == [1, 2]
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").exists()
    for out in ("plain", "mesh", "lora"):
        opens_in_transformers(tmp_path / out / "model")


def test_adapters_of_experts_train(tmp_path, programs):
    """SDPO on one device and on meshes: the same losses, every pair moves, and the export has them."""
    given(tmp_path, "gpt_oss")
    options = ["--method", "sdpo", "--method.group-size", "2", "--lora-rank", "2", "--lora-experts", "--lr", "1e-3"]
    plain = trained(tmp_path, tmp_path / "plain", programs, *options)
    wanted = [line["loss"] for line in plain]
    for mesh in ("4x2", "2x2x2"):
        meshed = trained(tmp_path, tmp_path / mesh, programs, *options, "--mesh", mesh, **EIGHT)
        assert [line["loss"] for line in meshed] == pytest.approx(wanted, rel=2e-3, abs=1e-9)
    pairs = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    moved = [name for name, array in pairs.items() if "experts" in name and "lora_B" in name and np.any(array)]
    assert len(moved) == 2 * from_hf(tmp_path / "model").layers
    for out in ("plain", "4x2", "2x2x2"):
        opens_in_transformers(tmp_path / out / "model")


LETTERS = """
import dataclasses

from sdjax.cli.options import Choice
from sdjax.run.settings import Settings
from sdjax.types import Example, Task, Verdict

METHOD, SETTINGS = "grpo", Settings()


def share_of_letters(example, text):
    return Verdict(sum(map(str.isalpha, text)) / max(len(text), 1))


def experiment(*, method: Choice, settings: Settings = SETTINGS):
    examples = [Example(str(i), ({"role": "user", "content": f"Write {i}."},), "") for i in range(40)]
    task = Task("letters", tuple(examples[:30]), tuple(examples[30:]), share_of_letters)
    return settings.experiment(method=settings.method(method), task=task)
"""


@pytest.mark.parametrize("mesh", [(), ("--mesh", "4x2")], ids=["plain", "mesh"])
def test_a_reward_trains_a_mixture_of_experts(mesh, tmp_path, programs):
    """GRPO where attempts differ: every matrix of the model moves, its routers and experts too."""
    given(tmp_path, "qwen3_moe")
    (tmp_path / "letters.py").write_text(LETTERS)
    before = pretrained.load(tmp_path / "model").params
    options = ["--model", str(tmp_path / "model"), "--method", "grpo", "--lr", "1e-3", "--router-aux", "0.01", *mesh]
    how = {"experiment": tmp_path / "letters.py", **(EIGHT if mesh else {})}
    lines = trained(tmp_path, tmp_path / "run", programs, *options, "--method.group-size", "4", **how)
    assert all(line["grad_norm"] > 1e-3 and line["router_aux"] > 1 for line in lines)
    after = pretrained.load(tmp_path / "run" / "model").params
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max() > 1e-5, before, after)
    assert all(jax.tree.leaves(moved["layers_0"])) and all(jax.tree.leaves(moved["layers_2"]))
    opens_in_transformers(tmp_path / "run" / "model")
