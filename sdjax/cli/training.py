"""`sdjax train`: all options of an experiment file, and the run that they describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from sdjax.cli import options
from sdjax.collect.controls import controlled
from sdjax.collect.selections import changed, selected
from sdjax.devices import processes
from sdjax.devices.compilation import prepare_to_compile
from sdjax.engine.protocol import Protocol
from sdjax.engine.sensible import check_numbers
from sdjax.run.fit import fit
from sdjax.run.folder import as_begun, check_folder
from sdjax.run.logs.trackers import revision
from sdjax.run.starting import source
from sdjax.run.storage.places import place, try_writing
from sdjax.samplers.options import check, sampled

PROCESSES = """auto: one of several processes, as the cluster says (TPU pods, Slurm); or set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID"""


GROUPS = ("method", "select", "control", "sampler", "evaluate")
"""Options of `sdjax train` that go by a first name: --method.group-size, say."""


def train_options(module: Any, factory: Any) -> type:
    """Every option of an experiment file: its own, the run's, those of the method and what is done to it."""
    extra: list[Any] = [
        ("out", Annotated[str, tyro.conf.arg(help="the run's folder; by default one below runs/")], ""),
        ("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in the folder")], False),
        ("processes", Annotated[str, tyro.conf.arg(help=PROCESSES)], ""),
    ]
    extra = [options.headed("run", [(name, hint, dataclasses.field(default=value)) for name, hint, value in extra])]
    if factory is not None:
        defaults = getattr(module, "OPTIONS", {}).get(factory.__name__, {})
        for name, some in {
            "method": (factory, defaults),
            "select": (selected, {}),
            "control": (controlled, {}),
            "sampler": (sampled, {}),
            "evaluate": (Protocol, {}),
        }.items():
            nested = options.options_class(f"{name.title()}Options", *some)
            extra.append((name, nested, dataclasses.field(default_factory=nested)))
    return options.options_class("Options", module.experiment, {}, extra)


def run(file: Path, module: Any, factory: Any, chosen: dict[str, Any], start: str) -> int:
    """Refuses what cannot run, then builds the experiment from its options (which loads the model) and runs it."""
    out, resume = chosen.pop("out"), chosen.pop("resume")
    processes.join(chosen.pop("processes"))
    groups = {name: options.shallow(chosen.pop(name)) for name in GROUPS if factory}
    if factory:
        options.check_ranges("method", factory, groups["method"])
    for some in (chosen, *(own for name, own in groups.items() if name != "method")):
        check_numbers(some)
    protocol = Protocol(**groups.get("evaluate", {}))
    if factory:
        check(**groups["sampler"])
    arguments = {"experiment": str(file), **chosen} | ({"from": start} if start else {})
    if factory:
        arguments |= {"method": factory.__name__}
        arguments |= {f"{name}.{option}": value for name, own in groups.items() for option, value in own.items()}

        def change(method):
            return sampled(changed(method, groups["select"], groups["control"]), **groups["sampler"])

        chosen["method"] = options.Choice(factory, groups["method"], change)
    label = factory.__name__ if factory else "run"
    out = place(out or f"runs/{file.stem}-{label}-{revision()}-{chosen.get('seed', 0)}")
    processes.agree({**arguments, "out": str(out), "resume": resume}, "arguments")
    processes.by_first(lambda: try_writing(out))
    standard = options.default_values(train_options(module, factory))
    arguments = processes.by_first(lambda: as_begun(out, arguments, standard))
    processes.by_first(lambda: check_folder(out, resume, arguments))
    if start and not resume:
        processes.by_first(lambda: str(source(start)))
    if processes.first():
        print(f"run folder {out}", flush=True)
        for name, value in arguments.items():
            print(f"  {name} = {value}", flush=True)
    prepare_to_compile()
    chosen = dataclasses.replace(options.call(module.experiment, chosen), protocol=protocol)
    result = fit(chosen, out, resume=resume, arguments=arguments, start=start)
    processes.leave()
    return 128 + result.interrupted if result.interrupted else 0
