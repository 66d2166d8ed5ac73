"""One-line mutants of a Python file: each is the file's text with one expression made wrong.

What is left alone: docstrings, annotations, imports, `raise` and `assert` statements, checks (`chex.assert_*`, `zip(strict=)`), and
cards, which are documentation.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Iterator

COMPARISONS = {
    ast.Lt: ("<=", ">"),
    ast.LtE: ("<", ">="),
    ast.Gt: (">=", "<"),
    ast.GtE: (">", "<="),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
NAMES = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "masked_mean": "masked_sum",
    "masked_sum": "masked_mean",
    "token_mean": "sequence_mean",
    "sequence_mean": "token_mean",
}
"""Functions that are called in place of one another."""
ROLES = {"student": "teacher", "teacher": "student", "live": "initial", "initial": "live"}
"""Strings that say who writes or reads."""
DROPPED = {"stop_gradient", "clip", "where", "abs", "normalise", "sorted", "reversed", "mean_one"}
"""Functions whose call is replaced by one of its arguments; of a selection, by either side."""
SYMMETRIC = {*NAMES, "equal", "gcd", "hypot", "isinstance", "getattr", "zip"}
"""Calls whose arguments are not exchanged: nothing, or something else than the order, would be tested."""
SPARED_CALLS = ("chex.assert_", "Card", "warnings.warn", "print", "TypeVar", "NewType")
SPARED = (ast.Import, ast.ImportFrom, ast.Raise, ast.Assert, ast.Global, ast.Nonlocal, ast.JoinedStr)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong edit: the line it stands on (from 1), the lines of its statement, the old and new line, the whole text."""

    line: int
    lines: tuple[int, int]
    before: str
    after: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        """What the edit is, wherever in the file the line has moved to."""
        return self.before.strip(), self.after.strip()


Edit = tuple[int, int, str]
"""Where an edit begins and ends, in bytes from the file's start, and what stands there instead."""


class Source:
    """A file's text with the places of its nodes."""

    def __init__(self, text: str):
        self.text, self.bytes = text, text.encode()
        self.tree = ast.parse(text)
        lengths = (len(line) for line in self.bytes.splitlines(keepends=True))
        self.starts = [0, *itertools.accumulate(lengths)]

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.bytes[begin:end].decode()

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edit]:
        """`new` in place of the operator `old` that stands between two nodes."""
        begin, end = self.span(left)[1], self.span(right)[0]
        place = self.bytes.find(old.encode(), begin, end)
        if place >= 0:
            yield place, place + len(old), new

    def instead(self, node: ast.AST, new: str) -> Edit:
        return *self.span(node), new

    def exchanged(self, first: ast.AST, second: ast.AST) -> Iterator[Edit]:
        """Two nodes in one another's place, with what stands between them."""
        (begin, middle), (later, end) = self.span(first), self.span(second)
        if self.of(first) != self.of(second):
            yield begin, end, self.of(second) + self.bytes[middle:later].decode() + self.of(first)


# ---- edits of one node ------------------------------------------------------------------------------------------------


def of_comparison(source: Source, node: ast.Compare) -> Iterator[Edit]:
    words = {ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Eq: "==", ast.NotEq: "!="}
    words |= {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
    sides = [node.left, *node.comparators]
    for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
        for new in COMPARISONS[type(operator)]:
            yield from source.between(left, right, words[type(operator)], new)


def of_operator(source: Source, node: ast.BinOp) -> Iterator[Edit]:
    if type(node.op) in OPERATORS:
        old, new = OPERATORS[type(node.op)]
        yield from source.between(node.left, node.right, old, new)
        if old in "&|":
            yield source.instead(node, source.of(node.left))
            yield source.instead(node, source.of(node.right))


def of_update(source: Source, node: ast.AugAssign) -> Iterator[Edit]:
    if type(node.op) in OPERATORS:
        old, new = OPERATORS[type(node.op)]
        yield from source.between(node.target, node.value, old + "=", new + "=")


def of_connective(source: Source, node: ast.BoolOp) -> Iterator[Edit]:
    old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    for left, right in itertools.pairwise(node.values):
        yield from source.between(left, right, old, new)


def of_sign(source: Source, node: ast.UnaryOp) -> Iterator[Edit]:
    # An axis -1 as 1 is the same in two dimensions; the constant itself is changed below.
    if not (isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)):
        yield source.instead(node, f"({source.of(node.operand)})")


def of_constant(source: Source, node: ast.Constant) -> Iterator[Edit]:
    value = node.value
    if isinstance(value, bool):
        yield source.instead(node, str(not value))
    elif isinstance(value, int):
        yield source.instead(node, str(value + 1))
    elif isinstance(value, float):
        other = 1.0 if value == 0.0 else 1000.0 * value if value < 1e-3 else 1.5 * value if value < 1e6 else 10.0
        yield source.instead(node, repr(float(f"{other:.6g}")))
    elif isinstance(value, str) and value in ROLES:
        yield source.instead(node, f'"{ROLES[value]}"')


def of_call(source: Source, node: ast.Call) -> Iterator[Edit]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    starred = any(isinstance(a, ast.Starred) for a in node.args)
    if name in NAMES:
        end = source.span(node.func)[1]
        yield end - len(name), end, NAMES[name]
    if name in DROPPED and node.args and not starred:
        kept = node.args[1:] if name == "where" else node.args[:1]
        yield from (source.instead(node, f"({source.of(a)})") for a in kept)
    if name not in SYMMETRIC and not starred:
        pairs = itertools.pairwise(node.args[1:] if name in ("where", "clip") else node.args)
        yield from itertools.chain.from_iterable(source.exchanged(*pair) for pair in pairs)
    for keyword in node.keywords:
        before = [n for n in (node.func, *node.args, *(k.value for k in node.keywords)) if n is not keyword.value]
        earlier = [source.span(n)[1] for n in before if source.span(n)[1] <= source.span(keyword)[0]]
        if keyword.arg not in (None, "dtype", "strict") and len(earlier) > 1:
            yield max(earlier), source.span(keyword)[1], ""


def of_choice(source: Source, node: ast.If | ast.IfExp | ast.While) -> Iterator[Edit]:
    if not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield source.instead(node.test, f"(not ({source.of(node.test)}))")


def of_comprehension(source: Source, node: ast.comprehension) -> Iterator[Edit]:
    yield from (source.instead(test, "True") for test in node.ifs)


EDITS = {
    ast.Compare: of_comparison,
    ast.BinOp: of_operator,
    ast.AugAssign: of_update,
    ast.BoolOp: of_connective,
    ast.UnaryOp: of_sign,
    ast.Constant: of_constant,
    ast.Call: of_call,
    ast.If: of_choice,
    ast.IfExp: of_choice,
    ast.While: of_choice,
    ast.comprehension: of_comprehension,
}


# ---- all of a file ----------------------------------------------------------------------------------------------------


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _children(source: Source, node: ast.AST) -> Iterator[ast.AST]:
    """What below a node may be made wrong."""
    spared = {id(getattr(node, field, None)) for field in ("annotation", "returns")}
    spared |= {id(x) for x in getattr(node, "decorator_list", ())}
    for child in ast.iter_child_nodes(node):
        said = isinstance(child, ast.Call) and source.of(child.func).startswith(SPARED_CALLS)
        said |= isinstance(child, ast.keyword) and child.arg == "strict"
        said |= isinstance(child, ast.Subscript) and source.of(child.value) == "Literal"
        if id(child) not in spared and not isinstance(child, SPARED) and not _is_docstring(child) and not said:
            yield child


def _nodes(source: Source, node: ast.AST, statement: tuple[int, int]) -> Iterator[tuple[ast.AST, tuple[int, int]]]:
    """Nodes with the lines of the innermost statement around them; of a compound statement, of its head."""
    for child in _children(source, node):
        lines = statement
        if isinstance(child, ast.stmt):
            head = [n.lineno for n in getattr(child, "body", ()) if isinstance(n, ast.stmt)]
            lines = child.lineno, max(child.lineno, min(head) - 1) if head else child.end_lineno
        yield child, lines
        yield from _nodes(source, child, lines)


def _edited(source: Source, node: ast.AST, lines: tuple[int, int], edit: Edit) -> Mutant | None:
    begin, end, new = edit
    text = (source.bytes[:begin] + new.encode() + source.bytes[end:]).decode()
    line = source.bytes.count(b"\n", 0, begin) + 1
    try:
        if ast.dump(ast.parse(text)) == ast.dump(source.tree):
            return None
    except SyntaxError:
        return None
    return Mutant(line, lines, source.text.splitlines()[line - 1], text.splitlines()[line - 1], text)


def mutants(text: str) -> list[Mutant]:
    """All one-line mutants of a module's text, in the order of its lines."""
    source = Source(text)
    found: dict[str, Mutant] = {}
    for node, lines in _nodes(source, source.tree, (1, 1)):
        for edit in EDITS[type(node)](source, node) if type(node) in EDITS else ():
            mutant = _edited(source, node, lines, edit)
            if mutant:
                found.setdefault(mutant.text, mutant)
    return sorted(found.values(), key=lambda m: (m.line, m.after))
