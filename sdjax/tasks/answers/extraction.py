"""What a text that mathematics is expected of gives as its answer, by the kind of answer that is wanted."""

from __future__ import annotations

import re
from typing import NamedTuple

from sdjax.tasks.answers import marks, text_answers
from sdjax.tasks.answers.notation import ascii_signs, plain
from sdjax.tasks.answers.quantities import EXPRESSION, QUANTITY, quantity
from sdjax.tasks.completions import split

_LONGEST_PROSE, _LONGEST_STATEMENT = 6000, 1500
_PADDING = re.compile(r"\n\s+\n|[ \t]{3,}")
_MATHS = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?!\s)([^$\n]+?)(?<![\s\\])\$(?!\d)", re.DOTALL
)
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*|__([^_\n]{1,80})__|\\textbf\{([^{}\n]{1,80})\}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)(?<!\b[a-z]\.)|[;\n\u3002]|\\n")
_REMARK = re.compile(
    r"\([^()]*\)|(?<=[.\n])\W{0,8}(?:check|verification|to verify|verify|note|n\.b\.|p\.?s\.?|remark|i checked|i verified|let me know"
    r"|i hope|hope this)\b.*\Z",
    re.IGNORECASE | re.DOTALL,
)
_CONCLUDES = re.compile(r"=|\b(?:total|altogether|so|thus|hence|therefore|in all|sum|finally)\b", re.IGNORECASE)
_ANOTHER = re.compile(
    rf"\s*[^\W\d]{{0,12}}\s*(?:,\s*(?:and|or)?|\band\b|\bor\b|\bto\b|\\pm)\s*(?={QUANTITY.pattern})", re.IGNORECASE
)
_LONE_LETTER = re.compile(
    r"\(([A-J])\)|\*\*\(?([A-J])[).:]?\*?\*?|\b(?:option|choice|answer)\s+\(?([A-J])\b|(?<![\w'])([B-H])(?![\w'])|\b(A)[).:]",
    re.ASCII,
)


class Taken(NamedTuple):
    """What was taken for the answer (`None`: nothing), and why."""

    answer: str | None
    why: str


def taken(text: str, gold: str) -> Taken:
    """The answer in a completion, given the correct one, whose kind says what is looked for.

    After the thinking: the last box or `<answer>`; else what the text states ("The answer is", "####"); else, as a last
    resort, its last number, or its last line where no number is wanted.
    """
    said = split(text)
    if said.open:
        return Taken(None, "the thinking does not end")
    if not said.answer:
        return Taken(None, "there is no answer after the thinking" if said.thinking else "the text is empty")
    mark = marks.marked(said.answer)
    if mark is not None and mark.answer is None:
        return Taken(None, f"the last {_NAMES[mark.by]} is empty or broken")
    if mark is not None:
        inner = marks.statement(plain(mark.answer)) if mark.by == "box" else None
        content = (
            inner
            if inner is not None
            else marks.last_boxes(said.answer)
            if mark.by == "box"
            else _in_prose(_PADDING.sub(_unpadded, mark.answer[-_LONGEST_STATEMENT:]), gold, whole=True)
        )
        return Taken(content, f"the last {_NAMES[mark.by]}")
    prose = _PADDING.sub(_unpadded, said.answer[-_LONGEST_PROSE:])
    stated = marks.statement(prose)
    if stated is not None:
        content = _in_prose(stated[:_LONGEST_STATEMENT], gold)
        return Taken(content, "stated as the answer" if content else "an answer is announced, and nothing follows")
    return _last_resort(prose, gold)


_NAMES = {"box": r"\boxed{}", "tag": "<answer>"}


def _in_prose(text: str, gold: str, whole: bool = False) -> str | None:
    """The answer at the beginning of what follows "The answer is"; with `whole`, of a text that is all answer."""
    wanted = plain(gold)
    numeric = quantity(wanted) is not None
    if whole and "\n" not in text.strip() and len(text) < 80 and not numeric:
        inner = marks.statement(text)
        return (inner if inner is not None else text).strip() or None
    if whole and (inner := marks.statement(text)) is not None:
        text = inner
    text = _dedented(text)
    if numeric:
        return _stated_quantity(text, whole) or (_clause(text) or None)
    if text_answers.choice(wanted) is None and not text_answers.is_prose(wanted):
        maths = _MATHS.match(text.lstrip(" *:\n"))
        if maths and not re.match(r"\s*(?:,|and\b|or\b|=)", text.lstrip(" *:\n")[maths.end() :]):
            return next(filter(None, maths.groups())).strip()
    return _clause(text) or None


def _dedented(text: str) -> str:
    """Without ornaments and blank lines before it; displayed formulas on one line."""
    text = re.sub(r"\A[\s*_:#>`-]*(?=[\s*_:#>`]*\n|\*)", "", text).lstrip(" *:\n")
    return re.sub(
        r"(\\\[|\$\$)(.+?)(\\\]|\$\$)",
        lambda m: f"{m[1]}{' '.join(m[2].split())}{m[3]}",
        text,
        flags=re.DOTALL,
    )


def _unpadded(padding: re.Match[str]) -> str:
    """A blank line stays one, with spaces in it or without; of many spaces two stay."""
    return "\n\n" if padding[0][0] == "\n" else "  "


def _clause(text: str) -> str:
    """The first sentence, without ornaments."""
    end = _SENTENCE_END.search(text.strip())
    return text.strip()[: end.start() if end else None].strip().strip("*_`").strip()


def _stated_quantity(text: str, whole: bool = False) -> str | None:
    """The number that a clause states: all of it, its end after "=", or its first number with what belongs to it."""
    maths = _MATHS.match(text)
    clause = _clause(text)
    if (
        maths
        and quantity(plain(next(filter(None, maths.groups())))) is not None
        and not _lists_another(text[maths.end() :])
    ):
        return next(filter(None, maths.groups())).strip()
    clear = plain(clause)
    if quantity(clear) is not None or (whole and not EXPRESSION.search(clear)):
        return clause
    if "=" in clear and re.match(r"[^,]{0,60}=", clear):
        parts = re.split(r"\\approx", clear)
        right = parts[0].rsplit("=", 1)[1].strip()
        return (
            (right if len(parts) == 1 else f"{right} \\approx {parts[1]}")
            if quantity(right)
            else _first(right) or clause
        )
    return _first(clear)


def _first(clear: str) -> str | None:
    """The first number of a clause with its percent sign; the whole clause where it lists several."""
    if (bold := _BOLD.search(clear)) and quantity(plain(next(filter(None, bold.groups())))):
        return next(filter(None, bold.groups()))
    found = EXPRESSION.search(clear)
    if not found:
        return None
    if _lists_another(clear[found.end() :]):
        return clear
    tail = re.match(
        r"\s*(?:\\?%|percent\b|(?:hundred|thousand|million|billion|trillion|dozen)\b)", clear[found.end() :]
    )
    before = clear[: found.start()]
    letters = re.match(r"[a-zA-Z](?![a-zA-Z])|\\(?:pi|sqrt)", clear[found.end() :])
    if letters or re.search(r"(?:\\[a-zA-Z]+|[_^{(\[])\s*$", before):
        return clear
    sign = "-" if re.search(r"\b(?:negative|minus)\s*$", before, re.IGNORECASE) else ""
    return sign + found[0] + (tail[0] if tail else "")


def _lists_another(rest: str) -> bool:
    return bool(_ANOTHER.match(ascii_signs(rest).replace("$", "").replace("*", "")))


def _last_resort(text: str, gold: str) -> Taken:
    wanted = plain(gold)
    if text_answers.choice(wanted) is not None:
        letters = [next(filter(None, found)) for found in _LONE_LETTER.findall(text)]
        line = text.strip().splitlines()[-1]
        whole = re.fullmatch(r"\W*([A-Ja-j])\W*", line)
        return Taken(whole[1] if whole else letters[-1] if letters else line, "the last letter")
    if quantity(wanted) is not None:
        return Taken(_unmarked_quantity(text), "the last number")
    line = text.strip().splitlines()[-1].strip()
    paragraph = re.split(r"\n\s*\n", text.strip())[-1]
    maths = [next(filter(None, m.groups())).strip() for m in _MATHS.finditer(paragraph)]
    if maths and not text_answers.is_prose(wanted):
        return Taken(maths[-1], "the last formula")
    return Taken(line.strip("*_`$ ") or None, "the last line")


def _unmarked_quantity(text: str) -> str | None:
    """The last number in bold that is no intermediate result, else the last number; remarks do not count."""
    said = _REMARK.sub(lambda m: " " if _worth(text, m) else m[0], text)
    if quantity(plain(said)) is not None and len(said) < 80:
        return said.strip()
    bold = [m for m in _BOLD.finditer(said) if quantity(plain(next(filter(None, m.groups()))))]
    if bold and not _CONCLUDES.search(said[bold[-1].end() :]):
        return next(filter(None, bold[-1].groups()))
    found = list(QUANTITY.finditer(_loose(said)))
    if not found:
        return None
    after = re.match(
        r"\s*(?:\\?%|percent\b|(?:thousand|million|billion|trillion|dozen)\b)", _loose(said)[found[-1].end() :]
    )
    return found[-1][0] + (after[0] if after else "")


def _worth(text: str, remark: re.Match[str]) -> bool:
    """Whether something is left to be the answer where a remark is left out."""
    return bool(QUANTITY.search(ascii_signs(text[: remark.start()])))


def _loose(text: str) -> str:
    """A long text in a notation in which numbers can be found: as `plain`, line by line."""
    lines = text.splitlines()[-40:]
    return "\n".join(plain(line) if len(line) < 2000 else ascii_signs(line) for line in lines)
