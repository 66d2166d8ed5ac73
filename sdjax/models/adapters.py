"""Low-rank adapters (LoRA) on frozen weights, which may be quantised (QLoRA): `x W + scale (x A^T) B^T`.

Adapters are parameters of their own, one pair of matrices per matrix of the transformers library, in its orientation
(`a [r, in]`, `b [out, r]`): `{"lora": {"layers_0": {"q_proj": {"a": ..., "b": ...}, ...}, ...}}`.  They are what is
trained, saved and averaged; `Base.with_adapters` puts them beside the frozen weights for the forward pass.  Before any
training `b` is 0: a frozen copy of the first adapters is the network without them.

Source: Hu et al. 2022 (LoRA), arXiv:2106.09685; Dettmers et al. 2023 (QLoRA, NF4), arXiv:2305.14314.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from sdjax.devices.sharding import place_parameters
from sdjax.models import expert_adapters
from sdjax.models.configs import ModelConfig
from sdjax.models.expert_adapters import AdaptedExperts
from sdjax.models.fields import ModelError
from sdjax.models.files.layout import Place, layout, stored_shapes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
TARGETS += ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj")
"""Every matrix of a block, by its name in the transformers library; a family has some of them.  Those of experts are apart."""

BASE = "lora/base"
"""The name that the frozen weights go by among the parameters of other policies."""

BLOCK = 64
"""Inputs that share a scale in NF4, as in QLoRA; int8 has one scale per output."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters to train: `scale = alpha / rank` (`alpha` is twice the rank if `None`), on `targets` of every block.

    Experts have none unless they are named, too: `TARGETS + expert_adapters.TARGETS`.  `base` is how the matrices of the
    blocks are kept: as they are, or quantised by qwix to int8 or NF4 (embeddings, norms, biases, head and experts are never
    quantised).

    Raises: ModelError for a rank below 1 or a target that does not exist.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    base: Literal["float", "int8", "nf4"] = "float"

    def __post_init__(self):
        if self.rank < 1:
            raise ModelError(f"rank={self.rank}: expected at least 1")
        known = TARGETS + expert_adapters.TARGETS
        wrong = [t for t in self.targets if t not in known]
        if wrong or not self.targets:
            raise ModelError(f"targets={','.join(wrong) or 'none'}: expected some of {', '.join(known)}")
        if self.base not in ("float", "int8", "nf4"):
            raise ModelError(f"base={self.base}: expected float, int8 or nf4")

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


def chosen(rank: int, base: str, experts: bool) -> Lora | None:
    """The adapters of three options of a command line; rank 0 is none.

    Raises: ModelError if they make no sense, a quantised base without adapters among it: nothing could be trained.
    """
    if rank == 0 and base != "float":
        raise ModelError(f"lora_base={base} freezes the weights: give the adapters a rank, --lora-rank 16")
    if rank == 0 and experts:
        raise ModelError("lora_experts adds to adapters: give them a rank, --lora-rank 16")
    return Lora(rank, targets=TARGETS + expert_adapters.TARGETS * experts, base=base) if rank else None


# ---- in the forward pass --------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Adapted:
    """A frozen weight `[in ..., out ...]` and what is added to it: stands in a parameter's place."""

    weight: Any  # an array, or one that qwix has quantised; the first leaf, of the parameter's shape
    parts: tuple[tuple[Array, Array] | None, ...]  # `(a [r, in], b [out, r])`, side by side along an output axis
    shapes: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)  # of the parts' outputs
    axis: int = flax.struct.field(pytree_node=False)  # of the outputs, along which they lie
    scale: float = flax.struct.field(pytree_node=False)

    def dense(self, dtype: Any) -> Array:
        """The frozen weight as an ordinary array."""
        if not hasattr(self.weight, "qvalue"):
            return self.weight.astype(dtype)
        import qwix

        return qwix.dequantize(self.weight).astype(dtype)

    def correction(self, x: Array) -> Array | float:
        """`scale (x A^T) B^T` of `x [..., in]` -> `[..., out ...]`; 0 without parts."""

        def product(part: tuple[Array, Array] | None, shape: tuple[int, ...]) -> Array:
            if part is None:
                return jnp.zeros((*x.shape[:-1], *shape), x.dtype)
            a, b = (matrix.astype(x.dtype) for matrix in part)
            return ((x @ a.T) @ b.T).reshape(*x.shape[:-1], *shape)

        found = [product(part, shape) for part, shape in zip(self.parts, self.shapes, strict=True)]
        return self.scale * jnp.concatenate(found, axis=x.ndim - 1 + self.axis) if found else 0.0

    def applied(self, x: Array, inputs: int = 1) -> Array:
        """`x [..., in ...]`, `inputs` axes of it the weight's, times weight and correction -> `[..., out ...]`."""
        x = x.reshape(*x.shape[: x.ndim - inputs], -1)

        def product(x: Array, weight: Any) -> Array:
            dense = self.replace(weight=weight).dense(x.dtype)
            out = dense.shape[inputs:]
            return (x @ dense.reshape(x.shape[-1], -1)).reshape(*x.shape[:-1], *out)

        # Of a quantised weight the backward pass keeps the few bits, not the floats made of them.
        product = jax.checkpoint(product) if hasattr(self.weight, "qvalue") else product
        return product(x, self.weight) + self.correction(x)

    def folded(self) -> Array:
        """Weight and correction as one float32 array."""
        weight = self.dense(jnp.float32)
        if not self.parts:
            return weight
        inputs = weight.ndim - len(self.shapes[0])
        each = jnp.eye(math.prod(weight.shape[:inputs]), dtype=jnp.float32)
        return weight + self.correction(each).reshape(weight.shape)


def folded(params: Any) -> Any:
    """Parameters with every adapter added into its weight, as float32: what is exported.  Others stay as they are."""
    fold = lambda x: x.folded() if is_adapted(x) else x
    return jax.tree.map(fold, params, is_leaf=is_adapted)


def is_adapted(parameter: Any) -> bool:
    """Whether a weight with something beside it stands in a parameter's place."""
    return isinstance(parameter, Adapted | AdaptedExperts)


# ---- adapters and their base ----------------------------------------------------------------------------------------


def targeted(config: ModelConfig, lora: Lora) -> list[tuple[str, str, Place]]:
    """Block, short name and place of every matrix that has an adapter, of each part where it lies in several, but those of experts."""
    short = lambda place: place.name.removesuffix(".weight").rsplit(".", 1)[-1]
    own = [p for p in layout(config) if short(p) in lora.targets and "/" in p.path and not p.of_experts]
    return [(p.path.split("/")[0], short(p), p) for p in own]


def initial(config: ModelConfig, lora: Lora, key: Array) -> dict:
    """Adapters that change nothing yet: `a` uniform within `1 / sqrt(in)`, as in the peft library, and `b` 0."""
    found: dict[str, dict] = {}
    whole = stored_shapes(layout(config))
    matrices = [(block, name, place) for block, name, place in targeted(config, lora) if not place.row]
    for number, (block, name, place) in enumerate(matrices):
        outputs, inputs = whole[place.name]
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, number), (lora.rank, inputs), jnp.float32, -bound, bound)
        found.setdefault(block, {})[name] = {"a": a, "b": jnp.zeros((outputs, lora.rank), jnp.float32)}
    for number, of in enumerate(expert_adapters.targeted(config, lora.targets), len(matrices)):
        own = expert_adapters.initial(config, of, lora.rank, jax.random.fold_in(key, number))
        found.setdefault(of.block, {})[of.name] = own
    return {"lora": found}


def is_adapters(params: Any) -> bool:
    """Whether a tree of parameters holds adapters alone."""
    return isinstance(params, Mapping) and set(params) == {"lora"}


@flax.struct.dataclass
class Base:
    """The frozen weights of a network, and where its adapters go."""

    weights: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)
    lora: Lora = flax.struct.field(pytree_node=False)

    def with_adapters(self, adapters: Mapping[str, Any]) -> dict:
        """Parameters of the whole network: frozen weights with these adapters beside them."""
        flat = flatten_dict(dict(self.weights), sep="/")
        parts: dict[str, list] = {}
        for block, name, place in targeted(self.config, self.lora):
            own, rows = adapters["lora"][block][name], slice(place.row, place.row + place.shape[0])
            parts.setdefault(place.path, []).append((place, (own["a"], own["b"][rows])))
        for path, weight in flat.items():
            if path in parts or hasattr(weight, "qvalue"):
                flat[path] = self.adapted(weight, path, parts.get(path, []))
        for of in expert_adapters.targeted(self.config, self.lora.targets):
            own = adapters["lora"][of.block][of.name]
            flat[of.path] = AdaptedExperts(flat[of.path], own["a"], own["b"], self.lora.scale)
        return unflatten_dict(flat, sep="/")

    def adapted(self, weight: Any, path: str, parts: Sequence[tuple[Place, tuple[Array, Array]]]) -> Adapted:
        """One weight with its parts, in the order in which the matrices lie in it."""
        if not parts:
            return Adapted(weight, (), (), 0, self.lora.scale)
        own = {(place.name, place.row): pair for place, pair in parts}
        together = [place for place in layout(self.config) if place.path == path]
        inputs = inputs_of(together[0])
        return Adapted(
            weight,
            tuple(own.get((place.name, place.row)) for place in together),
            tuple(place.ours[inputs:] for place in together),
            max(together[0].axis - inputs, 0),
            self.lora.scale,
        )


def inputs_of(place: Place) -> int:
    """How many of our axes, the first ones, are the matrix's input: a file's matrix is `[out, in]`."""
    return next(i for i in range(1, len(place.ours)) if math.prod(place.ours[:i]) == place.shape[1])


def base(config: ModelConfig, params: Mapping[str, Any], lora: Lora) -> Base:
    """The frozen half of a network: its weights on the device, those of the blocks' matrices quantised if asked for.

    Raises: ModelError if qwix is asked for and not installed, or adapters for experts that are not there.
    """
    places = {
        place.path: place for place in layout(config) if place.name.split(".")[-2] in TARGETS and not place.of_experts
    }
    expert_adapters.targeted(config, lora.targets)  # before anything is read
    flat = flatten_dict(dict(params), sep="/")
    wanted = {path for path, place in places.items() if not place.name.endswith(".bias") and lora.base != "float"}
    weights = {}
    for path, x in flat.items():  # one at a time: those that are quantised need not all be there as floats
        # Traced, for its shape alone, it has no place yet.
        placed = x if isinstance(x, jax.core.Tracer) else jnp.asarray(place_parameters({path: x})[path])
        weights[path] = quantised(placed, inputs_of(places[path]), lora.base) if path in wanted else placed
    return Base(unflatten_dict(weights, sep="/"), config, lora)


def quantised(weight: Any, inputs: int, kind: str) -> Any:
    """A weight `[in ..., out ...]` in int8, one scale per output, or in NF4, one per output and block of inputs."""
    try:
        import qwix
    except ImportError as error:
        raise ModelError(f"base={kind} needs qwix: install sdjax[lora], or take base=float") from error
    weight = jnp.asarray(weight, jnp.float32)
    outputs = tuple(range(inputs, weight.ndim))
    if kind == "int8":
        return qwix.quantize(weight, jnp.int8, channelwise_axes=outputs)
    last = inputs - 1
    tiles = {last: math.gcd(weight.shape[last], BLOCK)}
    return qwix.quantize(weight, "nf4", channelwise_axes=(*range(last), *outputs), tiled_axes=tiles)


def completed(policies: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by policy, where those that are adapters alone are put beside the frozen weights under `BASE`.

    Without frozen weights among them, they are what they were.
    """
    frozen = policies.get(BASE)
    if frozen is None:
        return dict(policies)
    whole = lambda tree: frozen.with_adapters(tree) if is_adapters(tree) else tree
    return {name: whole(tree) for name, tree in policies.items() if name != BASE}


def fingerprint(params: Mapping[str, Any], lora: Lora) -> int:
    """A checksum of how adapters are used and of a network's shapes and a few numbers of each array: they fit one base."""
    total = zlib.crc32(repr(lora).encode())
    for path, array in sorted(flatten_dict(dict(params), sep="/").items()):
        for end in (slice(0, 1), slice(array.shape[0] - 1, array.shape[0])):  # little is read of a model in files
            some = np.asarray(array[end], np.float32).reshape(-1)
            some = np.ascontiguousarray(some[:: max(1, some.size // 64)])
            total = zlib.crc32(f"{path}{array.shape}".encode() + some.tobytes(), total)
    return total


def beside(config: ModelConfig, params: Mapping[str, Any], adapters: Any, lora: Lora) -> Any:
    """A network's parameters with adapters beside their weights."""
    return completed({BASE: base(config, params, lora), "adapted": adapters})["adapted"]
