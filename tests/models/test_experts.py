"""Mixtures of experts: the choice against closed forms, groups against all experts, whole models against transformers."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from golden_models import GOLDEN, Golden, run, step
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sdjax.devices.sharding import MeshError, parameter_spec
from sdjax.models import adapters, attention, experts, transformer
from sdjax.models.configs import from_hf, to_hf
from sdjax.models.fields import ModelError
from sdjax.models.files import weights
from sdjax.models.files.layout import layout, shapes
from sdjax.models.routing import Moe, Routes, route

NAMES = ("gpt_oss", "qwen3_moe", "mixtral", "olmoe", "qwen2_moe")
unoptimised = pytest.fixture(scope="module", autouse=True)(networks.unoptimised)


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param)


def close(found, wanted, share=1e-5):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=share * np.abs(wanted).max())


def test_logits_are_those_of_transformers(golden):
    whole = np.ones_like(golden.mask)
    close(golden.full(golden.tokens, whole)[0], golden.logits)
    found = golden.full(golden.tokens, golden.mask)
    close(np.where(golden.mask[..., None], found, 0), golden.padded)


def test_decoding_takes_the_routes_of_scoring(golden):
    """Padded prompts are read once, the rest token by token: the logits of one pass, to rounding."""
    prefix, tokens, mask = 14, jnp.asarray(golden.tokens), jnp.asarray(golden.mask)
    positions = transformer.positions_of(mask)
    _, past = run(golden.model, golden.params, tokens[:, :prefix], positions[:, :prefix], mask[:, :prefix])
    cache = transformer.empty_cache(golden.model, 2, tokens.shape[1] - prefix)
    for column in range(tokens.shape[1] - prefix):
        here = prefix + column
        logits, cache = step(golden.model, golden.params, tokens[:, here], positions[:, here], past, cache, column)
        close(logits, golden.padded[:, here])


def test_files_say_the_same_when_they_are_written_again(golden, tmp_path):
    assert from_hf(to_hf(golden.config)) == golden.config
    assert {path: x.shape for path, x in flat(golden.params).items()} == shapes(golden.config)
    weights.save(tmp_path, golden.config, golden.params, shard_bytes=40_000)
    again = weights.opened(tmp_path, from_hf(tmp_path))[0]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again), golden.params)
    array, whole = again["layers_0"]["mlp"]["gate_up"], np.asarray(golden.params["layers_0"]["mlp"]["gate_up"])
    np.testing.assert_array_equal(array[1:3, 4:9, 1:, 3:17], whole[1:3, 4:9, 1:, 3:17])


def flat(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalised", [False, True])
def test_routes_are_the_most_probable_experts(renormalised):
    logits = np.random.default_rng(0).normal(size=(3, 5, 7)) * 3
    found = route(jnp.asarray(logits, jnp.float32), Moe(7, 3, 1, renormalised))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-logits, axis=-1)[..., :3]
    wanted = np.take_along_axis(probabilities, order, -1)
    np.testing.assert_array_equal(found.experts, order)
    np.testing.assert_allclose(
        found.weights, wanted / wanted.sum(-1, keepdims=True) if renormalised else wanted, rtol=1e-5
    )


def case(config, seed=0):
    """Tokens, routes and weights of a layer; one expert has no token, and one has most."""
    moe, draw = config.moe, np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    logits = array(2, 9, moe.experts) + jnp.asarray([4.0, -99.0, *[0.0] * (moe.experts - 2)])
    mlp = {
        "gate_up": array(moe.experts, config.width, 2, moe.width),
        "down": array(moe.experts, moe.width, config.width),
    }
    if moe.clamped is not None:
        mlp |= {"gate_up_bias": array(moe.experts, 2, moe.width), "down_bias": array(moe.experts, config.width)}
    return array(2, 9, config.width), route(logits, moe), mlp


@functools.partial(jax.jit, static_argnums=(3, 5))
def by_groups(x, routes, mlp, config, first=0, how=experts.by_groups):
    return how(x, routes, mlp, config, first) if how is experts.by_groups else how(x, routes, mlp, config)


def one_by_one(x, routes, mlp, config):
    """The same in float64, token by token."""
    result = np.zeros(x.shape)
    mlp = {name: np.asarray(array, np.float64) for name, array in mlp.items()}
    for at in np.ndindex(*x.shape[:2]):
        for weight, e in zip(np.asarray(routes.weights[at]), np.asarray(routes.experts[at]), strict=True):
            gate, up = np.einsum("d,dcf->cf", np.asarray(x[at], np.float64), mlp["gate_up"][e])
            if config.moe.clamped is None:
                inner = gate / (1 + np.exp(-gate)) * up
                result[at] += weight * (inner @ mlp["down"][e])
                continue
            gate, up = gate + mlp["gate_up_bias"][e, 0], up + mlp["gate_up_bias"][e, 1]
            gate, up = np.minimum(gate, config.moe.clamped), np.clip(up, -config.moe.clamped, config.moe.clamped)
            inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            result[at] += weight * (inner @ mlp["down"][e] + mlp["down_bias"][e])
    return result


@pytest.mark.parametrize("clamped", [None, 2.0])
def test_groups_are_the_experts_one_by_one_and_all_of_them(clamped):
    config = dataclasses.replace(from_hf(GOLDEN / "qwen3_moe"), moe=Moe(6, 2, 5, clamped=clamped))
    x, routes, mlp = case(config)
    wanted = one_by_one(x, routes, mlp, config)
    close(by_groups(x, routes, mlp, config), wanted)
    close(by_groups(x, routes, mlp, config, how=experts.by_all), wanted)
    halves = [{name: array[part] for name, array in mlp.items()} for part in (slice(0, 4), slice(4, 6))]
    close(
        sum(by_groups(x, routes, half, config, first) for half, first in zip(halves, (0, 4), strict=True)),
        wanted,
    )


def test_gradients_of_groups_are_those_of_all():
    config = dataclasses.replace(from_hf(GOLDEN / "qwen3_moe"), moe=Moe(6, 2, 5))
    x, routes, mlp = case(config)

    def loss(how, x, shares, mlp):
        return jnp.sum(jnp.sin(by_groups(x, Routes(shares, routes.experts), mlp, config, how=how)))

    of = lambda how: jax.jit(jax.grad(functools.partial(loss, how), argnums=(0, 1, 2)))(x, routes.weights, mlp)
    jax.tree.map(lambda one, other: close(one, other, 1e-4), of(experts.by_groups), of(experts.by_all))
    assert not np.any(of(experts.by_groups)[2]["down"][1])  # nobody goes there


# ---- files, meshes, adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' 9 exceeds the number of experts, 8"),
        ({"mlp_only_layers": "1"}, "'mlp_only_layers' must be a list of layers"),
    ],
)
def test_experts_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        from_hf({**to_hf(from_hf(GOLDEN / "qwen3_moe")), **change})


def test_every_other_layer_may_have_experts():
    config = from_hf({**to_hf(from_hf(GOLDEN / "qwen3_moe")), "decoder_sparse_step": 2, "mlp_only_layers": []})
    assert [config.has_experts(layer) for layer in range(3)] == [False, True, False]
    assert transformer.period_of(config) == 3 and config.first(1).has_experts(0) is False


def test_experts_are_split_over_the_model_axis():
    shape = shapes(from_hf(GOLDEN / "qwen3_moe"))["layers_0/mlp/gate_up"]
    assert parameter_spec("layers_0/mlp/gate_up", shape, {"data": 2, "model": 4}, 1) == P("model", "data", None, None)
    with pytest.raises(MeshError, match="8 experts do not divide by 3: choose a model axis of 1, 2, 4, 8$"):
        parameter_spec("layers_0/mlp/down", (8, 20, 32), {"data": 1, "model": 3})


def test_an_expert_axis_splits_experts_and_is_a_data_axis_for_all_else():
    sizes, shape = {"data": 2, "model": 2, "expert": 4}, shapes(from_hf(GOLDEN / "qwen3_moe"))
    of = lambda path: parameter_spec(path, shape[path], sizes, 1)
    assert of("layers_0/mlp/gate_up") == P(("model", "expert"), "data", None, None)
    assert of("layers_1/mlp/gate_up") == P(("data", "expert"), None, "model")
    assert of("layers_0/mlp/router") == P(("data", "expert"), None)
    assert of("layers_0/attention_norm/scale") == P(("data", "expert"))
    assert parameter_spec("embed", (64, 32), sizes, math.inf) == P("model", None)
    says = "mesh=1x4x3: .* over the model axis times expert axis, and 8 experts do not divide by 12: choose"
    with pytest.raises(MeshError, match=says):
        parameter_spec("layers_0/mlp/down", (8, 20, 32), {"data": 1, "model": 4, "expert": 3})


def test_a_shared_expert_reads_every_token():
    """Beside those that it goes to, weighed by a gate of its own."""
    golden = Golden("qwen2_moe")
    without = dataclasses.replace(golden.config, moe=dataclasses.replace(golden.config.moe, shared=None))
    wrong = golden.full(golden.tokens, np.ones_like(golden.mask), transformer.Transformer(without))
    assert np.abs(wrong[0] - golden.logits).max() > 1e-2 * np.abs(golden.logits).max()
    assert golden.config.moe.units == 3 * 12 + 20 and golden.config.hidden_units == 56
    assert {name for block, name, _ in adapters.targeted(golden.config, adapters.Lora()) if block == "layers_0"} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    spec = parameter_spec("layers_0/mlp/shared/gate_up", (32, 2, 20), {"data": 2, "model": 4}, 1)
    assert spec == P("data", None, "model")


def test_adapters_leave_experts_alone():
    config = from_hf(GOLDEN / "qwen3_moe")
    found = adapters.targeted(config, adapters.Lora())
    assert {name for block, name, _ in found if block == "layers_0"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name for block, name, _ in found if block == "layers_1"} >= {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert any(place.expert is not None for place in layout(config))


# ---- experts in one tensor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "qwen3_moe"])
def test_experts_in_one_tensor_are_read(name, tmp_path):
    """As Qwen3.5-MoE is published, also inside the folder of the class that reads images."""
    golden = Golden(name)
    tensors, fields = load_file(GOLDEN / name / "model.safetensors"), to_hf(golden.config)
    for layer in range(golden.config.layers):
        stem, experts_of = f"model.layers.{layer}.mlp.experts", range(golden.config.moe.experts)
        if f"{stem}.0.down_proj.weight" not in tensors:
            continue
        own = lambda part, stem=stem: [tensors.pop(f"{stem}.{e}.{part}.weight") for e in experts_of]  # noqa: B023
        gates, inputs = own("gate_proj"), own("up_proj")
        tensors[f"{stem}.gate_up_proj"] = np.stack([np.concatenate(both) for both in zip(gates, inputs, strict=True)])
        tensors[f"{stem}.down_proj"] = np.stack(own("down_proj"))
    if name == "qwen3_5_moe_text":
        tensors = {key.replace("model.", "model.language_model.", 1): x for key, x in tensors.items()}
        fields = {"model_type": "qwen3_5_moe", "text_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "model.safetensors")
    found, _ = weights.opened(tmp_path, from_hf(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), golden.params)
    part = (slice(2, 5), slice(3, 20), slice(1, 2), slice(4, 9))
    wanted = np.asarray(golden.params["layers_0"]["mlp"]["gate_up"])
    np.testing.assert_array_equal(found["layers_0"]["mlp"]["gate_up"][part], wanted[part])


# ---- MXFP4 ----------------------------------------------------------------------------------------------------------


def packed(draw, *shape):
    """Blocks and scales `[E, out, in / 32]`, and the numbers `[E, in, out]` that they mean, one by one."""
    blocks = draw.integers(0, 256, (*shape, 16)).astype(np.uint8)
    scales = draw.integers(118, 131, shape).astype(np.uint8)
    numbers = np.zeros((shape[0], 32 * shape[2], shape[1]))
    for e, out, group, byte in np.ndindex(blocks.shape):
        for place, bits in enumerate((int(blocks[e, out, group, byte]) % 16, int(blocks[e, out, group, byte]) // 16)):
            sign, exponent, fraction = bits // 8, bits // 2 % 4, bits % 2
            size = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
            numbers[e, 32 * group + 2 * byte + place, out] = (
                (-1) ** sign * size * 2.0 ** (int(scales[e, out, group]) - 127)
            )
    return blocks, scales, numbers


@pytest.fixture
def four_bits(tmp_path):
    """The tiny gpt-oss, as wide as a block, with its experts in four bits; and those experts."""
    fields = to_hf(from_hf(GOLDEN / "gpt_oss")) | {"intermediate_size": 32}
    config, draw = from_hf(fields), np.random.default_rng(0)
    params = jax.jit(transformer.initialise, static_argnums=0)(transformer.Transformer(config), jax.random.key(0))
    weights.save(tmp_path, config, params, dtype="bfloat16")
    tensors, wanted = load_file(tmp_path / "model.safetensors"), {}
    for layer in range(3):
        for name, out in (("gate_up_proj", 64), ("down_proj", 32)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stem]
            tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"], wanted[stem] = packed(draw, 8, out, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path, wanted


def test_experts_in_four_bits_are_read(four_bits):
    folder, wanted = four_bits
    params, dtype = weights.opened(folder, from_hf(folder))
    assert dtype == "bfloat16"
    gate_up, down = (params["layers_2"]["mlp"][name] for name in ("gate_up", "down"))
    whole = wanted["model.layers.2.mlp.experts.gate_up_proj"].reshape(8, 32, 32, 2).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(np.asarray(gate_up), whole)
    np.testing.assert_array_equal(gate_up[2:5, 3:20, 1:, 7:9], whole[2:5, 3:20, 1:, 7:9])
    np.testing.assert_array_equal(np.asarray(down), wanted["model.layers.2.mlp.experts.down_proj"])


def test_blocks_without_their_scales_are_refused(four_bits):
    folder, _ = four_bits
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks in model\.safetensors .* has no"):
        weights.opened(folder, from_hf(folder))


@pytest.mark.parametrize("how", ["gptq", None])
def test_other_quantisation_is_refused(how):
    fields = to_hf(from_hf(GOLDEN / "gpt_oss"))
    with pytest.raises(ModelError, match="quantised weights"):
        from_hf({**fields, "quantization_config": {"quant_method": how}})


def test_a_head_may_read_nothing():
    """A sink is one more key with the value 0: as large as the scores it halves what is read, at -inf it is not there."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    positions = np.broadcast_to(np.arange(5), (2, 5))
    keys = attention.Keys(draw(0, 2, 5, 3, 4), draw(1, 2, 5, 3, 4), positions, np.ones((2, 5), bool))
    query, sinks = draw(2, 2, 5, 3, 2, 4), draw(3, 3, 2)
    plain = attention.at_once(query, positions, (keys,))
    close(attention.at_once(query, positions, (keys,), sinks=jnp.full((3, 2), -jnp.inf)), plain)
    scores = np.einsum("bskgh,bpkh->bkgsp", query, keys.keys) / 2
    scores = np.where(np.tril(np.ones((5, 5), bool)), np.exp(scores), 0)
    share = scores.sum(-1) / (scores.sum(-1) + np.exp(np.asarray(sinks))[None, :, :, None])
    wanted = np.asarray(plain) * share.transpose(0, 3, 1, 2)[..., None]
    close(attention.at_once(query, positions, (keys,), sinks=sinks), wanted)
