"""Numbers as people write them, with units, currencies, percent signs and words; texts are `notation.plain`'s."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from sdjax.tasks.answers.numbers import Exact, exact, number, same_value, times

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+(?:\(\d+\))?)?|\.\d+"
_POWER = r"(?:\s*(?:\^|\*\*)\s*(?:[-+]?\d+|\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}|\([-+]?\d+(?:/\d+)?\)))"
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_LATEX = rf"\\frac{_GROUP}{_GROUP}|\\sqrt(?:\[\d+\])?{_GROUP}"
_TIMES_TEN = r"(?:\s*(?:\\times|\\cdot|\*|[xX])\s*10\s*(?:\^|\*\*)\s*(?:\{?\(?[-+]?\d+\)?\}?))"
_ATOM = (
    rf"(?:(?:{_DECIMAL})(?:\s+\d+/\d+(?![\d/])|\s*\\frac\{{\d+\}}\{{\d+\}}|[eE][-+]?\d{{1,4}}(?!\d)"
    rf"|\\overline\{{\d+\}}|\.\.\.|{_TIMES_TEN}|!)?{_POWER}?(?:\s*/\s*(?:\d+(?:\.\d+)?{_POWER}?|{_LATEX}))?|(?:{_LATEX}){_POWER}?)"
)
QUANTITY = re.compile(rf"(?<![\w.^_{{])(?:(?<![\w)\]}}])[-+]\s*)?{_ATOM}")
"""One number in a text, with the sign that belongs to it: none where something stands before that it is subtracted from."""

EXPRESSION = re.compile(rf"{QUANTITY.pattern}(?:\s*(?:[-+*/]|\\cdot|\\times|\\div)\s*[-+]?\s*{_ATOM})*")
"""Arithmetic with numbers."""

_LEADING = re.compile(
    r"(?:\b(?:only|just|exactly|simply|precisely|equal to|equals?|about|approximately|roughly|around|nearly|a total of"
    r"|USD|EUR|GBP|dollars?)\b|\\approx|[~=:])\s*",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d\\.a-z])", re.IGNORECASE)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALE = re.compile(rf"\s*-?({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|\\%|percent(?:age points?)?\b|per cent\b)", re.IGNORECASE)
_UNIT_EXPONENT = re.compile(r"(?<=[a-zA-Z)])\s*\^?\s*(?:\{-?\d\}|-?\d)(?!\d)")
_UNIT_LETTERS = frozenset("mgslLAVWNJKCFhdTt")
_UNIT = re.compile(r"[\s\-]*[^\W\d](?:[^\d\\=<>+*|{}\[\](),;]|\([^()\d]*\)|\\cdot|\^\\circ)*", re.IGNORECASE)
_DEGREES = re.compile(r"\s*(?:\^\\circ|'{1,2}|\")\s*[CFK]?\s*$")
_NO_UNITS = frozenset({"and", "or", "pi", "sqrt", "log", "ln", "sin", "cos", "tan", "exp", "to", "mod", "choose"})
_NO_UNITS_LETTERS = frozenset("ie")

_DIMENSIONS = {
    "length": {
        "mm": "1/1000",
        "cm": "1/100",
        "m": 1,
        "km": 1000,
        "in": "127/5000",
        "ft": "381/1250",
        "mi": "201168/125",
    },
    "mass": {"mg": "1/1000000", "g": "1/1000", "kg": 1, "t": 1000},
    "time": {"ms": "1/1000", "s": 1, "min": 60, "h": 3600, "day": 86400, "week": 604800},
    "volume": {"ml": "1/1000", "l": 1},
    "money": {"cent": "1/100", "dollar": 1},
    "angle": {"degree": 1},
}
_NAMES = {
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "centimetre": "cm",
    "millimetre": "mm",
    "inch": "in",
    "inche": "in",
    "foot": "ft",
    "feet": "ft",
    "mile": "mi",
    "milligram": "mg",
    "gram": "g",
    "kilogram": "kg",
    "ton": "t",
    "tonne": "t",
    "second": "s",
    "sec": "s",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "milliliter": "ml",
    "millilitre": "ml",
    "liter": "l",
    "litre": "l",
    "mL": "ml",
    "L": "l",
    "^\\circ": "degree",
    "deg": "degree",
    "d": "day",
}
_UNITS = {name: (kind, Fraction(size)) for kind, sizes in _DIMENSIONS.items() for name, size in sizes.items()}

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_SMALL = _BELOW_TWENTY.split()
_ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = dict(zip(_ROUND.split(), range(20, 100, 10), strict=True))
_PARTS = {"half": "1/2", "one half": "1/2", "one third": "1/3", "two thirds": "2/3", "one quarter": "1/4"}
_PARTS |= {"three quarters": "3/4", "one fourth": "1/4", "three fourths": "3/4", "one fifth": "1/5"}


class Quantity(NamedTuple):
    """A number, whether a percent sign follows it, and its unit as written (empty without one)."""

    value: Exact
    percent: bool = False
    unit: str = ""


def quantity(text: str) -> Quantity | None:
    """What a text says that is one number, with or without a unit, and nothing else; `None` for any other text."""
    text = _NEGATIVE.sub("-", text.strip())
    while leading := _LEADING.match(text):
        text = text[leading.end() :]
    for read in (exact, spelled):
        if (value := read(text)) is not None:
            return Quantity(value)
    found = EXPRESSION.match(text)
    if found is None or (value := exact(found[0])) is None:
        worded = re.match(r"[a-z]+(?:[- ][a-z]+)?(?=\s)", text, re.IGNORECASE)
        value, rest = (spelled(worded[0]), text[worded.end() :]) if worded else (None, "")
        return Quantity(value, unit=rest.strip()) if value is not None and is_unit(rest) else None
    rest = text[found.end() :]
    if scale := _SCALE.match(rest):
        value, rest = times(value, number(_SCALES[scale[1].lower()])), rest[scale.end() :]
    percent = _PERCENT.match(rest)
    rest = rest[percent.end() :] if percent else rest
    return Quantity(value, bool(percent), rest.strip()) if not rest.strip() or is_unit(rest) else None


def is_unit(rest: str) -> bool:
    """Whether what follows a number is a unit: words without numbers, operators or further values."""
    rest = _UNIT_EXPONENT.sub("", rest)
    if _DEGREES.fullmatch(rest):
        return True
    if not _UNIT.fullmatch(rest):
        return False
    words = re.findall(r"[^\W\d_]+", rest.replace("\\cdot", " ").replace("\\circ", " "))
    if len(words) == 1 and len(words[0]) == 1:
        return words[0] in _UNIT_LETTERS
    return bool(words) and words[0].lower() not in _NO_UNITS and words[0] not in _NO_UNITS_LETTERS


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are the same: percent as a number or as its hundredth, known units converted."""
    hundredth = number(Fraction(1, 100))
    if gold.percent != answer.percent:
        one, other = (gold, answer) if gold.percent else (answer, gold)
        return same_value(one.value, other.value) or same_value(times(one.value, hundredth), other.value)
    units = known_unit(gold.unit), known_unit(answer.unit)
    if None in units:
        return same_value(gold.value, answer.value)
    (kind, size), (other_kind, other_size) = units
    return kind == other_kind and same_value(times(gold.value, number(size)), times(answer.value, number(other_size)))


def known_unit(unit: str) -> tuple[str, Fraction] | None:
    """Dimension and size of a unit of the table, with its exponent; `None` for others."""
    found = re.fullmatch(r"(square |cubic |sq\.? |cu\.? )?([a-zA-Z]+|\^\\circ)\.?\s*(?:\^?\{?([23])\}?)?", unit.strip())
    if not found:
        return None
    word = found[2] if found[2] in _UNITS or found[2] in _NAMES else found[2].lower()
    singular = word if word in _UNITS or word in _NAMES else word.removesuffix("s")
    name = _NAMES.get(singular, singular)
    if name not in _UNITS:
        return None
    worded = {"s": 2, "c": 3}.get((found[1] or " ")[0], 1)
    power = int(found[3]) if found[3] else worded
    kind, size = _UNITS[name]
    return f"{kind}^{power}", size**power


def spelled(text: str) -> Exact | None:
    """The value of an English number word, up to millions; `None` for others."""
    text = text.strip().lower()
    if len(text) > 80 or not re.fullmatch(r"[a-z\s,-]+", text):
        return None
    if (part := _PARTS.get(text.replace("-", " ").removeprefix("a "))) is not None:
        return number(Fraction(part))
    total, current, words = 0, None, re.findall(r"[a-z]+", text)
    for word in words:
        if word in _SMALL:
            current = (current or 0) + _SMALL.index(word)
        elif word in _TENS:
            current = (current or 0) + _TENS[word]
        elif word == "hundred" and current is not None:
            current *= 100
        elif word in ("thousand", "million") and current is not None:
            total, current = total + current * _SCALES[word], 0
        elif word != "and" or current is None:
            return None
    return None if current is None else number(total + current)
