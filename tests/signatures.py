"""What functions and classes do unless told otherwise: the defaults of a room, for tests that write them down."""

import importlib
import inspect
import pkgutil

PLAIN = (bool, int, float, str, tuple)


def plain_defaults(room):
    """`{"module.name": {parameter: value}}` of a room's public functions and classes; nothing, empty, and objects left out."""
    found = {}
    for name in (m.name for m in pkgutil.iter_modules(importlib.import_module(room).__path__)):
        module = importlib.import_module(f"{room}.{name}")
        own = {n: x for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
        for thing, value in own.items():
            if not thing.startswith("_") and callable(value) and not is_error(value):
                found |= {f"{name}.{thing}": defaults} if (defaults := of(value)) else {}
    return found


def is_error(value):
    return isinstance(value, type) and issubclass(value, Exception)


def of(function):
    """The defaults of one function that are plain values."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return {}
    return {p.name: p.default for p in parameters if p.default != () and type(p.default) in PLAIN}


def listed(room, table):
    """What a room's functions have of the names in a table of defaults, in the table's form."""
    found = plain_defaults(room)
    return {name: {p: found.get(name, {}).get(p) for p in own} for name, own in table.items()}
