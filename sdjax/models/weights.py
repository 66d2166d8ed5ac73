"""Weights of a decoder in files: safetensors as the transformers library names them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdjax.models.configs import ModelConfig, to_hf
from sdjax.models.fields import ModelError
from sdjax.models.layout import Place, layout, shapes, stored_shapes
from sdjax.models.wrapped import text_tensors

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
    where = str(files[0]) if len(files) == 1 else str(folder)
    stored = text_tensors(stored, where)
    if config.tied_embeddings and "lm_head.weight" in stored:
        _check_tied(stored, where)
        stored.pop("lm_head.weight")
    return fill(config, stored, lambda place: place.name, where)


def _check_tied(stored: Mapping[str, Stored], where: str) -> None:
    """Some checkpoints repeat the embeddings as the head.  Another head was trained, and must not be dropped."""
    head, embed = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
    if embed is not None and (head.shape != embed.shape or not np.array_equal(head.read(), embed.read())):
        raise ModelError(
            f"{where}: config.json says 'tie_word_embeddings', but lm_head.weight differs from the embeddings: set "
            "'tie_word_embeddings' to false in config.json to use that head"
        )


def stored_dtype(folder: str | os.PathLike) -> str:
    """The type of most of the numbers in a folder's safetensors, as config.json names it."""
    count: dict[str, int] = {}
    for path in _safetensors_files(Path(folder)):
        for tensor in _open_safetensors(path).values():
            count[tensor.kind] = count.get(tensor.kind, 0) + math.prod(tensor.shape)
    return {"BF16": "bfloat16", "F16": "float16"}.get(max(count, key=count.get, default=""), "float32")


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
    problems = list(_problems(stored_shapes(places, named), stored))
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError(
            f"{where} does not hold the {config.family} model of its configuration:\n  " + "\n  ".join(shown)
        )
    arrays = {path: np.empty(shape, np.float32) for path, shape in shapes(config).items()}
    for place in places:
        place.part(arrays[place.path])[...] = place.read(
            stored[named(place)].read()[place.row : place.row + place.shape[0]]
        )
    return unflatten_dict(arrays, sep="/")


def _problems(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> Iterator[str]:
    for name, shape in wanted.items():
        if name not in stored:
            yield f"{name} {list(shape)} is missing"
            continue
        found = stored[name]
        if found.shape != shape:
            yield f"{name} in {found.file} has shape {list(found.shape)}, expected {list(shape)}"
        if found.kind not in _FLOATS:
            yield f"{name} in {found.file} has type {found.kind}, expected one of {', '.join(_FLOATS)}"
    for name in sorted(stored.keys() - wanted.keys()):
        if not name.endswith(".rotary_emb.inv_freq"):  # old checkpoints keep what follows from config.json
            yield f"{name} in {stored[name].file} {list(stored[name].shape)} is not expected"


# ---- writing ------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    shard_bytes: int = 5_000_000_000,
    dtype: str = "float32",
    **fields: Any,
) -> None:
    """Writes config.json and safetensors of one `dtype` (float32, bfloat16 or float16) that the transformers library opens, replacing those in the folder.

    Args:
      shard_bytes: above this, the weights are split over several files; host memory needed is one file's.
      fields: further fields of config.json (`eos_token_id=2`).

    Raises: ModelError if the parameters do not fit the configuration or the type, or the folder cannot be written.
    """
    folder, kind = Path(folder), jnp.dtype(dtype)
    written = to_hf(config) | {"dtype": dtype} | fields
    _check_params(config, params)
    shards = _shards(layout(config), shard_bytes // kind.itemsize)
    names = _shard_names(len(shards))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, places in zip(names, shards, strict=True):
            _write_shard(folder / name, places, params, kind)
        # Files of an earlier save under other names would be read instead of these, or beside them.
        for old in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"]:
            if old.name not in names:
                old.unlink(missing_ok=True)
        _write_index(folder / "model.safetensors.index.json", names, shards, kind.itemsize)
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
    """Consecutive tensors in groups of at most `limit` numbers (or one tensor)."""
    groups, size = [[]], 0
    for place in places:
        size += math.prod(place.shape)
        if groups[-1] and size > limit and not place.row:  # parts of one tensor stay together
            groups.append([])
            size = math.prod(place.shape)
        groups[-1].append(place)
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, places: list[Place], params: Mapping[str, Any], kind: np.dtype) -> None:
    arrays = flatten_dict(dict(params), sep="/")
    tensors, ours = {}, {}
    for place in places:
        if place.path not in ours:  # one array is fetched from the devices at a time
            ours = {place.path: np.asarray(arrays[place.path], np.float32)}
        part = _converted(place.written(ours[place.path]), kind, place.name)
        tensors[place.name] = np.concatenate([tensors[place.name], part]) if place.row else part
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _converted(tensor: np.ndarray, kind: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = tensor.astype(kind, copy=False)
    if kind == np.float16 and not np.array_equal(np.isfinite(found), np.isfinite(tensor)):
        raise ModelError(f"{name} has numbers that float16 cannot hold: export with --export-dtype bfloat16 or float32")
    return found


def _write_index(path: Path, names: list[str], shards: list[list[Place]], itemsize: int) -> None:
    if len(shards) == 1:
        path.unlink(missing_ok=True)
        return
    weight_map = {place.name: name for name, places in zip(names, shards, strict=True) for place in places}
    total = sum(itemsize * math.prod(place.shape) for places in shards for place in places)
    path.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8"
    )
