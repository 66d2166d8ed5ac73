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

    `inverse_frequencies` has `head_dim // 2` entries, radians per position, or fewer: the features beyond stay as they
    are.  `scale` multiplies cosine and sine (1 except for YaRN and LongRoPE).  `source` is what config.json says of it, as pairs: only
    `to_hf` needs it.  `longer` are LongRoPE's frequencies for texts of more than `original` tokens.  With `growth`, a
    query at position `p` is multiplied by `1 + growth log(1 + floor(p / original))` (Ministral 3).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    source: tuple[tuple[str, Any], ...] = ()
    original: int = 0
    longer: tuple[float, ...] = ()
    growth: float = 0.0

    def reaching(self, tokens: int) -> Rope:
        """The rope of texts of up to so many tokens."""
        if not self.longer or tokens <= self.original:
            return self
        return dataclasses.replace(self, inverse_frequencies=self.longer)


NO_ROPE = Rope(())
"""A layer that rotates nothing (SmolLM3)."""


ORIGINAL, GROWTH, PARTIAL = "original_max_position_embeddings", "llama_4_scaling_beta", "partial_rotary_factor"


def rope(
    head_dim: int, max_context: int, parameters: Mapping[str, Any] | None = None, where: str = "rope_parameters"
) -> Rope:
    """Rotary frequencies of one kind of layer, as the transformers library computes them.

    Args:
      head_dim: an even number.
      max_context: tokens; stands in for `original_max_position_embeddings` where that is missing.
      parameters: `rope_type` ("default", "linear", "llama3", "yarn", "longrope" or "proportional"), `rope_theta`, `partial_rotary_factor`
        (the share of a head that is rotated), and what that type needs.

    Raises: ModelError for another type, or for a missing number; `where` names the place in the message.
    Source: Su et al. 2021, arXiv:2104.09864; YaRN: Peng et al. 2023, arXiv:2309.00071; LongRoPE: Ding et al. 2024,
    arXiv:2402.13753.
    """
    parameters = dict(parameters or {})
    old_name = parameters.pop("type", None)
    parameters["rope_type"] = parameters.get("rope_type") or old_name or "default"
    parameters["rope_type"] = "longrope" if parameters["rope_type"] == "su" else parameters["rope_type"]
    parameters.setdefault("rope_theta", 10_000.0)
    fields = Fields(parameters, where)
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in _SCALINGS:
        fields.refuse(f"rope type {kind!r} is not supported; supported are {', '.join(_SCALINGS)}")
    # Of a proportional rope the factor says how many frequencies of a whole head are not 0.
    turned = head_dim if kind == "proportional" else int(head_dim * fields.number(PARTIAL, 1.0))
    if turned % 2 or not 0 < turned <= head_dim:
        fields.refuse(
            f"'partial_rotary_factor' must leave an even number of a head's {head_dim} features, found {turned}"
        )
    # float32 throughout, as in the reference: at position 10^4 the rounding of a frequency is visible in the angle.
    exponents = np.arange(0, turned, 2, dtype=np.float32) / np.float32(turned)
    base = np.float32(1) / np.float32(fields.number("rope_theta")) ** exponents
    frequencies, scale = _SCALINGS[kind](base, fields, max_context)
    kept = {"rope_type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind]}
    growth = fields.number(GROWTH) if fields.has(GROWTH) else 0.0
    kept |= {GROWTH, ORIGINAL} if growth else set()
    hashable = lambda value: tuple(value) if isinstance(value, list) else value
    source = tuple((name, hashable(parameters[name])) for name in sorted(kept) if fields.has(name))
    longer = _longrope(base, fields, max_context, "long_factor")[0] if kind == "longrope" else ()
    return Rope(
        tuple(map(float, frequencies)),
        float(scale),
        source,
        original=fields.integer(ORIGINAL, max_context) if growth or kind == "longrope" else 0,
        longer=tuple(map(float, longer)),
        growth=growth,
    )


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


def _longrope(
    base: np.ndarray, fields: Fields, max_context: int, which: str = "short_factor"
) -> tuple[np.ndarray, float]:
    """Each frequency is slowed by a factor of its own; there is a list for short texts and one for long ones."""
    factors = fields.values.get(which)
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf
    if not isinstance(factors, (list, tuple)) or len(factors) != len(base) or not all(map(number, factors)):
        fields.refuse(f"{which!r} must be a list of {len(base)} positive numbers, found {factors!r}")
    context = fields.number(ORIGINAL, max_context)
    factor = fields.number("factor", max_context / context)
    grown = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return base / np.asarray(factors, np.float32), fields.number("attention_factor", grown)


def _proportional(base: np.ndarray, fields: Fields, max_context: int) -> tuple[np.ndarray, float]:
    """The fastest frequencies of a whole head, `partial_rotary_factor` of them; the others are 0 (Gemma 4)."""
    share = fields.number(PARTIAL, 1.0)
    if share > 1:
        fields.refuse(f"{PARTIAL!r} must be at most 1, found {share}")
    turning = np.arange(len(base)) < int(share * len(base))
    return np.where(turning, base, np.float32(0)) / np.float32(fields.number("factor", 1.0)), 1.0


_SCALINGS = {
    "default": lambda base, fields, max_context: (base, 1.0),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
