"""Weights of a decoder in files: safetensors as the transformers library names them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sdjax.devices import processes
from sdjax.devices.sharding import to_host
from sdjax.models.adapters import is_adapted
from sdjax.models.configs import ModelConfig, to_hf
from sdjax.models.fields import ModelError
from sdjax.models.files.joined_experts import apart
from sdjax.models.files.layout import Place, layout, never_read, shapes, stored_shapes
from sdjax.models.files.mxfp4 import unpacked
from sdjax.models.files.safetensors_files import FLOATS, INDEX, SINGLE, Stored, common_dtype, open_folder
from sdjax.models.files.unread import Unread
from sdjax.models.wrapped import text_tensors

# ---- reading ------------------------------------------------------------------------------------------------------


def opened(folder: str | os.PathLike, config: ModelConfig) -> tuple[dict, str]:
    """Parameters in the safetensors of a folder of the transformers library, not read yet, and the type of most of them.

    Every tensor of the files is checked by its header.  The leaves (`sdjax.models.files.unread.Unread`) are read in float32 or,
    after `astype`, in another type, where they are placed on devices: each process reads what its devices hold.

    Raises: ModelError for a file that is absent or damaged, and once for all tensors that are missing, not expected or
    of another shape or type than the configuration says.
    """
    stored, where = open_folder(Path(folder))
    stored = apart(unpacked(text_tensors(stored, where)), {place.name for place in layout(config)})
    stored = {name: tensor for name, tensor in stored.items() if name not in never_read(config)}
    if config.tied_embeddings and "lm_head.weight" in stored:
        _check_tied(stored, where)
        stored.pop("lm_head.weight")
    return unread(config, stored, lambda place: place.name, where), common_dtype(stored.values())


def load(folder: str | os.PathLike, config: ModelConfig) -> dict:
    """`opened`, read whole into float32 numpy arrays on the host."""
    return jax.tree.map(np.asarray, opened(folder, config)[0])


def _check_tied(stored: Mapping[str, Stored], where: str) -> None:
    """Some checkpoints repeat the embeddings as the head.  Another head was trained, and must not be dropped."""
    head, embed = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
    if embed is None:
        return
    starts = range(0, head.shape[0], TIED_ROWS)
    blocks = [slice(row, min(row + TIED_ROWS, head.shape[0])) for row in starts]
    if head.shape != embed.shape or not all(np.array_equal(head.read(some), embed.read(some)) for some in blocks):
        raise ModelError(
            f"{where}: config.json says 'tie_word_embeddings', but lm_head.weight differs from the embeddings: set "
            "'tie_word_embeddings' to false in config.json to use that head"
        )


TIED_ROWS = 4096
"""Rows of a head that are compared with the embeddings' at a time."""


def unread(config: ModelConfig, stored: Mapping[str, Stored], named: Callable[[Place], str], where: str) -> dict:
    """Our parameters in the tensors of a file, after checking all of them; none is read."""
    places = layout(config)
    problems = list(_problems(stored_shapes(places, named), stored))
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError(
            f"{where} does not hold the {config.family} model of its configuration:\n  " + "\n  ".join(shown)
        )
    pieces: dict[str, list[tuple[Place, Stored]]] = {}
    for place in places:
        pieces.setdefault(place.path, []).append((place, stored[named(place)]))
    found = {path: Unread(shape, tuple(pieces[path])) for path, shape in shapes(config).items()}
    return unflatten_dict(found, sep="/")


def _problems(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> Iterator[str]:
    for name, shape in wanted.items():
        if name not in stored:
            yield f"{name} {list(shape)} is missing"
            continue
        found = stored[name]
        if found.shape != shape:
            yield f"{name} in {found.file} has shape {list(found.shape)}, expected {list(shape)}"
        if found.kind not in FLOATS:
            yield f"{name} in {found.file} has type {found.kind}, expected one of {', '.join(FLOATS)}"
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

    Every process of a run must call it: arrays are gathered from the devices one at a time, adapters added into their
    weights, and the first process writes.

    Args:
      shard_bytes: above this, the weights are split over several files; host memory needed is one file's and one array.
      fields: further fields of config.json (`eos_token_id=2`).

    Raises: ModelError if the parameters do not fit the configuration or the type, or the folder cannot be written.
    """
    folder, kind = Path(folder), jnp.dtype(dtype)
    written = to_hf(config) | {"dtype": dtype} | fields
    _check_params(config, params)
    shards = _shards(layout(config), shard_bytes // kind.itemsize)
    names = _shard_names(len(shards))
    arrays = flatten_dict(dict(params), sep="/")
    try:
        processes.by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        for name, places in zip(names, shards, strict=True):
            tensors, lost = _tensors(places, arrays, kind)
            processes.by_first(lambda name=name, some=tensors, lost=lost: _write_shard(folder / name, some, lost))
        processes.by_first(lambda: _finish(folder, names, shards, kind.itemsize, written))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the model to {folder}: {getattr(error, 'strerror', None) or error}") from error


def _finish(folder: Path, names: list[str], shards: list[list[Place]], itemsize: int, config: dict[str, Any]) -> None:
    # Files of an earlier save under other names would be read instead of these, or beside them.
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    _write_index(folder / INDEX, names, shards, itemsize)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    expected = shapes(config)
    size = lambda array: tuple(array.weight.shape if is_adapted(array) else np.shape(array))
    found = {path: size(array) for path, array in flatten_dict(dict(params), sep="/").items()}
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


def _tensors(places: list[Place], arrays: Mapping[str, Any], kind: np.dtype) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of one file, and those that `kind` cannot hold, on the first process; others help to gather them."""
    tensors, lost, ours = {}, [], {}
    for place in places:
        if place.path not in ours:  # one array is fetched from the devices at a time
            array = arrays[place.path]
            whole = to_host(array.folded() if is_adapted(array) else array)
            ours = {place.path: np.asarray(whole, np.float32) if processes.first() else None}
        if processes.first():
            exact = place.written(ours[place.path])
            with np.errstate(over="ignore"):
                part = exact.astype(kind, copy=False)
            if kind == np.float16 and not np.array_equal(np.isfinite(part), np.isfinite(exact)):
                lost.append(place.name)
            tensors[place.name] = np.concatenate([tensors[place.name], part]) if place.row else part
    return tensors, lost


def _write_shard(path: Path, tensors: dict[str, np.ndarray], lost: list[str]) -> None:
    if lost:
        raise ModelError(
            f"{lost[0]} has numbers that float16 cannot hold: export with --export-dtype bfloat16 or float32"
        )
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _write_index(path: Path, names: list[str], shards: list[list[Place]], itemsize: int) -> None:
    if len(shards) == 1:
        path.unlink(missing_ok=True)
        return
    weight_map = {place.name: name for name, places in zip(names, shards, strict=True) for place in places}
    total = sum(itemsize * math.prod(place.shape) for places in shards for place in places)
    path.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8"
    )
