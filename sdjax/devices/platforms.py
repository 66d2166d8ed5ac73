"""For what kind of device a program is being traced: the entered mesh's, here or not, or the default one."""

from __future__ import annotations

from typing import Any

import jax


def on_nvidia() -> bool:
    """Whether what is traced now is for NVIDIA's GPUs."""
    device = _device()
    return device.platform == "gpu" and device.device_kind.startswith("NVIDIA")


def on_cpu() -> bool:
    """Whether what is traced now is for CPUs."""
    return _device().platform == "cpu"


def _device() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
