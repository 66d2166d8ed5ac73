"""What a model's files say beside its weights survives a round: where turns end, types, heads, and an adapter's base."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sdjax.engine.policies import Policy
from sdjax.models import adapters, pretrained
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_files
from sdjax.models.pretrained import Origin
from sdjax.models.templates import stop_tokens
from sdjax.models.transformer import Transformer

TURNS = "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}<|start|>assistant "
ORIGINAL = {"eos_token_id": [0, 3], "temperature": 0.6, "top_p": 0.95, "do_sample": True}


@functools.cache
def byte_tokenizer(template=TURNS, special=("<|endoftext|>", "<|start|>", "<|other|>", "<|end|>")):
    """Bytes, and these special tokens before them; the first is the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate((*special, *alphabet))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = {"eos_token": special[0], "additional_special_tokens": list(special[1:])}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **own)


def folder(path, **files):
    """A model folder of this repository's tiny model, with these JSON files changed; `None` removes one."""
    pretrained.save(path, *tiny.pretrained())
    for name, fields in files.items():
        file = path / f"{name}.json"
        if fields is None:
            file.unlink()
        else:
            old = json.loads(file.read_text()) if name == "config" else {}
            file.write_text(json.dumps({**old, **fields}))
    return path


def written(path):
    return json.loads((path / "generation_config.json").read_text())


# ---- where a turn ends ----------------------------------------------------------------------------------------------


def test_a_turn_ends_where_the_tokenizer_or_the_generation_configuration_says():
    tokenizer = byte_tokenizer()
    assert stop_tokens(tokenizer) == (0, 3)  # the end token, and what the template writes after an answer
    assert stop_tokens(tokenizer, {"eos_token_id": 2}) == (0, 2, 3)
    assert stop_tokens(tokenizer, {"eos_token_id": [0, 2]}) == (0, 2)  # a list says which tokens end a turn
    assert stop_tokens(byte_tokenizer(None)) == (0,)
    assert stop_tokens(byte_tokenizer("{{ raise_exception('no') }}")) == (0,)
    assert stop_tokens(byte_tokenizer(TURNS.replace("<|end|>", "\n"))) == (0, 1)


def test_a_loaded_policy_stops_at_every_listed_token(tmp_path):
    model = pretrained.load(folder(tmp_path / "model", generation_config=ORIGINAL))
    assert model.origin.generation == ORIGINAL
    policy = Policy(Transformer(model.config), model.params, model.tokenizer, tiny.SHAPES, origin=model.origin)
    assert {0, 3} <= set(policy.stop) and model.tokenizer.eos_token_id in policy.stop


@pytest.mark.parametrize("ids", ["2", [1, "2"], -1, [[1]], True, 1.5])
def test_ends_that_are_no_ids_are_refused(tmp_path, ids):
    with pytest.raises(ModelError, match="generation_config.json: 'eos_token_id' must be a token id or a list of them"):
        pretrained.load(folder(tmp_path / "model", generation_config={"eos_token_id": ids}))


# ---- what is written again ------------------------------------------------------------------------------------------


def test_the_generation_configuration_is_kept(tmp_path):
    model = pretrained.load(folder(tmp_path / "model", generation_config=ORIGINAL))
    pretrained.save(tmp_path / "again", *model)
    assert ORIGINAL.items() <= written(tmp_path / "again").items()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [0, 3]
    found = GenerationConfig.from_pretrained(tmp_path / "again")
    assert found.eos_token_id == [0, 3] and found.temperature == 0.6 and found.top_p == 0.95


def test_without_one_a_served_model_stops_where_training_stopped(tmp_path):
    model = pretrained.load(folder(tmp_path / "model", generation_config=None))
    tokenizer = byte_tokenizer()
    config = model.config.__class__(**{**vars(model.config), "vocab_size": 300})
    grown = {
        n: np.zeros((300, x.shape[1]), np.float32) if n in ("embed", "head") else x for n, x in model.params.items()
    }
    pretrained.save(tmp_path / "again", config, grown, tokenizer)
    assert written(tmp_path / "again")["eos_token_id"] == [0, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_keep_the_type_that_they_were_loaded_in(tmp_path, dtype):
    pretrained.save(tmp_path / "model", *tiny.pretrained(), dtype=dtype)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype
    model = pretrained.load(tmp_path / "model")
    assert model.origin.dtype == dtype and model.params["embed"].dtype == np.float32
    pretrained.save(tmp_path / "again", *model)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert {x.dtype for x in again.values()} == {np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    pretrained.save(tmp_path / "wide", *model, dtype="float32")
    assert {x.dtype for x in load_file(tmp_path / "wide" / "model.safetensors").values()} == {np.dtype(np.float32)}


def test_numbers_that_the_type_cannot_hold_are_refused(tmp_path):
    model = tiny.pretrained()
    large = {**model.params, "embed": np.full_like(model.params["embed"], 1e6)}
    with pytest.raises(ModelError, match="embed_tokens.weight has numbers that float16 cannot hold"):
        pretrained.save(tmp_path / "model", *model._replace(params=large), dtype="float16")
    pretrained.save(tmp_path / "model", *model._replace(params=large), dtype="bfloat16")


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_a_head_that_differs_from_tied_embeddings_is_refused_and_a_copy_is_not(tmp_path):
    path = folder(tmp_path / "model", config={"tie_word_embeddings": True})
    with pytest.raises(
        ModelError, match="lm_head.weight differs from the embeddings: set 'tie_word_embeddings' to false"
    ):
        pretrained.load(path)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, path / "model.safetensors")
    assert "head" not in pretrained.load(path).params
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][1:]}, path / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head.weight differs"):
        pretrained.load(path)


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_names_its_base(tmp_path):
    model, lora = tiny.pretrained(), adapters.Lora(rank=2)
    first = adapters.initial(model.config, lora, jax.random.key(0))
    peft_files.save(tmp_path, model.config, first, lora, "owner/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"


def test_models_know_what_they_were_loaded_by(tmp_path):
    assert pretrained.load(folder(tmp_path / "model")).origin.name == str((tmp_path / "model").resolve())
    assert Origin().name is None and pretrained.EMBEDDED_NAME.count("/") == 1
