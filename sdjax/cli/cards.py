"""The methods as text: for `sdjax methods` and for the table in `methods/README.md`, from each module's `CARD` and its factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.cli import options


def describe(name: str) -> dict[str, Any]:
    """A method's card, its options with their defaults and meanings, and its module.  Raises `OptionError`."""
    factory = options.method_factory(name)
    texts = options.argument_help(factory)
    arguments = {
        p.name: {
            "default": p.default
            if options.is_plain(type(p.default)) or isinstance(p.default, tuple)
            else str_of(p.default),
            "help": texts.get(p.name, ""),
        }
        for p in inspect.signature(factory).parameters.values()
    }
    card = importlib.import_module(factory.__module__).CARD
    return {"name": factory.__name__, **card._asdict(), "options": arguments}


def str_of(value: Any) -> str:
    """A default that is a function, by its name."""
    return getattr(value, "__name__", str(value))


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """One line per method: name, arXiv id, status, equation."""
    width = max(len(d["name"]) for d in found)
    lines = [f"{d['name']:{width}}  {d['arxiv'] or '-':10}  {d['status']:14}  {d['equation']}" for d in found]
    return "\n".join([*lines, "", "sdjax methods NAME says more."])


def page(d: Mapping[str, Any]) -> str:
    """Everything about one method."""
    lines = [
        f"{d['name']}: {d['paper']}" + (f", arXiv:{d['arxiv']}" if d["arxiv"] else ""),
        f"  loss       {d['equation']}",
        f"  student    {d['student']}",
        f"  teacher    {d['teacher']}",
        f"  reduction  {d['reduction']}",
        f"  status     {d['status']}",
        *[f"  differs    {text}" for text in d["differences"]],
        "  options",
    ]
    lines += [
        f"    {name} = {o['default']}" + (f": {o['help']}" if o["help"] else "") for name, o in d["options"].items()
    ]
    return "\n".join(lines)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The table in `methods/README.md`, in Markdown."""
    rows = ["| method | source | loss | teacher reads |", "|---|---|---|---|"]
    for d in found:
        paper = d["paper"].split(",")[0].split(":")[0]
        source = f"{paper}, [{d['arxiv']}](https://arxiv.org/abs/{d['arxiv']})" if d["arxiv"] else paper
        mark = "" if d["status"] == "paper" else f" ({d['status']})"
        loss = f"`{d['equation']}`"
        cells = (f"[`{d['name']}`]({d['name']}.py)", source + mark, loss, d["teacher"])
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)
