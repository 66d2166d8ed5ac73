"""Whether two answers are the same: by kind of the correct one, with math-verify where neither is a number or a list.

Everything here is pure text work; `library` is asked last and gets texts that were split as far as possible.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sdjax.tasks.answers import text_answers
from sdjax.tasks.answers.notation import plain
from sdjax.tasks.answers.quantities import quantity, same_quantity

Library = Callable[[str, str], bool]
"""Compares two answers that are mathematics."""

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
_NAME = r"(?:\\?[a-zA-Z]+(?:_(?:\{[^{}]*\}|\w))?'*(?:\([a-zA-Z](?:,\s*[a-zA-Z])*\))?)"
_ASSIGNMENT = re.compile(rf"\s*({_NAME}|[^=<>\d]{{1,40}})\s*(?:=|\\in(?![a-z])|\\equiv)\s*(?![=<>])(.+)", re.DOTALL)
_RELATION = re.compile(r"\\(?:le|ge|lt|gt|ne)(?![a-zA-Z])|<=|>=|<|>")
_CONNECTIVE = re.compile(
    r"\s*(?:,|;|\\\\)?\s*(?<![a-zA-Z\\])(?:and|or|\\text\{ *(?:and|or) *\}|\\vee|\\lor)(?![a-zA-Z])\s*"
)
_SIGNS = {r"\le": "<=", r"\ge": ">=", r"\lt": "<", r"\gt": ">", "<": "<", ">": ">", "<=": "<=", ">=": ">="}
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_DECIMAL_COMMA = re.compile(r"\A-?(?:\d+,(?:\d{1,2}|\d{4,})|\d{1,3}(?:\.\d{3})+,\d+)(?=\s*[^\d\s,]*\Z)")
_DEEPEST = 6


def same(gold: str, answer: str, library: Library, depth: int = 0) -> bool:
    """Whether an answer is the correct one; both as written."""
    gold, answer = plain(gold), plain(answer)
    if not gold or not answer or depth > _DEEPEST:
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    if elided(gold) or elided(answer):
        return False  # what the dots stand for is the writer's secret
    if (letters := text_answers.choice(gold)) is not None:
        return text_answers.chosen(answer, letters)
    times = text_answers.time_of_day(gold), text_answers.time_of_day(answer)
    if None not in times and re.search("[ap]", gold + answer, re.IGNORECASE):
        return times[0] == times[1]
    if (day := text_answers.date(gold)) is not None:
        return text_answers.date(answer) == day
    again = lambda one, other: same(one, other, library, depth + 1)
    wanted = quantity(gold)
    if wanted is not None:
        return any(same_number(gold, each, library) for each in readings(answer))
    if (region := intervals(gold)) is not None and (found := intervals(answer)) is not None:
        return len(region) == len(found) and all(map(lambda a, b: same_interval(a, b, again), region, found))
    if (rows := matrix(gold)) is not None and (found := matrix(answer)) is not None:
        return list(map(len, rows)) == list(map(len, found)) and all(
            again(a, b) for one, other in zip(rows, found, strict=True) for a, b in zip(one, other, strict=True)
        )
    if rows is not None and 1 in (len(rows), len(rows[0])) and (found := members(answer)) is not None:
        return same_members(("tuple", [cell for row in rows for cell in row]), answer, again)
    if (collection := members(gold)) is not None:
        return same_members(collection, answer, again)
    if text_answers.is_prose(gold):
        return text_answers.same_words(gold, answer)
    return any(is_formula(each) and library(gold, each) for each in (answer, *readings(answer)))


def same_number(gold: str, answer: str, library: Library) -> bool:
    """Whether an answer is the number `gold`: exactly, or by the library where it is a formula."""
    found = quantity(_DECIMAL_COMMA.sub(lambda m: m[0].replace(".", "").replace(",", "."), answer))
    if found is not None:
        return same_quantity(quantity(gold), found)
    return is_formula(answer) and members(answer) is None and library(gold, answer)


def squeezed(text: str) -> str:
    """A text without the spaces that mean nothing."""
    return (
        re.sub(r"\s+(?![a-zA-Z\d])|(?<![a-zA-Z\d])\s+|(?<=\d)\s+(?=[a-zA-Z])", "", text)
        .replace("\\cdot", "*")
        .replace("\\times", "*")
    )


def elided(text: str) -> bool:
    """Whether a list has dots in place of some of its values; a decimal that goes on for ever has none."""
    return bool(re.search(r"(?:\.\.\.|\\[lc]?dots)", text)) and not re.fullmatch(r"-?\d*\.\d+\s*\.\.\.", text)


def is_formula(text: str) -> bool:
    """Whether a text may be mathematics: a word in it would be read as a product of its letters."""
    return not text_answers.is_prose(text)


def readings(answer: str) -> list[str]:
    """An answer, what it sets equal to something, and the exact and the rounded side of an approximation."""
    found = [answer]
    for piece in re.split(r"\\approx|\u2248", answer) if "\\approx" in answer else [answer]:
        value = piece
        while assigned := _ASSIGNMENT.fullmatch(value):
            value = assigned[2]
        if "=" in value and not _RELATION.search(value):
            value = value.rsplit("=", 1)[1]
        found.append(value.strip())
    return list(dict.fromkeys(each for each in found if each))


# ---- lists, sets, tuples --------------------------------------------------------------------------------------------


def parts(text: str, separator: str = ",") -> list[str]:
    """A text cut at the separators outside all brackets; thousands are not cut."""
    found, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\" and sign in "{}"
        depth += (sign in "([{") - (sign in ")]}")
        if sign in separator and depth == 0 and not escaped:
            found.append(text[start:place])
            start = place + 1
    return [piece.strip() for piece in [*found, text[start:]]]


def members(text: str) -> tuple[str, list[str]] | None:
    """Kind and members of a collection: "set" (order does not matter), "tuple", or "list" where nothing says which."""
    text = _value(text)
    kind, inner = "list", text
    if text.startswith("\\{") and text.endswith("\\}"):
        kind, inner = "set", text[2:-2]
    elif text.startswith("\\langle") and text.endswith("\\rangle"):
        kind, inner = "tuple", text[7:-7]
    elif text[:1] in _BRACKETS and text.endswith(_BRACKETS[text[0]]) and _closes_at_end(text):
        kind, inner = {"(": "tuple", "[": "row", "{": "set"}[text[0]], text[1:-1]
    if "|" in inner and kind == "set" or "\\mid" in inner:
        return None
    inner = _CONNECTIVE.sub(", ", inner) if kind == "list" else inner
    found = [piece for piece in parts(re.sub(r"(?<=\d);(?=\s)", ",", inner)) if piece]
    if kind == "list" and len(found) < 2 and "\\pm" not in inner:
        return None
    if len(found) < 1 or (kind in ("tuple", "row") and len(found) < 2):
        return ("set", []) if kind == "set" or squeezed(text) == "\\emptyset" else None
    if kind in ("list", "set"):
        found = [each for piece in found for each in plus_and_minus(piece)]
        if quantity(text) is not None:
            return None
    return kind, found


def plus_and_minus(text: str) -> list[str]:
    """Both values of `a \\pm b`."""
    if text.count("\\pm") != 1:
        return [text]
    return [text.replace("\\pm", sign).strip().removeprefix("+").strip() for sign in ("+", "-")]


def same_members(gold: tuple[str, list[str]], answer: str, again: Callable[[str, str], bool]) -> bool:
    """Whether an answer lists the same members: in order for tuples, in any for sets and bare lists."""
    kind, wanted = gold
    found = members(answer)
    if found is None and (rows := matrix(answer)) is not None and kind == "tuple":
        found = "tuple", [cell for row in rows for cell in row] if 1 in (len(rows), len(rows[0])) else []
    if found is None:
        found = "list", [answer]
    other, given = found
    # Braces, parentheses and square brackets say different things; a bare list says none of them.
    if {kind, other} in ({"set", "tuple"}, {"set", "row"}, {"tuple", "row"}):
        return False
    given, wanted = ([_value(each) for each in some] for some in (given, wanted))
    if "tuple" in (kind, other) or "row" in (kind, other):
        return len(given) == len(wanted) and all(map(again, wanted, given))
    left = list(given)
    for each in wanted:
        match = next((i for i, candidate in enumerate(left) if again(each, candidate)), None)
        if match is None:
            return False
        del left[match]
    # In a set the same member twice is one member.
    return all(any(again(each, extra) for each in wanted) for extra in left)


def _value(text: str) -> str:
    """What stands after `x =` or `x \\in`."""
    assigned = _ASSIGNMENT.fullmatch(text)
    return (
        assigned[2].strip() if assigned and not _RELATION.search(assigned[1]) and text.count("=") <= 1 else text.strip()
    )


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def matrix(text: str) -> list[list[str]] | None:
    """Rows of a matrix, in LaTeX or as nested lists; `None` for other texts."""
    text = _value(text)
    text = text[1:-1].strip() if re.match(r"[(\[]\s*\\begin\{array", text) and text[-1:] in ")]" else text
    if found := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found[2]) if row.strip()]
        return [[cell.strip() for cell in row.split("&")] for row in rows] or None
    if text.startswith("[[") and text.endswith("]]"):
        return [parts(row.strip()[1:-1]) for row in parts(text[1:-1])]
    return None


# ---- intervals ------------------------------------------------------------------------------------------------------

Interval = tuple[str, str, str, str]
"""Left bracket, lower bound, upper bound, right bracket: "(", "0", "\\infty", ")"."""


def intervals(text: str) -> list[Interval] | None:
    """An interval, a union of intervals in increasing order as written, or inequalities of one letter as such."""
    text = re.sub(rf"^\s*{_NAME}\s*\\in(?![a-z])\s*", "", text)
    if squeezed(text) == "\\mathbb{R}":
        return [("(", "-\\infty", "\\infty", ")")]
    pieces = re.split(r"\\cup(?![a-z])|(?<=[)\]])\s*[uU]\s*(?=[(\[])", text)
    if len(pieces) == 1:
        pieces = _CONNECTIVE.split(text)
        if len(pieces) == 2 and re.search(r"(?<![a-zA-Z])and(?![a-zA-Z])", text):
            return _bounded_both_ways(pieces)
    found = [_interval(piece.strip()) for piece in pieces]
    if not all(found):
        return None
    return sorted(found, key=lambda each: (each[1] != "-\\infty", each[2] == "\\infty")) if len(found) == 2 else found


def _bounded_both_ways(pieces: list[str]) -> list[Interval] | None:
    """`x > 0 and x < 3` is one interval."""
    one, other = (_interval(piece.strip()) for piece in pieces)
    if not one or not other:
        return None
    lower, upper = (one, other) if one[2] == "\\infty" else (other, one)
    return [(lower[0], lower[1], upper[2], upper[3])] if lower[2] == "\\infty" and upper[1] == "-\\infty" else None


def _interval(text: str) -> Interval | None:
    """One interval, or one inequality."""
    if (
        text[:1] in ("(", "[", "]")
        and text[-1:] in (")", "]", "[")
        and len(found := parts(text[1:-1].replace(";", ","))) == 2
    ):
        opening = {"(": "(", "[": "[", "]": "("}[text[0]]
        closing = {")": ")", "]": "]", "[": ")"}[text[-1]]
        low, high = (squeezed(bound).replace("+\\infty", "\\infty") for bound in found)
        return opening, low, high, closing
    signs = [_SIGNS.get(m[0], "") for m in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    letter = re.compile(_NAME + r"\Z")
    if not signs or "" in signs or len(signs) > 2:
        return None
    if len(signs) == 2:
        if signs[0][0] != signs[1][0] or not letter.match(sides[1]):
            return None
        low, high = (sides[0], sides[2]) if signs[0][0] == "<" else (sides[2], sides[0])
        below, above = signs if signs[0][0] == "<" else signs[::-1]
        return "[" if "=" in below else "(", low, high, "]" if "=" in above else ")"
    left, right = sides
    sign = signs[0] if letter.match(left) and not left.startswith("\\infty") else _MIRRORED[signs[0]]
    bound = right if sign == signs[0] else left
    if not letter.match(left) and not letter.match(right):
        return None
    if sign[0] == "<":
        return "(", "-\\infty", bound, "]" if "=" in sign else ")"
    return "[" if "=" in sign else "(", bound, "\\infty", ")"


def same_interval(one: Interval, other: Interval, again: Callable[[str, str], bool]) -> bool:
    """Whether two intervals have the same bounds and brackets; infinity has no closed end."""
    bracket = lambda sign, bound: "" if "\\infty" in bound else sign
    kinds = [(bracket(i[0], i[1]), bracket(i[3], i[2])) for i in (one, other)]
    return kinds[0] == kinds[1] and again(one[1], other[1]) and again(one[2], other[2])
