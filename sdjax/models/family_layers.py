"""What config.json says of a model's layers, by its family: their kinds, windows and ropes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.models.families import Family
from sdjax.models.fields import Fields
from sdjax.models.layer_kinds import DELTA, FULL, LAYER_KINDS, SLIDING
from sdjax.models.ropes import ORIGINAL, PARTIAL


def attention_kinds(fields: Fields, family: Family) -> tuple[list[str], tuple[int | None, ...]]:
    """What every layer is called in `layer_types`, and its window.  Raises ModelError."""
    layers = fields.integer("num_hidden_layers")
    unused = family.window_by_choice and (not fields.flag("use_sliding_window") or fields.is_null("sliding_window"))
    kinds = [FULL] * layers if unused else family.kinds(fields, layers)
    if family.layer_types and not unused:
        kinds = fields.names("layer_types", kinds)
    known = (*LAYER_KINDS, DELTA) if family.delta else LAYER_KINDS
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        fields.refuse(f"layer type {unknown[0]!r} is not supported; supported are {', '.join(known)}")
    if len(kinds) != layers:
        fields.refuse(f"'layer_types' names {len(kinds)} layers, 'num_hidden_layers' says {layers}")
    window = fields.integer("sliding_window", family.window) if SLIDING in kinds else None
    return kinds, tuple(window if kind == SLIDING else None for kind in kinds)


def rope_parameters(fields: Fields, family: Family, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The parameters for each kind of layer, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`.

    Raises: ModelError for a layout that the family does not have.
    """
    kinds = tuple(dict.fromkeys(kinds))
    found, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    nested = {kind: found[kind] for kind in LAYER_KINDS if kind in found}
    for kind, value in nested.items():
        if value is not None and not isinstance(value, Mapping):
            fields.refuse(f"'rope_parameters' of {kind!r} must be an object, found {value!r}")
    if nested and not family.rope_by_kind:
        fields.refuse(f"'rope_parameters' per layer type is not supported in a {family.architecture}")
    if found and not nested and family.rope_by_kind:
        fields.refuse(f"'rope_parameters' of a {family.architecture} must be given per layer type")
    shared = {"rope_theta": fields.number("rope_theta", family.rope_theta)}
    if fields.has(PARTIAL) or family.partial_rotary not in (None, 1.0):
        shared[PARTIAL] = fields.values.get(PARTIAL) or family.partial_rotary
    if family.original_context is not None:
        for section in filter(None, (found, scaling)):
            section[ORIGINAL] = fields.integer(ORIGINAL, family.original_context)
    if family.rope_by_kind:
        # Scaling stretches only the layers that see the whole context: a window never reaches that far.
        nested.setdefault(FULL, scaling or dict(family.full_rope))
        local = {"rope_theta": fields.number("rope_local_base_freq", family.local_theta)} if family.local_theta else {}
        given = {kind: {**shared, **(local if kind == SLIDING else {}), **(nested.get(kind) or {})} for kind in kinds}
    else:
        given = {kind: {**shared, **(found or scaling)} for kind in kinds}
    return {
        kind: parameters if family.partial_rotary is not None else _whole(parameters)
        for kind, parameters in given.items()
    }


def _whole(parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a family whose class always rotates whole heads: plain ropes, whatever `partial_rotary_factor` says."""
    scaled = (parameters.get("rope_type") or parameters.get("type") or "default") != "default"
    return {name: value for name, value in parameters.items() if scaled or name != PARTIAL}
