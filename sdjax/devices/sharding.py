"""Where arrays lie: a mesh of devices with the axes data, model and, by choice, expert, rules for parameters, rows for batches.

Rows of a batch are split over the data axis; heads, hidden units of the MLP and the vocabulary over the model axis;
large parameters, and with them snapshots and the optimizer's state, over the data axis too.  An expert axis is a second
data axis for all but the matrices of experts, which are split over it as over the model axis.  A mesh is entered with
`on(mesh)`; outside, on one device, every function here leaves its argument as it is and programs are what they were.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.devices.platforms import on_nvidia
from sdjax.devices.rules import EXPERTS, RULES, VOCABULARY, Rule
from sdjax.errors import InputError

AXES = DATA, MODEL = "data", "model"
EXPERT = "expert"


class MeshError(InputError, ValueError):
    """A mesh does not fit the devices, the model or the batch; the message says which number and why."""


# ---- the mesh -------------------------------------------------------------------------------------------------------


def mesh_shape(text: str) -> tuple[int, ...] | None:
    """`"4x2"` as `(4, 2)`: devices on the data and the model axis; `"4x2x4"` has an expert axis, too; `""` is `None`.

    Raises `MeshError`.
    """
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise MeshError(
            f"mesh={text}: expected DATAxMODEL or DATAxMODELxEXPERT, two or three numbers of devices such as 4x2"
        )
    return tuple(map(int, text.split("x")))


def make_mesh(shape: tuple[int, ...] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `shape` (data, model) or (data, model, expert) over `devices`, by default all of them and all on the data axis.

    Raises `MeshError` if their number is not that of the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (len(devices), 1) if shape is None else shape
    if math.prod(shape) != len(devices):
        raise MeshError(
            f"mesh={named(shape)} is a mesh of {math.prod(shape)} devices and there are {len(devices)}: expected "
            f"{' or '.join(named((len(devices) // m, m)) for m in divisors(len(devices)))}"
        )
    try:
        # Not the default: under explicit axes every gather and reshape of the model would have to name its sharding.
        return jax.make_mesh(
            shape, (*AXES, EXPERT)[: len(shape)], axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )
    except NotImplementedError as error:  # of TPUs, which lie on a torus
        torus = named([1 + max(at) for at in zip(*(d.coords for d in devices), strict=True)])
        raise MeshError(
            f"mesh={named(shape)} cannot be laid over the {torus} devices of this slice: take axes that are "
            "products of whole axes of the slice"
        ) from error


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """While entered, programs run on the mesh, and what this module constrains and places is split over it."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def current() -> Any:
    """The mesh that is entered, with its axes' sizes in `.shape`, or `None`; also `None` if it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names in (AXES, (*AXES, EXPERT)) and mesh.size > 1 else None


def axis_size(axis: str) -> int:
    """In how many parts of the entered mesh something lies along an axis; 1 outside."""
    mesh = current()
    return 1 if mesh is None else devices_along(mesh.shape, along(axis, mesh.shape))


def along(axis: str, sizes: Any) -> str | tuple[str, ...]:
    """The axes of a mesh of `sizes` that something lies along an axis on: an expert axis is a second data axis."""
    return (DATA, EXPERT) if axis == DATA and EXPERT in sizes else axis


def of_experts(sizes: Any) -> str | tuple[str, ...]:
    """The axes of a mesh of `sizes` that experts are split over."""
    return (MODEL, EXPERT) if EXPERT in sizes else MODEL


def devices_along(sizes: Any, axes: str | tuple[str, ...]) -> int:
    """Devices along one axis of a mesh of `sizes`, or along several together."""
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def named(shape: Sequence[int]) -> str:
    """`(4, 2)` as `4x2`."""
    return "x".join(map(str, shape))


def divisors(number: int) -> list[int]:
    """All divisors of a number, least first."""
    return [d for d in range(1, number + 1) if number % d == 0]


# ---- parameters -----------------------------------------------------------------------------------------------------


LEAST = 2**16
"""Parameters of fewer elements are not split over the data axis: gathering them costs more than it saves."""


def parameter_spec(path: str, shape: Sequence[int], sizes: Any, least: float | None = None) -> P:
    """How an array with a parameter's path is split over a mesh of `sizes` {"data": n, "model": m} and, perhaps, "expert".

    By its rule over the model axis, then along its largest divisible axis that is left over the data axis (with the
    expert axis, but for experts).  A
    vocabulary that does not divide is split by width instead, and in uneven parts where logits are computed.

    Raises `MeshError` naming rule and number if something else does not divide.
    """
    axes: list[Any] = [None] * len(shape)
    # An optimizer may keep sums of a parameter, which go by its path and have fewer axes: those of Adafactor have no rule.
    ruled = () if re.search(r"(^|/)v_(row|col)/", path) else RULES
    rule = next((r for r in ruled if r.dims == len(shape) and re.search(r.pattern, path)), None)
    expert = rule is not None and rule.what == EXPERTS
    split = of_experts(sizes) if expert else MODEL
    if rule is not None and shape[rule.axis] % devices_along(sizes, split) == 0:
        axes[rule.axis] = split if devices_along(sizes, split) > 1 else None
    elif rule is not None and rule.what != VOCABULARY:
        raise indivisible(rule, path, shape, sizes)
    elif rule is not None and shape[1] % sizes[MODEL] == 0:
        axes[1] = MODEL
    spread = DATA if expert else along(DATA, sizes)
    if devices_along(sizes, spread) > 1 and math.prod(shape) >= (LEAST if least is None else least):
        fits = [i for i, n in enumerate(shape) if axes[i] is None and n % devices_along(sizes, spread) == 0]
        if fits:
            axes[max(fits, key=lambda i: shape[i])] = spread
    return P(*axes)


def indivisible(rule: Rule, path: str, shape: Sequence[int], sizes: Any) -> MeshError:
    """The error of a parameter that its rule cannot split."""
    split = of_experts(sizes) if rule.what == EXPERTS else MODEL
    number, devices = shape[rule.axis], devices_along(sizes, split)
    fits = ", ".join(map(str, divisors(number)[:12]))
    where = "model axis" if split == MODEL else "model axis times expert axis"
    return MeshError(
        f"mesh={named(tuple(sizes.values()))}: rule {rule.pattern!r} splits {path} by {rule.what} over the {where}, "
        f"and {number} {rule.what} do not divide by {devices}: choose a {where} of {fits}"
    )


def path_of(path: Sequence[Any]) -> str:
    """The path of a leaf in a tree as `layers_0/mlp/down`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_specs(tree: Any, sizes: Any, least: float | None = None) -> Any:
    """`parameter_spec` of every leaf (arrays or shapes) of parameters, snapshots or an optimizer's state."""
    # A frozen weight beside adapters is split like the parameter in whose place it stands.
    name = lambda path: path_of(path).removesuffix("/qvalue").removesuffix("/weight")
    return jax.tree_util.tree_map_with_path(lambda p, x: parameter_spec(name(p), x.shape, sizes, least), tree)


def constrain_parameters(tree: Any, least: float | None = None) -> Any:
    """Inside a compiled program: parameters, their gradients or an optimizer's state, split by the rules."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, parameter_specs(tree, mesh.shape, least))


def by_rows(tree: Any) -> Any:
    """Inside a compiled program: arrays that lie in memory row by row, on GPUs of a mesh.

    What is gathered along its last axis stays as it came, and products inside a loop copy it in every turn.
    """
    if current() is None or not on_nvidia():
        return tree
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), tree)


def with_whole_head(params: Any, dtype: Any = None) -> Any:
    """Inside a compiled program: parameters whose embedding and head are split over the model axis alone.

    With `dtype` they are sent in that type.
    """
    if current() is None:
        return params
    own = {name: params[name].astype(dtype or params[name].dtype) for name in ("embed", "head") if name in params}
    return {**params, **constrain_parameters(own, least=math.inf)}


def copies(head: Array) -> Array:
    """Inside a compiled program: a head `[V, D]` once for each of the `N` devices of the data axis, `[N, V, D]`.

    What a loop adds up of the copies' gradients stays on each device until the loop has ended; a single head's
    gradient is summed over the data axis in every round.
    """
    spec = parameter_spec("head", head.shape, current().shape, least=math.inf)
    repeated = jnp.broadcast_to(head, (axis_size(DATA), *head.shape))
    return jax.lax.with_sharding_constraint(repeated, P(along(DATA, current().shape), *spec))


def place_parameters(tree: Any, least: float | None = None) -> Any:
    """Parameters from the host, from files or from elsewhere, split by the rules; on one device, on that.

    Leaves may be anything with `shape` and `dtype` that is read by `x[part]`, such as `sdjax.models.files.unread.Unread`: a
    process reads the parts that its devices hold, and no more.
    """
    mesh = current()
    if mesh is None:
        return jax.tree.map(lambda x: x if isinstance(x, Array) else jax.device_put(np.asarray(x)), tree)
    return jax.tree.map(place, tree, parameter_specs(tree, mesh.shape, least))


def own_parameters(tree: Any) -> Any:
    """`place_parameters` in arrays that nobody else holds, so that a program may be given them for good."""
    copied = lambda old, new: jnp.array(new) if isinstance(old, Array | np.ndarray) else new
    return jax.tree.map(copied, tree, place_parameters(tree))


# ---- rows and activations -------------------------------------------------------------------------------------------


def constrain(x: Array, *axes: str | None) -> Array:
    """Inside a compiled program: `x` with its leading axes split over these axes of the mesh, the others whole.

    Rows that do not divide by the data axis stay whole: a chunk of one row, say.
    """
    mesh = current()
    if mesh is None:
        return x
    whole = lambda axis, size: axis is None or (axis == DATA and size % axis_size(DATA))
    fits = [None if whole(a, n) else along(a, mesh.shape) for a, n in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, P(*fits))


def parted(x: Array) -> Array:
    """Inside a compiled program: `x [B, S, D]`, the same along the model axis, kept in parts along `D`, one on each.

    By hand: were it a constraint, the partitioner would split what `x` is computed from and what it goes into as well,
    and send weights about.  Left as it is where `D` does not divide.
    """
    if not divides(x):
        return x
    width, rows = x.shape[-1] // axis_size(MODEL), rows_axis(len(x))
    own = lambda x: jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(MODEL) * width, width, axis=-1)
    return jax.shard_map(own, in_specs=P(rows), out_specs=P(rows, None, MODEL), check_vma=False)(x)


def gathered(x: Array) -> Array:
    """The inverse of `parted`."""
    if not divides(x):
        return x
    rows = rows_axis(len(x))
    whole = lambda x: jax.lax.all_gather(x, MODEL, axis=x.ndim - 1, tiled=True)
    return jax.shard_map(whole, in_specs=P(rows, None, MODEL), out_specs=P(rows), check_vma=False)(x)


def divides(x: Array) -> bool:
    """Whether `parted` splits the last axis."""
    return axis_size(MODEL) > 1 and x.shape[-1] % axis_size(MODEL) == 0


def rows_axis(rows: int) -> str | tuple[str, ...] | None:
    """What so many rows are split over in a `shard_map`; `None` where they do not divide and stay whole."""
    return along(DATA, current().shape) if rows % axis_size(DATA) == 0 else None


def place_rows(tree: Any) -> Any:
    """Arrays from the host with their first axis split over the data axis; on one device, on that."""
    mesh = current()
    if mesh is None:
        return jax.device_put(tree)
    of = lambda x: P(rows_axis(len(x))) if np.ndim(x) else P()
    return jax.tree.map(lambda x: place(x, of(x)), tree)


def place_whole(tree: Any) -> Any:
    """Arrays from the host, whole on every device."""
    return tree if current() is None else jax.tree.map(lambda x: place(x, P()), tree)


def place(x: Any, spec: P) -> Array:
    """An array that every process has, from the host or a device, laid over the entered mesh."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, sharding)
    if isinstance(x, Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(x), spec))
    x = np.asarray(x) if isinstance(x, Array) else x
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.asarray(x[part]))


# ---- back to the host -----------------------------------------------------------------------------------------------


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays on this host.

    What is split over other hosts' devices is gathered first, one array at a time, by all processes together.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: jax.device_get(whole(x)), tree)


def whole(x: Any) -> Any:
    """An array of which this process has every part: gathered if it had not."""
    if not isinstance(x, Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)


def own_key(key: Array) -> Array:
    """A random key for what this process does by itself: the same key, on its own device."""
    return key if current() is None else jax.random.wrap_key_data(np.asarray(jax.random.key_data(key)))


def rows_multiple(rows: int) -> int:
    """The least number of rows, at least `rows`, that the data axis divides."""
    return -(-rows // axis_size(DATA)) * axis_size(DATA)
