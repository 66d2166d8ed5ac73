"""Compilers for devices that are not here: whether they are installed."""

import importlib.util

import jax

from sdjax.planning import gpus


def tpus() -> bool:
    """That for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def nvidia() -> bool:
    """That for NVIDIA's GPUs."""
    try:
        return bool(gpus.devices_of(gpus.GPUS["h100"], 1, 1))
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return False


def cudnn() -> bool:
    """And cuDNN, by which long runs are read."""
    return (
        nvidia() and importlib.util.find_spec("nvidia") is not None and bool(importlib.util.find_spec("nvidia.cudnn"))
    )
