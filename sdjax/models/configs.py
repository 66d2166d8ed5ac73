"""The shape of a decoder: one frozen dataclass for every supported family, read from and written as config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class ModelError(ValueError):
    """A model that cannot be read, written or supported; the message is one sentence for the person who asked."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    `inverse_frequencies` has `head_dim // 2` entries, radians per position; `scale` multiplies cosine and sine
    (1 except for YaRN).  `source` is what config.json says of it, as pairs: only `to_hf` needs it.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    source: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know; hashable, so that it can be a static argument of `jax.jit`.

    `windows` has one entry per layer: `None` attends to everything before, `n` to the last `n` tokens (itself
    included).  `ropes` has one entry per layer too.  `qk_norm` is "none", "head" (RMS norm over each head, Qwen3) or
    "flat" (over all heads together, OLMo).  With `post_norm` a sublayer's *output* is normalised (OLMo), else its input.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    max_context: int
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    qkv_bias: bool = False
    qk_norm: str = "none"
    post_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What a config.json leaves to the model's class in the transformers library."""

    architecture: str
    rope_theta: float = 10_000.0
    head_dim: int | None = None  # None: width / heads
    qkv_bias: bool = False
    qk_norm: str = "none"
    post_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", head_dim=128, qk_norm="head"),
    "olmo3": Family("Olmo3ForCausalLM", rope_theta=500_000.0, qk_norm="flat", post_norm=True),
}
"""The supported families by their `model_type` in config.json."""


# ---- fields of config.json ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A mapping read from a config.json, and what to call it in messages."""

    values: Mapping[str, Any]
    where: str

    def refuse(self, sentence: str):
        raise ModelError(f"{self.where}: {sentence}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            self.refuse(f"the field {name!r} is missing")
        # `not value > 0` also refuses NaN, which json.loads accepts.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
            self.refuse(f"the field {name!r} must be a positive number, found {value!r}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int):
            self.refuse(f"the field {name!r} must be a whole number, found {value!r}")
        return value

    def names(self, name: str, default: list[str]) -> list[str]:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
            self.refuse(f"the field {name!r} must be a list of names, found {value!r}")
        return list(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"the field {name!r} must be true or false, found {value!r}")
        return value

    def section(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(f"the field {name!r} must be an object, found {value!r}")
        return dict(value or {})


def _read(config: Mapping[str, Any] | str | Path) -> _Fields:
    if isinstance(config, Mapping):
        return _Fields(config, "config.json")
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
    return _Fields(values, str(path))


# ---- rotary position embedding ------------------------------------------------------------------------------------


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
    fields = _Fields(parameters, where)
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


def _linear(base: np.ndarray, fields: _Fields, max_context: int) -> tuple[np.ndarray, float]:
    return base / np.float32(fields.number("factor")), 1.0


def _llama3(base: np.ndarray, fields: _Fields, max_context: int) -> tuple[np.ndarray, float]:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        fields.refuse(f"'high_freq_factor' must be above 'low_freq_factor', found {high} and {low}")
    context = fields.number("original_max_position_embeddings", max_context)
    slowed = base / np.float32(fields.number("factor"))
    rotations = np.float32(context) * base / np.float32(2 * math.pi)
    kept = np.clip((rotations - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * slowed + kept * base, 1.0


def _yarn(base: np.ndarray, fields: _Fields, max_context: int) -> tuple[np.ndarray, float]:
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


def _yarn_scale(fields: _Fields, factor: float) -> float:
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


def _rope_parameters(fields: _Fields, family: Family, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The parameters for each kind of layer, from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
    found, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    nested = {kind: found[kind] for kind in _LAYER_KINDS if kind in found}
    for kind, value in nested.items():
        if value is not None and not isinstance(value, Mapping):
            fields.refuse(f"'rope_parameters' of {kind!r} must be an object, found {value!r}")
    if nested and family.architecture != "Olmo3ForCausalLM":
        fields.refuse(f"'rope_parameters' per layer type is not supported in a {family.architecture}")
    if found and not nested and family.architecture == "Olmo3ForCausalLM":
        fields.refuse("'rope_parameters' of an Olmo3ForCausalLM must be given per layer type")
    shared = {"rope_theta": fields.number("rope_theta", family.rope_theta)}
    if fields.has("partial_rotary_factor"):
        shared["partial_rotary_factor"] = fields.values["partial_rotary_factor"]
    if family.architecture == "Olmo3ForCausalLM":
        # Scaling stretches only the layers that see the whole context: a window never reaches that far.
        nested.setdefault("full_attention", scaling)
        return {kind: {**shared, **(nested.get(kind) or {})} for kind in kinds}
    return {kind: {**shared, **(found or scaling)} for kind in kinds}


# ---- config.json to ModelConfig and back --------------------------------------------------------------------------

_LAYER_KINDS = ("full_attention", "sliding_attention")


def from_hf(config: Mapping[str, Any] | str | Path) -> ModelConfig:
    """The configuration in a config.json of the transformers library, in its present or its older layout.

    Args:
      config: what the file holds, the file, or the folder it is in.

    Raises: ModelError for a file that cannot be read, for a family, rope type or variant that is not supported, and
    for a field that is missing or makes no sense; the message names the file and the field.
    """
    fields = _read(config)
    name = _family_name(fields)
    family = FAMILIES[name]
    _refuse_variants(fields)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.refuse(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if not fields.has("head_dim") and family.head_dim is None and width % heads:
        fields.refuse(f"'hidden_size' {width} is not a multiple of 'num_attention_heads' {heads}")
    head_dim = fields.integer("head_dim", family.head_dim or width // heads)
    if head_dim % 2:
        fields.refuse(f"the width of a head must be even, found {head_dim}")
    max_context = fields.integer("max_position_embeddings")
    kinds, windows = _attention_kinds(fields, name)
    ropes = {
        kind: rope(head_dim, max_context, parameters, fields.where)
        for kind, parameters in _rope_parameters(fields, family, tuple(dict.fromkeys(kinds))).items()
    }
    return ModelConfig(
        family=name,
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=len(kinds),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        max_context=max_context,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        windows=windows,
        ropes=tuple(ropes[kind] for kind in kinds),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        post_norm=family.post_norm,
    )


def _family_name(fields: _Fields) -> str:
    supported = "supported are " + ", ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())
    if not fields.has("model_type"):
        fields.refuse(f"the field 'model_type' is missing; {supported}")
    name = fields.values["model_type"]
    if not isinstance(name, str) or name not in FAMILIES:
        fields.refuse(f"model type {name!r} is not supported; {supported}")
    architectures = fields.names("architectures", [FAMILIES[name].architecture])
    if FAMILIES[name].architecture not in architectures:
        fields.refuse(f"architecture {', '.join(architectures)} is not supported; {supported}")
    return name


def _refuse_variants(fields: _Fields) -> None:
    """What a supported family's config.json can ask for and this decoder does not do."""
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name):
            fields.refuse(f"{name!r} is true: biases other than Qwen2's on queries, keys and values are not supported")
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.refuse(f"'hidden_act' {activation!r} is not supported, only 'silu'")
    if fields.has("quantization_config"):
        fields.refuse("quantised weights ('quantization_config') are not supported; use the unquantised model")


def _attention_kinds(fields: _Fields, name: str) -> tuple[list[str], tuple[int | None, ...]]:
    """What every layer is called in `layer_types`, and its window."""
    layers = fields.integer("num_hidden_layers")
    no_window = "sliding_window" in fields.values and not fields.has("sliding_window")
    if name == "llama" or (name != "olmo3" and (no_window or not fields.flag("use_sliding_window"))):
        return ["full_attention"] * layers, (None,) * layers
    # Without `layer_types`: every fourth layer of OLMo 3 is full; Qwen's windows start at `max_window_layers`.
    full = 0 if fields.values.get("max_window_layers") == 0 else fields.integer("max_window_layers", 28)
    windowed = lambda layer: (layer + 1) % 4 != 0 if name == "olmo3" else layer >= full
    kinds = fields.names("layer_types", [_LAYER_KINDS[windowed(layer)] for layer in range(layers)])
    unknown = [kind for kind in kinds if kind not in _LAYER_KINDS]
    if unknown:
        fields.refuse(f"layer type {unknown[0]!r} is not supported; supported are {', '.join(_LAYER_KINDS)}")
    if len(kinds) != layers:
        fields.refuse(f"'layer_types' names {len(kinds)} layers, 'num_hidden_layers' says {layers}")
    window = (
        fields.integer("sliding_window", None if name == "olmo3" else 4096) if "sliding_attention" in kinds else None
    )
    return kinds, tuple(window if kind == "sliding_attention" else None for kind in kinds)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What goes into a config.json that the transformers library (5 or later) opens; `from_hf` inverts it.

    Raises: ModelError for a configuration that its family cannot express there (say, two lengths of window).
    """
    if config.family not in FAMILIES:
        raise ModelError(f"family {config.family!r} is not supported; supported are {', '.join(FAMILIES)}")
    kinds = [_LAYER_KINDS[window is not None] for window in config.windows]
    parameters = {kind: dict(entry.source) for kind, entry in zip(kinds, config.ropes, strict=False)}
    result = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "rope_parameters": parameters if config.family == "olmo3" else next(iter(parameters.values()), {}),
        "dtype": "float32",
        # Written out, because the defaults of some families lie outside a small vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.family != "llama":
        windows = [window for window in config.windows if window is not None]
        result |= {"layer_types": kinds, "sliding_window": windows[0] if windows else None}
    if config.family in ("qwen2", "qwen3"):
        full = next((layer for layer, window in enumerate(config.windows) if window is not None), config.layers)
        result |= {"use_sliding_window": full < config.layers, "max_window_layers": full}
    _check_expressible(config, result)
    return result


def _check_expressible(config: ModelConfig, written: dict[str, Any]) -> None:
    read = from_hf(written)
    names = [field.name for field in dataclasses.fields(config)]
    differing = [name for name in names if getattr(config, name) != getattr(read, name)]
    if differing:
        raise ModelError(
            f"a {config.family} config.json cannot express this configuration's {', '.join(differing)} "
            "(ropes must come from `rope` or `from_hf`)"
        )


# ---- well-known models, for planning ------------------------------------------------------------------------------


def _preset(family: str, sizes: str, **rest: Any) -> ModelConfig:
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip(names, map(int, sizes.split()), strict=True))
    return from_hf({"model_type": family, "rms_norm_eps": 1e-6, **numbers, **rest})


_OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

PRESETS: dict[str, ModelConfig] = {
    #                      vocabulary, context, width, MLP, layers, heads, key-value heads
    "smollm2-135m": _preset(
        "llama", "49152 8192 576 1536 30 9 3", rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True
    ),
    "qwen3-1.7b": _preset("qwen3", "151936 40960 2048 6144 28 16 8", rope_theta=1_000_000.0, tie_word_embeddings=True),
    "qwen3-8b": _preset("qwen3", "151936 40960 4096 12288 36 32 8", rope_theta=1_000_000.0),
    "deepseek-r1-distill-qwen-7b": _preset("qwen2", "152064 131072 3584 18944 28 28 4", rope_theta=10_000.0),
    "olmo3-7b-instruct": _preset(
        "olmo3", "100278 65536 4096 11008 32 32 32", sliding_window=4096, rope_scaling=_OLMO3_YARN
    ),
}
"""Configurations of public models, without their weights: what a plan of memory needs."""
