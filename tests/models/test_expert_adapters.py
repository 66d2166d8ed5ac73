"""Adapters of experts: against float64, in the peft library's files and by its formula, in whole models, on meshes."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models.test_adapters import GOLDEN, TOKENS, close, logits, model_of, trained
from models.test_experts import case, one_by_one
from networks import unoptimised
from safetensors.numpy import load_file

from sdjax.devices.sharding import parameter_spec
from sdjax.models import adapters, expert_adapters, experts
from sdjax.models.adapters import Lora, folded
from sdjax.models.configs import from_hf
from sdjax.models.expert_adapters import DOWN, GATE_UP, AdaptedExperts
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_files, weights
from sdjax.models.routing import Moe

BOTH = Lora(rank=3, alpha=5.0, targets=("q_proj", *expert_adapters.TARGETS))


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def adapted_case(clamped):
    """Tokens, routes and adapted weights of a layer of 6 experts."""
    config = dataclasses.replace(from_hf(GOLDEN / "qwen3_moe"), moe=Moe(6, 2, 5, clamped=clamped))
    x, routes, mlp = case(config)
    draw = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    own = {
        "gate_up": AdaptedExperts(mlp["gate_up"], array(6, 2, config.width), array(6, 10, 2), 0.5),
        "down": AdaptedExperts(mlp["down"], array(6, 2, 5), array(6, config.width, 2), 0.5),
    }
    return config, x, routes, mlp | own


def added(mlp, pairs=None):
    """Every expert's matrices with `scale B A` added, in float64."""
    result = {name: np.asarray(x, np.float64) for name, x in mlp.items() if not isinstance(x, AdaptedExperts)}
    for name, x in mlp.items():
        if isinstance(x, AdaptedExperts):
            a, b = (np.asarray(own, np.float64) for own in (pairs[name] if pairs else (x.a, x.b)))
            change = np.stack([x.scale * (b[e] @ a[e]).T for e in range(len(a))])
            result[name] = np.asarray(x.weight, np.float64) + change.reshape(x.weight.shape)
    return result


@functools.partial(jax.jit, static_argnums=(0, 4))
def read(how, x, routes, mlp, config):
    return how(x, routes, mlp, config, *((0,) if how is experts.by_groups else ()))


@pytest.mark.parametrize("clamped", [None, 2.0])
def test_each_expert_reads_its_own_pair(clamped):
    config, x, routes, mlp = adapted_case(clamped)
    wanted = one_by_one(x, routes, added(mlp), config)
    assert (
        np.abs(wanted - one_by_one(x, routes, {n: getattr(w, "weight", w) for n, w in mlp.items()}, config)).max() > 1
    )
    close(read(experts.by_groups, x, routes, mlp, config), wanted)
    close(read(experts.by_all, x, routes, mlp, config), wanted)


def test_gradients_are_those_of_float64():
    """Along a random direction of all pairs, by central differences."""
    config, x, routes, mlp = adapted_case(None)
    names, draw = ("gate_up", "down"), np.random.default_rng(2)
    pairs = {name: (np.asarray(mlp[name].a, np.float64), np.asarray(mlp[name].b, np.float64)) for name in names}
    direction = jax.tree.map(lambda p: draw.normal(size=p.shape), pairs)
    value = lambda found: np.sin(found / 50).sum()
    moved = lambda by: jax.tree.map(lambda p, d: p + by * d, pairs, direction)
    far = [value(one_by_one(x, routes, added(mlp, moved(by)), config)) for by in (1e-5, -1e-5)]

    def loss(pairs):
        own = {name: mlp[name].replace(a=a, b=b) for name, (a, b) in pairs.items()}
        return jnp.sin(read(experts.by_groups, x, routes, mlp | own, config) / 50).sum()

    start = jax.tree.map(jnp.float32, pairs)
    found = jax.grad(loss)(start)
    along = sum(np.sum(np.asarray(g) * d) for g, d in zip(*map(jax.tree.leaves, (found, direction)), strict=True))
    assert along == pytest.approx((far[0] - far[1]) / 2e-5, rel=1e-4)
    assert not np.any(found["down"][1][1])  # nobody goes to that expert


@pytest.mark.slow
def test_a_network_with_adapted_experts_is_the_folded_one():
    """And with pairs that were not trained yet the one without them."""
    model, params = model_of("gpt_oss")
    base, first = adapters.base(model.config, params, BOTH), adapters.initial(model.config, BOTH, jax.random.key(0))
    whole = base.with_adapters(trained(model.config, BOTH))
    close(logits(model, whole, TOKENS), logits(model, folded(whole), TOKENS))
    close(logits(model, base.with_adapters(first), TOKENS), logits(model, params, TOKENS))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", "mixtral"])
def test_the_peft_folder_gives_the_merged_experts_by_pefts_formula(family, tmp_path):
    """That of its `ParamWrapper`: `B.reshape(out, r, E)`, `A.reshape(E, r, in)`, outputs in the file's order."""
    config, params = from_hf(GOLDEN / family), weights.load(GOLDEN / family, from_hf(GOLDEN / family))
    own, count = jax.device_get(trained(config, BOTH)), config.moe.experts
    weights.save(tmp_path / "base", config, params)
    weights.save(tmp_path / "merged", config, adapters.base(config, params, BOTH).with_adapters(own))
    peft_files.save(tmp_path / "adapter", config, own, BOTH)
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    inside = "base_model.model.model.layers.0.mlp.experts"
    for stem, part in ((f"{inside}.base_layer", "gate_up"), (inside, "down")):
        a, b = (pairs[f"{stem}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
        delta = 5 / 3 * np.einsum("ore,eri->eoi", b.reshape(len(b), 3, count), a.reshape(count, 3, -1))
        close(one_tensor(merged, part, count) - one_tensor(before, part, count), delta)
    found, tree = peft_files.load(tmp_path / "adapter", config)
    assert found == BOTH
    jax.tree.map(np.testing.assert_array_equal, tree, own)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert fields["target_modules"] == ["q_proj"]


def one_tensor(tensors, part, count):
    """A layer's matrices `[E, out, in]` as transformers 5 holds them in one parameter, from a file."""
    if f"model.layers.0.mlp.experts.{part}_proj" in tensors:
        return tensors[f"model.layers.0.mlp.experts.{part}_proj"].swapaxes(1, 2)
    short = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}[part]
    stem = "mlp.experts"
    if "model.layers.0.block_sparse_moe.gate.weight" in tensors:
        short, stem = {"gate_up": ("w1", "w3"), "down": ("w2",)}[part], "block_sparse_moe.experts"
    own = lambda e: [tensors[f"model.layers.0.{stem}.{e}.{name}.weight"] for name in short]
    return np.stack([np.concatenate(own(e)) for e in range(count)])


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "torch")), reason="peft or torch is not installed"
)
@pytest.mark.parametrize("targets", [(GATE_UP, DOWN), (GATE_UP,), (DOWN, "q_proj")])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", "mixtral"])
def test_the_peft_library_reads_what_is_written(family, targets, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, params = model_of(family)
    lora = Lora(rank=3, alpha=5.0, targets=targets)
    own = trained(model.config, lora)
    peft_files.save(tmp_path, model.config, own, lora)
    plain = AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.asarray(TOKENS.astype(np.int64))).logits.numpy()
    whole = adapters.base(model.config, params, lora).with_adapters(own)
    close(logits(model, whole, TOKENS), expected, 5e-5)


def test_pairs_lie_where_their_experts_do():
    for path in (f"lora/layers_0/{GATE_UP}/a", "layers_0/mlp/down/b"):
        assert parameter_spec(path, (8, 4, 96), {"data": 2, "model": 4}, 1) == P("model", None, "data")


def test_experts_that_are_not_there_are_refused():
    model, params = model_of("llama")
    with pytest.raises(ModelError, match="lora_experts: llama has no experts to adapt"):
        adapters.base(model.config, params, BOTH)
    with pytest.raises(ModelError, match="lora_experts adds to adapters: give them a rank"):
        adapters.chosen(0, "float", True)
    assert adapters.chosen(3, "float", True) == Lora(3, targets=adapters.TARGETS + expert_adapters.TARGETS)
