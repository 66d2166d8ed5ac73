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

from sdjax.models.adapters import TARGETS, Lora, targeted
from sdjax.models.configs import ModelConfig
from sdjax.models.fields import ModelError
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
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "target_modules": [name for name in lora.targets if name in {short for _, short, _ in targeted(config, lora)}],
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
    rank = told["r"]
    alpha = told["lora_alpha"] * (rank**0.5 if told.get("use_rslora") else 1.0)
    if not short <= {*TARGETS}:
        raise ModelError(f"{file}: adapters of {', '.join(sorted(short - {*TARGETS}))} are not supported")
    lora, tree, left = Lora(rank, alpha, tuple(t for t in TARGETS if t in short)), {}, {*tensors}
    whole = stored_shapes(layout(config))
    for block, name, place in targeted(config, lora):
        outputs, inputs = whole[place.name]
        own = {}
        for letter, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
            key = f"{STEM}{place.name.removesuffix('.weight')}.lora_{letter.upper()}.weight"
            left.discard(key)
            own[letter] = np.asarray(tensors.get(key, np.zeros(shape, np.float32)), np.float32)
            if own[letter].shape != shape:
                raise ModelError(f"{file}: {key} has the shape {own[letter].shape}, and the model wants {shape}")
        tree.setdefault(block, {})[name] = own
    if left:
        raise ModelError(f"{file}: the model has no place for {min(left)}: is it the adapter's?")
    return lora, {"lora": tree}
