"""Adapters of experts as the peft library lays them out (0.21, `target_parameters`): two matrices for all experts of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.models.configs import ModelConfig
from sdjax.models.expert_adapters import TARGETS, Target
from sdjax.models.files.layout import layout

MODULE = "mlp"
"""Where the experts of a layer are in every class of transformers 5."""


def parameters(names: tuple[str, ...]) -> list[str]:
    """Some of `TARGETS` as peft names them."""
    return [f"{MODULE}.{name}" for name in TARGETS if name in names]


def named(parameters: list[str] | None) -> tuple[str, ...]:
    """Those of `TARGETS` that are among peft's names, which may begin with the layer or end with the last word alone."""
    ends = {name.rsplit(".", 1)[-1] for name in parameters or ()}
    return tuple(name for name in TARGETS if name.rsplit(".", 1)[-1] in ends)


def stem(target: Target, names: tuple[str, ...]) -> str:
    """The name of a pair: modules that add to one parameter each lie inside one another, the last parameter outside."""
    last = target.name == [name for name in TARGETS if name in names][-1]
    return f"model.{target.block.replace('_', '.')}.{MODULE}.experts{'' if last else '.base_layer'}"


def written(config: ModelConfig, target: Target, own: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`a [E, r, in]` as `[E r, in]`, `b [E, out, r]` as `[out, r E]`, outputs in the file's order."""
    a, b = np.asarray(own["a"], np.float32), np.asarray(own["b"], np.float32)
    apart = b.reshape(len(b), *target.outputs, -1)
    b = apart.transpose(0, *(1 + order_of(config, target)), apart.ndim - 1).reshape(b.shape)
    return {"a": a.reshape(-1, a.shape[-1]), "b": b.transpose(1, 2, 0).reshape(b.shape[1], -1)}


def read(config: ModelConfig, target: Target, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `written`."""
    experts, order = config.moe.experts, order_of(config, target)
    b = stored["b"].reshape(len(stored["b"]), -1, experts).transpose(2, 0, 1)
    apart = b.reshape(experts, *(target.outputs[axis] for axis in order), -1)
    back = apart.transpose(0, *(1 + np.argsort(order)), apart.ndim - 1).reshape(b.shape)
    return {"a": stored["a"].reshape(experts, -1, target.inputs), "b": back}


def shapes(config: ModelConfig, target: Target, rank: int) -> dict[str, tuple[int, int]]:
    """The shapes of what `written` returns."""
    experts = config.moe.experts
    return {"a": (experts * rank, target.inputs), "b": (int(np.prod(target.outputs)), rank * experts)}


def order_of(config: ModelConfig, target: Target) -> np.ndarray:
    """The order of a file's axes among our outputs: gpt-oss has gates and inputs in turn, others gates above inputs."""
    place = next(place for place in layout(config) if place.path == target.path)
    return np.argsort(place.axes[2:])
