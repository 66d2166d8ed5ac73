"""Rotary position embeddings: the frequencies of every kind that config.json can ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    `inverse_frequencies` has `head_dim // 2` entries, radians per position; `scale` multiplies cosine and sine
    (1 except for YaRN).  `source` is what config.json says of it, as pairs: only `to_hf` needs it.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    source: tuple[tuple[str, Any], ...] = ()


def rope(
    head_dim: int, max_context: int, parameters: Mapping[str, Any] | None = None, where: str = "rope_parameters"
) -> Rope:
    """Rotary frequencies of one kind of layer, as the transformers library computes them.

    Args:
      head_dim: an even number.
      max_context: tokens; stands in for `original_max_position_embeddings` where that is missing.
      parameters: `rope_type` ("default", "linear", "llama3" or "yarn"), `rope_theta`, and what that type needs.

    Raises: ModelError for another type, or for a missing number; `where` names the place in the message.
    Source: Su et al. 2021, arXiv:2104.09864; YaRN: Peng et al. 2023, arXiv:2309.00071.
    """
    parameters = dict(parameters or {})
    old_name = parameters.pop("type", None)
    parameters["rope_type"] = parameters.get("rope_type") or old_name or "default"
    parameters.setdefault("rope_theta", 10_000.0)
    fields = Fields(parameters, where)
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in _SCALINGS:
        fields.refuse(f"rope type {kind!r} is not supported; supported are {', '.join(_SCALINGS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        fields.refuse("'partial_rotary_factor' other than 1 is not supported")
    # float32 throughout, as in the reference: at position 10^4 the rounding of a frequency is visible in the angle.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = np.float32(1) / np.float32(fields.number("rope_theta")) ** exponents
    frequencies, scale = _SCALINGS[kind](base, fields, max_context)
    kept = ("rope_type", "rope_theta", *_ROPE_FIELDS[kind])
    source = tuple((name, parameters[name]) for name in kept if name in parameters)
    return Rope(tuple(float(f) for f in frequencies), float(scale), source)


def _linear(base: np.ndarray, fields: Fields, max_context: int) -> tuple[np.ndarray, float]:
    return base / np.float32(fields.number("factor")), 1.0


def _llama3(base: np.ndarray, fields: Fields, max_context: int) -> tuple[np.ndarray, float]:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        fields.refuse(f"'high_freq_factor' must be above 'low_freq_factor', found {high} and {low}")
    context = fields.number("original_max_position_embeddings", max_context)
    slowed = base / np.float32(fields.number("factor"))
    rotations = np.float32(context) * base / np.float32(2 * math.pi)
    kept = np.clip((rotations - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * slowed + kept * base, 1.0


def _yarn(base: np.ndarray, fields: Fields, max_context: int) -> tuple[np.ndarray, float]:
    """Dimensions that turn often are kept, those that turn rarely slowed by `factor`, a linear ramp between."""
    theta, half = fields.number("rope_theta"), len(base)
    context = fields.number("original_max_position_embeddings", max_context)
    factor = fields.number("factor", max_context / context if "factor" in fields.values else None)
    turning = lambda turns: half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)
    low, high = turning(fields.number("beta_fast", 32)), turning(fields.number("beta_slow", 1))
    if fields.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return (1 - kept) * (base / np.float32(factor)) + kept * base, _yarn_scale(fields, factor)


def _yarn_scale(fields: Fields, factor: float) -> float:
    """`attention_factor` if given, else `0.1 ln(factor) + 1`, or a ratio of two of those (DeepSeek)."""
    if fields.has("attention_factor"):
        return fields.number("attention_factor")
    grown = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    if fields.values.get("mscale") and fields.values.get("mscale_all_dim"):
        return grown(fields.number("mscale")) / grown(fields.number("mscale_all_dim"))
    return grown(1)


_SCALINGS = {
    "default": lambda base, fields, max_context: (base, 1.0),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
