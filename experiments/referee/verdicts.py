"""Computes the verdict on every claim of claims.toml from the results, and prints every number that the text quotes.

    python experiments/referee/verdicts.py

Arms that were not run are listed as such; claims about them have no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdjax.cli.options import from_command_line
from sdjax.study.blocks import ARMS, BASES, SEEDS, Sizes, with_forced
from sdjax.study.claims import Claim, Effect, Results, Verdict, judge, read_claims, verdicts
from sdjax.study.tables import table

CLAIMS = Path(__file__).with_name("claims.toml")
MEASURES = ("accuracy", "length", "words", "goes_on", "honest", "first_right")


def study(*, out: str = "runs/referee", lr: float = Sizes().lr) -> str:
    """Three tables: the verdicts, every arm over its measurements, and the cost.

    Args:
      out: the folder of results.
      lr: the learning rate of the runs that are judged.
    """
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(out).glob("run-*.json"))]
    files = [file for file in files if file["arguments"]["lr"] == lr]
    results = {grammar: dict(with_forced(complete(files, grammar))) for grammar in ARMS}
    claims = read_claims(CLAIMS)
    tested = [c for c in claims if known(c, results)]
    effects = [judge(c, results[c.grammar]) for c in tested]
    lines = dict(zip((c.name for c in tested), map(cells, tested, effects, verdicts(effects)), strict=True))
    judged = [lines.get(c.name, not_run(c)) for c in claims]
    courses = [line for grammar, arms in results.items() for line in courses_of(grammar, arms)]
    return "\n\n".join([table(judged), *([table(courses)] if courses else []), cost(files)])


def complete(files: list[dict], grammar: str) -> dict[str, list[list[dict]]]:
    """The results of a grammar's arms, `{arm: [base][seed]}`; arms with runs missing are left out."""
    found: dict[str, dict[tuple[str, int], dict]] = {}
    for file in files:
        told = file["arguments"]
        if told["grammar"] == grammar:
            found.setdefault(told["arm"], {})[told["base"], told["seed"]] = file["result"]
    whole = {name: runs for name, runs in found.items() if len(runs) == len(BASES) * len(SEEDS)}
    bases = sorted({base for runs in whole.values() for base, _ in runs})
    return {name: [[runs[base, seed] for seed in SEEDS] for base in bases] for name, runs in whole.items()}


def known(claim: Claim, results: Mapping[str, Results]) -> bool:
    """Whether both arms of a claim were run."""
    wanted = {claim.arm, claim.arm if claim.against == "itself" else claim.against}
    return wanted <= results[claim.grammar].keys()


def cells(claim: Claim, effect: Effect, verdict: Verdict) -> dict[str, str]:
    """A row of the table of verdicts."""
    points = claim.measure == "accuracy"
    scale, unit = (100, " points") if points else (1, "")
    shown = f"{scale * effect.mean:+.{1 if points else 2}f}{unit}"
    interval = f"{scale * effect.low:+.{1 if points else 2}f} to {scale * effect.high:+.{1 if points else 2}f}"
    return row(claim, f"{shown} [{interval}]", f"**{verdict}**")


def not_run(claim: Claim) -> dict[str, str]:
    """A row for a claim whose arms were not run, or not with all bases and seeds."""
    return row(claim, "", "not run")


def row(claim: Claim, here: str, verdict: str) -> dict[str, str]:
    """The cells that every claim has."""
    paper = (
        f"{'above' if claim.sign > 0 else 'below'} {'its beginning' if claim.against == 'itself' else claim.against}"
    )
    what = f"{claim.measure.replace('_', ' ')}, {claim.problems.replace('_', ' ')}, step {claim.step}"
    return {
        "claim": f"{claim.says} ({claim.arxiv})",
        "arm": f"{claim.grammar}: {claim.arm}",
        "predicted": f"{what}: {paper}",
        "here": here,
        "verdict": verdict,
    }


def courses_of(grammar: str, arms: Results) -> list[dict[str, str]]:
    """The rows of the table of arms of a grammar; above them what all arms begin with."""
    whole = {name: [rows for seeds in runs for rows in seeds] for name, runs in arms.items() if "forced" not in name}
    before = [course(grammar, "before training", [rows[:1] for rows in next(iter(whole.values()))])] if whole else []
    return [*before, *(course(grammar, name, rows) for name, rows in sorted(whole.items()))]


def course(grammar: str, name: str, rows: list[list[dict]]) -> dict[str, str]:
    """A row of the table of arms: accuracy with more options at every measurement, and the last one in all measures."""
    mean = lambda at, problems, what: float(np.mean([r[at][problems][what] for r in rows]))
    way = " ".join(f"{100 * mean(at, 'more_options', 'accuracy'):.0f}" for at in range(len(rows[0])))
    sets = [name for name, value in rows[0][-1].items() if isinstance(value, dict)]
    ends = {f"{s.replace('_', ' ')}, %": f"{100 * mean(-1, s, 'accuracy'):.0f}" for s in sets}
    more = {what.replace("_", " "): f"{mean(-1, 'more_options', what):.2f}" for what in MEASURES[1:]}
    return {"grammar": grammar, "arm": name, "more options, %, at every measurement": way, **ends, **more}


def cost(files: list[dict]) -> str:
    """How many runs there are and how long they took."""
    return f"{len(files)} runs, {sum(file['seconds'] for file in files) / 60:.0f} minutes of one process."


if __name__ == "__main__":
    print(from_command_line(study))
