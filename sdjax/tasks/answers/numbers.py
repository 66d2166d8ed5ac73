"""Exact values of texts that are numbers: fractions, decimals, powers of any size, and arithmetic with them.

No value is rounded and no large power is evaluated: `2^{2024}` and `4^{1012}` are compared as products of powers.  Texts are
those that `sdjax.tasks.answers.notation.plain` returns.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 400
"""Characters of a text that is read as a number."""

MOST_BITS = 1 << 14
"""Of an integer that is evaluated; larger ones stay powers."""


class NotExact(ValueError):
    """This text is no number, or not one whose exact value is found here."""


class Exact(NamedTuple):
    """`sign * product of base ** exponent`, bases integers above 1; `sign` 0 is zero."""

    sign: int
    powers: tuple[tuple[int, int], ...] = ()


def exact(text: str) -> Exact | None:
    """The value of an arithmetic text such as `-2 1/2`, `3 \\times 10^{8}`, `1/2^{99}`, `\\sqrt{16}`; `None` for others."""
    text = text.strip()
    if not text or len(text) > LONGEST:
        return None
    try:
        reader = _Reader(_tokens(_prepared(text)))
        value = reader.sum()
        return value if reader.at_end() else None
    except (NotExact, RecursionError, ZeroDivisionError, OverflowError):
        return None


def same_value(one: Exact, other: Exact) -> bool:
    """Whether two values are equal, decided without evaluating them."""
    if one.sign != other.sign:
        return False
    quotient = [*one.powers, *((base, -exponent) for base, exponent in other.powers)]
    return all(exponent == 0 for exponent in _coprime(quotient).values())


def fraction(value: Exact) -> Fraction | None:
    """The value as a fraction; `None` for one that is too large to be evaluated."""
    try:
        return _evaluated(value)
    except NotExact:
        return None


def number(value: int | Fraction) -> Exact:
    """A fraction as an exact value."""
    value = Fraction(value)
    sizes = [(abs(value.numerator), 1), (value.denominator, -1)]
    return Exact((value > 0) - (value < 0), tuple((b, e) for b, e in sizes if b > 1))


def times(one: Exact, other: Exact) -> Exact:
    """The product."""
    sign = one.sign * other.sign
    return Exact(sign, (*one.powers, *other.powers) if sign else ())


def _coprime(powers: list[tuple[int, int]]) -> dict[int, int]:
    """The same product over bases without common factors: it is 1 only where all exponents are 0."""
    found: dict[int, int] = {}
    waiting = [(base, exponent) for base, exponent in powers if exponent]
    while waiting:
        base, exponent = waiting.pop()
        for other in found:
            shared = math.gcd(base, other)
            if shared > 1:
                old = found.pop(other)
                pieces = [(shared, exponent + old), (base // shared, exponent), (other // shared, old)]
                waiting += [(b, e) for b, e in pieces if b > 1 and e]
                break
        else:
            found[base] = exponent
    return found


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _evaluated(value: Exact) -> Fraction:
    if not value.sign:
        return Fraction(0)
    if sum(base.bit_length() * abs(exponent) for base, exponent in value.powers) > MOST_BITS:
        raise NotExact
    product = Fraction(value.sign)
    for base, exponent in value.powers:
        product *= Fraction(base) ** exponent
    return product


def _inverse(value: Exact) -> Exact:
    if not value.sign:
        raise ZeroDivisionError
    return Exact(value.sign, tuple((base, -exponent) for base, exponent in value.powers))


def _power(value: Exact, exponent: Exact) -> Exact:
    wanted = _evaluated(exponent)
    if not value.sign:
        if wanted <= 0:
            raise NotExact
        return value
    if wanted.denominator != 1:
        return _power(_root(value, wanted.denominator), number(wanted.numerator))
    whole = wanted.numerator
    sign = value.sign if whole % 2 else 1
    return Exact(sign, tuple((base, each * whole) for base, each in value.powers) if whole else ())


def _root(value: Exact, degree: int) -> Exact:
    """A root that is rational.  Raises `NotExact` for others."""
    if value.sign < 0 and degree % 2 == 0:
        raise NotExact
    found = []
    for base, exponent in _coprime(list(value.powers)).items():
        if exponent % degree == 0:
            found.append((base, exponent // degree))
            continue
        root = _whole_root(base, degree)
        found.append((root, exponent))
    return Exact(value.sign, tuple(found))


def _whole_root(base: int, degree: int) -> int:
    if degree > base.bit_length():
        raise NotExact
    root = math.isqrt(base) if degree == 2 else round(base ** (1 / degree)) if base < 1 << 50 else 0
    if root < 2 or root**degree != base:
        raise NotExact
    return root


def _factorial(value: Exact) -> Exact:
    whole = _evaluated(value)
    if whole.denominator != 1 or not 0 <= whole <= 1000:
        raise NotExact
    return number(math.factorial(whole.numerator))


# ---- reading --------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_MIXED = re.compile(r"(?<![\d./^{}\\])(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*\\frac\{(\d+)\}\{(\d+)\})(?!\s*[\d/^!])")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\((\d+)\))")
_ELIDED = re.compile(r"(\d*)\.(\d*?)(\d{1,6}?)\3{2,}\s*(?:\.\.\.|\\[lc]?dots)\s*$")
_SPELLED_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4}(?![\d.]))?)|(?P<name>\\(?:frac|sqrt|cdot|times|ast))"
    r"|(?P<sign>\*\*|[-+*/^!(){}\[\]]))"
)


def _prepared(text: str) -> str:
    """Thousands joined; mixed numbers, repeating decimals and `3 x 10^8` written out."""
    text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    text = _REPEATING.sub(lambda m: _repeating(m[1], m[2], m[3] or m[4]), text)
    text = _ELIDED.sub(lambda m: _repeating(m[1], m[2], m[3]), text)
    text = _SPELLED_TIMES.sub(r"\\times ", text)
    return _MIXED.sub(lambda m: f"({m[1]}+({m[2] or m[4]}/{m[3] or m[5]}))", text)


def _repeating(whole: str, once: str, again: str) -> str:
    """`0.1666...` as an exact quotient."""
    top = int(f"{whole}{once}{again}") - int(f"{whole}{once}" or 0)
    return f"({top}/{'9' * len(again)}{'0' * len(once)})"


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            if text[at:].strip():
                raise NotExact
            break
        found.append(token[0].strip())
        at = token.end()
    return found


class _Reader:
    """A recursive reader of sums, products and powers."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.place, self.depth = tokens, 0, 0

    def at_end(self) -> bool:
        return self.place == len(self.tokens)

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.next()
        if token and token in wanted:
            self.place += 1
            return token
        return ""

    def expect(self, wanted: str) -> None:
        if not self.take(wanted):
            raise NotExact

    def sum(self) -> Exact:
        value = self.product()
        while sign := self.take("+", "-"):
            right = self.product()
            value = number(_evaluated(value) + (1 if sign == "+" else -1) * _evaluated(right))
        return value

    def product(self) -> Exact:
        value = self.signed()
        while True:
            if self.take("*", "\\cdot", "\\times", "\\ast"):
                value = times(value, self.signed())
            elif self.take("/"):
                value = times(value, _inverse(self.signed()))
            elif self.next() in ("(", "\\frac", "\\sqrt"):  # side by side
                value = times(value, self.powered())
            else:
                return value

    def signed(self) -> Exact:
        if self.take("-"):
            value = self.signed()
            return value._replace(sign=-value.sign)
        if self.take("+"):
            return self.signed()
        return self.powered()

    def powered(self) -> Exact:
        value = self.atom()
        while self.take("!"):
            value = _factorial(value)
        if self.take("^", "**"):
            self.deeper()
            value = _power(value, self.signed())
        return value

    def atom(self) -> Exact:
        token = self.next()
        self.place += 1
        if token[:1].isdigit() or token[:1] == ".":
            return number(Fraction(token))
        if token in ("(", "{", "["):
            return self.inside(token)
        if token == "\\frac":
            top, bottom = self.braces(), self.braces()
            return times(top, _inverse(bottom))
        if token == "\\sqrt":
            degree = self.inside("[") if self.take("[") else number(2)
            order = _evaluated(degree)
            if order.denominator != 1 or not 2 <= order <= 64:
                raise NotExact
            return _root(self.braces(), order.numerator)
        raise NotExact

    def braces(self) -> Exact:
        self.expect("{")
        return self.inside("{")

    def inside(self, opening: str) -> Exact:
        self.deeper()
        value = self.sum()
        self.expect({"(": ")", "{": "}", "[": "]"}[opening])
        return value

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > 100:
            raise NotExact
