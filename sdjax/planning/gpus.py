"""GPUs that are not here: what the compiler is told of them, so that programs for them can be made without one.

The figures are those that NVIDIA's driver reports of each; the compiler chooses tiles and checks limits by them.  Nothing
can be timed, so matrix products get default tiles instead of the fastest of several: layouts, graphs, exchanges and
memory are those of a real machine, some kernels are not.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

PER_HOST = 8
"""GPUs of one host in the machines that clouds rent; fewer may be asked for."""

SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The environment variable that says which share of a GPU's memory JAX takes when it starts."""

DEFAULT_SHARE, MOST = 0.75, 0.92
"""That share where nothing is said, and the largest that leaves room for the driver, NCCL and cuBLAS."""


class Gpu(NamedTuple):
    """One kind of GPU as its driver describes it: bytes, bytes/s, GHz."""

    name: str
    capability: int  # the major one
    cores: int  # multiprocessors
    units: int  # for float32 in each of them
    clock: float
    memory: int
    bandwidth: int
    cache: int  # second level
    shared: int  # first level and shared memory, of each multiprocessor

    @property
    def features(self) -> str:
        """Whether the compiler may use what only this generation has."""
        return "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 191514411008, 7672320000000, 132644864, 233472),
}
"""The memory is that of the whole device; a share of it is a run's."""

TARGET = """
gpu_device_info {{
  name: "{gpu.name}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {gpu.capability}.0"
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {gpu.features} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true device_interconnect_info {{ active_links: 18 }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.28.1"
}}
platform_name: "CUDA" device_description_str: "{gpu.name}"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }} runtime_version {{ major: 13 }}
"""
"""XLA's `GpuTargetConfigProto` as text.  With a `cub_version` sorts, and with them top-k, would be CUB's as in a run, and
those of long rows ask for a device while they are compiled."""


def target(gpu: Gpu) -> str:
    """What the compiler is told of a GPU."""
    return TARGET.format(gpu=gpu, optin=gpu.shared - 1024)


def hosts_and_gpus(shape: str) -> tuple[int, int] | None:
    """`"8"` as `(1, 8)` and `"2x8"` as `(2, 8)`: hosts, and GPUs of each; `None` for what is neither."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    return found and (int(found[1] or 1), int(found[2]))


def devices_of(gpu: Gpu, hosts: int, each: int) -> list[Any]:
    """Devices for compiling only.  Raises `NotImplementedError` where the compiler for GPUs is not installed."""
    from jax.experimental import topologies

    # Else the plugin refuses to load where the libraries of CUDA, which only running needs, are missing.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    described = {"topology": f"1x{hosts}x{each}", "target_config": target(gpu)}
    return list(topologies.get_topology_desc(platform="cuda", **described).devices)


def memory_of(gpu: Gpu) -> float:
    """Bytes that a run has of a GPU: the share that JAX takes when it starts."""
    return gpu.memory * float(os.environ.get(SHARE) or DEFAULT_SHARE)
