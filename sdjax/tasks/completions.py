"""The one place where a completion is split into what the model thought and what it answered.

Thinking is not the answer.  It stands between tags, whose opening one may stand in the completion or in the prompt: where
the prompt ends in an opening tag (DeepSeek-R1's template), `sdjax.engine.tokens.decode_text` puts it before the text, so
that a completion says by itself what it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OPENING = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]", "<|begin_of_thought|>")
"""The tags that begin thinking, whatever their case and spacing."""

CLOSING = ("</think>", "</thinking>", "</thought>", "</reasoning>", "[/THINK]", "<|end_of_thought|>")
"""The tags that end it."""

ANSWER = ("<answer>", "</answer>")
"""The tags around an answer."""

_loose = lambda tag: re.escape(tag).replace("<", r"<\s*").replace("/", r"/\s*").replace(">", r"\s*>")
_spaced = lambda tags: "|".join(map(_loose, tags))
_TAG = re.compile(rf"(?P<opening>{_spaced(OPENING)})|(?P<closing>{_spaced(CLOSING)})", re.IGNORECASE)
_OPEN_AT_END = re.compile(rf"(?:{_spaced(OPENING)})\s*\Z", re.IGNORECASE)


class Completion(NamedTuple):
    """Both without tags.  `answer` is empty where the thinking is `open`: an answer was never reached."""

    thinking: str
    answer: str
    open: bool = False


def split(text: str) -> Completion:
    """Thinking and answer of a completion.

    What stands before a closing tag without its opening one is thinking, too.  Thinking that begins again after an answer
    and does not end leaves the completion `open`.
    """
    thought: list[str] = []
    said: list[str] = []
    inside, at = False, 0
    for tag in _TAG.finditer(text):
        piece, at = text[at : tag.start()], tag.end()
        if tag["opening"]:
            (thought if inside else said).append(piece)
            inside = True
        else:
            thought += [piece] if inside else [*said, piece]
            said = said if inside else []
            inside = False
    (thought if inside else said).append(text[at:])
    if inside:
        return Completion(_joined([*said, *thought]), "", open=True)
    return Completion(_joined(thought), "".join(said).strip())


def opens_thinking(prompt: str) -> str:
    """The opening tag that a rendered prompt ends in; empty where it ends in none."""
    found = _OPEN_AT_END.search(prompt)
    return found[0].strip() if found else ""


def is_tag(text: str) -> bool:
    """Whether a text is a tag around thinking."""
    return _TAG.fullmatch(text) is not None


def _joined(pieces: list[str]) -> str:
    return "\n".join(piece.strip() for piece in pieces if piece.strip())
