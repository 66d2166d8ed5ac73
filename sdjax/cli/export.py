"""`sdjax export`: a checkpoint of a run as a model folder."""

from __future__ import annotations

from typing import Literal

from sdjax.cli.models import checkpointed
from sdjax.run.export import write_model
from sdjax.run.folder import RunError
from sdjax.run.starting import source
from sdjax.run.storage import places


def export(
    checkpoint: str,
    /,
    *,
    out: str = "",
    model: str = "",
    dtype: Literal["original", "float32", "bfloat16", "float16"] = "original",
) -> str:
    """Writes the parameters of a checkpoint as a folder that sdjax and the transformers library open; adapters folded in.

    Args:
      checkpoint: RUN@STEP: a run's folder, which may be in a bucket, and one of its checkpoints.
      out: the folder to write, which may be in a bucket; by default RUN/model-STEP.
      model: where architecture, tokenizer and frozen weights are read from, if the run does not say.
      dtype: type of the weights; original: that of the model that was trained.
    """
    start = source(checkpoint)
    target = places.place(out or start.folder / f"model-{start.step}")
    if places.names(target):
        raise RunError(f"{target} is not empty: name another folder with --out")
    places.try_writing(target)
    write_model(target, checkpointed(start, model), None if dtype == "original" else dtype)
    return f"{start}: model written to {target}"
