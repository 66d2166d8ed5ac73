"""Answers that are words: letters of a choice, names, yes and no, dates and times of day."""

from __future__ import annotations

import re

_CHOICE = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*(?:[).:](?!\d)|\Z))\s*(.*)", re.DOTALL)
_SEVERAL = re.compile(r"\(?([A-J])\)?(?:\s*(?:,|and|&|\s)\s*\(?([A-J])\)?)+")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:option|choice|answer|statement)s?\s*(?:is|are|:)?\s*)?[\[(]?\s*"
    r"([A-Ja-j])\s*(?:[)\].:,\-]|\Z|\s(?=[\(\"])|\s+(?=because|since|as|is|which|[-:]))",
    re.IGNORECASE,
)
_CASE_LETTER = re.compile(r"[\[(]?\s*([A-Ja-j])\s*[)\].]?\Z")
_ARTICLES = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)
_AFTER = re.compile(r"\s*(?:[,;:.(]|-\s|because\b|since\b|as\b|which\b|where\b|who\b|that is\b|$)", re.IGNORECASE)
_KNOWN = """
sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt frac pi infty cdot times pm le ge ne cup
cap in to mod pmod gcd lcm max min det dim deg arg ker circ alpha beta gamma delta epsilon zeta eta theta iota kappa
lambda mu nu xi rho sigma tau upsilon phi chi psi omega emptyset mathbb mathcal overline binom begin end matrix
pmatrix bmatrix vmatrix array cases lfloor rfloor lceil rceil langle rangle infinity vec hat bar neg land lor forall
exists setminus subset subseteq equiv approx sim mid angle triangle perp parallel and or if for all
"""
_FUNCTIONS = frozenset(_KNOWN.split())
_VARIABLES = re.compile(
    r"[abc]{1,3}|[xyz]{1,3}|[mn]{1,2}|[pqr]{1,3}|[uvw]{1,3}|[rst]{1,2}|[hk]{1,2}|dx|dy|d[xyt]|a[xy]|b[xy]"
)
_YEAR = "january february march april may june july august september october november december"
_MONTHS = _YEAR.split()
_MONTH = rf"({'|'.join(f'{month[:3]}(?:{month[3:]})?' if month != 'may' else 'may' for month in _MONTHS)}|sept)\.?"
_DATES = (
    re.compile(rf"{_MONTH}\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(?P<year>\d{{4}}))?", re.IGNORECASE),
    re.compile(
        rf"(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:,?\s+(?P<year>\d{{4}}))?", re.IGNORECASE
    ),
)
_ISO = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})\s*(?:([ap])\.?\s*m\.?)?|(\d{1,2})\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_SAME = {"true": "true", "false": "false", "correct": "true", "incorrect": "false"}


# ---- choices --------------------------------------------------------------------------------------------------------


def choice(gold: str) -> frozenset[str] | None:
    """The letters of a correct answer that is a choice: `B`, `(B)`, `B) Paris`, `A, C`; `None` for other answers."""
    if _SEVERAL.fullmatch(gold) and not re.fullmatch(r"\([^()]*\)", gold):
        return frozenset(re.findall(r"[A-J](?![a-z])", gold))
    found = _CHOICE.fullmatch(gold)
    return frozenset(found[1] or found[2]) if found else None


def chosen(answer: str, letters: frozenset[str]) -> bool:
    """Whether an answer names exactly these letters, with or without the text that belongs to them."""
    if _SEVERAL.fullmatch(answer):
        return frozenset(re.findall(r"[A-J](?![a-z])", answer)) == letters
    answer = re.sub(r"^[a-zA-Z]\s*=\s*(?=\(?[A-Ja-j]\)?\s*$)", "", answer)
    found = _CASE_LETTER.match(answer) or _LETTER.match(answer)
    return found is not None and letters == {found[1].upper()}


# ---- prose ----------------------------------------------------------------------------------------------------------


def is_prose(text: str) -> bool:
    """Whether a text has words that are no names of mathematics: they would be read as products of letters."""
    bare = re.sub(r"\\[a-zA-Z]+", " ", text)
    return any(word not in _FUNCTIONS and not _VARIABLES.fullmatch(word) for word in re.findall(r"[^\W\d_]{2,}", bare))


def same_words(gold: str, answer: str) -> bool:
    """Whether an answer says the same words, whatever their case, or begins with them and goes on to explain."""
    wanted, said = _folded(gold), _folded(answer)
    if wanted == said or _SAME.get(wanted, wanted) == _SAME.get(said, said):
        return True
    return said.startswith(wanted) and bool(_AFTER.match(said[len(wanted) :]))


def time_of_day(text: str) -> tuple[int, int] | None:
    """Hour and minute of a time with "am" or "pm", or of four digits and a colon; `None` for other texts."""
    found = _CLOCK.fullmatch(text.strip())
    if not found:
        return None
    hour, minute, half = int(found[1] or found[4]), int(found[2] or 0), (found[3] or found[5] or "").lower()
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return (hour, minute) if hour < 24 and minute < 60 else None


def date(text: str) -> tuple[int, int, int] | None:
    """Year (0 without one), month and day; `None` for texts that are no date."""
    text = text.strip().strip(".")
    text = re.sub(r"^(?:on\s+)?(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+", "", text, flags=re.IGNORECASE)
    if found := _ISO.fullmatch(text):
        return int(found[1]), int(found[2]), int(found[3])
    for pattern in _DATES:
        if found := pattern.fullmatch(text):
            month = next(g for g in found.groups() if g and g[0].isalpha())[:3].lower()
            return int(found["year"] or 0), [m[:3] for m in _MONTHS].index(month) + 1, int(found["day"])
    return None


def _folded(text: str) -> str:
    text = _ARTICLES.sub("", text.strip())
    return " ".join(text.casefold().replace("-", " ").split()).strip(" .!\"'*`")
