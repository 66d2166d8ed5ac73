"""Folders of the peft library in and out: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sdjax.models import expert_adapters
from sdjax.models.adapters import TARGETS, Lora, targeted
from sdjax.models.configs import ModelConfig
from sdjax.models.fields import ModelError
from sdjax.models.files import peft_experts
from sdjax.models.files.layout import layout, stored_shapes

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STEM = "base_model.model."


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    adapters: Mapping[str, Any],
    lora: Lora,
    base_name: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which the peft library and vLLM open.

    They are loaded onto the base model `base_name`, a hub name or a folder.  Raises: ModelError if the folder cannot be
    written.
    """
    folder, tensors = Path(folder), {}
    for block, short, place in targeted(config, lora):
        own, stem = adapters["lora"][block][short], f"{STEM}{place.name.removesuffix('.weight')}"
        for letter in ("a", "b"):
            tensors[f"{stem}.lora_{letter.upper()}.weight"] = np.ascontiguousarray(own[letter], np.float32)
    for of in expert_adapters.targeted(config, lora.targets):
        stem = f"{STEM}{peft_experts.stem(of, lora.targets)}"
        for letter, array in peft_experts.written(config, of, adapters["lora"][of.block][of.name]).items():
            tensors[f"{stem}.lora_{letter.upper()}.weight"] = np.ascontiguousarray(array)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "target_modules": [name for name in lora.targets if name in {short for _, short, _ in targeted(config, lora)}],
        "target_parameters": peft_experts.parameters(lora.targets) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def fields(folder: Path) -> Mapping[str, Any]:
    """What an adapter's configuration says.  Raises: ModelError."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder / CONFIG}: {error}") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG}: expected an adapter of the type LORA")
    wrong = {"use_dora": "DoRA", "rank_pattern": "ranks by module", "alpha_pattern": "scales by module"}
    wrong |= {"modules_to_save": "whole modules", "fan_in_fan_out": "transposed weights"}
    named = [what for name, what in wrong.items() if found.get(name)]
    if named or found.get("bias", "none") != "none":
        raise ModelError(f"{folder / CONFIG}: adapters with {', '.join(named) or 'biases'} are not supported")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(f"{folder / CONFIG}: expected a rank `r` and `lora_alpha`")
    return found


def load(folder: Path, config: ModelConfig) -> tuple[Lora, dict]:
    """An adapter, and how it is added to a network of this shape.  A matrix that it leaves out gets zeros.

    Raises: ModelError if it is damaged, or made for another network.
    """
    told, file = fields(folder), folder / TENSORS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    short = {match[1] for name in tensors if (match := re.search(r"\.(\w+)\.lora_[AB]\.weight$", name))}
    short -= {"experts", "base_layer"}
    rank = told["r"]
    alpha = told["lora_alpha"] * (rank**0.5 if told.get("use_rslora") else 1.0)
    if not short <= {*TARGETS}:
        raise ModelError(f"{file}: adapters of {', '.join(sorted(short - {*TARGETS}))} are not supported")
    experts = peft_experts.named(told.get("target_parameters"))
    lora, tree = Lora(rank, alpha, tuple(t for t in TARGETS if t in short) + experts), {}
    left, whole = {*tensors}, stored_shapes(layout(config))
    for block, name, place in targeted(config, lora):
        outputs, inputs = whole[place.name]
        stem, shapes = place.name.removesuffix(".weight"), {"a": (rank, inputs), "b": (outputs, rank)}
        tree.setdefault(block, {})[name] = _pair(file, tensors, left, stem, shapes)
    for of in expert_adapters.targeted(config, lora.targets):
        own = _pair(file, tensors, left, peft_experts.stem(of, experts), peft_experts.shapes(config, of, rank))
        tree.setdefault(of.block, {})[of.name] = peft_experts.read(config, of, own)
    if left:
        raise ModelError(f"{file}: the model has no place for {min(left)}: is it the adapter's?")
    return lora, {"lora": tree}


def _pair(
    file: Path, tensors: Mapping[str, np.ndarray], left: set[str], stem: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, np.ndarray]:
    """The pair of one matrix, taken from those that are left; zeros where the adapter leaves it out.  Raises: ModelError."""
    found = {}
    for letter, shape in shapes.items():
        key = f"{STEM}{stem}.lora_{letter.upper()}.weight"
        left.discard(key)
        found[letter] = np.asarray(tensors.get(key, np.zeros(shape, np.float32)), np.float32)
        if found[letter].shape != shape:
            raise ModelError(f"{file}: {key} has the shape {found[letter].shape}, and the model wants {shape}")
    return found
