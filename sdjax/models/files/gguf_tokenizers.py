"""The tokenizer in a GGUF file: byte-level BPE of several kinds, and SentencePiece's BPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdjax.models.fields import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    **dict.fromkeys(("gpt-2", "default", "olmo", "phi-2"), ""),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), "digits"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _WORDS % ""),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _WORDS % "{1,3}"),
}
"""How text is split before byte-level BPE, by `tokenizer.ggml.pre` as in llama.cpp: GPT-2's words, these after single
digits, or a regular expression."""

_CONTROL, _USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type` in the GGUF specification


def gguf_tokenizer(reader: Any, most: int, where: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a file (transformers reads it only where torch is installed); `most` tokens fit the model.

    Raises: ModelError for a kind that is not supported.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    def say(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name if "." in name else f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    kind, split = say("model"), say("pre", "default")
    if kind == "llama":
        backend = _sentencepiece(say("tokens"), say("scores"), say("add_space_prefix", True))
    elif kind == "gpt2" and split in SPLITS:
        backend = _byte_level(say("tokens"), say("merges"), SPLITS[split])
    else:
        raise ModelError(
            f"{where}: GGUF tokenizer {kind}/{split} is not supported; supported are llama and gpt2/{', '.join(SPLITS)}: "
            "use the folder with tokenizer.json"
        )
    tokens, kinds = say("tokens"), say("token_type", [])
    for wanted, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        own = [token for token, found in zip(tokens, kinds, strict=False) if found == wanted]
        add([AddedToken(token, normalized=False, special=wanted == _CONTROL) for token in own])
    named = {"bos": say("bos_token_id"), "eos": say("eos_token_id"), "unk": say("unknown_token_id")}
    named["pad"] = say("padding_token_id")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=say("tokenizer.chat_template"),
        model_max_length=most,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[number] for role, number in named.items() if number is not None},
    )


def _byte_level(tokens: list[str], merges: list[str], split: str) -> Any:
    """Byte-level BPE whose words are GPT-2's, those after single digits, or a regular expression's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    by_words = split in ("", "digits")
    first = [] if by_words else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    first += [pre_tokenizers.Digits(individual_digits=True)] if split == "digits" else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], scores: list[float], prefixed: bool) -> Any:
    """SentencePiece's BPE: pieces of which the one with the highest score is joined first; bytes for what has none.

    A text gets a space before its first word if `prefixed` (Llama 2 and Mistral; not Gemma).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = next((token for token in ("<unk>", "<UNK>") if token in vocabulary), None)
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return backend
