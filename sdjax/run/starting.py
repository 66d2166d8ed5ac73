"""RUN@STEP: the checkpoint of another run, whose parameters a run starts from or that is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sdjax.devices.processes import by_first
from sdjax.run.folder import RunError
from sdjax.run.storage import checkpoint, places


class Source(NamedTuple):
    """A step of a run."""

    folder: Path
    step: int

    def __str__(self) -> str:
        return f"{self.folder}@{self.step}"


def source(text: str) -> Source:
    """What `RUN@STEP` names.  Raises `RunError`, `CheckpointError` or `PlaceError` if there is no such checkpoint."""
    name, _, step = text.rpartition("@")
    if not name or not step.isdigit():
        raise RunError(f"{text}: expected RUN@STEP, a run's folder and one of its checkpoints, such as runs/mine@100")
    folder = places.place(name)
    places.try_reading(folder)
    checkpoint.found(folder / "checkpoints", int(step))
    return Source(folder, int(step))


def parameters(start: Source, like: Any, base: int | None) -> Any:
    """The trained parameters of a checkpoint, laid out as `like`: weights, or adapters of the same `base`.

    Every process must call it.  Raises `CheckpointError` if it is damaged, and `RunError` if it holds others.
    """
    folder = checkpoint.absolute(start.folder / "checkpoints")
    content, tree = by_first(lambda: checkpoint.whole(folder, start.step)), {"params": like}
    saved = {name: text for name, text in content["arrays"].items() if name.split("/")[0] == "params"}
    differs = checkpoint.difference(saved, checkpoint.described(tree))
    if not differs and content["host"].get("base") != base:
        differs = "its adapters were trained on other weights, or with other options of Lora"
    if differs:
        raise RunError(
            f"--from {start}: it holds other parameters than this run trains: {differs}: give the model and the options "
            f"that it was trained with, or make a model of it (sdjax export {start}) and name that with --model"
        )
    return checkpoint.arrays(folder, start.step, content, tree)["params"]
