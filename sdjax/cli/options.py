"""Command lines from function signatures: an experiment's keyword arguments and a method's, with types and defaults."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sdjax import methods
from sdjax.errors import InputError, nearest
from sdjax.ranges import out_of_range
from sdjax.types import Method


class OptionError(InputError, ValueError):
    """A command line names something that does not exist."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method's factory with some of its options chosen; the experiment offers the rest when it calls it.

    `change` is applied to the method that comes out: controls, instruments.
    """

    factory: Callable[..., Method]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[Method], Method] = lambda method: method

    def __call__(self, **offered: Any) -> Method:
        """The method.  What is offered and is no argument of the factory (a lesson, for GRPO) is left out."""
        known = inspect.signature(self.factory).parameters
        return self.change(self.factory(**{k: v for k, v in offered.items() if k in known}, **self.options))

    def first(self, change: Callable[[Method], Method]) -> Choice:
        """The choice whose method is changed so before what the command line asks for."""
        return dataclasses.replace(self, change=lambda method: self.change(change(method)))


def method_names() -> list[str]:
    """Every method: the modules of `sdjax.methods`, each with a factory of its own name."""
    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__))


def method_factory(name: str) -> Callable[..., Method]:
    """The factory of a method by name (dashes count as underscores).  Raises `OptionError` with the nearest names."""
    module = name.replace("-", "_")
    if module not in method_names():
        raise OptionError(f"there is no method {name!r}{nearest(module, method_names())}: see `sdjax methods`")
    return getattr(importlib.import_module(f"sdjax.methods.{module}"), module)


def load_experiment(path: str) -> types.ModuleType:
    """The module of an experiment file.  Raises `OptionError` if there is none or it has no `experiment` function."""
    file = Path(path)
    if not file.is_file():
        near = nearest(str(file), [str(p) for p in Path("experiments").rglob("*.py")])
        raise OptionError(f"there is no experiment file {path}{near}")
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise OptionError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        raise OptionError(f"{path}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "experiment", None)):
        raise OptionError(f"{path} has no function `experiment(*, ...) -> Experiment`")
    return module


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` and the other arguments.  Raises `OptionError` if it has no value."""
    rest, value, i = [], None, 0
    while i < len(arguments):
        if arguments[i] == f"--{name}":
            if i + 1 == len(arguments) or arguments[i + 1].startswith("--"):
                raise OptionError(f"--{name} needs a value")
            value, i = arguments[i + 1], i + 2
        elif arguments[i].startswith(f"--{name}="):
            value, i = arguments[i].split("=", 1)[1], i + 1
        else:
            rest.append(arguments[i])
            i += 1
    return value, rest


def check_ranges(group: str, function: Callable, chosen: Mapping[str, Any]) -> None:
    """Raises `OptionError` for a number that its type does not allow, as it was typed: `--method.group-size 0`."""
    for name, said in out_of_range(function, chosen).items():
        value = chosen[name]
        typed = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
        raise OptionError(f"--{group}.{name.replace('_', '-')} {typed}: {said}")


def take_template(arguments: Sequence[str]) -> list[str]:
    """Arguments in which every `--template.NAME VALUE` has become a field of one `--template '{"name": value}'`.

    A value is read as JSON where it can be, else as text.  Raises `OptionError` for one without a value.
    """
    found, rest = {}, list(arguments)
    for name in dict.fromkeys(a.split("=", 1)[0] for a in arguments if a.startswith("--template.")):
        value, rest = take_option(rest, name.removeprefix("--"))
        found[name.removeprefix("--template.").replace("-", "_")] = as_value(value or "")
    return [*rest, "--template", json.dumps(found)] if found else rest


def as_value(text: str) -> Any:
    """What a text says as JSON, `True` and `False` in any case; the text itself where it is none."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def check_names(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raises `OptionError` for an option `--name` that is not known, with the nearest names."""
    known = ["help", *(name.replace("_", "-") for name in known)]
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0].replace("_", "-")
        if argument.startswith("--") and name.removeprefix("no-") not in known:
            raise OptionError(f"there is no option --{name}{nearest(f'--{name}', [f'--{k}' for k in known])}")


def spelled_out(arguments: Sequence[str], options: type) -> list[str]:
    """The arguments with `--remat` as `--remat True` and `--no-remat` as `--remat False`, for booleans that may be `None`."""
    optional = {name.replace("_", "-") for name, field in all_options(options).items() if may_be_none(field.type)}
    arguments, found = list(arguments), []
    for position, argument in enumerate(arguments):
        name = argument.removeprefix("--").replace("_", "-")
        said = arguments[position + 1 : position + 2] in (["True"], ["False"], ["None"])
        if argument.startswith("--no-") and name.removeprefix("no-") in optional:
            found += [f"--{name.removeprefix('no-')}", "False"]
        else:
            found += [argument, "True"] if argument.startswith("--") and name in optional and not said else [argument]
    return found


def may_be_none(hint: Any) -> bool:
    """Whether a type is a boolean or `None`."""
    hint = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    return {*typing.get_args(hint)} == {bool, type(None)}


def all_options(options: type) -> dict[str, dataclasses.Field]:
    """The options of an `options_class` by name: those under a heading by their own, others nested as `method.name`."""
    found = {}
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.default_factory):
            prefix = "" if issubclass(field.default_factory, Heading) else f"{field.name}."
            found |= {f"{prefix}{name}": own for name, own in all_options(field.default_factory).items()}
        else:
            found[field.name] = field
    return found


def option_names(options: type) -> list[str]:
    """Names of all options of an `options_class`, and of what they are nested in."""
    names = list(all_options(options))
    return [*names, *dict.fromkeys(name.split(".")[0] for name in names if "." in name)]


def default_values(options: type) -> dict[str, Any]:
    """The defaults of all options of an `options_class` that have one."""
    options = all_options(options).items()
    return {name: field.default for name, field in options if field.default is not dataclasses.MISSING}


def help_texts(options: type) -> dict[str, str]:
    """What `--help` says of each option of an `options_class`."""
    texts = {}
    for name, field in all_options(options).items():
        marks = [mark for mark in getattr(field.type, "__metadata__", ()) if hasattr(mark, "help")]
        texts[name] = marks[0].help or "" if marks else ""
    return texts


def argument_help(function: Callable) -> dict[str, str]:
    """What a docstring's `Args:` section says of each argument."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    found, name = {}, None
    for line in (section.group(1) if section else "").splitlines():
        start = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
        if start:
            name = start.group(1)
            found |= {n: start.group(2) for n in name.split(", ")}
        elif name and line.strip():
            found |= {n: f"{found[n]} {line.strip()}" for n in name.split(", ")}
    return found


def is_plain(hint: Any) -> bool:
    """Whether a type can be written on a command line: numbers, text, booleans, literals, tuples and options of them."""
    if hint in (int, float, str, bool, type(None)):
        return True
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    return origin in (tuple, types.UnionType, typing.Union) and all(
        is_plain(a) for a in typing.get_args(hint) if a is not Ellipsis
    )


class Heading:
    """The base of classes whose options stand under a heading of `--help` and keep their plain names."""


def under_headings(settings: Any) -> list[tuple[str, Any, Any]]:
    """Fields for `dataclasses.make_dataclass` from a frozen dataclass of settings: one nested class per heading.

    The fields of `settings` say `heading` and `help` in their metadata, else the class by its name and its docstring; its
    values are the defaults.
    """
    hints, groups = typing.get_type_hints(type(settings)), {}
    texts, heading = argument_help(type(settings)), type(settings).__name__.lower()
    for field in dataclasses.fields(settings):
        said = field.metadata.get("help", texts.get(field.name, ""))
        hint = Annotated[hints[field.name], tyro.conf.arg(help=said)]
        own = (field.name, hint, dataclasses.field(default=getattr(settings, field.name)))
        groups.setdefault(field.metadata.get("heading", heading), []).append(own)
    return [headed(heading, fields) for heading, fields in groups.items()]


def headed(heading: str, fields: Sequence[tuple]) -> tuple[str, Any, Any]:
    """A field that puts other fields under a heading of `--help`."""
    group = dataclasses.make_dataclass(heading.title(), fields, frozen=True, bases=(Heading,))
    return heading, Annotated[group, tyro.conf.OmitArgPrefixes], dataclasses.field(default_factory=group)


def options_class(name: str, function: Callable, defaults: Mapping[str, Any], extra: Sequence = ()) -> type:
    """A dataclass with one field per plain keyword argument of a function, and `extra` fields.

    An argument whose default is a dataclass (`Settings`) becomes options of its own, under headings; one that is only
    positional stays so.
    """
    hints, texts = typing.get_type_hints(function), argument_help(function)
    fields = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, str)
        if dataclasses.is_dataclass(parameter.default):
            fields += under_headings(parameter.default)
        if not is_plain(hint):
            continue
        default = defaults.get(parameter.name, parameter.default)
        annotated = Annotated[hint, tyro.conf.arg(help=texts.get(parameter.name, ""))]
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            said = tyro.conf.arg(help=texts.get(parameter.name, ""), metavar=parameter.name.upper())
            annotated = tyro.conf.Positional[Annotated[hint, said]]
        if default is inspect.Parameter.empty:
            fields.insert(0, (parameter.name, annotated))
        else:
            fields.append((parameter.name, annotated, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, [*fields, *extra], frozen=True)


def shallow(options: Any) -> dict[str, Any]:
    """A dataclass's fields as a dictionary, without following into values other than headings."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        found |= shallow(value) if isinstance(value, Heading) else {field.name: value}
    return found


def call(function: Callable, chosen: Mapping[str, Any]) -> Any:
    """A function's result for chosen options; those of an argument that is a dataclass are put into it."""
    chosen, arguments, first = dict(chosen), {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            first.append(chosen.pop(parameter.name))
        if dataclasses.is_dataclass(parameter.default):
            names = [field.name for field in dataclasses.fields(parameter.default)]
            own = {name: chosen.pop(name) for name in names}
            arguments[parameter.name] = dataclasses.replace(parameter.default, **own)
    return function(*first, **chosen, **arguments)


def from_command_line(function: Callable, arguments: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """A function's result for options, by default those that this process was started with; `--help` shows them.

    Raises: `OptionError` for an option that does not exist.
    """
    known, arguments = options_class("Options", function, {}), sys.argv[1:] if arguments is None else arguments
    check_names(arguments, option_names(known))
    description = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip()
    return call(function, shallow(tyro.cli(known, args=arguments, prog=prog, description=description)))
