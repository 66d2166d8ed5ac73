"""The command line: `sdjax COMMAND ...`.  A command's options are a function's signature."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from sdjax import options

COMMANDS = """usage: sdjax COMMAND ...

  train EXPERIMENT [--method NAME] [--out FOLDER] [--resume] [--option VALUE ...]
                      run an experiment file; --help after it lists every option
  evaluate MODEL --data FILE.jsonl
                      greedy accuracy of a model on a file of problems
  methods [NAME] [--json | --markdown]
                      the methods, their papers and equations
  bench [--model NAME]
                      rollout tokens/s, update seconds and memory beside this machine's ceilings

exit status: 0 done; 2 bad input; 130 and 143 ended by Ctrl-C and SIGTERM (a run is saved: go on with --resume)
"""


def train(arguments: list[str]) -> int:
    """`sdjax train EXPERIMENT ...`"""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(COMMANDS)
            return 0
        raise options.OptionError("name an experiment file: sdjax train experiments/chain_sum.py")
    module = options.load_experiment(arguments[0])
    name, rest = options.take_option(arguments[1:], "method")
    name = name or getattr(module, "METHOD", None)
    takes_method = "method" in inspect.signature(module.experiment).parameters
    if takes_method and name is None:
        raise options.OptionError(f"{arguments[0]} needs --method NAME: one of {', '.join(options.method_names())}")
    if name is not None and not takes_method:
        raise options.OptionError(f"{arguments[0]} takes no --method: its function `experiment` has no such argument")
    factory = options.method_factory(name) if name else None
    own = train_options(module, factory)
    options.check_names(rest, options.option_names(own))
    chosen = tyro.cli(
        own,
        args=rest,
        prog=f"sdjax train {arguments[0]}" + (f" --method {name}" if name else ""),
        description=(module.__doc__ or "").strip(),
    )
    return run(Path(arguments[0]), module, factory, options.shallow(chosen))


def train_options(module: Any, factory: Any) -> type:
    """Every option of an experiment file: its own, the run's, those of the method and of the controls."""
    from sdjax.controls import controlled

    extra: list[Any] = [
        ("out", Annotated[str, tyro.conf.arg(help="the run's folder; by default one below runs/")], ""),
        ("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in the folder")], False),
    ]
    extra = [(name, hint, dataclasses.field(default=value)) for name, hint, value in extra]
    if factory is not None:
        defaults = getattr(module, "OPTIONS", {}).get(factory.__name__, {})
        for name, some in (("method", (factory, defaults)), ("control", (controlled, {}))):
            nested = options.options_class(f"{name.title()}Options", *some)
            extra.append((name, nested, dataclasses.field(default_factory=nested)))
    return options.options_class("Options", module.experiment, {}, extra)


def run(file: Path, module: Any, factory: Any, chosen: dict[str, Any]) -> int:
    """Refuses what cannot run, then builds the experiment from its options (which loads the model) and runs it."""
    from sdjax.controls import controlled
    from sdjax.fit import check_folder, fit
    from sdjax.train import check_numbers

    out, resume = chosen.pop("out"), chosen.pop("resume")
    own, control = (options.shallow(chosen.pop(name)) if factory else {} for name in ("method", "control"))
    for some in (chosen, own, control):
        check_numbers(some)
    arguments = {"experiment": str(file), **chosen}
    if factory:
        arguments |= {"method": factory.__name__, **{f"method.{name}": value for name, value in own.items()}}
        arguments |= {f"control.{name}": value for name, value in control.items()}
        chosen["method"] = options.Choice(factory, own, functools.partial(controlled, **control))
    label = factory.__name__ if factory else "run"
    out = Path(out or f"runs/{file.stem}-{label}-{revision()}-{chosen.get('seed', 0)}")
    check_folder(out, resume, arguments)
    print(f"run folder {out}", flush=True)
    for name, value in arguments.items():
        print(f"  {name} = {value}", flush=True)
    keep_programs()
    result = fit(module.experiment(**chosen), out, resume=resume, arguments=arguments)
    return 128 + result.interrupted if result.interrupted else 0


def methods(arguments: list[str]) -> int:
    """`sdjax methods [NAME] [--json | --markdown]`"""
    from sdjax import cards

    forms = ("--json", "--markdown")
    names = [a for a in arguments if a not in forms]
    if {"-h", "--help"} & {*names}:
        print(COMMANDS)
        return 0
    if unknown := [name for name in names if name.startswith("-")]:
        raise options.OptionError(f"sdjax methods has no option {unknown[0]}{options.nearest(unknown[0], forms)}")
    found = [cards.describe(name) for name in names or options.method_names()]
    if "--markdown" in arguments:
        print(cards.table(found))
    elif "--json" in arguments:
        print(json.dumps(found[0] if len(names) == 1 else found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(cards.page(d) for d in found) if names else cards.listing(found))
    return 0


def evaluate(arguments: list[str]) -> int:
    """`sdjax evaluate MODEL --data FILE ...`"""
    from sdjax.measure import measure

    options.check_names(arguments, list(inspect.signature(measure).parameters))
    keep_programs()
    print(tyro.cli(measure, args=arguments, prog="sdjax evaluate"))
    return 0


def bench(arguments: list[str]) -> int:
    """`sdjax bench ...`"""
    from sdjax.bench import bench

    for name, value in tyro.cli(bench, args=arguments, prog="sdjax bench").items():
        print(f"{name:45s} {value:10.3f}")
    return 0


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` names another.

    A folder per kind of processor: programs made for one may use instructions that another, with which the home folder
    is shared, does not have.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        try:
            flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        except (OSError, StopIteration):
            flags = platform.processor()
        kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "sdjax" / kind))


def revision() -> str:
    """The short hash of the checked-out commit, or the package's version."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:  # no git here
        return importlib.metadata.version("sdjax")
    return found.stdout.strip() if found.returncode == 0 else importlib.metadata.version("sdjax")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done; 2: bad input, said in one sentence; 130 and 143: ended by SIGINT and SIGTERM, with everything saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(COMMANDS)
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands = {"train": train, "evaluate": evaluate, "methods": methods, "bench": bench}
    try:
        if arguments[0] not in commands:
            near = options.nearest(arguments[0], list(commands))
            raise options.OptionError(f"there is no command {arguments[0]!r}{near}")
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt as interrupt:
        print(f"sdjax: {str(interrupt) or 'SIGINT'}: ended; checkpoints written before it are whole", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except Exception as error:
        from sdjax.errors import INPUT_ERRORS  # here, because it imports everything

        if not isinstance(error, INPUT_ERRORS):
            raise
        print(f"sdjax: {error}", file=sys.stderr)
        return 2


def program() -> None:
    """What the shell runs: `main`, whose status ends the process."""
    status = main()
    if status >= 128:
        # The signal may have come while XLA's threads were at work: an interpreter being taken apart would crash them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
