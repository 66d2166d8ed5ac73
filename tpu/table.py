"""The tables of `tpu/README.md`: `python tpu/table.py FOLDER` makes the plans that the folder has not, and prints them.

A plan is kept as soon as it is made, so the command may be ended and started again.  Give a number to make only so many
more plans.  GPUs come first: they are compiled faster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.cli.options import Choice
from sdjax.devices.compilation import prepare_to_compile
from sdjax.methods.sdpo import sdpo
from sdjax.planning import plan, verdict
from sdjax.planning.chips import PlanError


class Row(NamedTuple):
    """One plan: the cloud's name of the slice or the GPUs, and the options of `sdjax plan`."""

    slice: str
    topology: str
    mesh: str
    model: str
    prompts: int
    completion: int
    rows_per_chunk: int = 8
    tokens_per_chunk: int = 256
    scan: bool = True
    quick: bool = True
    params_dtype: str = "float32"
    optimizer: str = "adamw"

    def options(self) -> dict[str, Any]:
        """The options of the command."""
        return {name: value for name, value in self._asdict().items() if name != "slice"}

    def command(self) -> str:
        """What prints this plan."""
        standard = {name: self._field_defaults[name] for name in ("params_dtype", "optimizer")}
        words = [
            f"--{name.replace('_', '-')} {value}" if not isinstance(value, bool) else f"--{name}" * value
            for name, value in self.options().items()
            if standard.get(name) != value
        ]
        return " ".join(["sdjax plan --method sdpo", *filter(None, words)])

    def what(self) -> str:
        """The model, and what is kept of it where that is not the standard."""
        kept = [name for name in (self.params_dtype, self.optimizer) if name not in self._field_defaults.values()]
        return ", ".join([self.model, *kept])

    def file(self) -> str:
        """Where the plan is kept."""
        return "-".join(map(str, self)).replace(":", "-") + ".json"


ROWS = (
    Row("v5e-8", "v5e:2x4", "8x1", "smollm2-135m", 32, 512),
    Row("v5e-32", "v5e:4x8", "32x1", "smollm2-135m", 128, 2048),
    Row("v5e-8", "v5e:2x4", "4x2", "qwen3-1.7b", 16, 1024),
    Row("v5e-32", "v5e:4x8", "8x4", "qwen3-1.7b", 64, 2048),
    Row("v5e-8", "v5e:2x4", "1x8", "qwen3-8b", 8, 512),
    Row("v5e-32", "v5e:4x8", "4x8", "qwen3-8b", 32, 1024),
    Row("v5e-32", "v5e:4x8", "4x8", "qwen3-8b", 32, 512),
    Row("v5p-8", "v5p:2x2x1", "2x2", "qwen3-8b", 16, 2048),
    Row("v5p-16", "v5p:2x2x2", "4x2", "qwen3-8b", 16, 2048),
    Row("v5p-256", "v5p:4x4x8", "32x4", "qwen3-8b", 128, 8192),
    Row("v5e-32", "v5e:4x8", "8x4", "deepseek-r1-distill-qwen-7b", 32, 512),
    Row("v5p-32", "v5p:2x2x4", "8x2", "deepseek-r1-distill-qwen-7b", 32, 4096),
    Row("v5e-32", "v5e:4x8", "4x8", "olmo3-7b-instruct", 32, 512),
    Row("v5p-32", "v5p:2x2x4", "8x2", "olmo3-7b-instruct", 32, 4096),
    Row("v5p-32", "v5p:2x2x4", "4x4", "qwen3-30b-a3b", 16, 1024, tokens_per_chunk=512),
    Row("v5p-32", "v5p:2x2x4", "4x4", "gpt-oss-20b", 16, 1024, tokens_per_chunk=512),
)
"""Cores count in the names of v5p slices, two per chip; chips in those of v5e."""

GPU_ROWS = (
    Row("1 H100", "h100:1", "1x1", "qwen3-1.7b", 8, 2048, quick=False),
    Row("8 H100", "h100:8", "8x1", "qwen3-1.7b", 8, 2048, tokens_per_chunk=2048, quick=False),
    Row("8 A100", "a100:8", "8x1", "qwen3-1.7b", 8, 2048, tokens_per_chunk=2048, quick=False),
    Row("8 H100", "h100:8", "4x2", "qwen3-8b", 16, 2048, tokens_per_chunk=2048, quick=False),
    Row("8 H200", "h200:8", "8x1", "qwen3-8b", 16, 2048, tokens_per_chunk=2048, quick=False),
    Row("8 B200", "b200:8", "8x1", "qwen3-8b", 16, 2048, tokens_per_chunk=2048, quick=False),
    Row("2 x 8 H100", "h100:2x8", "16x1", "qwen3-8b", 32, 2048, tokens_per_chunk=2048, quick=False),
    Row("8 H100", "h100:8", "2x4", "qwen3-30b-a3b", 8, 1024, 8, 512, True, False, "bfloat16", "adafactor"),
    Row("2 x 8 H100", "h100:2x8", "4x4", "qwen3-30b-a3b", 16, 1024, 8, 512, True, False),
    Row("8 H100", "h100:8", "2x4", "gpt-oss-20b", 8, 1024, 8, 512, True, False, "bfloat16", "adafactor"),
    Row("2 x 8 H100", "h100:2x8", "4x4", "gpt-oss-20b", 16, 1024, 8, 512, True, False),
)
"""Hosts of eight."""


def made(row: Row, folder: Path) -> dict[str, Any]:
    """A row's plan, or what it was refused with, as kept in the folder or made now."""
    file = folder / row.file()
    if not file.exists():
        print(row.command(), file=sys.stderr, flush=True)
        try:
            found = verdict.as_json(plan.plan(method=Choice(sdpo), **row.options()))
        except PlanError as error:
            if not str(error).startswith(plan.TOO_LARGE):
                raise
            found = {"refused": str(error)}
        file.write_text(json.dumps(found, indent=1))
    return json.loads(file.read_text())


def cells(row: Row, found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    first = [row.slice, row.mesh, row.what(), f"{row.prompts} x 8 x {row.completion}"]
    if "refused" in found:
        return [*first, *[""] * 6, f"no: {found['refused'].removeprefix(plan.TOO_LARGE + ': ')}"]
    made = verdict.from_json(found)
    gigabytes = lambda value: f"{value / 1e9:.1f}"
    needed, took = verdict.totals(made), verdict.seconds(made)
    most, room = max(needed.values()), verdict.available(made)
    there = "yes" if most <= room else "**no**"
    return [
        *first,
        gigabytes(sum(made.state.values())),
        gigabytes(sum(c.memory["temporary"] for c in made.updates)),
        gigabytes(made.cache),
        f"{sum(c.flops for c in made.updates) / 1e12:.0f}",
        f"{sum(sum(c.exchanged.values()) for c in made.updates) / 1e9:.0f}",
        f"{took['update']:.1f} + {took['sampler']:.1f}",
        f"{there}: {gigabytes(needed['update'])} and {gigabytes(needed['sampler'])} of {room / 1e9:.0f}",
    ]


HEADS = "slice|mesh|model|prompts x attempts x tokens|state|temporary|cache|TFLOP|exchanged|seconds|fits, GB"


def table(folder: Path, rows: tuple[Row, ...]) -> str:
    """The Markdown table of those of the plans that a folder has, and the command of each."""
    there = [row for row in rows if (folder / row.file()).exists()]
    lines = [f"| {HEADS.replace('|', ' | ')} |", "|" + "---|" * (HEADS.count("|") + 1)]
    lines += [f"| {' | '.join(cells(row, made(row, folder)))} |" for row in there]
    return "\n".join([*lines, "", *(f"    {row.command()}" for row in there)])


def main(folder: str, more: str = "1000") -> None:
    """Makes at most `more` plans, then prints the table of all that are there."""
    prepare_to_compile()
    Path(folder).mkdir(parents=True, exist_ok=True)
    missing = [row for row in (*GPU_ROWS, *ROWS) if not (Path(folder) / row.file()).exists()]
    for row in missing[: int(more)]:
        made(row, Path(folder))
    print(table(Path(folder), ROWS), table(Path(folder), GPU_ROWS), sep="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
