"""A run fits the memory there is: its sizes are chosen before the first step, kept in its folder, and the same on resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.devices import memory, processes
from sdjax.devices.memory import MemoryShortage, gigabytes
from sdjax.engine.needs import Sizes
from sdjax.engine.tokens import ROWS
from sdjax.engine.train import Experiment
from sdjax.run.sizes import FEW_ROWS, TOKENS, at_once, choose, given_sizes, guessed, planned
from sdjax.run.storage.places import read_json, replace_text

FILE = "memory.json"


class Settled(NamedTuple):
    """An experiment with all its sizes, what the run folder keeps of them, and what is said about it."""

    experiment: Experiment
    record: dict[str, Any]
    said: str


def settled(experiment: Experiment, longest: int, folder: Path) -> Settled:
    """Chooses the sizes that the experiment leaves open, or takes those that the folder's run began with.

    Raises: MemoryShortage where nothing fits.
    """
    e = experiment
    given = {name: value for name, value in given_sizes(e).items() if value is not None}
    begun = processes.by_first(lambda: begun_with(folder))
    if begun is not None:
        sizes = Sizes(**{**begun["sizes"], **given})
        return resumed(e, sizes, begun)
    if e.memory == "off":
        sizes = Sizes(**{"rows": ROWS, "rows_per_chunk": None, "tokens_per_chunk": TOKENS[0], "remat": False, **given})
        return Settled(*with_sizes(e, sizes, None), "memory: not looked at (--memory off)")
    room = memory.room(e.memory)
    load = guessed(e, longest, FEW_ROWS)
    chosen = at_once(load, room)
    if chosen is None:
        load = planned(e, longest)
        chosen = choose(load, room)
    return Settled(
        *with_sizes(e, chosen.sizes, chosen.needed), f"memory: {told(chosen.sizes, chosen.needed)}; there are {room}"
    )


def with_sizes(experiment: Experiment, sizes: Sizes, needed: float | None) -> tuple[Experiment, dict[str, Any]]:
    """The experiment with all sizes, and what is kept of them."""
    whole = dataclasses.replace(experiment, shapes=sizes.of(experiment.shapes), remat=sizes.remat)
    return whole, {"sizes": sizes._asdict(), "needed": needed}


def begun_with(folder: Path) -> dict[str, Any] | None:
    """What a folder says of the sizes that its run began with, if it does."""
    try:
        found = read_json(folder / FILE)
        return found if {*found["sizes"]} == {*Sizes._fields} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resumed(experiment: Experiment, sizes: Sizes, begun: Mapping[str, Any]) -> Settled:
    """The sizes with which a run goes on.  Raises `MemoryShortage` where they no longer fit."""
    same, needed = sizes == Sizes(**begun["sizes"]), begun["needed"]
    needed = needed if same else None
    if needed is not None and experiment.memory != "off":
        room = memory.room(experiment.memory)
        if needed > room.free:
            raise MemoryShortage(
                f"the run began with sizes that need {gigabytes(needed)} ({told(sizes)}), and there are {room}: end other "
                "programs, give smaller sizes, or go on all the same with --memory off"
            )
    said = f"memory: as the run began, {told(sizes, needed)}"
    if not same:
        said = f"memory: other sizes than the run began with, {told(sizes)}: the same numbers up to rounding"
    return Settled(*with_sizes(experiment, sizes, needed), said)


def told(sizes: Sizes, needed: float | None = None) -> str:
    """Sizes in words, as options."""
    options = [f"--rows {sizes.rows}"]
    options.append("all rows" if sizes.rows_per_chunk is None else f"--rows-per-chunk {sizes.rows_per_chunk}")
    options.append("all tokens" if sizes.tokens_per_chunk is None else f"--tokens-per-chunk {sizes.tokens_per_chunk}")
    options.append("--remat" if sizes.remat else "--no-remat")
    most = "" if needed is None else f", at most {gigabytes(needed)}"
    return ", ".join(options) + most


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Keeps the sizes in the run's folder."""
    replace_text(folder / FILE, json.dumps(record, indent=1))
