"""A model learns to program from tests: HumanEval or a file of problems, any method.

    sdjax train experiments/code.py --task humaneval
    sdjax train experiments/code.py --data problems.jsonl --model Qwen/Qwen3-0.6B --method resd --reward share

Programs run in a sandbox, on all cores; SDPO, VPD, MOPD, RESD and whichever method reads feedback are told which test failed and
how.  A line of a file has `prompt` or `messages` and `tests`: inputs and outputs, calls of a function, or assertions; see
`sdjax/tasks/code/problems.py`.  Programs that fail hidden tests (`hidden_tests`) are not told which.
"""

from __future__ import annotations

from typing import Literal

from sdjax.cli.options import Choice
from sdjax.engine.train import Experiment
from sdjax.run.programs import Programs
from sdjax.run.reading import Reading
from sdjax.run.settings import Settings
from sdjax.tasks.code.tasks import code_problems, humaneval
from sdjax.tasks.errors import TaskError

METHOD = "sdpo"
SETTINGS = Settings(
    steps=100, prompts=4, warmup=10, context=1536, completion=384, shorten_prompts=True, evaluation=41, save_every=25
)
OPTIONS = {"sdpo": {"alpha": 1.0, "top_k": 20, "ema_rate": 0.01}}


def experiment(
    *,
    method: Choice,
    settings: Settings = SETTINGS,
    task: Literal["humaneval", "file"] = "humaneval",
    data: str | None = None,
    reading: Reading = Reading(),
    reward: Literal["all", "share"] = "all",
    programs: Programs = Programs(),
) -> Experiment:
    """Any method on problems of programming.

    Args:
      task: humaneval (pip install 'sdjax[code]'), or the file that `--data` names.
      data: problems with tests: a file, a folder or a hub data set, as in own_data.py; implies `--task file`.
      reward: what a training program earns: 1 for passing all tests, or the share that it passes.
    """
    settings = settings.shortened()
    algorithm = settings.method(method)
    if task == "file" and data is None:
        raise TaskError("--task file needs --data FILE.")
    if task == "humaneval" and data is None and (reading.test_data or reading.test_split):
        raise TaskError("--test-data needs --data: HumanEval holds out a share of its own problems (--test-fraction).")
    chosen = {"reward": reward, **programs.how()}
    if data is None:
        problems = humaneval(test_fraction=reading.test_fraction or 0.25, **chosen)
    else:
        problems = code_problems(data, reading.task, **chosen)
    return settings.experiment(method=algorithm, task=problems)
