"""The shape of a decoder: one frozen dataclass for every supported family, read from and written as config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.models.fields import Fields, ModelError, read_fields
from sdjax.models.ropes import Rope, rope


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


# ---- config.json to ModelConfig and back --------------------------------------------------------------------------

_LAYER_KINDS = ("full_attention", "sliding_attention")


def _rope_parameters(fields: Fields, family: Family, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
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


def from_hf(config: Mapping[str, Any] | str | Path) -> ModelConfig:
    """The configuration in a config.json of the transformers library, in its present or its older layout.

    Args:
      config: what the file holds, the file, or the folder it is in.

    Raises: ModelError for a file that cannot be read, for a family, rope type or variant that is not supported, and
    for a field that is missing or makes no sense; the message names the file and the field.
    """
    fields = read_fields(config)
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


def _family_name(fields: Fields) -> str:
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


def _refuse_variants(fields: Fields) -> None:
    """What a supported family's config.json can ask for and this decoder does not do."""
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name):
            fields.refuse(f"{name!r} is true: biases other than Qwen2's on queries, keys and values are not supported")
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.refuse(f"'hidden_act' {activation!r} is not supported, only 'silu'")
    if fields.has("quantization_config"):
        fields.refuse("quantised weights ('quantization_config') are not supported; use the unquantised model")


def _attention_kinds(fields: Fields, name: str) -> tuple[list[str], tuple[int | None, ...]]:
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
