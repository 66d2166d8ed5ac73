"""A model's description in a file: fields with checks, and the error that names file and field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.errors import InputError


class ModelError(InputError, ValueError):
    """A model that cannot be read, written or supported; the message is one sentence for the person who asked."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """A mapping read from a config.json, and what to call it in messages."""

    values: Mapping[str, Any]
    where: str

    def refuse(self, sentence: str):
        """Raises `ModelError`: where, and the sentence."""
        raise ModelError(f"{self.where}: {sentence}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null, which is another thing than not being there."""
        return name in self.values and self.values[name] is None

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            self.refuse(f"the field {name!r} is missing")
        # `not value > 0` also refuses NaN, which json.loads accepts.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
            self.refuse(f"the field {name!r} must be a positive number, found {value!r}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(name, default)
        if not isinstance(value, int):
            self.refuse(f"the field {name!r} must be a whole number, found {value!r}")
        return value

    def names(self, name: str, default: list[str]) -> list[str]:
        """A list of texts."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            self.refuse(f"the field {name!r} must be a list of names, found {value!r}")
        return list(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"the field {name!r} must be true or false, found {value!r}")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object; none is an empty one."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(f"the field {name!r} must be an object, found {value!r}")
        return dict(value or {})


def read_fields(config: Mapping[str, Any] | str | Path) -> Fields:
    """The fields of a config.json: what it holds, the file, or its folder.  Raises `ModelError`."""
    if isinstance(config, Mapping):
        return Fields(config, "config.json")
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"there is no {path}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return Fields(values, str(path))
