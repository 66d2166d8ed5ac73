"""The referee's base models and their facts: how each grammar searches, what a context adds, what its teacher would say.

    python experiments/referee/testbed.py

The first call pre-trains the models, three of each grammar, and keeps them in the user's cache folder, or in `SDJAX_TESTBED`.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from sdjax.cli.options import from_command_line
from sdjax.devices.compilation import prepare_to_compile
from sdjax.engine.generate import GREEDY
from sdjax.engine.policies import Policy
from sdjax.models import pretrained
from sdjax.models.transformer import Transformer
from sdjax.study import referee, searchers
from sdjax.study.arms import arm, forbidding
from sdjax.study.bases import identity
from sdjax.study.blocks import BASES
from sdjax.study.searchers import ANSWERS, INTERVAL, NONE, SOLUTION
from sdjax.study.tables import table
from sdjax.tasks.search import BARE, GRAMMARS, Grammar

CONTEXTS = (INTERVAL, *ANSWERS, SOLUTION)
COLUMNS = ("accuracy", "length", "trials", "words", "goes_on", "honest")


def facts(policy: Policy, grammar: Grammar, problems: int) -> dict:
    """Every way of answering, `{way: {problems: summary}}`, and what a teacher reads in the student's attempts."""
    sets, key = referee.held_out(problems, seed=100), jax.random.key(100)
    told = lambda c: lambda e: searchers.told(e, c, grammar)
    found = {"sampled": referee.behaviour(policy, sets, key)}
    found["greedy"] = referee.behaviour(policy, sets, key, sampling=GREEDY)
    few = {name: sets[name] for name in ("in_domain", "more_options")}
    for c in CONTEXTS:
        found[f"{c.kind}, keep {c.dose:g}"] = referee.behaviour(policy, few, key, context=told(c))
    if grammar.words:
        ids = policy.tokenizer.convert_tokens_to_ids(list(grammar.words))
        found["words forbidden"] = referee.behaviour(policy, few, key, choose=forbidding(ids))
    read = {} if grammar is BARE else referee.read_by_teacher(policy, grammar, (NONE, *CONTEXTS), problems, 100)
    return {"ways": found, "read": read}


def study(
    *,
    out: str = "runs/referee",
    grammars: tuple[str, ...] = tuple(g.name for g in GRAMMARS),
    problems: int = 64,
) -> str:
    """Makes the base models and measures them.

    Args:
      out: the folder of results; what is finished there is not run again.
      grammars: whose base models.
      problems: held-out problems of each family, one answer each.
    """
    rows, read = [], []
    for grammar in (g for g in GRAMMARS if g.name in grammars):
        runs = [measured(out, grammar, base, problems) for base in BASES]
        ways = [(way, name) for way, sets in runs[0]["ways"].items() for name in sets]
        rows += [line(grammar, way, name, [run["ways"][way][name] for run in runs]) for way, name in ways]
        read += [heard(grammar, context, [run["read"][context] for run in runs]) for context in runs[0]["read"]]
    return f"{table(rows)}\n\n{table(read)}"


def measured(out: str, grammar: Grammar, base: int, problems: int) -> dict:
    """The facts of one base model, which is made if need be."""
    started = time.perf_counter()
    folder = searchers.base(grammar, seed=base)
    print(f"{grammar.name} {base}: {identity(folder)} after {time.perf_counter() - started:.0f} s", flush=True)
    loaded = pretrained.load(folder)
    policy = Policy(Transformer(loaded.config), loaded.params, loaded.tokenizer, referee.SHAPES, origin=loaded.origin)
    arguments = {"grammar": grammar.name, "base": identity(folder), "problems": problems}
    return arm(out, "facts", arguments, lambda _: facts(policy, grammar, problems))


def spread(values: list[float], scale: float = 1.0) -> str:
    """The mean over base models, and the lowest and the highest."""
    mean, low, high = (scale * f(values) for f in (np.mean, np.min, np.max))
    return f"{mean:.{0 if scale > 1 else 2}f} ({low:.{0 if scale > 1 else 2}f} to {high:.{0 if scale > 1 else 2}f})"


def line(grammar: Grammar, way: str, name: str, runs: list[dict]) -> dict[str, str]:
    """A row of the first table."""
    cells = {what: spread([run[what] for run in runs], 100 if what == "accuracy" else 1) for what in COLUMNS}
    named = {"grammar": grammar.name, "answers": way, "problems": name.replace("_", " ")}
    return named | {{"accuracy": "accuracy, %"}.get(what, what.replace("_", " ")): cell for what, cell in cells.items()}


def heard(grammar: Grammar, context: str, runs: list[dict]) -> dict[str, str]:
    """A row of the second table."""
    columns = {"answers after a miss, %": "stops", "right result, %": "honest", "target as result, %": "wishful"}
    cells = {column: spread([run[what] for run in runs], 100) for column, what in columns.items()}
    return {"grammar": grammar.name, "told, keeps": context, **cells}


if __name__ == "__main__":
    prepare_to_compile()
    print(from_command_line(study))
