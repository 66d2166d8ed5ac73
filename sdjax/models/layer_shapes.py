"""What layers of one model have each of their own: sizes of heads, keys that they borrow, inputs (Gemma 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class LayerShapes:
    """Sizes of layers without a window, layers that borrow, and what a token gives each layer.

    Layers without a window have `kv_heads` heads of keys of the width `head_dim`; with `keys_as_values` what becomes their keys
    becomes their values, too.  The last `borrowing` layers have no keys of their own: they read those of the last layer of
    their kind (with a window or without) before them, and their MLPs are twice as wide with `wide_mlp`.  Every layer has an input
    of the width `inputs` (0: none) besides, by an embedding of `input_vocabulary` entries.
    """

    head_dim: int
    kv_heads: int
    keys_as_values: bool = False
    borrowing: int = 0
    wide_mlp: bool = False
    inputs: int = 0
    input_vocabulary: int = 0

    def of_first(self, layers: int, of: int) -> LayerShapes:
        """The same for the first layers of so many."""
        return dataclasses.replace(self, borrowing=max(0, self.borrowing - (of - layers)))

    @classmethod
    def read(cls, fields: Fields, full: Sequence[bool], head_dim: int, kv_heads: int) -> LayerShapes:
        """From a config.json, with which layers have no window, and the sizes of the others.  Raises ModelError."""
        number = lambda name, default=0: fields.integer(name, default) if fields.values.get(name, default) else 0
        same = fields.flag("attention_k_eq_v")
        sizes = {"head_dim": fields.integer("global_head_dim", 512), "num_key_value_heads": kv_heads}
        if same and fields.has("num_global_key_value_heads"):
            sizes["num_key_value_heads"] = fields.integer("num_global_key_value_heads")
        sizes |= _by_layer(fields, full, {"head_dim": head_dim, "num_key_value_heads": kv_heads})
        borrowing = number("num_kv_shared_layers")
        own = set(full[: len(full) - borrowing])
        if not own >= set(full[len(full) - borrowing :]) or borrowing >= len(full):
            fields.refuse(f"'num_kv_shared_layers' {borrowing} leaves no layer of every kind whose keys could be read")
        inputs, vocabulary = number("hidden_size_per_layer_input", 256), number("vocab_size_per_layer_input", 262_144)
        if inputs and vocabulary < fields.integer("vocab_size"):
            fields.refuse(f"'vocab_size_per_layer_input' {vocabulary} is less than 'vocab_size'")
        return cls(
            head_dim=sizes["head_dim"],
            kv_heads=sizes["num_key_value_heads"],
            keys_as_values=same,
            borrowing=borrowing,
            wide_mlp=fields.flag("use_double_wide_mlp"),
            inputs=inputs,
            input_vocabulary=vocabulary if inputs else 0,
        )

    def written(self) -> dict[str, Any]:
        """The fields that `read` reads."""
        return {
            "global_head_dim": self.head_dim,
            "num_global_key_value_heads": self.kv_heads,
            "attention_k_eq_v": self.keys_as_values,
            "num_kv_shared_layers": self.borrowing,
            "use_double_wide_mlp": self.wide_mlp,
            "hidden_size_per_layer_input": self.inputs,
            "vocab_size_per_layer_input": self.input_vocabulary,
        }


def _by_layer(fields: Fields, full: Sequence[bool], others: Mapping[str, int]) -> dict[str, int]:
    """The sizes of layers without a window in `per_layer_config` (as transformers 5 writes them), which must agree."""
    listed = fields.section("per_layer_config")
    found = [{**others, **(listed.get(str(layer)) or {})} for layer in range(len(full))]
    sizes = {tuple(sorted(own.items())) for own, is_full in zip(found, full, strict=True) if is_full}
    rest = [own for own, is_full in zip(found, full, strict=True) if not is_full]
    if (
        len(sizes) > 1
        or any(own != dict(others) for own in rest)
        or any(dict(s).keys() != others.keys() for s in sizes)
    ):
        fields.refuse(
            "'per_layer_config' may give all layers without a window one 'head_dim' and one 'num_key_value_heads', "
            "and nothing else"
        )
    return dict(next(iter(sizes))) if listed and sizes else {}
