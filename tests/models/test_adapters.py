"""Adapters: the forward pass against merged weights, the peft library's formula and files, quantised bases, whole runs."""

import dataclasses
import functools
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from networks import network, padded, prompts, unoptimised
from safetensors.numpy import load_file

from sdjax.collect.contexts import question, with_solution
from sdjax.devices.sharding import parameter_specs
from sdjax.engine import train
from sdjax.engine.generate import Sampling, generate
from sdjax.engine.policies import frozen
from sdjax.engine.snapshots import frozen_snapshots
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.methods.sdpo import sdpo
from sdjax.models import adapters, pretrained, transformer
from sdjax.models.adapters import TARGETS, Lora, folded, is_adapters
from sdjax.models.configs import FAMILIES, from_hf
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_files, weights
from sdjax.models.transformer import Transformer
from sdjax.run.fit import fit
from sdjax.run.folder import RunError
from sdjax.types import Task

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.random.default_rng(0).integers(1, 60, (2, 9)).astype(np.int32)
needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="sdjax[lora] is not installed")
each_family = pytest.mark.parametrize(
    "family", ["gemma3_text", "llama", "llama_biased", "olmo3", "phi4", "qwen2", "qwen3", "qwen3_5_text"]
)
"""Between them every kind of matrix, in one tensor of a file and in several."""


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@functools.cache
def model_of(family):
    """A committed model of a family and its parameters."""
    config = from_hf(GOLDEN / family)
    return Transformer(config), weights.load(GOLDEN / family, config)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    mask = jnp.ones(tokens.shape, bool)
    states, _ = transformer.hidden(model, params, tokens, transformer.positions_of(mask), mask)
    return transformer.logits(model, params, states)


def trained(config, lora, seed=1):
    """Adapters after some training: all their numbers differ from 0."""
    start = adapters.initial(config, lora, jax.random.key(seed))
    noise = lambda path, x: x + 0.3 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
    return jax.tree_util.tree_map_with_path(noise, start)


def close(found, expected, size=1e-5):
    np.testing.assert_allclose(found, expected, atol=size * float(np.abs(expected).max()))


# ---- the forward pass and the files ---------------------------------------------------------------------------------


def test_every_family_is_here():
    assert {from_hf(p).family for p in GOLDEN.iterdir() if p.is_dir()} == set(FAMILIES)


@each_family
def test_new_adapters_change_nothing_and_trained_ones_are_a_change_of_weights(family):
    model, params = model_of(family)
    lora = Lora(rank=3, alpha=5.0)
    base = adapters.base(model.config, params, lora)
    plain = logits(model, params, TOKENS)
    close(logits(model, base.with_adapters(adapters.initial(model.config, lora, jax.random.key(0))), TOKENS), plain)
    whole = base.with_adapters(trained(model.config, lora))
    found = logits(model, whole, TOKENS)
    assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()
    close(found, logits(model, folded(whole), TOKENS))


@each_family
def test_the_peft_folder_gives_the_merged_weights_by_pefts_formula(family, tmp_path):
    """`W + alpha / r * B A` for each matrix of the transformers library, in float64."""
    model, params = model_of(family)
    lora = Lora(rank=3, alpha=5.0)
    own = trained(model.config, lora)
    weights.save(tmp_path / "base", model.config, params)
    weights.save(
        tmp_path / "merged", model.config, folded(adapters.base(model.config, params, lora).with_adapters(own))
    )
    peft_files.save(tmp_path / "adapter", model.config, own, lora)
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    before, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = set()
    for name, matrix in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = matrix.astype(np.float64)
        if f"{stem}A.weight" in pairs:
            a, b = (pairs.pop(f"{stem}{letter}.weight").astype(np.float64) for letter in "AB")
            assert a.shape == (3, matrix.shape[1]) and b.shape == (matrix.shape[0], 3)
            expected = expected + fields["lora_alpha"] / fields["r"] * b @ a
            changed.add(name.split(".")[-2])
        close(merged[name], expected, 1e-6)
    given, own = own, {name for block in own["lora"].values() for name in block}
    assert not pairs and changed == own == set(fields["target_modules"]) <= set(TARGETS)
    found, tree = peft_files.load(tmp_path / "adapter", model.config)
    read = folded(adapters.beside(model.config, params, tree, found))
    expected = folded(adapters.base(model.config, params, lora).with_adapters(given))
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        close(one, other, 1e-6)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model, _ = model_of("qwen3")
    lora = Lora(rank=3, targets=("q_proj",))
    peft_files.save(tmp_path, model.config, trained(model.config, lora), lora)
    other, _ = model_of("llama")
    if other.config.width != model.config.width:
        with pytest.raises(ModelError, match="has the shape"):
            peft_files.load(tmp_path, other.config)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    for change, said in (
        ({"use_dora": True}, "DoRA are not supported"),
        ({"bias": "all"}, "biases are not supported"),
        ({"peft_type": "IA3"}, "of the type LORA"),
        ({"r": 0}, "expected a rank"),
    ):
        file.write_text(json.dumps({**told, **change}))
        with pytest.raises(ModelError, match=said):
            peft_files.load(tmp_path, model.config)
    file.write_text(json.dumps({**told, "use_rslora": True, "lora_alpha": 6}))
    assert peft_files.load(tmp_path, model.config)[0].scale == pytest.approx(6 / 3**0.5)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot read"):
        peft_files.load(tmp_path, model.config)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "torch")), reason="peft or torch is not installed"
)
def test_the_peft_library_reads_what_is_written(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, params = model_of("qwen3")
    lora = Lora(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "gate_proj"))
    own = trained(model.config, lora)
    peft_files.save(tmp_path, model.config, own, lora)
    theirs = AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.asarray(TOKENS.astype(np.int64))).logits.numpy()
    whole = adapters.base(model.config, params, lora).with_adapters(own)
    np.testing.assert_allclose(logits(model, whole, TOKENS), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_only_what_is_targeted_changes():
    model, params = model_of("qwen3")
    lora = Lora(rank=2, targets=("k_proj", "down_proj"))
    own = trained(model.config, lora)
    assert {name for block in own["lora"].values() for name in block} == {"k_proj", "down_proj"}
    merged = flatten_dict(folded(adapters.base(model.config, params, lora).with_adapters(own)), sep="/")
    for path, array in flatten_dict(params, sep="/").items():
        differs = np.abs(merged[path] - array) > 1e-6
        if path.endswith("attention/qkv"):
            assert not differs[:, :, :-2].any() and not differs[:, :, -1].any() and differs[:, :, -2].all()
        else:
            assert differs.any() == path.endswith("mlp/down")


def test_gradients_are_those_of_the_change_of_weights():
    """And the base has none: it is no argument of what is differentiated."""
    model, params = model_of("llama")
    lora = Lora(rank=2)
    base, own = adapters.base(model.config, params, lora), trained(model.config, lora)
    value = lambda whole: jnp.square(logits(model, whole, TOKENS)).mean()
    found = jax.grad(lambda own: value(base.with_adapters(own)))(own)
    expected = jax.grad(lambda own: value(folded(base.with_adapters(own))))(own)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, expected)
    remat = Transformer(model.config, remat=True)
    again = jax.grad(lambda own: jnp.square(logits(remat, base.with_adapters(own), TOKENS)).mean())(own)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, again)


@pytest.mark.parametrize("kind", ["float", pytest.param("nf4", marks=needs_qwix)])
@pytest.mark.slow
def test_the_sampler_reads_adapters(kind):
    model, params = network("mixed")
    lora = Lora(rank=2, base=kind)
    whole = adapters.base(model.config, params, lora).with_adapters(trained(model.config, lora))
    keys, context = jax.random.split(jax.random.key(0), 4), padded(prompts((3, 7)), 8)
    write = lambda params: generate((model,), (params,), (context,), keys, Sampling(), jnp.asarray([-1]), 8, length=8)
    found, expected = write(whole), write(folded(whole))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["float", pytest.param("int8", marks=needs_qwix)])
def test_a_mesh_splits_frozen_weights_like_the_parameters_whose_place_they_take(kind):
    model, params = network("mixed")
    lora = Lora(rank=2, base=kind)
    whole = adapters.base(model.config, params, lora).with_adapters(trained(model.config, lora))
    sizes = {"data": 1, "model": 2}
    plain, found = parameter_specs(params, sizes), parameter_specs(whole, sizes)
    for block in ("layers_0", "layers_1"):
        for part, name in (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down")):
            weight = found[block][part][name].weight
            assert plain[block][part][name] == getattr(weight, "qvalue", weight) != P()


# ---- quantised bases ------------------------------------------------------------------------------------------------


@needs_qwix
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_near_and_small(kind):
    """int8: half a step of 1/127.5 of the output's largest weight.  NF4: half the widest gap between its 16 values."""
    model, params = network("mixed")
    base = adapters.base(model.config, params, Lora(base=kind))
    nothing = adapters.initial(model.config, Lora(base=kind), jax.random.key(0))
    dense = flatten_dict(folded(base.with_adapters(nothing)), sep="/")
    step = {"int8": 1 / 127.5, "nf4": 1 - 0.6961928}[kind]
    for path, array in flatten_dict(params, sep="/").items():
        if not any(name in path for name in ("/qkv", "/out", "/gate_up", "/down")):
            np.testing.assert_array_equal(dense[path], array)
            continue
        inputs = (0, 1, 2) if path.endswith("/out") and kind == "int8" else (2,) if path.endswith("/out") else (0,)
        largest = np.abs(array).max(inputs, keepdims=True)
        worst = np.abs(dense[path] - array) / largest
        assert 0 < worst.max() <= step / 2 + 1e-5, path
    stored = base.weights["layers_0"]["mlp"]["down"].qvalue
    assert stored.dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]


@needs_qwix
def test_nf4_has_a_scale_for_every_64_inputs():
    found = adapters.quantised(jnp.ones((192, 3, 5)), 1, "nf4")
    assert found.scale.shape == (3, 3, 5)
    assert adapters.quantised(jnp.ones((2, 4, 128, 7)), 3, "nf4").scale.shape == (2, 4, 2, 7)
    assert adapters.quantised(jnp.ones((192, 3, 5)), 1, "int8").scale.shape == (1, 3, 5)


@needs_qwix
def test_adapters_learn_on_a_quantised_base():
    model, params = model_of("llama")
    lora = Lora(rank=2, base="nf4")
    base, own = adapters.base(model.config, params, lora), trained(model.config, lora)
    value = lambda whole: jnp.square(logits(model, whole, TOKENS)).mean()
    found = jax.jit(jax.grad(lambda own: value(base.with_adapters(own))))(own)
    dense = adapters.base(model.config, folded(base.with_adapters(jax.tree.map(jnp.zeros_like, own))), Lora(rank=2))
    expected = jax.grad(lambda own: value(dense.with_adapters(own)))(own)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, expected)


def test_bad_options_are_refused(monkeypatch):
    for options, message in (
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"targets": ("q_proj", "query")}, "targets=query: expected some of q_proj, k_proj"),
        ({"targets": ()}, "targets=none"),
        ({"base": "int3"}, "base=int3: expected float, int8 or nf4"),
    ):
        with pytest.raises(ModelError, match=message):
            Lora(**options)
    with pytest.raises(ModelError, match="give the adapters a rank"):
        adapters.chosen(0, "nf4", False)
    assert adapters.chosen(0, "float", False) is None and adapters.chosen(4, "int8", False) == Lora(4, base="int8")
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(ModelError, match=r"needs qwix: install sdjax\[lora\]"):
        adapters.quantised(np.ones((4, 4), np.float32), 1, "int8")


# ---- whole runs -----------------------------------------------------------------------------------------------------

LORA = Lora(rank=4)


def experiment(steps, *, lora=LORA, seed=0, ema=0.5):
    """SDPO with a teacher that averages, or with the initial model as the teacher (`ema` None)."""
    method = sdpo(
        group_size=2,
        ema_rate=ema or 0.0,
        top_k=None,
        lesson=lambda r, _: with_solution(question(r.example), r.example.solution),
    )
    if ema is None:
        method = method._replace(snapshots={name: frozen() for name in method.snapshots})
    return Experiment(
        method=method,
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(seed),
        optimizer=optax.adam(1e-2),
        shapes=Shapes(context=48, completion=8, rows=8, tokens_per_chunk=None),
        steps=steps,
        prompts=2,
        evaluation=2,
        save_every=2,
        lora=lora,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return folder, fit(experiment(4), folder)


def test_only_adapters_are_trained_saved_and_averaged(run):
    folder, result = run
    assert is_adapters(result.state.params) and all(is_adapters(s) for s in result.state.snapshots.values())
    start = adapters.initial(tiny.config(), LORA, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), result.state.params, start)
    assert all(x > 0 for x in jax.tree.leaves(moved))
    (average,) = result.state.snapshots.values()
    between = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), average, result.state.params)
    assert all(x > 0 for x in jax.tree.leaves(between))
    arrays = json.loads((folder / "checkpoints" / "4.json").read_text())["arrays"]
    saved = sum(math.prod(json.loads(kind[kind.index("[") :])) for kind in arrays.values())
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    # Adapters, their two moments and their average; keys and counters beside them.
    assert count(start) * 4 <= saved <= count(start) * 4 + 8


def test_the_exported_model_is_the_base_with_the_adapters(run):
    folder, result = run
    whole = adapters.base(tiny.config(), tiny.pretrained().params, LORA).with_adapters(result.state.params)
    loaded = pretrained.load(folder / "model")
    jax.tree.map(lambda a, b: close(a, b, 1e-6), loaded.params, jax.device_get(folded(whole)))
    names = {p.name for p in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_and_needs_the_same_base(run, tmp_path):
    _, whole = run
    fit(experiment(2), tmp_path / "halves")
    resumed = fit(experiment(4), tmp_path / "halves", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    with pytest.raises(RunError, match="trained on other weights"):
        fit(experiment(6, seed=1), tmp_path / "halves", resume=True)
    with pytest.raises(RunError, match="other options of Lora"):
        fit(experiment(6, lora=Lora(rank=4, alpha=1.0)), tmp_path / "halves", resume=True)


@needs_qwix
@pytest.mark.slow
def test_a_teacher_without_the_adapter_is_the_first_adapters_kept(tmp_path):
    """On a quantised base, too: the frozen snapshot is the network as it was, at an adapter's size, and is not saved."""
    lora = dataclasses.replace(LORA, base="int8")
    own = dataclasses.replace(experiment(2, lora=lora, ema=None), export=False)
    (teacher,) = frozen_snapshots(own.method, train.frozen_and_trained(own)[1]).values()
    assert is_adapters(teacher)
    assert fit(own, tmp_path / "run").state.snapshots == {}
    base = adapters.base(tiny.config(), tiny.pretrained().params, lora)
    off = jax.tree.map(jnp.zeros_like, teacher)
    close(
        logits(tiny.model(), base.with_adapters(teacher), TOKENS % 20),
        logits(tiny.model(), base.with_adapters(off), TOKENS % 20),
    )
