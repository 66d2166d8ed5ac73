"""Runs the referee's arms: every method on every grammar, on three base models and with four seeds each.

    python experiments/referee/arms.py                                     all that is not yet there
    python experiments/referee/arms.py --grammars silent --arms GRPO       some of it

What is finished is never run again, so the command goes on where it was interrupted, and several of them may share a folder.
"""

from __future__ import annotations

import time

from sdjax.cli.options import from_command_line
from sdjax.devices.compilation import prepare_to_compile
from sdjax.study.blocks import ARMS, Block, Sizes
from sdjax.tasks.search import GRAMMARS


def study(
    *,
    out: str = "runs/referee",
    grammars: tuple[str, ...] = tuple(ARMS),
    arms: tuple[str, ...] = (),
    lr: float = Sizes().lr,
    steps: int = 20,
) -> str:
    """Runs arms.

    Args:
      out: the folder of results.
      grammars: which grammars; `arms`: which of their arms, all if none is named.
      lr: learning rate of AdamW.
      steps: batches, of those after which arms are measured (20, 30 or 60 at the end).
    """
    chosen = [g for g in GRAMMARS if g.name in grammars]
    blocks = {g.name: Block(out, g, Sizes(lr=lr), steps) for g in chosen}
    names = arms or tuple(dict.fromkeys(name for g in blocks for name in ARMS[g]))
    for name in names:
        for grammar, block in blocks.items():
            if name in ARMS[grammar]:
                started = time.perf_counter()
                runs = block.run(name)
                end = [run["rows"][-1]["more_options"]["accuracy"] for seeds in runs for run in seeds]
                seconds = time.perf_counter() - started
                print(f"{grammar}, {name}: {100 * sum(end) / len(end):.0f} % at the end, {seconds:.0f} s", flush=True)
    return ""


if __name__ == "__main__":
    prepare_to_compile()
    from_command_line(study)
