"""`sdjax verify`: the rewards of given texts, and what was taken for the answer of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.cli.judged import Known, Verifier, judged
from sdjax.errors import InputError, nearest
from sdjax.run.programs import Programs
from sdjax.run.reading import Rows
from sdjax.tasks import bounded, judging, maths
from sdjax.tasks.answers import extraction, marks
from sdjax.tasks.code.programs import program_in
from sdjax.tasks.completions import split
from sdjax.tasks.data.readers import rows_of
from sdjax.tasks.data.rows import prompt_of
from sdjax.tasks.errors import TaskError
from sdjax.tasks.splits import question_key
from sdjax.types import Example

TEXTS = ("text", "completion", "response")
"""Fields that may hold a text."""


class RewardError(InputError, ValueError):
    """A file of texts cannot be judged: one sentence naming file, line and field."""


def rewards(
    file: str,
    /,
    *,
    data: str = "",
    task: Known = "file",
    verifier: Verifier = "maths",
    rows: Rows = Rows(keep_duplicates=True),
    programs: Programs = Programs(),
    as_json: bool = False,
) -> str:
    """Rewards of given texts, with what was taken for the answer of each: look at them before you train.

    A line of FILE is a text, or an object with `text` (or `completion`, `response`) and its problem's `id` or `prompt`
    (or `messages`); without either, line n belongs to problem n.  `finished: false` says that the length limit cut the
    text off.  Where lines have a `reward`, the differences are counted: a run's rollouts.jsonl is such a file.

    Args:
      file: JSON lines; JSON, CSV and Parquet are read, too, compressed or not.
      data: the problems, a file, folder or hub data set, as `sdjax train experiments/own_data.py` reads them.
      task: humaneval (pip install 'sdjax[code]'), or the problems that `--data` names.
      verifier: how answers are judged: as mathematics, as texts, or as programs by the tests of each row.
      as_json: print one JSON object a line instead.
    """
    problems = judged(data, task, verifier, rows, programs)
    cases, recorded = read_cases(file, problems.name, problems.examples)
    late = bounded.out_of_time()
    verdicts = judging.verdicts(problems.verify, cases)
    found = [
        {
            "id": case.example.id,
            "reward": verdict.reward,
            **taken(case, problems.about["verifier"], verdict.reward),
            "right": case.example.answers if len(case.example.answers) > 1 else case.example.main_answer,
            **({} if before is None else {"recorded": before}),
            **({} if verdict.feedback is None else {"feedback": verdict.feedback}),
        }
        for case, verdict, before in zip(cases, verdicts, recorded, strict=True)
    ]
    if as_json:
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    return "\n".join([*map(line_of, found), "", summary(found, bounded.out_of_time() - late)])


def taken(case: judging.Case, verifier: str, reward: float) -> dict[str, str | None]:
    """What was taken for the answer, and why."""
    if verifier == "tests":
        return {"answer": program_in(case.text), "why": "the last fenced block of the answer"}
    if not case.finished and not judging.has_marked_answer(case.text):
        return {"answer": None, "why": r"cut off before a complete \boxed{} or <answer>"}
    if verifier == "exact":
        said = split(case.text).answer
        return {"answer": marks.stated_answer(said, case.example.main_answer.count("\n") + 1), "why": "stated"}
    found = [extraction.taken(case.text, maths.unwrapped(right)) for right in case.example.answers]
    pairs = zip(found, case.example.answers, strict=True)
    equal = (f for f, right in pairs if reward and f.answer and maths.equal(maths.unwrapped(right), f.answer))
    return next(equal, found[0])._asdict()


def line_of(row: Mapping[str, Any]) -> str:
    """A row for people."""
    shown = lambda text: "nothing" if text is None else repr(text if len(text) <= 80 else text[:77] + "...")
    right = " or ".join(map(repr, row["right"])) if isinstance(row["right"], tuple) else repr(row["right"])
    before = f"  (recorded: {row['recorded']:g})" if row.get("recorded", row["reward"]) != row["reward"] else ""
    right = f"; right is {right}" if row["right"] else ""
    return f"{row['reward']:g}  {row['id']}: took {shown(row['answer'])} ({row['why']}){right}{before}"


def summary(rows: Sequence[Mapping[str, Any]], late: int) -> str:
    """What the rewards come to."""
    mean, none = sum(r["reward"] for r in rows) / len(rows), sum(r["answer"] is None for r in rows)
    compared = [r for r in rows if "recorded" in r]
    differing = sum(r["recorded"] != r["reward"] for r in compared)
    parts = [f"{len(rows)} texts, mean reward {mean:.3f}, {none} without an answer"]
    parts += [f"{late} not compared in {bounded.LIMIT_S:g} s"] if late else []
    parts += [f"{differing} of {len(compared)} recorded rewards differ"] if compared else []
    return "; ".join(parts)


def read_cases(file: str, data: str, examples: Sequence[Example]) -> tuple[list[judging.Case], list[float | None]]:
    """The texts of a file with their problems, and the rewards that it records.  Raises `RewardError`, `TaskError`."""
    by_id = {e.id: e for e in examples}
    by_question = {question_key(e.prompt): e for e in examples}
    lines = []
    for row in rows_of(Path(file), texts=True):
        if isinstance(row.value, TaskError):
            raise row.value
        lines.append((f"{file}, {row.place}", {"text": row.value} if isinstance(row.value, str) else row.value))
    if not lines:
        raise RewardError(f"{file} has no texts: expected JSON lines, each a text or an object with `text`")
    ordered = not any({"id", "prompt", "messages"} & {*row} for _, row in lines)
    if ordered and len(lines) != len(examples):
        raise RewardError(
            f"{file} has {len(lines)} texts and {data} {len(examples)} problems: give each text the `id` or `prompt` of "
            "its problem, or one text for each problem in the same order"
        )
    cases, recorded = [], []
    for number, (where, row) in enumerate(lines):
        field = next((name for name in TEXTS if isinstance(row.get(name), str)), None)
        if field is None:
            raise RewardError(f"{where}: expected a text under `text` (or {', '.join(TEXTS[1:])})")
        example = examples[number] if ordered else problem_of(row, where, data, by_id, by_question)
        finished, reward = row.get("finished", True), row.get("reward")
        if not isinstance(finished, bool):
            raise RewardError(f"{where}: `finished` must be true or false, found {finished!r}")
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
            raise RewardError(f"{where}: `reward` must be a number, found {reward!r}")
        cases.append(judging.Case(example, row[field], finished))
        recorded.append(None if reward is None else float(reward))
    return cases, recorded


def problem_of(
    row: Mapping[str, Any], where: str, data: str, by_id: Mapping[str, Example], by_question: Mapping[str, Example]
) -> Example:
    """The problem that a line names.  Raises `RewardError`."""
    if row.get("id") is not None:
        name = str(row["id"])
        found = by_id.get(name) or by_id.get(name.rsplit("#", 1)[0])  # `to_file` numbers the texts of a problem
        if found is None:
            raise RewardError(f"{where}: no problem of {data} has the `id` {name!r}{nearest(name, list(by_id))}")
        return found
    if "prompt" not in row and "messages" not in row:
        raise RewardError(f"{where}: expected `id` or `prompt`, as other lines have it")
    found = by_question.get(question_key(prompt_of(row, where)))
    if found is None:
        raise RewardError(f"{where}: no problem of {data} has this prompt")
    return found
