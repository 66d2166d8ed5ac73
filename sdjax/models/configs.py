"""The shape of a decoder: one frozen dataclass for every supported family, read from and written as config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.models.delta_shapes import DeltaShape
from sdjax.models.families import FAMILIES, OPTIONAL, Asked, Family, supported
from sdjax.models.family_layers import attention_kinds, rope_parameters
from sdjax.models.fields import Fields, ModelError, read_fields
from sdjax.models.files.mxfp4 import is_mxfp4
from sdjax.models.layer_kinds import DELTA, FULL, LAYER_KINDS, full, rotating_as_named
from sdjax.models.layer_shapes import LayerShapes
from sdjax.models.ropes import NO_ROPE, ORIGINAL, Rope, rope
from sdjax.models.routing import Moe
from sdjax.models.wrapped import text_fields


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know; hashable, so that it can be a static argument of `jax.jit`.

    `windows` has one entry per layer: `None` attends to everything before, `n` to the last `n` tokens (itself
    included).  `ropes` has one entry per layer too.  `qk_norm` is "none", "head" (RMS norm over each head, Qwen3) or
    "flat" (over all heads together, OLMo).  `norms` says what is normalised: each sublayer's input ("before"), its
    output ("after", OLMo), or "both" (Gemma); a norm multiplies by `norm_offset` plus its scale.  Attention scores are
    divided by the root of `query_scalar` (`None`: of `head_dim`), or multiplied by `score_scale` if there is one.  What a
    sublayer adds is multiplied by `residual_scale`, logits are divided by `logit_divisor` (Granite); a cap `c` turns scores or logits `x` into
    `c tanh(x / c)`.  `fused` is of files only: one tensor holds queries, keys and values, one gate and up (Phi-3).
    Layers of `delta_layers` are gated delta nets of the shape `delta`; with `gated_attention` what a head reads is
    multiplied by the sigmoid of a gate (Qwen3.5).  With `value_norm` values have RMS norms without a scale, with
    `layer_scale` what a layer gives is multiplied by a number that is not trained, and `shapes` are what layers have of
    their own (Gemma 4).
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
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    norms: str = "before"
    norm_offset: float = 0.0
    activation: str = "silu"
    fused: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    query_scalar: float | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    moe: Moe | None = None
    sinks: bool = False
    gated_attention: bool = False
    delta: DeltaShape | None = None
    delta_layers: tuple[bool, ...] = ()
    value_norm: bool = False
    layer_scale: bool = False
    shapes: LayerShapes | None = None

    def reaching(self, tokens: int | None) -> ModelConfig:
        """The same model for texts of up to so many tokens: LongRoPE has other frequencies for long ones."""
        if tokens is None or not any(rope.longer for rope in self.ropes):
            return self
        return dataclasses.replace(self, ropes=tuple(rope.reaching(tokens) for rope in self.ropes))

    def has_experts(self, layer: int) -> bool:
        """Whether a mixture of experts stands in place of a layer's MLP."""
        return self.moe is not None and layer not in self.moe.dense

    @property
    def hidden_units(self) -> int:
        """Hidden units of a layer that a token goes through, at most."""
        dense = self.moe is None or any(not self.has_experts(layer) for layer in range(self.layers))
        mlp = max(self.mlp_units(layer) for layer in range(self.layers)) if dense else 0
        return max(mlp, self.moe.units if self.moe else 0)

    def of_layers(self) -> list[tuple[Any, ...]]:
        """What one layer may have that another has not, for each layer: layers with equal entries do the same."""
        mixed = [self.has_experts(layer) for layer in range(self.layers)]
        return list(zip(*(getattr(self, name) or (None,) * self.layers for name in PER_LAYER), mixed, strict=True))

    def heads_of(self, layer: int) -> tuple[int, int]:
        """How many heads of keys a layer has, and how wide they are."""
        own = self.shapes is not None and self.windows[layer] is None
        return (self.shapes.kv_heads, self.shapes.head_dim) if own else (self.kv_heads, self.head_dim)

    def keys_of(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: itself, or the last of its kind that does not borrow."""
        lenders = self.layers - (self.shapes.borrowing if self.shapes else 0)
        alike = lambda other: (self.windows[other] is None) == (self.windows[layer] is None)
        return layer if layer < lenders else max(filter(alike, range(lenders)))

    def key_products(self, layer: int) -> int:
        """Products of a group of heads besides the queries': key and value, both in one, or none where they are borrowed."""
        if self.keys_of(layer) != layer:
            return 0
        return 1 if self.shapes and self.shapes.keys_as_values and self.windows[layer] is None else 2

    def mlp_units(self, layer: int) -> int:
        """Hidden units of a layer's MLP."""
        wide = self.shapes is not None and self.shapes.wide_mlp and self.keys_of(layer) != layer
        return self.mlp_width * (2 if wide else 1)

    @property
    def alike(self) -> bool:
        """Whether a layer needs nothing of those before it but what they give."""
        return self.shapes is None or not (self.shapes.borrowing or self.shapes.inputs)

    def has_delta(self, layer: int) -> bool:
        """Whether a layer is a gated delta net instead of attention."""
        return bool(self.delta_layers) and self.delta_layers[layer]

    def first(self, layers: int) -> ModelConfig:
        """The same model with its first layers alone."""
        per_layer = {name: getattr(self, name)[:layers] for name in PER_LAYER}
        shapes = self.shapes and self.shapes.of_first(layers, self.layers)
        return dataclasses.replace(self, layers=min(layers, self.layers), shapes=shapes, **per_layer)


BIASES = ("qkv_bias", "out_bias", "mlp_bias")
"""The fields of `ModelConfig` that say which products have biases."""

PER_LAYER = ("windows", "ropes", "delta_layers")
"""The fields of `ModelConfig` with one entry per layer (or none, for what no layer has)."""


# ---- config.json to ModelConfig and back --------------------------------------------------------------------------


def from_hf(config: Mapping[str, Any] | str | Path) -> ModelConfig:
    """The configuration in a config.json of the transformers library, in its present or its older layout.

    Args:
      config: what the file holds, the file, or the folder it is in.

    Raises: ModelError for a file that cannot be read, for a family, rope type or variant that is not supported, and
    for a field that is missing or makes no sense; the message names the file and the field.
    """
    fields = text_fields(read_fields(config))
    name = _family_name(fields)
    family = FAMILIES[name]
    _refuse_variants(fields, family)
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
    kinds, windows = attention_kinds(fields, family)
    shapes = LayerShapes.read(fields, [k == FULL for k in kinds], head_dim, kv_heads) if family.own_shapes else None
    width_of = lambda kind: shapes.head_dim if shapes and kind == FULL else head_dim
    ropes = {
        kind: rope(width_of(kind), max_context, parameters, fields.where)
        for kind, parameters in rope_parameters(fields, family, kinds).items()
    }
    rotates = family.rotates(fields, kinds) if family.rotates else [kind != DELTA for kind in kinds]
    scales = {ours: _optional(fields, family, name, ours) for name, ours in OPTIONAL.items()}
    if scales["embedding_scale"] is None:
        scales["embedding_scale"] = width**0.5
    moe = family.experts and family.experts.read(fields, len(kinds))
    return ModelConfig(
        family=name,
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=len(kinds),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        # Where all layers have experts, it need not be said and counts for nothing.
        mlp_width=fields.integer("intermediate_size", moe.width if moe and not moe.dense else None),
        norm_eps=fields.number("rms_norm_eps"),
        max_context=max_context,
        tied_embeddings=fields.flag("tie_word_embeddings", family.tied_embeddings),
        windows=windows,
        ropes=tuple(ropes[kind] if turns else NO_ROPE for kind, turns in zip(kinds, rotates, strict=True)),
        **{bias: _stated(fields, getattr(family, bias)) for bias in BIASES},
        qk_norm=family.qk_norm,
        norms=family.norms,
        norm_offset=family.norm_offset,
        moe=moe,
        activation=_ACTIVATIONS[fields.values.get(family.activation_field) or _named_activation(family.activation)],
        fused=family.fused,
        sinks=family.sinks,
        gated_attention=family.gated_attention,
        value_norm=family.value_norm,
        layer_scale=family.layer_scale,
        shapes=shapes,
        delta=DeltaShape.read(fields) if DELTA in kinds else None,
        delta_layers=tuple(kind == DELTA for kind in kinds) if DELTA in kinds else (),
        **scales,
    )


def _family_name(fields: Fields) -> str:
    if not fields.has("model_type"):
        fields.refuse(f"the field 'model_type' is missing; {supported()}")
    name = fields.values["model_type"]
    if not isinstance(name, str) or name not in FAMILIES:
        fields.refuse(f"model type {name!r} is not supported; {supported()}")
    architectures = fields.names("architectures", [FAMILIES[name].architecture])
    if FAMILIES[name].architecture not in architectures:
        fields.refuse(f"architecture {', '.join(architectures)} is not supported; {supported()}")
    return name


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Our names of activations by those of config.json."""


def _named_activation(activation: str) -> str:
    return next(name for name, ours in _ACTIVATIONS.items() if ours == activation)


def _stated(fields: Fields, fact: bool | Asked) -> bool:
    """A fact of a family, or what config.json says of it."""
    return fields.flag(*fact) if isinstance(fact, Asked) else fact


def _optional(fields: Fields, family: Family, name: str, ours: str) -> float | None:
    """A number that some families read; null is none."""
    if name not in family.optional or name not in fields.values:
        return getattr(family, ours)
    return fields.number(name) if fields.has(name) else None


def _refuse_variants(fields: Fields, family: Family) -> None:
    """What a supported family's config.json can ask for and this decoder does not do."""
    activation = fields.values.get(family.activation_field)
    if activation is not None and activation not in _ACTIVATIONS:
        fields.refuse(f"{family.activation_field!r} {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    if fields.values.get("use_bidirectional_attention") not in (None, False, "vision"):  # of texts there is no vision
        fields.refuse("'use_bidirectional_attention' is not supported: a text is written from left to right")
    if fields.values.get("enable_moe_block") and family.own_shapes:
        fields.refuse("'enable_moe_block' is not supported: experts beside an MLP, as in Gemma 4 26B-A4B")
    packed = family.sinks and is_mxfp4(fields.section("quantization_config"))
    if fields.has("quantization_config") and not packed:
        fields.refuse("quantised weights ('quantization_config') are not supported; use the unquantised model")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """What goes into a config.json that the transformers library (5 or later) opens; `from_hf` inverts it.

    Raises: ModelError for a configuration that its family cannot express there (say, two lengths of window).
    """
    if config.family not in FAMILIES:
        raise ModelError(f"family {config.family!r} is not supported; supported are {', '.join(FAMILIES)}")
    family, kinds = FAMILIES[config.family], [LAYER_KINDS[window is not None] for window in config.windows]
    kinds = [DELTA if config.has_delta(layer) else kind for layer, kind in enumerate(kinds)]
    listed = lambda value: list(value) if isinstance(value, tuple) else value
    parameters = {
        kind: {name: listed(value) for name, value in entry.source}
        for kind, entry in zip(kinds, config.ropes, strict=False)
        if entry != NO_ROPE
    }
    result = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        family.activation_field: _named_activation(config.activation),
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": parameters if family.rope_by_kind else next(iter(parameters.values()), {}),
        "dtype": "float32",
        # Written out, because the defaults of some families lie outside a small vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    windows = [window for window in config.windows if window is not None]
    if family.layer_types:
        result["layer_types"] = kinds
    if family.kinds is not full:
        result["sliding_window"] = windows[0] if windows else None
    facts = {bias: getattr(family, bias) for bias in BIASES}
    result |= {fact.field: getattr(config, bias) for bias, fact in facts.items() if isinstance(fact, Asked)}
    if config.moe is not None:
        result |= family.experts.written(config.moe)
    if family.window_by_choice:
        first = next((layer for layer, window in enumerate(config.windows) if window is not None), config.layers)
        result["use_sliding_window"] = first < config.layers
        result |= {"max_window_layers": first} if family.rotates is None else {}
    if family.original_context is not None:
        result[ORIGINAL] = next(iter(parameters.values()), {}).get(ORIGINAL, family.original_context)
    if family.rotates is rotating_as_named:
        result["no_rope_layers"] = [int(entry != NO_ROPE) for entry in config.ropes]
    if config.delta is not None:
        result |= config.delta.written()
    if config.shapes is not None:
        result |= config.shapes.written()
    result |= {name: getattr(config, OPTIONAL[name]) for name in family.optional}
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
