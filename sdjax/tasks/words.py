"""A tokenizer of whole words, for synthetic tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer whose tokens are the words between spaces, with a chat template; words not given are `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = dict.fromkeys(("<pad>", "<end>", "<unk>", "user:", "assistant:", "system:", *words))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHAT,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
