"""Accelerators by what bounds a program on them, and the devices of a slice or of hosts that are not here."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax

from sdjax.devices import memory, sharding
from sdjax.errors import InputError
from sdjax.planning import gpus


class PlanError(InputError, ValueError):
    """A plan cannot be made as asked; the message says which value and what is possible."""


class Chip(NamedTuple):
    """One device: bytes of memory, FLOP/s of bfloat16 matrix products, bytes/s of memory and of one link, one way."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    links: int  # of a chip: two per axis of its torus; 1 to a switch that joins the GPUs of a host
    network: float = 0.0  # bytes/s of one device to other hosts, where those are not joined by links

    @property
    def exchange(self) -> float:
        """Bytes/s that one device receives in an exchange: a ring uses two links of a torus."""
        return self.link * min(2, self.links)


CHIPS = {
    "v4": Chip(32e9, 275e12, 1.2e12, 4.5e10, 6),
    "v5e": Chip(16e9, 197e12, 8.1e11, 4.5e10, 4),
    "v5p": Chip(96e9, 459e12, 2.8e12, 9.0e10, 6),
    "v6e": Chip(32e9, 920e12, 1.6e12, 9.0e10, 4),
    "a100": Chip(80e9, 312e12, 2.04e12, 3.0e11, 1, 2.5e10),
    "h100": Chip(80e9, 989e12, 3.35e12, 4.5e11, 1, 5.0e10),
    "h200": Chip(141e9, 989e12, 4.8e12, 4.5e11, 1, 5.0e10),
    "b200": Chip(180e9, 2250e12, 8.0e12, 9.0e11, 1, 5.0e10),
}
"""Published peak figures; TPUs as in Austin et al. 2025, "How to Scale Your Model", GPUs as in their data sheets, without
sparsity, with the network of a DGX: one adapter of 200 or 400 Gbit/s for each."""

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    **{gpu.name: name for name, gpu in gpus.GPUS.items()},
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
    """The devices of a slice such as "v5e:4x8" or of hosts such as "h100:2x8", for compiling only; "here": this machine's.

    Raises `PlanError` for a name that does not exist, with those that do, and where the compiler is missing.
    """
    if topology == HERE:
        return jax.devices()
    chip, _, shape = topology.partition(":")
    if chip in TOPOLOGIES and shape:
        return tpus_of(topology, shape)
    if chip in gpus.GPUS and (counts := gpus.hosts_and_gpus(shape)):
        return gpus_of(topology, gpus.GPUS[chip], *counts)
    raise PlanError(f"topology={topology}: there is none of this name; {valid()}")


def tpus_of(topology: str, shape: str) -> list[Any]:
    """The devices of a slice of TPUs.  Raises `PlanError`."""
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


def gpus_of(topology: str, gpu: gpus.Gpu, hosts: int, each: int) -> list[Any]:
    """The GPUs of some hosts.  Raises `PlanError`."""
    if each > gpus.PER_HOST:
        raise PlanError(
            f"topology={topology}: a host has at most {gpus.PER_HOST} GPUs; for {hosts * each} of them say "
            f"{topology.partition(':')[0]}:{-(-hosts * each // gpus.PER_HOST)}x{gpus.PER_HOST}"
        )
    try:
        return gpus.devices_of(gpu, hosts, each)
    except NotImplementedError as error:
        raise PlanError(
            f"topology={topology}: the compiler for GPUs is not installed; pip install 'sdjax[cuda-compiler]', which needs "
            "no GPU"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise PlanError(f"topology={topology}: the compiler for GPUs says: {said}; {valid()}") from error


def valid() -> str:
    """The topologies to choose from, as half a sentence."""
    slices = "; ".join(f"{chip}: {shapes.replace(' ', ', ')}" for chip, shapes in TOPOLOGIES.items())
    return f"{slices}; {', '.join(gpus.GPUS)}: 1, 2, 4, 8 GPUs, or hosts of 8 as 2x8, 4x8; or {HERE}"


def chip_of(device: Any) -> tuple[str, Chip | None]:
    """Name and figures of a device's kind; `None` where they are not known, as for a CPU."""
    name = KINDS.get(device.device_kind, device.device_kind)
    return name, CHIPS.get(name)


def memory_of(device: Any, chip: Chip | None) -> float | None:
    """Bytes that a device has for a run: of one that is here what is free, of another what is built in.

    Of a GPU the share that JAX takes: see `gpus.memory_of`.
    """
    if any(device == other for other in jax.devices()):
        free = memory.room(device=device).free
        return free if math.isfinite(free) else chip and chip.memory
    gpu = next((gpu for gpu in gpus.GPUS.values() if gpu.name == device.device_kind), None)
    return gpus.memory_of(gpu) if gpu else chip and chip.memory


def mesh_of(topology: str, shape: str) -> Any:
    """A mesh over a topology: "" lays all devices along the data axis.  Raises `PlanError` and `sharding.MeshError`."""
    return sharding.make_mesh(sharding.mesh_shape(shape), devices_of(topology))
