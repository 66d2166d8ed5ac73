"""The language model inside a folder that also reads images or sounds: its part of config.json, its tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from sdjax.models.fields import Fields

Tensor = TypeVar("Tensor")


class Wrapper(NamedTuple):
    """A class of the transformers library around a language model: its name, and the default family inside."""

    architecture: str
    family: str


WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", "gemma3_text"),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", "gemma4_text"),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral"),
}
"""The supported wrappers by their `model_type` in config.json."""

TEXT = re.compile(r"^(?:language_model\.model|model\.language_model)\.")
HEAD = re.compile(r"^language_model\.lm_head\.")
OTHERS = re.compile(
    r"^(?:model\.)?(?:vision_tower|vision_model|vision_encoder|visual|audio_tower|multi_modal_projector|embed_vision|embed_audio)\.|^mtp\."
)
"""How a wrapper names the tensors of its language model, of the head, and all others."""


def text_fields(fields: Fields) -> Fields:
    """The fields of the language model; of a config.json without a wrapper, all of them."""
    wrapper, inner = WRAPPERS.get(str(fields.values.get("model_type"))), fields.values.get("text_config")
    if wrapper is None:
        return fields
    if not isinstance(inner, Mapping):
        fields.refuse(f"'text_config' of a {wrapper.architecture} must be an object, found {inner!r}")
    values: dict[str, Any] = {"model_type": wrapper.family, **inner}
    values.pop("architectures", None)
    for name in ("tie_word_embeddings", "quantization_config"):
        if name not in values and name in fields.values:
            values[name] = fields.values[name]
    return Fields(values, f"{fields.where} (text_config)")


def text_tensors(stored: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of the language model by its own names; a warning says how many others are left out."""
    found = {HEAD.sub("lm_head.", TEXT.sub("model.", name)): tensor for name, tensor in stored.items()}
    others = [name for name in found if OTHERS.match(name)]
    if others:
        warnings.warn(
            f"{where}: only the language model is read; {len(others)} tensors of other parts are left out, such as {others[0]}",
            stacklevel=2,
        )
    return {name: tensor for name, tensor in found.items() if name not in set(others)}
