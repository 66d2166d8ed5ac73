"""Your model on your problems: a file of JSON lines, any method.

    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method grpo
    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method opd --teacher Qwen/Qwen3-8B
    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method opd --lesson solution

A line has `prompt` (text) or `messages` (a chat that ends with a user turn) and `answer`; `solution` (a worked
reference, which only teachers read) and `feedback` (a fixed remark for wrong answers) are optional.  Answers are compared
as mathematics.  Other fields may name a teacher: `--teachers math=MODEL,code=MODEL --teacher-field domain`.
"""

from __future__ import annotations

from sdjax.cli.options import Choice
from sdjax.engine.train import Experiment
from sdjax.run.settings import Settings
from sdjax.tasks.jsonl import jsonl

METHOD = "sdpo"
SETTINGS = Settings(
    prompts=8, warmup=10, context=1024, completion=512, evaluation=200, evaluate_every=25, save_every=25
)


def experiment(
    *,
    method: Choice,
    data: str,
    settings: Settings = SETTINGS,
    test_data: str | None = None,
    test_fraction: float | None = None,
    skip_bad_rows: bool = False,
) -> Experiment:
    """Any method on a file of problems.

    Args:
      data: JSON lines to train on.
      test_data: JSON lines that are held out.
      test_fraction: without `test_data`, the share of `data` that is held out, split by question (0.1).
      skip_bad_rows: count and list bad lines instead of refusing the file.
    """
    settings = settings.shortened()
    chosen = settings.method(method)
    task = jsonl(data, test_path=test_data, test_fraction=test_fraction, skip_bad_rows=skip_bad_rows)
    return settings.experiment(method=chosen, task=task)
