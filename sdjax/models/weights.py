"""Weights of a decoder in files: safetensors as the transformers library names them, and parameters as one table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdjax.models.configs import ModelConfig, to_hf
from sdjax.models.fields import ModelError

# ---- the table ----------------------------------------------------------------------------------------------------

# One row per tensor in a file: our path, its name in transformers, its name in GGUF, and how its axes lie.
# `D` width, `K` key-value heads, `G` query heads per key-value head, `H` head width, `F` MLP width, `V` vocabulary.
# "KGH,D -> DKGH": the file holds a matrix [K*G*H, D], we hold [D, K, G, H].  Tensors that share one of our arrays
# stand behind one another, in the table's order, along the axis that is marked with a dot: here "DK.GH".
_MODEL = """
embed                           model.embed_tokens                       token_embd          V,D   -> VD
final_norm/scale                model.norm                               output_norm         D     -> D
"""
_HEAD = """
head                            lm_head                                  output              V,D   -> VD
"""
_BLOCK = """
layers_#/attention/qkv          model.layers.#.self_attn.q_proj          blk.#.attn_q        KGH,D -> DK.GH
layers_#/attention/qkv          model.layers.#.self_attn.k_proj          blk.#.attn_k        K1H,D -> DK.1H
layers_#/attention/qkv          model.layers.#.self_attn.v_proj          blk.#.attn_v        K1H,D -> DK.1H
layers_#/attention/out          model.layers.#.self_attn.o_proj          blk.#.attn_output   D,KGH -> KGHD
layers_#/mlp/gate_up            model.layers.#.mlp.gate_proj             blk.#.ffn_gate      1F,D  -> D.1F
layers_#/mlp/gate_up            model.layers.#.mlp.up_proj               blk.#.ffn_up        1F,D  -> D.1F
layers_#/mlp/down               model.layers.#.mlp.down_proj             blk.#.ffn_down      D,F   -> FD
"""
_QKV_BIAS = """
layers_#/attention/qkv_bias     model.layers.#.self_attn.q_proj.bias     -                   KGH   -> K.GH
layers_#/attention/qkv_bias     model.layers.#.self_attn.k_proj.bias     -                   K1H   -> K.1H
layers_#/attention/qkv_bias     model.layers.#.self_attn.v_proj.bias     -                   K1H   -> K.1H
"""
_QK_NORM = {
    "none": "",
    "head": """
layers_#/attention/q_norm/scale model.layers.#.self_attn.q_norm          -                   H     -> H
layers_#/attention/k_norm/scale model.layers.#.self_attn.k_norm          -                   H     -> H
""",
    "flat": """
layers_#/attention/q_norm/scale model.layers.#.self_attn.q_norm          -                   Q     -> Q
layers_#/attention/k_norm/scale model.layers.#.self_attn.k_norm          -                   P     -> P
""",
}
_PRE_NORM = """
layers_#/attention_norm/scale   model.layers.#.input_layernorm           blk.#.attn_norm     D     -> D
layers_#/mlp_norm/scale         model.layers.#.post_attention_layernorm  blk.#.ffn_norm      D     -> D
"""
_POST_NORM = """
layers_#/attention_norm/scale   model.layers.#.post_attention_layernorm  -                   D     -> D
layers_#/mlp_norm/scale         model.layers.#.post_feedforward_layernorm -                  D     -> D
"""


class Place(NamedTuple):
    """Where one tensor of a file lies in our parameters, for one configuration."""

    path: str
    name: str  # in transformers
    gguf: str
    shape: tuple[int, ...]  # in the file
    view: tuple[int, ...]  # the file's shape with every axis apart
    axes: tuple[int, ...]  # of the view, in our order
    axis: int  # ours, along which it shares the array
    start: int

    @property
    def ours(self) -> tuple[int, ...]:
        """The shape of the part of our array that this tensor fills."""
        return tuple(self.view[axis] for axis in self.axes)

    def part(self, array: np.ndarray) -> np.ndarray:
        """This tensor's part of our array: a view."""
        return array[(slice(None),) * self.axis + (slice(self.start, self.start + self.ours[self.axis]),)]

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The file's tensor in our order of axes."""
        return stored.reshape(self.view).transpose(self.axes)

    def written(self, array: np.ndarray) -> np.ndarray:
        """The file's tensor, from our whole array."""
        return np.ascontiguousarray(self.part(array).transpose(np.argsort(self.axes)).reshape(self.shape))


def layout(config: ModelConfig) -> list[Place]:
    """Every tensor of a file with this configuration, and where it lies in our parameters."""
    table = _MODEL + ("" if config.tied_embeddings else _HEAD)
    block = _BLOCK + (_QKV_BIAS if config.qkv_bias else "") + _QK_NORM[config.qk_norm]
    block += _POST_NORM if config.post_norm else _PRE_NORM
    table += "".join(block.replace("#", str(layer)) for layer in range(config.layers))
    places, ends = [], {}
    for row in table.split("\n"):
        if row:
            places.append(_place(config, row, ends))
    return places


def _place(config: ModelConfig, row: str, ends: dict[str, int]) -> Place:
    path, name, gguf, stored, _, ours = row.split()
    sizes = {"D": config.width, "K": config.kv_heads, "G": config.heads // config.kv_heads, "H": config.head_dim}
    sizes |= {"F": config.mlp_width, "V": config.vocab_size, "1": 1}
    sizes |= {"Q": config.heads * config.head_dim, "P": config.kv_heads * config.head_dim}
    letters = stored.replace(",", "")
    start, axis = ends.get(path, 0), max(ours.find("."), 0)
    ends[path] = start + sizes[ours.replace(".", "")[axis]]
    return Place(
        path=path,
        name=name if name.endswith(".bias") else f"{name}.weight",
        gguf=f"{gguf}.weight",
        shape=tuple(math.prod(sizes[letter] for letter in group) for group in stored.split(",")),
        view=tuple(sizes[letter] for letter in letters),
        axes=tuple(letters.index(letter) for letter in ours.replace(".", "")),
        axis=axis,
        start=start,
    )


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every one of our parameters, by path: "layers_0/attention/qkv"."""
    result: dict[str, tuple[int, ...]] = {}
    for place in layout(config):  # the last tensor of an array ends where the array ends
        end = place.start + place.ours[place.axis]
        result[place.path] = (*place.ours[: place.axis], end, *place.ours[place.axis + 1 :])
    return result


# ---- reading ------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """One tensor of a file: where it is, what it is, and how to read it."""

    file: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


_FLOATS = ("F64", "F32", "F16", "BF16")


def load(folder: str | os.PathLike, config: ModelConfig) -> dict:
    """Parameters from the safetensors of a folder of the transformers library, in one file or in shards.

    Tensors are read one at a time, whatever their float type, into float32 numpy arrays: they stay on the host until
    somebody places them on devices.

    Raises: ModelError for a file that is absent or damaged, and once for all tensors that are missing, not expected or
    of another shape or type than the configuration says.
    """
    folder = Path(folder)
    files = _safetensors_files(folder)
    stored = {}
    for path in files:
        stored |= _open_safetensors(path)
    if config.tied_embeddings:
        stored.pop("lm_head.weight", None)  # some checkpoints repeat the embeddings here
    where = str(files[0]) if len(files) == 1 else str(folder)
    return fill(config, stored, lambda place: place.name, where)


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"there is neither {single.name} nor {index.name} in {folder}")
    try:
        shards = sorted(
            {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read the list of shards in {index}: {error!r}") from error
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ModelError(f"{index} names {', '.join(absent)}, which {folder} does not hold")
    return shards


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, "numpy")
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        # `file` is memory-mapped and stays open as long as one of these readers lives.
        return {
            name: Stored(path.name, tuple(part.get_shape()), part.get_dtype(), lambda name=name: file.get_tensor(name))
            for name, part in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def fill(config: ModelConfig, stored: Mapping[str, Stored], named: Callable[[Place], str], where: str) -> dict:
    """Our parameters from the tensors of a file, after checking all of them."""
    places = layout(config)
    problems = list(_problems({named(place): place for place in places}, stored))
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError(
            f"{where} does not hold the {config.family} model of its configuration:\n  " + "\n  ".join(shown)
        )
    arrays = {path: np.empty(shape, np.float32) for path, shape in shapes(config).items()}
    for place in places:
        place.part(arrays[place.path])[...] = place.read(stored[named(place)].read())
    return unflatten_dict(arrays, sep="/")


def _problems(places: Mapping[str, Place], stored: Mapping[str, Stored]) -> Iterator[str]:
    for name, place in places.items():
        if name not in stored:
            yield f"{name} {list(place.shape)} is missing"
            continue
        found = stored[name]
        if found.shape != place.shape:
            yield f"{name} in {found.file} has shape {list(found.shape)}, expected {list(place.shape)}"
        if found.kind not in _FLOATS:
            yield f"{name} in {found.file} has type {found.kind}, expected one of {', '.join(_FLOATS)}"
    for name in sorted(stored.keys() - places.keys()):
        if not name.endswith(".rotary_emb.inv_freq"):  # old checkpoints keep what follows from config.json
            yield f"{name} in {stored[name].file} {list(stored[name].shape)} is not expected"


# ---- writing ------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    shard_bytes: int = 5_000_000_000,
    **fields: Any,
) -> None:
    """Writes config.json and float32 safetensors that the transformers library opens, replacing those in the folder.

    Args:
      shard_bytes: above this, the weights are split over several files; host memory needed is one file's.
      fields: further fields of config.json (`eos_token_id=2`).

    Raises: ModelError if the parameters do not fit the configuration, or the folder cannot be written.
    """
    folder = Path(folder)
    written = to_hf(config) | fields
    _check_params(config, params)
    shards = _shards(layout(config), shard_bytes)
    names = _shard_names(len(shards))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, places in zip(names, shards, strict=True):
            _write_shard(folder / name, places, params)
        # Files of an earlier save under other names would be read instead of these, or beside them.
        for old in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"]:
            if old.name not in names:
                old.unlink(missing_ok=True)
        _write_index(folder / "model.safetensors.index.json", names, shards)
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the model to {folder}: {getattr(error, 'strerror', None) or error}") from error


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    expected = shapes(config)
    found = {path: tuple(np.shape(array)) for path, array in flatten_dict(dict(params), sep="/").items()}
    problems = [
        f"{path}: found {list(found[path]) if path in found else 'nothing'}, "
        f"expected {list(expected[path]) if path in expected else 'nothing'}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]
    if problems:
        raise ModelError("the parameters do not fit the configuration:\n  " + "\n  ".join(problems[:20]))


def _shards(places: list[Place], limit: int) -> list[list[Place]]:
    """Consecutive tensors in groups of at most `limit` bytes (or one tensor)."""
    groups, size = [[]], 0
    for place in places:
        size += 4 * math.prod(place.shape)
        if groups[-1] and size > limit:
            groups.append([])
            size = 4 * math.prod(place.shape)
        groups[-1].append(place)
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, places: list[Place], params: Mapping[str, Any]) -> None:
    arrays = flatten_dict(dict(params), sep="/")
    tensors, ours = {}, {}
    for place in places:
        if place.path not in ours:  # one array is fetched from the devices at a time
            ours = {place.path: np.asarray(arrays[place.path], np.float32)}
        tensors[place.name] = place.written(ours[place.path])
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _write_index(path: Path, names: list[str], shards: list[list[Place]]) -> None:
    if len(shards) == 1:
        path.unlink(missing_ok=True)
        return
    weight_map = {place.name: name for name, places in zip(names, shards, strict=True) for place in places}
    total = sum(4 * math.prod(place.shape) for places in shards for place in places)
    path.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8"
    )
