"""Every family against transformers' logits: in one run, padded, decoded; what each has of its own; its files."""

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import unoptimised
from safetensors.numpy import load_file, save_file

from sdjax.models import configs, families, layer_kinds, transformer
from sdjax.models.configs import from_hf, to_hf
from sdjax.models.families import FAMILIES, Family
from sdjax.models.fields import ModelError
from sdjax.models.files import weights
from sdjax.models.ropes import NO_ROPE, rope
from sdjax.models.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
LENGTH, PREFIX = 20, 12
SIZES = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), 5e-5) | {"gemma4_text": 3e-5}
"""What the largest logit may be off by, relatively: norms of what a delta net reads, and scores of normalised heads that
nothing divides, enlarge the rounding of small numbers."""
each_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@functools.cache
def golden(name):
    """A committed model: its configuration, its parameters, and what transformers computes."""
    config = from_hf(GOLDEN / name)
    with np.load(GOLDEN / name / "logits.npz") as file:
        return config, weights.load(GOLDEN / name, config), dict(file)


def masks(arrays):
    """Two rows without padding, two with padding on the left."""
    padded = np.arange(LENGTH) >= LENGTH - arrays["lengths"][:, None]
    return np.concatenate([np.ones_like(padded), padded])


def close(found, expected, size=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=size * np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=0)
def in_one_run(model, params, tokens, mask):
    states, _ = transformer.hidden(model, params, tokens, transformer.positions_of(mask), mask)
    return transformer.logits(model, params, states)


@functools.partial(jax.jit, static_argnums=0)
def decoded(model, params, tokens, mask):
    """Logits of the tokens after the prefix: the prefix is read once, the others one by one into a cache."""
    positions = transformer.positions_of(mask)
    first = (slice(None), slice(0, PREFIX))
    _, past = transformer.hidden(model, params, tokens[first], positions[first], mask[first])

    def step(cache, column):
        token, position = tokens[:, PREFIX + column], positions[:, PREFIX + column]
        place = transformer.Column(column, column + 1)
        states, cache = transformer.decode(model, params, token, position, past, cache, place)
        return cache, transformer.logits(model, params, states)

    cache = transformer.empty_cache(model, len(tokens), LENGTH - PREFIX)
    return jnp.moveaxis(jax.lax.scan(step, cache, jnp.arange(LENGTH - PREFIX))[1], 0, 1)


# ---- logits ---------------------------------------------------------------------------------------------------------


def test_every_family_has_a_model():
    assert {golden(name)[0].family for name in NAMES} == set(FAMILIES)


@each_model
def test_logits_are_those_of_transformers(name):
    """In float32, at once and token by token, with padding and without."""
    config, params, arrays = golden(name)
    model, mask = Transformer(config, reach=LENGTH), masks(arrays)
    tokens = np.concatenate([arrays["tokens"]] * 2)
    found, size = in_one_run(model, params, tokens, mask), SIZES.get(name, 4e-6)
    close(found[0], arrays["logits"], size)
    close(np.where(mask[2:, :, None], found[2:], 0), arrays["padded"], size)
    close(decoded(model, params, tokens, mask)[2:], arrays["padded"][:, PREFIX:], size)


CHANGES = {
    "score_cap": ("gemma2", None),
    "logit_cap": ("gemma2", None),
    "query_scalar": ("gemma2", None),
    "norm_offset": ("gemma3_text", 0.0),
    "embedding_scale": ("gemma3_text", 1.0),
    "activation": ("gemma3_text", "silu"),
    "windows": ("mistral", (None, None)),
    "value_norm": ("gemma4_large", False),
    "layer_scale": ("gemma4_large", False),
    "residual_scale": ("granite", 1.0),
    "logit_divisor": ("granite", 1.0),
    "score_scale": ("granite", None),
    "qk_norm": ("exaone4", "none"),
    "ropes": ("smollm3", (rope(8, 64, {"rope_theta": 1_000.0}),) * 4),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_a_family_has_of_its_own_matters(field):
    """Guards the models: a decoder without it must not pass."""
    name, value = CHANGES[field]
    config, params, arrays = golden(name)
    other = Transformer(dataclasses.replace(config, **{field: value}))
    found = in_one_run(other, params, arrays["tokens"], np.ones((2, LENGTH), bool))
    assert np.abs(found[0] - arrays["logits"]).max() > 1e-2 * np.abs(arrays["logits"]).max()


def test_long_rope_goes_by_the_longest_text_of_a_run():
    """Sampler and scorer must agree: not by the text at hand, whose keys would be of two kinds."""
    config, params, arrays = golden("phi4_long")
    short = Transformer(config, reach=8)
    found = in_one_run(short, params, arrays["tokens"], np.ones((2, LENGTH), bool))
    assert np.abs(found[0] - arrays["logits"]).max() > 1e-2 * np.abs(arrays["logits"]).max()
    assert (
        short.config.reaching(9)
        == Transformer(config, reach=LENGTH).config.reaching(20)
        != config.reaching(8)
        == config
    )


def test_growing_queries_and_partial_ropes():
    assert golden("ministral3")[0].ropes[0].growth == 0.3
    assert len(golden("phi4")[0].ropes[0].inverse_frequencies) == 6 and golden("phi4")[0].head_dim == 16
    assert [entry == NO_ROPE for entry in golden("smollm3")[0].ropes] == [False, True, False, True]


def test_layers_that_borrow_keys_and_have_inputs():
    """Gemma 4: the last layers have queries alone, and a cache holds the keys of those that own them."""
    config, params, arrays = golden("gemma4_text")
    assert [config.keys_of(layer) for layer in range(4)] == [0, 1, 0, 1]
    assert [params[f"layers_{layer}"]["attention"]["qkv"].shape[1:] for layer in (0, 1, 2)] == [
        (2, 4, 8),
        (2, 4, 16),
        (2, 2, 8),
    ]
    assert len(transformer.empty_cache(Transformer(config), 1, 5).keys) == 2
    assert params["layers_3"]["mlp"]["down"].shape[0] == 2 * config.mlp_width == config.hidden_units
    assert config.first(3).shapes.borrowing == 1 and config.first(2).shapes.borrowing == 0
    mask = np.ones((2, LENGTH), bool)
    other = {**params, "inputs": {**params["inputs"], "embed": 0 * params["inputs"]["embed"]}}
    found = in_one_run(Transformer(config), other, arrays["tokens"], mask)
    assert np.abs(found[0] - arrays["logits"]).max() > 1e-2 * np.abs(arrays["logits"]).max()


def test_keys_may_become_values():
    """Gemma 4 31B: one product for both in layers without a window, which have heads of another size and number."""
    config, params, _ = golden("gemma4_large")
    assert [config.heads_of(layer) for layer in range(2)] == [(4, 8), (2, 16)]
    assert [params[f"layers_{layer}"]["attention"]["qkv"].shape for layer in range(2)] == [
        (32, 4, 3, 8),
        (32, 2, 3, 16),
    ]


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_large"])
def test_recomputed_and_looped_layers_give_the_same_gradients(name):
    """What layers lend to one another, and their inputs, reach every gradient; the scales of layers have none."""
    config, params, arrays = golden(name)
    mask = np.ones((2, LENGTH), bool)

    def loss(params, model):
        return jnp.sum(jnp.sin(in_one_run(model, params, arrays["tokens"], mask)))

    plain, again = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, Transformer(config, remat=other, scan=other))
        for other in (False, True)
    )
    jax.tree.map(lambda one, other: close(one, other, 1e-3) if np.any(one) else None, again, plain)
    still = {jax.tree_util.keystr(p) for p, x in jax.tree_util.tree_leaves_with_path(plain) if not np.any(x)}
    assert still == {f"['layers_{layer}']['scale']" for layer in range(config.layers)}


def test_tensors_that_no_layer_reads_are_left_out(tmp_path):
    """Published folders of Gemma 4 hold keys and values of layers that borrow them, and are written by layer or for all."""
    config, params, _ = golden("gemma4_text")
    tensors = load_file(GOLDEN / "gemma4_text" / "model.safetensors")
    more = {
        f"model.layers.3.self_attn.{name}.weight": np.ones(3, np.float32) for name in ("k_proj", "v_proj", "k_norm")
    }
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    found = weights.load(tmp_path, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, params)))
    by_layer = json.loads((GOLDEN / "gemma4_text" / "config.json").read_text())
    assert "per_layer_config" in by_layer and "global_head_dim" not in by_layer
    assert "global_head_dim" in to_hf(config) and from_hf(by_layer) == from_hf(to_hf(config)) == config


def test_a_pattern_of_letters_says_which_layers_have_windows():
    """EXAONE 4: those with a window rotate, others do not; without any window all do."""
    fields = {**to_hf(golden("exaone4")[0]), "num_hidden_layers": 5, "sliding_window_pattern": "LLG"}
    del fields["layer_types"]
    found = from_hf(fields)
    assert found.windows == (6, 6, None, 6, 6)
    assert [entry == NO_ROPE for entry in found.ropes] == [False, False, True, False, False]
    assert from_hf({**fields, "sliding_window_pattern": 2}).windows == (6, None, 6, None, 6)
    whole = from_hf({**fields, "sliding_window": None})
    assert whole.windows == (None,) * 5 and NO_ROPE not in whole.ropes


# ---- files ----------------------------------------------------------------------------------------------------------


@each_model
def test_files_are_written_as_they_were_read(name, tmp_path):
    config, params, _ = golden(name)
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    weights.save(tmp_path, config, params, shard_bytes=20_000)
    before = load_file(GOLDEN / name / "model.safetensors")
    after = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], np.asarray(tensor, np.float32))
    expected = jax.eval_shape(lambda: transformer.initialise(Transformer(config), jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


@each_model
def test_transformers_opens_what_is_written(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config, params, arrays = golden(name)
    weights.save(tmp_path, config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(arrays["tokens"]).long()).logits.numpy()
    close(found[0], arrays["logits"], SIZES.get(name, 1e-5))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model"])
def test_the_language_model_inside_a_wrapper(prefix, tmp_path):
    """As published (`language_model.model.`) and as transformers 5 writes it (`model.language_model.`)."""
    config, params, _ = golden("gemma3_text")
    inner = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "vision_config": {"hidden_size": 8}}))
    rename = lambda key: prefix + key if prefix.endswith(".") else prefix + key.removeprefix("model")
    tensors = {rename(k): v for k, v in load_file(GOLDEN / "gemma3_text" / "model.safetensors").items()}
    others = {"vision_tower.x.weight": np.zeros(3), "model.multi_modal_projector.y": np.zeros(2)}
    save_file({**tensors, **others}, tmp_path / "model.safetensors")
    assert from_hf(tmp_path) == config
    with pytest.warns(UserWarning, match=r"only the language model is read; 2 tensors"):
        found = weights.load(tmp_path, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, params)))


def test_without_other_parts_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        golden.__wrapped__("mistral")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, ["text_config", "Gemma3ForConditionalGeneration", "object"]),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "t5"}},
            ["(text_config)", "'t5'", "not supported", "phi3"],
        ),
        (
            {"model_type": "mamba"},
            ["'mamba'", "not supported", "gemma3_text (Gemma3ForCausalLM)", "mistral", "smollm3"],
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            ["use_bidirectional_attention", "left to right"],
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ["no_rope_layers", "2 entries"]),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, ["no_rope_layers", "0 or 1"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}}, ["short_factor", "4 positive"]),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, ["partial_rotary_factor", "found 12"]),
        ({"model_type": "gemma4_text", "enable_moe_block": True}, ["enable_moe_block", "26B-A4B"]),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 2}, ["num_kv_shared_layers", "2 leaves no layer"]),
        (
            {"model_type": "gemma4_text", "vocab_size_per_layer_input": 9},
            ["vocab_size_per_layer_input", "'vocab_size'"],
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"0": {"head_dim": 4}}},
            ["per_layer_config", "'num_key_value_heads'"],
        ),
        ({"model_type": "exaone4", "sliding_window_pattern": "LX"}, ["sliding_window_pattern", "L and G", "'LX'"]),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, ["final_logit_softcapping", "positive"]),
    ],
)
def test_refused_configurations(change, words):
    minimal = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    with pytest.raises(ModelError) as error:
        from_hf({**minimal, **rest, **change})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# ---- another family ---------------------------------------------------------------------------------------------------


def test_a_row_of_facts_adds_a_family(monkeypatch, tmp_path):
    """Norms on both sides, normalised heads and windows under another name: no code but the row."""
    row = Family("NewcomerForCausalLM", kinds=layer_kinds.full_every(2), window=6, qk_norm="head", norms="both")
    monkeypatch.setitem(families.FAMILIES, "newcomer", row)
    inner = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    inner |= {"model_type": "newcomer", "architectures": ["NewcomerForCausalLM"], "head_dim": 12}
    inner |= {"hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    config = from_hf(inner)
    assert configs.FAMILIES is families.FAMILIES and config.norms == "both" and config.windows == (6, None, 6)
    model = Transformer(config)
    params = jax.jit(transformer.initialise, static_argnums=0)(model, jax.random.key(0))
    weights.save(tmp_path, config, params)
    again = weights.load(tmp_path, from_hf(tmp_path))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    tokens = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, 0)
    mask = np.ones((2, LENGTH), bool)
    close(decoded(model, params, tokens, mask), in_one_run(model, params, tokens, mask)[:, PREFIX:])
