"""What a run leaves for others to open: the model as a folder of the transformers library, and its adapter as one of peft."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sdjax.devices import processes
from sdjax.devices.sharding import to_host
from sdjax.engine.train import Experiment
from sdjax.models import pretrained
from sdjax.models.files import peft_files
from sdjax.models.pretrained import Pretrained
from sdjax.run.storage import places


def export(experiment: Experiment, folder: Path, whole: Any, trained: Any) -> dict[str, Path]:
    """Writes `model/` from a policy's parameters and, with `lora`, `adapter/` from the trained ones; returns what is where.

    Both hold the tokenizer; the model keeps the original's generation configuration and type of weights, and the adapter
    names its base.  Raises: ModelError.
    """
    student, lora = experiment.student, experiment.lora
    write_model(folder / "model", student._replace(params=whole), experiment.export_dtype)
    if lora is None:
        return {"model": folder / "model"}
    own, target = to_host(trained), folder / "adapter"

    def write() -> None:
        with places.to_write(target) as here:
            peft_files.save(here, student.config, own, lora, student.origin.name)
            student.tokenizer.save_pretrained(here)

    processes.by_first(write)
    return {"model": folder / "model", "adapter": target}


def write_model(folder: Path, model: Pretrained, dtype: str | None) -> None:
    """Writes a model folder, on a disk or in a bucket, file by file; every process must call it."""
    with places.to_write(folder) if processes.first() else contextlib.nullcontext(folder) as here:
        pretrained.save(here, *model, dtype=dtype)
