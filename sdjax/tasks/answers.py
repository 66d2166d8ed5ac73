"""From a completion to an answer, and from a wrong answer to a remark: pure functions, safe on any text."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

Extract = Callable[[str], str | None]
"""Takes a completion, returns the answer in it, or `None` where there is none."""

Remark = Callable[[str, str], str]
"""Takes (the answer that was given, the correct answer), returns a remark for a wrong answer."""

NO_ANSWER = "No answer was found in your response."

_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,20}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to the number unless something it could be subtracted from stands right before it ("10-7").
_NUMBER = re.compile(rf"(?<![\w.])(?:(?<![\w)\]}}])[-+])?(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d)|/\d+)?")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(
    r"\bthe (?:final |correct )?answer is\b:?|^[^\w\n]*(?:final )?answer:|####", re.IGNORECASE | re.MULTILINE
)
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_LONGEST_NUMBER = 400


# ---- extraction ---------------------------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, braces balanced; `None` without one or when it is empty."""
    opened: list[int | None] = []
    found = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            found = text[start : token.start()] if start is not None else found
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:  # two characters are an escaped brace
            opened.append(token.end())
    return (found or "").strip() or None


def last_tagged(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`; `None` without one or when it is empty."""
    found = _TAGGED.findall(text)
    return found[-1].strip() or None if found else None


def last_number(text: str) -> str | None:
    """The last number in the text, without thousands commas: integer, decimal, `a/b` or `1e-5`; `None` without one."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found else None


def numeric_answer(text: str) -> str | None:
    r"""The last number of the last `\boxed{}` or `<answer>`, else of the text: small models answer in free text."""
    marked = last_boxed(text) or last_tagged(text)
    return (last_number(marked) if marked else None) or last_number(text)


def stated_answer(text: str, lines: int = 1) -> str | None:
    r"""The last `\boxed{}`, else `<answer>`, else what follows "The answer is", else the last lines; `None` if empty.

    `lines` is how many lines an unmarked answer may have (a board has several); 0 is the whole text.
    """
    marked = last_boxed(text) or last_tagged(text)
    if marked:
        return marked
    statements = list(_STATED.finditer(text))
    if statements:
        kept = text[statements[-1].end() :].strip().splitlines()[: lines or None]
    else:
        kept = text.strip().splitlines()[-lines:]
    # Ornaments of chat models; never brackets or underscores, which boards are made of.
    return "\n".join(kept).strip().strip("*`$").strip() or None


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
