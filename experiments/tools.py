"""A model learns to use tools: problems that it answers after calls of a calculator or of Python, with every method.

    sdjax train experiments/tools.py                                             arithmetic with a calculator, GRPO
    sdjax train experiments/tools.py --method sdpo --told hindsight              taught by what the tools were going to say
    sdjax train experiments/tools.py --method sdpo --told turn                   each turn by what they said to it alone
    sdjax train experiments/tools.py --data problems.jsonl --model Qwen/Qwen3-0.6B --tools calculator,python

An attempt is a conversation: a turn that calls tools is answered by them, the first turn without a call is the answer.  Calls
have the form of the model's chat template.  `--data` is that of `experiments/own_data.py`.
"""

from __future__ import annotations

from typing import Literal

from sdjax.cli.options import Choice
from sdjax.collect.hindsight import hindsight
from sdjax.collect.turns import by_turn
from sdjax.engine.policies import templated
from sdjax.engine.train import Experiment
from sdjax.models.templates import own_options
from sdjax.run.reading import Reading
from sdjax.run.settings import Settings
from sdjax.tasks.errors import TaskError
from sdjax.tasks.reasoning_gym import chain_sum
from sdjax.tasks.tools.calculator import CALCULATOR
from sdjax.tasks.tools.calls import style_of
from sdjax.tasks.tools.interpreter import interpreter
from sdjax.tasks.tools.tool import Tool
from sdjax.tasks.tools.world import with_tools

METHOD = "grpo"
SETTINGS = Settings(
    steps=100, prompts=4, warmup=10, context=1024, completion=256, evaluation=50, save_every=25, evaluate_every=25
)
OPTIONS = {"sdpo": {"alpha": 1.0, "top_k": 20, "ema_rate": 0.01}}

TOOLS = {"calculator": lambda: CALCULATOR, "python": interpreter}


def chosen(names: str) -> list[Tool]:
    """The tools that `--tools` names.  Raises: `TaskError`."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TOOLS]
    if unknown or not wanted:
        raise TaskError(f"--tools {names}: expected some of {', '.join(TOOLS)}, separated by commas.")
    return [TOOLS[name]() for name in wanted]


def experiment(
    *,
    method: Choice,
    settings: Settings = SETTINGS,
    tools: str = "calculator",
    turns: int = 4,
    told: Literal["peers", "hindsight", "turn"] = "peers",
    data: str | None = None,
    reading: Reading = Reading(),
    terms: int = 3,
    digits: int = 3,
    train_size: int = 400,
) -> Experiment:
    """Any method on problems that are answered with tools.

    Args:
      tools: calculator, python (in the sandbox), or both, separated by commas.
      turns: how many turns an attempt has at most, the answer included.
      told: what SDPO's teacher and others read: a peer's success or feedback; with hindsight also what each call will give;
        with turn, for each turn by itself, what its own calls gave, and in the last one feedback.
      data: problems to train on, as in `experiments/own_data.py`; without them sums are drawn.
      terms: numbers of a drawn sum.
      digits: digits of each of them.
      train_size: drawn training problems.
    """
    settings = settings.shortened()
    if turns < 1:
        raise TaskError(f"--turns {turns}: expected at least 1.")
    if told == "turn":
        method = method.first(lambda built: by_turn(built, turns))
    algorithm = settings.method(method, hindsight() if told == "hindsight" else None)
    own = chosen(tools)
    if data is None:
        sums = {"terms": (terms, terms), "digits": (digits, digits), "seed": settings.seed}
        task = chain_sum(train_size=train_size, test_size=settings.evaluation, **sums)
    else:
        task = reading.task(data)
    student = settings.student()
    # A template that takes tools describes them itself.
    described = "tools" not in own_options(student.tokenizer)
    style = style_of(str(student.tokenizer.chat_template))
    task = with_tools(task, own, style=style, described=described, turns=turns)
    if not described:
        algorithm = templated(algorithm, {"tools": [tool.schema for tool in own]})
    return settings.experiment(method=algorithm, task=task, student=student)
