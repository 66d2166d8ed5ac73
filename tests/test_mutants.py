"""What `mutants.py` makes wrong, and what it leaves alone."""

import ast

from mutants import mutants
from mutate import marked

TEXT = '''"""Says a > b and not c."""
from typing import Literal
Names = Literal["student", "teacher"]

def f(x: int | None, over, axis=-1):
    """Returns 1."""
    chex.assert_rank(x, 1)
    if x < 2 and not over:
        raise ValueError(f"{x + 1} is more than 2")
    kept = jnp.where(over, x, 0.0)
    return stop_gradient(g(x, over, axis=axis) * kept)
'''
ADDED = """
def g(x, y):
    return x["student"] + max(y)
"""


def lines(text):
    """The wrong lines of a text, by the line that they stand for."""
    found = {}
    for mutant in mutants(text):
        ast.parse(mutant.text)
        assert sum(a != b for a, b in zip(text.splitlines(), mutant.text.splitlines(), strict=True)) == 1
        found.setdefault(mutant.line, []).append(mutant.key[1])
    return found


def test_every_kind_is_made_once():
    found = lines(TEXT + ADDED)
    assert sorted(found) == [5, 8, 10, 11, 14]
    assert found[5] == ["def f(x: int | None, over, axis=-2):"]
    comparisons = ("x <= 2 and not over", "x > 2 and not over", "x < 3 and not over")
    connectives = ("x < 2 or not over", "x < 2 and (over)", "(not (x < 2 and not over))")
    assert sorted(found[8]) == sorted(f"if {test}:" for test in comparisons + connectives)
    assert sorted(found[10]) == sorted(
        f"kept = {value}" for value in ("(x)", "(0.0)", "jnp.where(over, 0.0, x)", "jnp.where(over, x, 1.0)")
    )
    assert sorted(found[11]) == sorted(
        f"return {value}"
        for value in (
            "(g(x, over, axis=axis) * kept)",
            "stop_gradient(g(over, x, axis=axis) * kept)",
            "stop_gradient(g(x, over) * kept)",
            "stop_gradient(g(x, over, axis=axis) / kept)",
        )
    )
    assert sorted(found[14]) == sorted(
        ['return x["teacher"] + max(y)', 'return x["student"] - max(y)', 'return x["student"] + min(y)']
    )


def test_a_mutant_knows_the_lines_of_its_statement():
    mutant = mutants("x = f(\n    1,\n    y,\n)\n")[0]
    assert (mutant.line, mutant.lines) == (2, (1, 4)) and mutant.text == "x = f(\n    2,\n    y,\n)\n"
    assert {m.lines for m in mutants("if (\n    a\n    and b\n):\n    c = 1\n")} == {(1, 4), (5, 5)}


def test_marked_text_does_the_same_and_says_which_lines_run(monkeypatch):
    text = '"""Says."""\nfrom __future__ import annotations\n\ndef f(x):\n    """Twice."""\n    if x:\n        g = lambda y: (\n            2 * y)\n        return g(x)\n    return 0\n'
    seen, names = [], {}
    monkeypatch.setattr("builtins.line_runs", lambda file, line: seen.append(line), raising=False)
    exec(marked(text, "some.py"), names)  # noqa: S102
    assert seen == [4] and names["__doc__"] == "Says." and names["f"].__doc__ == "Twice."
    assert (names["f"](3), seen[1:]) == (6, [6, 7, 9, 8])
    assert (names["f"](0), seen[5:]) == (0, [6, 10])
    monkeypatch.delattr("builtins.line_runs")
    assert names["f"](3) == 6
