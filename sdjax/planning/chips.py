"""Accelerators by what bounds a program on them, and the devices of a slice that is not here."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax

from sdjax.devices import memory, sharding
from sdjax.errors import InputError


class PlanError(InputError, ValueError):
    """A plan cannot be made as asked; the message says which value and what is possible."""


class Chip(NamedTuple):
    """One device: bytes of memory, FLOP/s of bfloat16 matrix products, bytes/s of memory and of one link, one way."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    links: int  # of a chip: two per axis of its torus


CHIPS = {
    "v4": Chip(32e9, 275e12, 1.2e12, 4.5e10, 6),
    "v5e": Chip(16e9, 197e12, 8.1e11, 4.5e10, 4),
    "v5p": Chip(96e9, 459e12, 2.8e12, 9.0e10, 6),
    "v6e": Chip(32e9, 920e12, 1.6e12, 9.0e10, 4),
    "h100": Chip(80e9, 989e12, 3.35e12, 4.5e11, 1),
    "h200": Chip(141e9, 989e12, 4.8e12, 4.5e11, 1),
}
"""Published peak figures; TPUs as in Austin et al. 2025, "How to Scale Your Model", GPUs as in their data sheets."""

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""Chips by what JAX calls their devices."""

TOPOLOGIES = {
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
}
"""Slices that the cloud offers, chips along each axis; others that the compiler accepts work too."""

HERE = "here"


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice such as "v5e:4x8", for compiling only, or of this machine for "here".

    Raises `PlanError` for a name that does not exist, with those that do, and where the TPU compiler is missing.
    """
    if topology == HERE:
        return jax.devices()
    chip, _, shape = topology.partition(":")
    if chip not in TOPOLOGIES or not shape:
        raise PlanError(f"topology={topology}: there is none of this name; {valid()}")
    from jax.experimental import topologies

    # Else the TPU library looks for the machine that it is on.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    hosts = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **hosts).devices)
    except Exception as error:
        said = str(error).splitlines()[0]
        if "not installed" in said:
            raise PlanError(
                f"topology={topology}: the TPU compiler is not installed; pip install 'sdjax[tpu]'"
            ) from error
        if "lockfile" in said:
            raise PlanError(
                f"topology={topology}: another process uses the TPU library: wait for its end, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1 where there is no TPU"
            ) from error
        raise PlanError(f"topology={topology}: the TPU compiler says: {said}; {valid()}") from error


def valid() -> str:
    """The topologies to choose from, as half a sentence."""
    return "; ".join(f"{chip}: {shapes.replace(' ', ', ')}" for chip, shapes in TOPOLOGIES.items()) + f"; or {HERE}"


def chip_of(device: Any) -> tuple[str, Chip | None]:
    """Name and figures of a device's kind; `None` where they are not known, as for a CPU."""
    name = KINDS.get(device.device_kind, device.device_kind)
    return name, CHIPS.get(name)


def memory_of(device: Any, chip: Chip | None) -> float | None:
    """Bytes that a device has for a run: of one that is here what is free, of another what is built in."""
    if any(device == other for other in jax.devices()):
        free = memory.room(device=device).free
        return free if math.isfinite(free) else chip and chip.memory
    return chip and chip.memory


def mesh_of(topology: str, shape: str) -> Any:
    """A mesh over a slice: "" lays all devices along the data axis.  Raises `PlanError` and `sharding.MeshError`."""
    return sharding.make_mesh(sharding.mesh_shape(shape), devices_of(topology))
