"""Your model on your problems: a file, a folder or a data set of the Hugging Face hub, any method.

    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method grpo
    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method opd --teacher Qwen/Qwen3-8B
    sdjax train experiments/own_data.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method opd --lesson solution
    sdjax train experiments/own_data.py --data openai/gsm8k --config main --test-split test --method grpo
    sdjax train experiments/own_data.py --data mine.parquet --fields prompt=query,answer=labels.gold --method grpo

A row has `prompt` (text, or turns) or `messages` (a chat that ends with a user turn) and `answer`; `solution` (a worked
reference, which only teachers read) and `feedback` (a fixed remark for wrong answers) are optional.  Layouts of public data
sets (GSM8K, MATH, AIME, TRL, verl, DAPO) are recognised and said.  Answers are compared as mathematics; with `--judge` a model
scores them by a rubric.  Other fields may name a teacher: `--teachers math=MODEL,code=MODEL --teacher-field domain`.
"""

from __future__ import annotations

from sdjax.cli.options import Choice
from sdjax.engine.train import Experiment
from sdjax.run.reading import Reading
from sdjax.run.settings import Settings

METHOD = "sdpo"
SETTINGS = Settings(
    prompts=8, warmup=10, context=1024, completion=512, evaluation=200, evaluate_every=25, save_every=25
)


def experiment(
    *,
    method: Choice,
    data: str,
    settings: Settings = SETTINGS,
    reading: Reading = Reading(),
) -> Experiment:
    """Any method on your problems.

    Args:
      data: problems to train on: JSON lines, JSON, CSV or Parquet, plain or compressed (.gz, .zst); a folder of such
        files; or a data set of the Hugging Face hub, by name.
    """
    settings = settings.shortened()
    chosen = settings.method(method)
    return settings.experiment(method=chosen, task=reading.task(data))
