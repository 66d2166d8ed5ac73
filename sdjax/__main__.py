"""The command line: `sdjax COMMAND ...`.  A command's options are a function's signature."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tyro

from sdjax import __version__
from sdjax.cli import options
from sdjax.errors import InputError, nearest

COMMANDS = """usage: sdjax COMMAND ...

  train EXPERIMENT [--method NAME] [--out FOLDER] [--resume] [--from RUN@STEP] [--option VALUE ...]
                      run an experiment file; --help after it lists every option; FOLDER may be gs://bucket/folder;
                      --from begins with the parameters of another run's checkpoint
  export RUN@STEP [--out FOLDER]
                      a checkpoint of a run as a model folder, for sdjax and the transformers library
  evaluate MODEL [OTHER] --data DATA [--samples 32 --temperature 0.6 --top-p 0.95] [--caps 1024,4096]
                      accuracy of one or two models with intervals: avg@n, maj@k, pass@k, by length, paired
  verify FILE.jsonl --data DATA
                      rewards of given texts, with what was taken for the answer of each
  report RUN [RUN ...] [--out FILE.html] [--microscope]
                      one page of curves, tables and rollouts token by token, and its figures as SVG and PNG
  watch RUN [RUN ...] [--port 8321]
                      that page in a browser on this machine, anew as the runs go on
  methods [NAME] [--json | --markdown]
                      the methods, their papers and equations
  plan [--topology v5e:4x8] [--model qwen3-8b] [--method NAME]
                      one step compiled for devices that need not be here: memory, exchanges, seconds at best
  scaling [--weak] [--model qwen3-1.7b] [--method NAME]
                      exchanges and operations of each of 1 to 8 devices as the mesh grows
  bench [--model NAME] | bench --suite [--out bench.json]
                      rollout tokens/s, update seconds and memory beside this machine's ceilings; --suite writes them
                      in bfloat16 and float32 with machine and versions to a file

sdjax --version and sdjax --help say which version this is, and this

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
    start, rest = options.take_option(rest, "from")
    name = name or getattr(module, "METHOD", None)
    takes_method = "method" in inspect.signature(module.experiment).parameters
    if takes_method and name is None:
        raise options.OptionError(f"{arguments[0]} needs --method NAME: one of {', '.join(options.method_names())}")
    if name is not None and not takes_method:
        raise options.OptionError(f"{arguments[0]} takes no --method: its function `experiment` has no such argument")
    from sdjax.cli.training import run, train_options  # late: an option that does not exist is said at once

    factory = options.method_factory(name) if name else None
    own, rest = train_options(module, factory), options.take_template(rest)
    options.check_names(rest, options.option_names(own))
    chosen = tyro.cli(
        own,
        args=options.spelled_out(rest, own),
        prog=f"sdjax train {arguments[0]}" + (f" --method {name}" if name else ""),
        description=(module.__doc__ or "").strip(),
    )
    return run(Path(arguments[0]), module, factory, options.shallow(chosen), start or "")


def methods(arguments: list[str]) -> int:
    """`sdjax methods [NAME] [--json | --markdown]`"""
    from sdjax.cli import cards

    forms = ("--json", "--markdown")
    names = [a for a in arguments if a not in forms]
    if {"-h", "--help"} & {*names}:
        print(COMMANDS)
        return 0
    if unknown := [name for name in names if name.startswith("-")]:
        raise options.OptionError(f"sdjax methods has no option {unknown[0]}{nearest(unknown[0], forms)}")
    found = [cards.describe(name) for name in names or options.method_names()]
    if "--markdown" in arguments:
        print(cards.table(found))
    elif "--json" in arguments:
        print(json.dumps(found[0] if len(names) == 1 else found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(cards.page(d) for d in found) if names else cards.listing(found))
    return 0


def export(arguments: list[str]) -> int:
    """`sdjax export RUN@STEP ...`"""
    from sdjax.cli.export import export

    print(options.from_command_line(export, arguments, "sdjax export"))
    return 0


def evaluate(arguments: list[str]) -> int:
    """`sdjax evaluate MODEL --data FILE ...`"""
    from sdjax.cli.measure import measure
    from sdjax.devices.compilation import prepare_to_compile

    prepare_to_compile()
    print(options.from_command_line(measure, options.take_template(arguments), "sdjax evaluate"))
    return 0


def verify(arguments: list[str]) -> int:
    """`sdjax verify FILE --data FILE ...`"""
    from sdjax.cli.rewards import rewards

    print(options.from_command_line(rewards, arguments, "sdjax verify"))
    return 0


def report(arguments: list[str]) -> int:
    """`sdjax report RUN [RUN ...]`"""
    from sdjax.devices.compilation import prepare_to_compile
    from sdjax.report.report import report

    prepare_to_compile()
    print(options.from_command_line(report, arguments, "sdjax report"))
    return 0


def watch(arguments: list[str]) -> int:
    """`sdjax watch RUN [RUN ...]`"""
    from sdjax.report.watch import watch

    options.from_command_line(watch, arguments, "sdjax watch")
    return 0


def bench(arguments: list[str]) -> int:
    """`sdjax bench ...` and `sdjax bench --suite ...`"""
    from sdjax.cli.bench import bench
    from sdjax.cli.suite import suite
    from sdjax.devices.compilation import give_back_memory

    give_back_memory()
    if "--suite" in arguments:
        rest = [a for a in arguments if a != "--suite"]
        print(options.from_command_line(suite, rest, "sdjax bench --suite"))
        return 0
    for name, value in options.from_command_line(bench, arguments, "sdjax bench").items():
        print(f"{name:45s} {value:10.3f}")
    return 0


def plan(arguments: list[str]) -> int:
    """`sdjax plan ...`"""
    from sdjax.devices.compilation import prepare_to_compile
    from sdjax.planning import plan as planning
    from sdjax.planning import verdict

    chosen = of_method(planning.plan, arguments, "sdjax plan")
    prepare_to_compile()
    print(verdict.report(planning.plan(**chosen)))
    return 0


def scaling(arguments: list[str]) -> int:
    """`sdjax scaling ...`"""
    # Before jax looks for devices: eight that share this processor.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sdjax.planning import scaling as planning

    print(planning.table(planning.scaling(**of_method(planning.scaling, arguments, "sdjax scaling"))))
    return 0


def of_method(function: Any, arguments: list[str], command: str) -> dict[str, Any]:
    """The arguments of a function of a method: its own options and those of `--method`."""
    name, rest = options.take_option(arguments, "method")
    factory = options.method_factory(name or "sdpo")
    nested = options.options_class("MethodOptions", factory, {})
    extra = [("method", nested, dataclasses.field(default_factory=nested))]
    own = options.options_class("Options", function, {}, extra)
    options.check_names(rest, options.option_names(own))
    chosen = options.shallow(tyro.cli(own, args=rest, prog=command, description=function.__doc__))
    # Options that say nothing are left to the method: a plan may choose its teacher.
    given = {k: v for k, v in options.shallow(chosen["method"]).items() if v != getattr(nested(), k)}
    return {**chosen, "method": options.Choice(factory, given)}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done; 2: bad input, said in one sentence; 130 and 143: ended by SIGINT and SIGTERM, with everything saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(COMMANDS)
        return 0
    if arguments[0] == "--version":
        print(f"sdjax {__version__}")
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands = {
        "train": train,
        "export": export,
        "evaluate": evaluate,
        "verify": verify,
        "report": report,
        "watch": watch,
        "methods": methods,
        "bench": bench,
        "plan": plan,
        "scaling": scaling,
    }
    try:
        if arguments[0] not in commands:
            near = nearest(arguments[0], list(commands))
            raise options.OptionError(f"there is no command {arguments[0]!r}{near}")
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt as interrupt:
        print(f"sdjax: {str(interrupt) or 'SIGINT'}: ended; what was written before it is whole", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except Exception as error:
        from sdjax.devices import processes

        processes.leave(f"{type(error).__name__}: {error}")
        if not isinstance(error, InputError):
            raise
        print(f"sdjax: {error}", file=sys.stderr)
        return 2


def program() -> None:
    """What the shell runs: `main`, whose status ends the process."""
    from sdjax.devices.processes import disconnect

    status = main()
    if status >= 128:
        disconnect()
    if status:
        # XLA's threads may be at work: an interpreter being taken apart would crash them.  Others may wait for a bucket.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
