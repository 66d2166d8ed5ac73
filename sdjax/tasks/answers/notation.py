"""One notation for what people write in many: Unicode, LaTeX, Markdown and other scripts' digits as plain text."""

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"),
    **dict.fromkeys("\u00d7\u2a2f\u2715\u2062", r"\times "),
    **dict.fromkeys("\u00b7\u22c5\u2219\u2217\u2022", r"\cdot "),
    **dict.fromkeys("\u00f7\u2215\u2044\u2236", "/"),
    **dict.fromkeys("\u2018\u2019\u2032\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
    "\u221e": r"\infty ",
    "\u221a": r"\sqrt ",
    "\u00b1": r"\pm ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u2264": r"\le ",
    "\u2a7d": r"\le ",
    "\u2265": r"\ge ",
    "\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2243": r"\approx ",
    "\u2245": r"\approx ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2211": r"\sum ",
    "\u220f": r"\prod ",
    "\u222b": r"\int ",
    "\u2192": r"\to ",
    "\u00b0": r"^\circ ",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u2026": "...",
    "\u2102": r"\mathbb{C}",
    "\u211d": r"\mathbb{R}",
    "\u2115": r"\mathbb{N}",
    "\u2124": r"\mathbb{Z}",
    "\u211a": r"\mathbb{Q}",
    "\u066b": ".",
    "\u066c": ",",
    "\u3001": ",",
    "\uff0c": ",",
    "\u3002": ".",
    "\uff0e": ".",
    "\uff1a": ":",
    "\uff1d": "=",
    "\u2223": "|",
}
_LETTERS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega"
_CODES = (*range(0x3B1, 0x3BF), 0x3C0, 0x3C1, *range(0x3C3, 0x3CA))
_GREEK = {chr(code): f"\\{name} " for code, name in zip(_CODES, _LETTERS.split(), strict=True)}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RUNS = re.compile(f"([{''.join(_RAISED)}]+)|([{''.join(_LOWERED)}]+)")
_SPACES = dict.fromkeys(
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
_UNSEEN = dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad", "")

_THIN = "\u2009\u202f\u00a0\u2007"
_GROUPED = re.compile(
    rf"(?<![\d.])\d{{1,3}}(?:(?:\{{,\}}|,?\\[,;:! ]|~|\\thinspace\b ?|['_\u2019{_THIN}])\d{{3}})+(?![\d'])"
)
_NOT_DIGIT = re.compile(r"\D")

_DELIMITERS = re.compile(r"\\[()\[\]]|(?<!\\)\$+")
_STYLES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|ensuremath|phantom\{[^{}]*\}"
    r"|rm|bf|it|mathstrut|middle)(?![a-zA-Z])\s*"
)
_INVISIBLE_BRACE = re.compile(r"(?<=[(\[|])\.|\\(?:left|right)\s*\.")
_WRAPPED = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal|sc)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|emph|underline|boldsymbol"
    r"|bm|boxed|fbox|textcolor\{[a-z]*\}|color\{[a-z]*\}|mathop|mathord)\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\(?:[dtc]frac|sfrac|nicefrac|tfrac|cfrac)(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(
    r"\\frac\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\d|[a-zA-Z]|\\[a-zA-Z]+)\s*(\{|\d|[a-zA-Z]|\\[a-zA-Z]+)"
)
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\[[^\]]*\])?\s*(\d+(?!\d)|[a-zA-Z](?![a-zA-Z])|\\[a-zA-Z]+)")
_COMMANDS = (
    (re.compile(r"\\(?:geq?slant|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\(?:leq?slant|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:neq)(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\(?:doteq|simeq|thickapprox)(?![a-zA-Z])"), r"\\approx"),
    (re.compile(r"\\(?:div)(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:lbrace)(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![a-zA-Z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![a-zA-Z])"), "]"),
    (re.compile(r"\\(?:colon)(?![a-zA-Z])"), ":"),
    (re.compile(r"\\(?:varnothing)(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\(?:degree|textdegree)(?![a-zA-Z])(?:\{\})?|\^\s*\{?\s*\\circ\s*\}?"), r"^\\circ "),
    (re.compile(r"\\(?:dots[cbmio]?|[lc]dots|hdots)(?![a-zA-Z])"), "..."),
    (
        re.compile(r"\\(?:quad|qquad|enspace|hspace\{[^{}]*\}|hskip|space|newline|medskip|,|;|:|!|>| )(?![a-zA-Z])|~"),
        " ",
    ),
    (re.compile(r"\\[,;:!> ]|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\\$|\\textdollar(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:euro|pounds|yen)(?![a-zA-Z])"), ""),
)
_WORDED = (
    (re.compile(r"(?<![a-zA-Z\\])(?:infinity|oo)(?![a-zA-Z])", re.IGNORECASE), r"\\infty"),
    (
        re.compile(r"(?<![a-zA-Z\\])all real numbers\.?\Z|\\mathbb\s*R(?![a-zA-Z])|\\R(?![a-zA-Z])", re.IGNORECASE),
        r"\\mathbb{R}",
    ),
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
)
_ORNAMENTS = '*_`"\u201c\u201d '
LONGEST = 4000
"""Characters; longer texts are returned as they are: no answer is so long."""


def ascii_signs(text: str) -> str:
    """Digits, superscripts, fractions and signs of Unicode as ASCII or LaTeX: `½` as ` 1/2`, `x²` as `x^{2}`."""
    if text.isascii():
        return text
    text = _GROUPED.sub(lambda m: _NOT_DIGIT.sub("", m[0]), text)
    text = _RUNS.sub(_script, text)
    return "".join(map(_signs, text))


def _script(run: re.Match[str]) -> str:
    if run[1]:
        return f"^{{{''.join(map(_RAISED.__getitem__, run[1]))}}}"
    return f"_{{{''.join(map(_LOWERED.__getitem__, run[2]))}}}"


def _signs(sign: str) -> str:
    if sign.isascii():
        return sign
    for table in (_SYMBOLS, _GREEK, _SPACES, _UNSEEN):
        if sign in table:
            return table[sign]
    if unicodedata.category(sign) == "Nd":
        return str(unicodedata.digit(sign))
    if unicodedata.category(sign) == "No" and "FRACTION" in unicodedata.name(sign, ""):
        return " " + unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
    folded = unicodedata.normalize("NFKC", sign)
    return folded if folded.isascii() else sign


def plain(answer: str) -> str:
    """An answer in one notation: no delimiters, styles, wrappers or ornaments; `\\frac{a}{b}` and `\\sqrt{a}` with braces.

    Words stay words, units stay units.  Dollar signs go, whether they delimit mathematics or mean money.
    """
    if len(answer) > LONGEST:
        return answer.strip()
    text = ascii_signs(answer).strip()
    text = _GROUPED.sub(lambda m: _NOT_DIGIT.sub("", m[0]), text)
    if "\\" in text:
        text = _unlatex(text)
    else:
        text = text.replace("$", "").replace("~", " ")
    for pattern, replacement in _WORDED:
        text = pattern.sub(replacement, text)
    text = text.replace("**", "\x00") if re.search(r"\d\s*\*\*\s*[\d({-]", text) else text.replace("**", "")
    text = re.sub(r"[€£¥₹₩₽]|\bUS\$|\bUSD\b|\bRs\.?(?=\s*\d)", "", text)
    text = " ".join(text.replace("\x00", "^").split())
    return _bare(text)


def _unlatex(text: str) -> str:
    text = text.replace("\\\\", "\x01")  # the end of a matrix's row is no escaped space
    text = _DELIMITERS.sub(" ", text)
    text = _INVISIBLE_BRACE.sub(lambda m: m[0][:-1] if m[0].startswith("\\") else m[0], text)
    text = _STYLES.sub("", text)
    for _ in range(6):
        unwrapped = _WRAPPED.sub(_content, text)
        if unwrapped == text:
            break
        text = unwrapped
    text = _FRACTION.sub(r"\\frac", text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    for _ in range(4):
        text = _SHORT_ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text)
        text = _SHORT_FRACTION.sub(_braced, text)
    return text.replace("$", "").replace("\x01", "\\\\")


def _content(wrapped: re.Match[str]) -> str:
    """What a wrapper holds; a text keeps its distance from what is beside it."""
    return f" {wrapped[2].strip()} " if wrapped[1].startswith(("text", "mbox", "hbox")) else wrapped[2]


def _braced(found: re.Match[str]) -> str:
    top = found[1] if found[1].startswith("{") else f"{{{found[1]}}}"
    return f"\\frac{top}" + ("{" if found[2] == "{" else f"{{{found[2]}}}")


def _bare(text: str) -> str:
    """Without ornaments and a final full stop."""
    while True:
        shorter = text.strip(_ORNAMENTS).rstrip(";,").strip()
        if shorter.endswith(".") and not shorter.endswith(".."):
            shorter = shorter[:-1]
        if shorter == text:
            return text
        text = shorter
