"""Rules by which families say what their layers are, where `layer_types` does not: with a window, a delta net, rotating."""

from __future__ import annotations

from collections.abc import Callable

from sdjax.models.fields import Fields

LAYER_KINDS = FULL, SLIDING = "full_attention", "sliding_attention"
"""What `layer_types` can call a layer that attends: to everything before it, or to a window."""


DELTA = "linear_attention"
"""What it calls a gated delta net."""


# ---- which layers have a window ----------------------------------------------------------------------------------------


def full(fields: Fields, layers: int) -> list[str]:
    """No layer has a window."""
    return [FULL] * layers


def windowed(fields: Fields, layers: int) -> list[str]:
    """Every layer has a window, if there is one."""
    return [FULL if fields.is_null("sliding_window") else SLIDING] * layers


def windowed_if_named(fields: Fields, layers: int) -> list[str]:
    """Every layer has a window, if `sliding_window` is written."""
    return [SLIDING if fields.has("sliding_window") else FULL] * layers


def windowed_by_choice(fields: Fields, layers: int) -> list[str]:
    """Layers from `max_window_layers` on have a window, if `use_sliding_window` says so (Qwen)."""
    first = border(fields)
    return [SLIDING if layer >= first else FULL for layer in range(layers)]


def border(fields: Fields) -> int:
    """`max_window_layers`, which may be 0."""
    return 0 if fields.values.get("max_window_layers") == 0 else fields.integer("max_window_layers", 28)


def windowed_by_turns(fields: Fields, layers: int) -> list[str]:
    """Every other layer before `max_window_layers` has a window, if `use_sliding_window` says so (Qwen2-MoE)."""
    last = border(fields)
    return [SLIDING if layer % 2 == 0 and layer < last else FULL for layer in range(layers)]


def full_every(period: int, named: str = "", others: str = SLIDING) -> Callable[[Fields, int], list[str]]:
    """The last of every `period` layers is full, the `others` are not; `named` is the field that can say another period."""

    def kinds(fields: Fields, layers: int) -> list[str]:
        every = fields.integer(named, period) if named else period
        return [FULL if (layer + 1) % every == 0 else others for layer in range(layers)]

    return kinds


def windowed_without_rope(fields: Fields, layers: int) -> list[str]:
    """Layers that rotate nothing have a window, if `use_sliding_window` says so (SmolLM3)."""
    return [FULL if rotates else SLIDING for rotates in rotating_as_named(fields, [FULL] * layers)]


def windowed_by_pattern(fields: Fields, layers: int) -> list[str]:
    """`sliding_window_pattern` such as "LLLG" or 4: local layers, then a global one; without a window all are (EXAONE 4)."""
    if fields.is_null("sliding_window"):
        return [FULL] * layers
    pattern = fields.values.get("sliding_window_pattern")
    if not isinstance(pattern, str):
        return full_every(4, "sliding_window_pattern")(fields, layers)
    if not pattern or {*pattern} - {*"LG"}:
        fields.refuse(f"'sliding_window_pattern' must be a number or letters L and G, found {pattern!r}")
    return [SLIDING if pattern[layer % len(pattern)] == "L" else FULL for layer in range(layers)]


# ---- which layers rotate queries and keys, where not all do ----------------------------------------------------------


def rotating_as_named(fields: Fields, kinds: list[str]) -> list[bool]:
    """`no_rope_layers` has 1 for those that do; without it all but every fourth (SmolLM3)."""
    layers = len(kinds)
    every = fields.integer("no_rope_layer_interval", 4)
    named = fields.values.get("no_rope_layers")
    if named is None:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(named, list) or len(named) < layers or any(entry not in (0, 1) for entry in named):
        fields.refuse(f"'no_rope_layers' must be a list of {layers} entries that are 0 or 1, found {named!r}")
    return [bool(entry) for entry in named[:layers]]


def rotating_in_windows(fields: Fields, kinds: list[str]) -> list[bool]:
    """Those with a window, where there is any window at all (EXAONE 4)."""
    return [kind == SLIDING or fields.is_null("sliding_window") for kind in kinds]
