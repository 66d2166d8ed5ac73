"""From a completion to an answer, and from a wrong answer to a remark: pure functions, safe on any text."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

Extract = Callable[[str], str | None]
"""Takes a completion, returns the answer in it, or `None` where there is none."""

Remark = Callable[[str, str], str]
"""Takes (the answer that was given, the correct answer), returns a remark for a wrong answer."""

NO_ANSWER = "No answer was found in your response."

_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,20}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to the number unless something it could be subtracted from stands right before it ("10-7").
_NUMBER = re.compile(rf"(?<![\w.])(?:(?<![\w)\]}}])[-+])?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d)|/\d+)?")
_BRACES = re.compile(r"(?:\\f?box(?:ed)?|\x08oxed)\s*\{|\\boxed\s*(?=-?\d)(?P<bare>-?[\d.,]*\d)|\\.|[{}]", re.DOTALL)
_OPEN_TAG = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_CLOSE_TAG = re.compile(r"<\s*/\s*answer\s*>", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s$.\\()\[\]]*(?:,|;|\band\b|\bor\b)+[\s$]*(?:and|or)?[\s$\\()\[\]]*(?:\w+\s*=\s*)?")
_LONGEST_NUMBER = 400

_DENIED = r"(?!\W*(?:not|wrong|incorrect|correct|right|clear|simple|obvious|as follows|below|unknown)\b)"
_STATED = re.compile(
    r"\b(?:the|my|our|your|final|correct)\s+(?:(?:final|correct|right|overall|exact|simplified|numerical)\s+)*answers?"
    r"(?:\s+(?:to|for|of)\s[^.:\n]{1,80}?)?[\s*_]*(?:\b(?:is|are|equals|would be|should be|must be|will be|comes out to"
    r"|turns out to be|becomes)\b|=)(?:\s+(?:thus|therefore|then|simply|just|indeed|given by))?[\s*_]*:?"
    + _DENIED
    + r"|^[^\w\n]*(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?(?:answers?|final result|final solution)[\s*_]*(?:\([^()\n]*\))?"
    r"[\s*_]*(?::|=|-|\u2014|\u2013|\n)[\s*_]*"
    + _DENIED
    + r"|####(?![# \t]*(?:#|(?:step|part|case|method|solution|final|answer|approach)\b))[ \t]*"
    r"|\bla (?:respuesta|soluci[o\u00f3]n)(?: final| correcta)? es\b:?|\brespuesta(?: final)?\s*\**:"
    r"|\bla r\u00e9ponse(?: finale| correcte)? est\b:?|\br\u00e9ponse(?: finale)?\s*\**:"
    r"|\bdie (?:endg\u00fcltige |richtige )?antwort (?:ist|lautet)\b:?|\bantwort\s*\**:"
    r"|\ba resposta(?: final| correta)? \u00e9(?!\w):?|\bresposta(?: final)?\s*\**:"
    r"|\bla risposta(?: finale| corretta)? \u00e8(?!\w):?|\brisposta(?: finale)?\s*\**:"
    r"|\b\u043e\u0442\u0432\u0435\u0442\s*\**[:\u2014-]|\u7b54\u6848(?:\u662f|\u4e3a)?\s*\**[:\uff1a]?|\u7b54\s*[:\uff1a]|\u7b54\u3048(?:\u306f)?\s*[:\uff1a]?"
    r"|(?:\uc815\ub2f5|\ub2f5)(?:\uc740)?\s*[:\uff1a]?|\u0627\u0644(?:\u062c\u0648\u0627\u0628|\u0625\u062c\u0627\u0628\u0629)(?:\s+\u0647\u0648|\s+\u0647\u064a)?\s*:?|\u0909\u0924\u094d\u0924\u0930(?:\s+\u0939\u0948)?\s*:?",
    re.IGNORECASE | re.MULTILINE,
)


class Mark(NamedTuple):
    """An answer that the text marks as such, and by what; `None` where the mark is empty or broken."""

    answer: str | None
    by: str


# ---- extraction ---------------------------------------------------------------------------------------------------


def boxes(text: str) -> tuple[list[tuple[int, int, str]], int]:
    r"""All complete outermost `\boxed{...}` as (start, end, content), and where one begins that never ends, else -1."""
    opened: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, str]] = []
    inside = 0
    for token in _BRACES.finditer(text):
        if token["bare"]:
            found += [] if inside else [(token.start(), token.end(), token["bare"])]
        elif token[0] == "}":
            place = opened.pop() if opened else None
            if place is not None:
                inside -= 1
                found += [] if inside else [(place[0], token.end(), text[place[1] : token.start()])]
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:  # two characters are an escaped brace
            opened.append((token.start(), token.end()))
            inside += 1
    broken = next((place[0] for place in opened if place is not None), -1)
    return found, broken


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced; `None` without one or when it is empty or broken."""
    found, broken = boxes(text)
    return found[-1][2].strip() or None if found and broken < found[-1][0] else None


def last_boxes(text: str) -> str | None:
    r"""As `last_boxed`, but `\boxed{1}` or `\boxed{2}`, with only a comma, "and" or "or" between, is `1, 2`."""
    found, broken = boxes(text)
    if not found or broken > found[-1][0]:
        return None
    contents = [found[-1][2].strip()]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if not _BETWEEN.fullmatch(text[end:start][:60]):
            break
        contents.insert(0, content.strip())
    return ", ".join(dict.fromkeys(contents)).strip() or None if contents[-1] else None


def last_tagged(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`; `None` without one or when it is empty or broken."""
    place = _last_tag(text)
    closed = _CLOSE_TAG.search(text, place[1]) if place else None
    return text[place[1] : closed.start()].strip() or None if closed else None


def marked(text: str) -> Mark | None:
    r"""What the last `\boxed{}` or `<answer>` holds, whichever comes last; `None` where there is neither.

    A last mark that is empty or broken is not skipped in favour of an earlier one.  A box inside the tag is the answer.
    """
    found, broken = boxes(text)
    box = max(broken, found[-1][0] if found else -1)
    place = _last_tag(text)
    if place is None or box > place[0]:
        return Mark(last_boxed(text), "box") if box >= 0 else None
    return Mark(last_tagged(text), "tag")


def statement(text: str) -> str | None:
    """What follows the last "The answer is", "Answer:", "####" or the same in another language; `None` without one."""
    found = list(_STATED.finditer(text))
    return text[found[-1].end() :] if found else None


def last_number(text: str) -> str | None:
    """The last number in the text, without thousands commas: integer, decimal, `a/b` or `1e-5`; `None` without one."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found else None


def numeric_answer(text: str) -> str | None:
    r"""A number: that of the last `\boxed{}` or `<answer>`, else the first one stated, else the last one of the text.

    `None` where the mark is empty or broken, or there is no number.
    """
    if (mark := marked(text)) is not None:
        return (last_number(mark.answer) or last_number(text)) if mark.answer else None
    if (said := statement(text)) is not None:
        line = next((line for line in said.splitlines() if line.strip()), "")
        found = _NUMBER.findall(line.rsplit("=", 1)[-1].replace("\N{MINUS SIGN}", "-"))
        if found:
            return found[0].replace(",", "")
    return last_number(text)


def stated_answer(text: str, lines: int = 1) -> str | None:
    r"""The last `\boxed{}` or `<answer>`, else what follows "The answer is", else the last lines; `None` if empty.

    `lines` is how many lines an unmarked answer may have (a board has several); 0 is the whole text.
    """
    if (mark := marked(text)) is not None:
        return mark.answer
    said = statement(text)
    kept = text.strip().splitlines()[-lines:] if said is None else said.strip().splitlines()[: lines or None]
    # Ornaments of chat models; never brackets or underscores, which boards are made of.
    return "\n".join(kept).strip().strip("*`$").strip() or None


def _last_tag(text: str) -> tuple[int, int] | None:
    places = [found.span() for found in _OPEN_TAG.finditer(text)]
    return places[-1] if places else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number (see `last_number`) and nothing else; `None` for any other text."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ZeroDivisionError:
        return None


# ---- remarks for wrong answers ------------------------------------------------------------------------------------


def outcome(answer: str, correct: str) -> str:
    """Only that it is wrong: "Your answer 7 is wrong."."""
    return f"Your answer {_shortened(answer)} is wrong."


def direction(answer: str, correct: str) -> str:
    """On which side it is wrong: "Your answer 7 is wrong: it is too small."; `outcome` where not both are numbers."""
    difference = _difference(answer, correct)
    if not difference:
        return outcome(answer, correct)
    return f"Your answer {answer} is wrong: it is too {'large' if difference > 0 else 'small'}."


def distance(answer: str, correct: str) -> str:
    """By how much it is wrong: "Your answer 7 is wrong: it is too small by 2.".  Whoever can add knows the answer."""
    difference = _difference(answer, correct)
    if not difference:
        return outcome(answer, correct)
    return direction(answer, correct)[:-1] + f" by {_as_text(abs(difference))}."


def reveal(answer: str, correct: str) -> str:
    """What would have been right: "Your answer 7 is wrong; the correct answer is 9."."""
    remark = outcome(answer, correct)
    return f"{remark[:-1]}; the correct answer is {correct}." if correct else remark


def remark_on(answer: str | None, correct: str, *, fixed: str | None, remark: Remark, reveal_answer: bool) -> str:
    """What to say of a wrong answer (`None`: no answer was found); an example's own `fixed` remark comes first."""
    if fixed is not None:
        return fixed
    if answer is None:
        return f"{NO_ANSWER[:-1]}; the correct answer is {correct}." if reveal_answer and correct else NO_ANSWER
    return (reveal if reveal_answer else remark)(answer, correct)


def _difference(answer: str, correct: str) -> Fraction | None:
    given, wanted = parse_number(answer), parse_number(correct)
    return None if given is None or wanted is None else given - wanted


def _as_text(value: Fraction) -> str:
    """An integer or a short decimal where the value is one, else a fraction."""
    decimal = f"{float(value):.10g}" if value.denominator != 1 and value < 10**10 else str(value)
    return decimal if "e" not in decimal and Fraction(decimal) == value else str(value)


def _shortened(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else text[:longest] + "..."
