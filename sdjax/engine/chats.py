"""Chats and texts to token ids.  Control tokens that stand in a text are text; only the template's own make turns.

A control token in a text is broken by a private character before the template is rendered, and that character's own
tokens are left out again: nothing else changes, and a text without control tokens is encoded as the tokenizer does it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.models import WordLevel

from sdjax.errors import InputError
from sdjax.models.templates import MARK, own_options, written
from sdjax.tasks.completions import is_tag
from sdjax.tasks.data.rows import TURN

BREAKS = "\ue0b5\uf1c3\ue6d9\uf0a7"
"""Private characters that may break a control token."""


class ChatError(InputError, ValueError):
    """A chat cannot be encoded as the chat template means it; the message says which text and why."""


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a chat up to where the assistant speaks next, by the tokenizer's chat template.

    `template` are options of that template, such as `{"enable_thinking": False}`.  A tokenizer without a template gets
    the turns' contents, joined by newlines.  A control token in a turn's content is encoded as text.

    Raises `ChatError` where the tokenizer cannot do that, and warns where the template's turns are themselves text.
    """
    turns = [{name: m[name] for name in TURN if name in m} for m in messages]
    texts, bare = [t["content"] for t in turns], getattr(tokenizer, "chat_template", None) is None
    own = "" if bare else str(tokenizer.chat_template)
    warn_of_plain_turns(tokenizer, own, texts)
    write = lambda turns: (
        "\n".join(t["content"] for t in turns) if bare else written(tokenizer, turns, **template or {})
    )
    if not any(controls_in(tokenizer, own, text) for text in texts):
        return tokenizer.encode(write(turns), add_special_tokens=bare)
    for mark in BREAKS:
        safe = [{**t, "content": broken(tokenizer, own, t["content"], mark)} for t in turns]
        found = encoded(tokenizer, write(safe), mark, bare) if mark not in "".join(texts) else None
        if found is not None:
            return found
    raise cannot(controls_in(tokenizer, own, "\n".join(texts))[0])


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it; a control token in it is encoded as text.

    Raises `ChatError` where the tokenizer cannot do that.
    """
    own = str(getattr(tokenizer, "chat_template", None) or "")
    found = controls_in(tokenizer, own, text)
    if not found:
        return tokenizer.encode(text, add_special_tokens=False)
    for mark in BREAKS:
        ids = encoded(tokenizer, broken(tokenizer, own, text, mark), mark, False) if mark not in text else None
        if ids is not None:
            return ids
    raise cannot(found[0])


def cannot(token: str) -> ChatError:
    """The error of a tokenizer that makes a turn of a text."""
    return ChatError(
        f"a text contains {token!r}, a control token that this tokenizer cannot encode as text: remove it from the data"
    )


def check_view(tokenizer: Any, name: str, template: Mapping[str, Any]) -> None:
    """Raises `ChatError` if a view's chats, written with these options, do not end where a completion can begin.

    The options must be the template's.  The last token before the completion must not be one that joins the first word of
    a text: the view would read tokens that it never saw so.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return
    unknown = sorted({*template} - {*own_options(tokenizer)})
    if unknown:
        raise ChatError(
            f"view {name!r}: the chat template has no option {unknown[0]!r}; it has "
            f"{', '.join(own_options(tokenizer)) or 'none'}"
        )
    if isinstance(tokenizer.backend_tokenizer.model, WordLevel):  # its words stand apart in any case
        return
    text = written(tokenizer, [{"role": "user", "content": "x"}], **template)
    if not any(starts_token(tokenizer, text, word) for word in ("The", "I", "So")):
        raise ChatError(
            f"view {name!r}: its chats end in {text[-12:]!r}, which the tokenizer joins with the first word of a completion: "
            "the view would not read the student's tokens as it knows them; let the chat template end in a line break or a "
            "control token"
        )


def starts_token(tokenizer: Any, text: str, word: str) -> bool:
    """Whether a word that follows a text begins with a token of its own."""
    found = tokenizer(text + word, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in found["offset_mapping"]]
    # Offsets may leave out a space that the token holds.
    own = lambda number: number == tokenizer.unk_token_id or word.startswith(tokenizer.convert_ids_to_tokens(number))
    return any(s == len(text) and own(n) for s, n in zip(starts, found["input_ids"], strict=True))


# ---- control tokens -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The tokens that make turns, longest first: all special ones, and other added ones that the template writes.

    Blank ones and the tags of thinking are none.  `template` is the tokenizer's own and keys the cache.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    turning = lambda t: t.special or (len(t.content) > 1 and t.content in template)
    found = {t.content for t in added if turning(t) and t.content.strip() and not is_tag(t.content.strip())}
    return tuple(sorted(found, key=lambda t: (-len(t), t)))


def controls_in(tokenizer: Any, template: str, text: str) -> list[str]:
    """The control tokens that occur in a text."""
    return [t for t in control_tokens(tokenizer, template) if t in text]


def broken(tokenizer: Any, template: str, text: str, mark: str) -> str:
    """The text with `mark` inside every control token, so that none is left."""
    while found := controls_in(tokenizer, template, text):
        token = found[0]
        if len(token) == 1:
            raise cannot(token)
        place = boundary(tokenizer, token)
        text = text.replace(token, token[:place] + mark + token[place:])
    return text


@functools.lru_cache(maxsize=1024)
def boundary(tokenizer: Any, token: str) -> int:
    """Where a control token is broken: at the first boundary of the tokens that it has as text, else in its middle."""
    how = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    ends = [end for _, end in tokenizer(token, **how)["offset_mapping"]]
    return next((end for end in ends if 0 < end < len(token)), len(token) // 2)


def encoded(tokenizer: Any, text: str, mark: str, special: bool) -> list[int] | None:
    """Token ids of a text without those of `mark`; `None` where a token holds `mark` and other characters.

    The tokenizer's unknown token may: it stands for any text.
    """
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = []
    for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        piece = text[start:end]
        if mark in piece and piece.strip(mark) and number != tokenizer.unk_token_id:
            return None
        if mark not in piece or piece.strip(mark):
            ids.append(number)
    return ids


# ---- templates whose turns are text ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def plain_turn(tokenizer: Any, template: str) -> str:
    """What the template writes between a question and its answer, if that holds no control token; else empty."""
    text = written(tokenizer, [{"role": "user", "content": MARK}]) if template else ""
    after = text.rpartition(MARK)[2].strip() if MARK in text else ""
    return "" if controls_in(tokenizer, template, after) else after


def warn_of_plain_turns(tokenizer: Any, template: str, texts: Sequence[str]) -> None:
    """Warns, once for each kind of turn, of a text that the model cannot tell from the end of a turn."""
    turn = plain_turn(tokenizer, template)
    if turn and any(turn in text for text in texts):
        warnings.warn(
            f"a text contains {turn!r}, which this tokenizer's chat template writes as ordinary text at the end of a turn: "
            "no tokenizer can keep the two apart, so the model may read that text as several turns",
            stacklevel=3,
        )
