"""Layouts of public data sets, known by their shape: a row of theirs as one with `prompt`, `answer` and `solution`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.tasks.answers.marks import last_boxed
from sdjax.tasks.data import choices, dialogues
from sdjax.tasks.data.fields import FIELDS, at, unpacked

QUESTIONS = ("prompt", "messages", "problem", "question", "Problem", "Question", "query", "question_stem")
ANSWERS = ("answer", "Answer", "answers", "final_answer", "expected_answer", "ground_truth", "target")
SOLUTIONS = ("solution", "Solution", "completion", "rationale", "explanation")
"""Columns, the first that a row has."""

SHORT = 100
"""Characters of a `solution` that may be the bare answer, as in TRL's data sets."""


class Laid(NamedTuple):
    """A row in the form of `rows.py`, what its fields are called in the file, and the layout in words."""

    row: dict[str, Any]
    names: dict[str, str]
    layout: str


def laid_out(row: Mapping[str, Any], chosen: Mapping[str, str], where: str) -> Laid:
    """A row with its fields under their own names: by its layout, and by `chosen` columns where there are any.

    Raises: `TaskError` for a chosen column that is not there, or choices of which none is right.
    """
    asked = None if {"prompt", "messages", "answer"} & {*chosen} else multiple_choice(row, where)
    found = asked or verl(row) or dialogue(row, where) or instruction(row) or columns(row)
    return with_system(by_choice(found, row, chosen, where) if chosen else found)


def with_system(laid: Laid) -> Laid:
    """The row with a system column as its first turn."""
    form = "messages" if "messages" in laid.row else "prompt"
    if form not in laid.row:
        return laid
    turns, column = dialogues.with_system(laid.row[form], laid.row)
    if not column:
        return laid
    rest = {name: value for name, value in laid.row.items() if name != column}
    return laid._replace(row={**rest, form: turns}, layout=f"{laid.layout}, after `{column}`")


def by_choice(found: Laid, row: Mapping[str, Any], chosen: Mapping[str, str], where: str) -> Laid:
    """A row that was laid out, with the columns that were chosen.  A text to imitate needs no answer.  Raises: `TaskError`."""
    given = {name: at(row, column, where) for name, column in chosen.items() if column}
    used = {column.split(".")[0] for column in chosen.values()}
    forms = {"prompt", "messages"} if {"prompt", "messages"} & {*given} else set()
    # A column that was chosen for one field is not found for another by its name.
    kept = {
        name: value
        for name, value in found.row.items()
        if name not in forms
        and name not in chosen
        and (name not in FIELDS or found.names.get(name, name).split(".")[0] not in used)
        and (name in FIELDS or name not in used)
    }
    if "solution" in given and "answer" not in {**kept, **given}:
        given["answer"] = ()
    return after_marks(
        Laid({**kept, **given}, {**found.names, **chosen}, ", ".join(f"{n}={c}" for n, c in chosen.items()))
    )


def dialogue(row: Mapping[str, Any], where: str) -> Laid | None:
    """A conversation that its assistant ends: what is said last is the solution, which needs no answer; else one to go on.

    Raises: `TaskError` where the last turn is no text.
    """
    found = dialogues.dialogue_of(row)
    if found is None or any(row.get(name) is not None for name in QUESTIONS if name != "messages"):
        return None
    column, turns = found
    rest = {name: value for name, value in row.items() if name not in (column, "messages")}
    if turns[-1]["role"] != "assistant":
        laid = columns({**rest, "messages": turns})
        return laid._replace(names={**laid.names, "messages": column}, layout=laid.layout.replace("messages", column))
    answer = first_of(rest, ANSWERS)
    shown = {
        "solution": dialogues.last_said(turns, column, where),
        "answer": () if answer is None else rest.pop(answer),
    }
    names = {"messages": column, "solution": column, "answer": answer or "answer"}
    how = f"conversation: the last turn of `{column}` is the solution, those before it are read"
    return Laid(
        {**rest, "messages": turns[:-1], **shown}, names, how if answer is None else f"{how}, the answer in `{answer}`"
    )


def instruction(row: Mapping[str, Any]) -> Laid | None:
    """Alpaca: an `instruction`, perhaps with an `input` below it, and the `output` to imitate."""
    if not {"instruction", "output"} <= row.keys() or question_of(row) is not None:
        return None
    rest = {name: value for name, value in row.items() if name not in ("instruction", "input", "output")}
    below = row.get("input") or ""
    text = f"{row['instruction']}\n\n{below}" if isinstance(below, str) and below.strip() else row["instruction"]
    names = {"prompt": "instruction", "solution": "output"}
    return Laid(
        {"answer": (), **rest, "prompt": text, "solution": row["output"]}, names, "Alpaca: `output` is the solution"
    )


def verl(row: Mapping[str, Any]) -> Laid | None:
    """verl and DAPO: `prompt` as turns, the answer in `reward_model.ground_truth`, perhaps a solution in `extra_info`."""
    judge, extra = unpacked(row.get("reward_model")), unpacked(row.get("extra_info"))
    if not isinstance(judge, Mapping) or judge.get("ground_truth") is None:
        return None
    answer = judge["ground_truth"]
    texts = (
        {f"extra_info.{name}": extra.get(name) for name in ("solution", "answer")} if isinstance(extra, dict) else {}
    )
    told = {"solution": row.get("solution"), **texts}
    names = {"answer": "reward_model.ground_truth"}
    found = {k: v for k, v in row.items() if k not in ("reward_model", "solution", "answer")} | {"answer": answer}
    for name, text in told.items():
        if isinstance(text, str) and text.strip() and text.strip() != str(answer).strip():
            found, names = {**found, "solution": text}, {**names, "solution": name}
            break
    question = question_of(row)
    if question is not None and question != "prompt":
        found["messages" if question == "messages" else "prompt"] = found.pop(question)
    return Laid(found, names, "verl and DAPO: the answer in `reward_model.ground_truth`")


def multiple_choice(row: Mapping[str, Any], where: str) -> Laid | None:
    """MMLU, ARC and their like: the choices stand below the question, the answer is a letter.  Raises: `TaskError`."""
    question = question_of(row)
    found = None if question is None else choices.asked(row, question, where)
    if found is None:
        return None
    text, right = found.text, found.right
    rest = {name: value for name, value in row.items() if name not in (question, right)}
    laid = columns({**rest, "prompt": text, "answer": found.letter})
    names = {**laid.names, "prompt": question, "answer": right}
    return Laid(laid.row, names, f"multiple choice: `{question}` with `{found.column}`, the right one in `{right}`")


def columns(row: Mapping[str, Any]) -> Laid:
    """Question, answer and solution by the names of their columns; the answer may stand at the end of the solution."""
    question, answer = question_of(row), first_of(row, ANSWERS)
    solution = first_of(row, SOLUTIONS)
    if question is None:
        return Laid(dict(row), {}, "prompt and answer")
    form = "messages" if question == "messages" else "prompt"
    used = {form: question, "answer": answer, "solution": solution}
    names = {name: column for name, column in used.items() if column is not None}
    beside = {"messages"} if question not in ("prompt", "messages") else set()
    found = {k: v for k, v in row.items() if k not in {*names.values()} | beside}
    found |= {name: row[column] for name, column in names.items()}
    if "ID" in found and "id" not in found:
        found["id"] = found.pop("ID")
        names["id"] = "ID"
    if solution == "completion":
        found["solution"] = said(found["solution"])
    if answer is None and solution is None:
        return Laid(found, names, "no answer")
    if answer is None:
        found, names, how = from_solution(found, names)
        return Laid(found, names, f"{known(question, row)}`{question}`, {how}")
    return after_marks(Laid(found, names, f"{known(question, row)}`{question}`, the answer in `{answer}`"))


def question_of(row: Mapping[str, Any]) -> str | None:
    """The column of the question.  Turns that an assistant ends are none where there is another column."""
    found = [name for name in QUESTIONS if row.get(name) is not None]
    if len(found) > 1 and found[0] == "messages":
        found = found[1:]
    return found[0] if found else next((name for name in QUESTIONS if name in row), None)


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these columns that the row fills, else the first that it has."""
    return next(
        (name for name in names if row.get(name) is not None), next((name for name in names if name in row), None)
    )


def known(question: str, row: Mapping[str, Any]) -> str:
    """The name by which people know the layout, where it has one."""
    if question == "prompt" and isinstance(unpacked(row["prompt"]), list):
        return "TRL conversational: "
    return "MATH or AIME: " if question in ("problem", "Problem") else ""


def after_marks(laid: Laid) -> Laid:
    """GSM8K: what stands after `####` in the answer is the answer, and the text before it the solution."""
    answer = laid.row.get("answer")
    if not isinstance(answer, str) or "####" not in answer:
        return laid
    before, after = (part.strip() for part in answer.rsplit("####", 1))
    if not after:
        return laid
    names, row = laid.names, {**laid.row, "answer": after}
    if row.get("solution") is None and before:
        row, names = {**row, "solution": before}, {**names, "solution": names.get("answer", "answer")}
    question = names.get("prompt", "prompt")
    return Laid(row, names, f"GSM8K: `{question}`, the answer after #### in `{names.get('answer', 'answer')}`")


def from_solution(row: dict[str, Any], names: dict[str, str]) -> tuple[dict[str, Any], dict[str, str], str]:
    r"""MATH: the answer is the last `\boxed{}` of the solution; a solution without marks that is short is the answer."""
    text, column = row["solution"], names["solution"]
    names = {**names, "answer": column}
    if not isinstance(text, str):
        return {k: v for k, v in row.items() if k != "solution"} | {"answer": text}, names, f"the answer in `{column}`"
    boxed = last_boxed(text)
    if boxed is not None:
        alone = text.strip().strip("$").strip() == f"\\boxed{{{boxed}}}"
        kept = {k: v for k, v in row.items() if not (alone and k == "solution")}
        return {**kept, "answer": boxed}, names, f"the answer in the last \\boxed{{}} of `{column}`"
    if "####" in text:
        laid = after_marks(Laid({**row, "answer": text, "solution": None}, names, ""))
        return laid.row, laid.names, f"the answer after #### in `{column}`"
    if len(text) <= SHORT and "\n" not in text.strip():
        kept = {k: v for k, v in row.items() if k != "solution"}
        return {**kept, "answer": text}, names, f"the answer in `{column}`"
    return row, {name: own for name, own in names.items() if name != "answer"}, "no answer"


def said(value: Any) -> Any:
    """The text of a completion that is a list of turns: what its assistant says."""
    turns = unpacked(value)
    if isinstance(turns, list) and turns and all(isinstance(t, Mapping) and "content" in t for t in turns):
        return turns[-1]["content"]
    return value
