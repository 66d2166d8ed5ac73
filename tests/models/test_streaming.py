"""Weights are read from files part by part, where they are wanted, and written file by file; what is wrong is said first."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from sdjax.devices import sharding
from sdjax.models import pretrained
from sdjax.models.adapters import Lora, fingerprint
from sdjax.models.fields import ModelError
from sdjax.models.files import safetensors_files, unread, weights
from sdjax.models.files.layout import layout


@pytest.fixture
def folder(tmp_path):
    """The tiny model in several shards."""
    weights.save(tmp_path / "m", tiny.config(), tiny.pretrained().params, shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    return tmp_path / "m"


def flat(tree):
    return {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_any_part_of_a_parameter_is_read_as_if_it_were_cut_from_the_whole(folder, monkeypatch):
    monkeypatch.setattr(unread, "BLOCK", 600)  # several blocks to a tensor
    monkeypatch.setattr(safetensors_files, "MAPPED", 1000)  # files are mapped anew
    wanted, found = flat(tiny.pretrained().params), flat(weights.opened(folder, tiny.config())[0])
    draw = np.random.default_rng(0)
    assert wanted.keys() == found.keys()
    for path, whole in wanted.items():
        whole = np.asarray(whole)
        assert (found[path].shape, found[path].size, found[path].nbytes) == (whole.shape, whole.size, whole.nbytes)
        np.testing.assert_array_equal(np.asarray(found[path]), whole)
        for _ in range(6):
            ends = [np.sort(draw.choice(size + 1, 2, replace=False)) for size in whole.shape]
            part = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(found[path][part], whole[part], err_msg=f"{path} {part}")
        half = found[path].astype(jnp.bfloat16)
        np.testing.assert_array_equal(half[...], whole.astype(jnp.bfloat16))


def test_a_device_reads_its_own_part_and_no_more(folder, monkeypatch):
    read = []
    part = safetensors_files.File.part

    def counted(self, name, index):
        found = part(self, name, index)
        read.append((name, found.size))
        return found

    monkeypatch.setattr(safetensors_files.File, "part", counted)
    qkv = weights.opened(folder, tiny.config())[0]["layers_0"]["attention"]["qkv"]
    assert not read  # headers alone
    qkv[:, :1]  # one of two groups of heads: half of each of three tensors
    sizes = {p.name: np.prod(p.shape) for p in layout(tiny.config()) if p.path == "layers_0/attention/qkv"}
    assert dict(read) == {name: size // 2 for name, size in sizes.items()}


def test_opened_models_are_placed_like_loaded_ones(folder):
    tree = weights.opened(folder, tiny.config())[0]
    jax.tree.map(np.testing.assert_array_equal, sharding.place_parameters(tree), weights.load(folder, tiny.config()))
    own = sharding.own_parameters(weights.load(folder, tiny.config()))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(own))
    assert fingerprint(tree, Lora()) == fingerprint(weights.load(folder, tiny.config()), Lora())


def test_an_opened_model_knows_the_type_it_is_kept_in(tmp_path):
    pretrained.save(tmp_path / "m", *tiny.pretrained(), dtype="bfloat16")
    model = pretrained.opened(tmp_path / "m")
    assert model.origin.dtype == "bfloat16"
    kept = pretrained.kept_in(model.params, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(sharding.place_parameters(kept))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(sharding.place_parameters(model.params))} == {jnp.dtype(jnp.float32)}


# ---- what is wrong is said before anything is read ------------------------------------------------------------------


def stale(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = max(index["weight_map"].values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def absent(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def eighths(folder):
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].astype(jnp.float8_e4m3fn)}, path)


def reshaped(folder):
    path = min(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name][:-1]}, path)


@pytest.mark.parametrize(
    "harm, words",
    [
        (stale, r"index\.json says that model\.norm\.weight is in model-.*which does not hold it"),
        (absent, r"index\.json names model-00002-of-\d+\.safetensors, which .* does not hold"),
        (cut, r"model-00002-of-\d+\.safetensors is not a readable safetensors file"),
        (eighths, r"\S+ in model-00001-of-\d+\.safetensors has type F8_E4M3, expected one of F64, F32, F16, BF16"),
        (reshaped, r"\S+ in model-00001-of-\d+\.safetensors has shape \[.*\], expected \["),
    ],
)
def test_a_folder_that_is_wrong_is_refused_before_it_is_read(folder, monkeypatch, harm, words):
    harm(folder)
    monkeypatch.setattr(safetensors_files.File, "part", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelError, match=words):
        weights.opened(folder, tiny.config())
