"""Problems from every kind of file: the same rows in each, layouts by their shape, bad rows named, parts of data sets chosen."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sdjax.collect.rollouts import to_file
from sdjax.tasks import maths
from sdjax.tasks.data import layouts, problems
from sdjax.tasks.data.problems import stem
from sdjax.tasks.data.sources import source
from sdjax.tasks.errors import TaskError
from sdjax.types import Rollout

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
ROWS = [
    {"prompt": 'One, "two",\r\nthree: how many?', "answer": 3, "solution": "One by one.", "level": "easy"},
    {"prompt": "Größe 😀?", "answer": "1/2"},
]


def read(path, **how):
    return problems.problems(path, **how)


def asked(examples):
    return [example.prompt[-1]["content"] for example in examples]


def answers(examples):
    return [example.answer for example in examples]


# ---- files ----------------------------------------------------------------------------------------------------------


def as_lines(rows):
    return b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\r\n\r\n"


def as_csv(rows, separator=","):
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "answer", "solution", "level"], delimiter=separator)
    table.writeheader()
    table.writerows(rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


FILES = {
    "p.jsonl": as_lines(ROWS),
    "p.unknown": as_lines(ROWS),
    "lines.json": as_lines(ROWS),
    "p.json": json.dumps(ROWS).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "p.csv": as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "p.tsv": as_csv(ROWS, "\t"),
    "p.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "p.csv.bz2": bz2.compress(as_csv(ROWS)),
    "p.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    # Names that say something else than the file is.
    "packed.jsonl": gzip.compress(as_lines(ROWS)),
    "packed.csv": bz2.compress(as_csv(ROWS)),
    "other.json.gz": lzma.compress(json.dumps(ROWS).encode()),
    "unpacked.jsonl.gz": as_lines(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_problems(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    found = read(tmp_path / name)
    assert asked(found.examples) == [row["prompt"] for row in ROWS] and answers(found.examples) == ["3", "1/2"]
    assert found.examples[0].solution == "One by one." and found.examples[1].solution is None
    assert found.examples[0].meta == {"level": "easy"}
    assert found.examples[0].id.rsplit(":", 1)[0] == name.split(".")[0] and len({e.id for e in found.examples}) == 2


@pytest.mark.parametrize("name", ["p.parquet", "parquet.jsonl", "p.arrow", "file.arrow", "p.jsonl.zst"])
def test_files_that_need_arrow(tmp_path, name):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.Table.from_pylist([{**row, "answer": str(row["answer"])} for row in ROWS])
    table = table.append_column("when", arrow.array([0, 1], arrow.timestamp("s")))
    if "parquet" in name:
        parquet.write_table(table, tmp_path / name, row_group_size=1)
    elif name == "p.jsonl.zst":
        with arrow.output_stream(tmp_path / name, compression="zstd") as file:
            file.write(as_lines(ROWS))
    else:
        new = arrow.ipc.new_stream if name == "p.arrow" else arrow.ipc.new_file
        with new(tmp_path / name, table.schema) as file:
            file.write_table(table)
    found = read(tmp_path / name)
    assert asked(found.examples) == [row["prompt"] for row in ROWS] and answers(found.examples) == ["3", "1/2"]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(TaskError, match=rf"{name.split('.')[0]}\.\S+ (is damaged|cannot be read)"):
        read(tmp_path / name)


def test_tables_keep_nested_values_as_json(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"prompt": json.dumps(TURNS), "reward_model": json.dumps({"ground_truth": "5"}), "n": 1.0},
        {
            "prompt": json.dumps(TURNS[1:]),
            "reward_model": json.dumps({"ground_truth": '["5", "five"]'}),
            "n": float("nan"),
        },
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "v.parquet")
    found = read(tmp_path / "v.parquet").examples
    assert found[0].prompt == tuple(TURNS) and answers(found) == ["5", ("5", "five")]
    with pytest.raises(TaskError, match="v.parquet, row 2: `n` is nan, which is no number"):
        read(tmp_path / "v.parquet", fields="answer=n")
    assert answers(read(tmp_path / "v.parquet", fields="answer=reward_model.ground_truth").examples)[0] == "5"


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("x.csv", b"prompt,answer\nq,1,2\n", "x.csv, line 2: found 3 cells, and the header names 2 columns"),
        ("x.csv", b'prompt,answer\na,1\n"b\nc,2\n', "x.csv, line 3: this is not CSV"),
        ("x.csv", b"prompt,answer\na\xff,1\n", "x.csv, line 2: this is not UTF-8"),
        ("x.csv", b"prompt,answer\na,1\nb,\n", "x.csv, line 3: `answer` is missing; found prompt"),
        ("x.csv", b"prompt,prompt\na,1\n", "line 1: two columns have the name 'prompt'"),
        (
            "x.json",
            b'[{"prompt": "a",\n "answer" 1}]',
            "x.json: this is not JSON (Expecting ':' delimiter at line 2, column 11)",
        ),
        ("x.json", b'[{"prompt": "a", "answer": 1}, 7]', "x.json, row 2: expected a JSON object"),
        ("x.json", b"7", "x.json: expected a list of objects"),
        ("x.json", b'[{"prompt": "a", "answer": NaN}]', "x.json, row 1: `answer` is nan, which is no number"),
        ("x.json", b'{"a": 1, "a": 2}', "x.json: this is not JSON (the key 'a' stands twice"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 9999, mtime=0)[:30], "x.jsonl.gz is damaged or cut off"),
        ("x.jsonl", b"{'prompt': 1}", "each line must be one JSON object; a file that is one list or one object must"),
        (
            "x.jsonl",
            b'[{"prompt": "a"}]',
            "line 1: expected a JSON object with `prompt` and `answer`, found a list; a file",
        ),
        ("x.csv", b'{"prompt": "a", "answer": 1}', "x.csv, line 1: this is JSON and no table"),
        ("x.csv", b"question,answer\na,1\nb,\n", "x.csv, line 3: `answer` is missing; found question; name its column"),
        ("x.jsonl", b'{"instruction": "a"}', "found only instruction; name its column, as --fields prompt=COLUMN"),
        ("x.csv", "prompt,answer".encode("utf-16"), "x.csv is UTF-16; save the file as UTF-8"),
        ("x.xlsx", b"PK\x03\x04", "x.xlsx is a ZIP archive or a spreadsheet"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "x.parquet is a pointer of Git LFS"),
        ("x.jsonl", b"<!DOCTYPE html>", "x.jsonl is a web page; download the file itself"),
    ],
)
def test_bad_files_and_rows_are_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as error:
        read(tmp_path / name)
    assert sentence in str(error.value) and str(tmp_path / name) in str(error.value)


def test_bad_rows_of_a_table_are_left_out(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'prompt,answer\na,1\nb\n"c\r\nd",2\n\ne,3\n')
    found = read(tmp_path / "x.csv", skip_bad_rows=True)
    assert (asked(found.examples), len(found.bad), found.about["bad"]) == (["a", "c\r\nd", "e"], 1, 1)
    assert [e.id for e in found.examples] == ["x:2", "x:4", "x:7"]


# ---- layouts --------------------------------------------------------------------------------------------------------

GSM = {"question": "Natalia sold 48, then half as many?", "answer": "Half is <<48/2=24>>24.\nTogether 72.\n#### 72"}
MATH = {"problem": "x?", "level": "Level 5", "type": "Algebra", "solution": r"So it is $\boxed{\frac{1}{2}}$."}
VERL = {
    "data_source": "math_dapo",
    "prompt": TURNS,
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b"},
}


@pytest.mark.parametrize(
    "row, question, answer, solution, said",
    [
        ({"prompt": "q", "answer": 5}, "q", "5", None, "`prompt`, the answer in `answer`"),
        (GSM, GSM["question"], "72", "Half is <<48/2=24>>24.\nTogether 72.", "GSM8K"),
        (MATH, "x?", r"\frac{1}{2}", MATH["solution"], "MATH"),
        ({**MATH, "answer": "0.5"}, "x?", "0.5", MATH["solution"], "MATH"),
        ({"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204}, "p", "204", "s", "AIME"),
        ({"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u"}, "p", "204", "s", "AIME"),
        (VERL, "2 + 3?", "34", None, "verl and DAPO"),
        (
            {**VERL, "extra_info": {"answer": "Long. #### 34", "question": "raw"}},
            *("2 + 3?", "34", "Long. #### 34", "verl"),
        ),
        ({**VERL, "prompt": "plain", "solution": "34", "source_prompt": TURNS}, "plain", "34", None, "verl and DAPO"),
        (
            {**VERL, "reward_model": {"ground_truth": ["34", "thirty-four"]}},
            "2 + 3?",
            ("34", "thirty-four"),
            None,
            "verl",
        ),
        ({"prompt": TURNS, "answer": "5"}, "2 + 3?", "5", None, "TRL conversational"),
        ({"prompt": TURNS, "solution": r"$\boxed{5}$"}, "2 + 3?", "5", None, "TRL conversational"),
        ({"prompt": TURNS, "solution": "$5$"}, "2 + 3?", "$5$", None, "TRL conversational"),
        ({"prompt": TURNS, "ground_truth": "5"}, "2 + 3?", "5", None, "TRL conversational"),
        (
            {"prompt": TURNS, "completion": [{"role": "assistant", "content": r"I add: \boxed{5}"}]},
            *("2 + 3?", "5", r"I add: \boxed{5}", "TRL conversational"),
        ),
        (
            {
                "problem": "p",
                "solution": r"long \boxed{1}",
                "messages": [*TURNS, {"role": "assistant", "content": "a"}],
            },
            *("p", "1", r"long \boxed{1}", "MATH"),
        ),
        ({"messages": TURNS, "answer": [1, "one"]}, "2 + 3?", ("1", "one"), None, "`messages`"),
        (
            {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}},
            "q",
            ("a", "b"),
            None,
            "`answers`",
        ),
        ({"prompt": "q", "answer": "[1, 2]"}, "q", "[1, 2]", None, "`prompt`"),
    ],
)
def test_layouts_are_known_by_their_shape_and_said(tmp_path, row, question, answer, solution, said):
    (tmp_path / "x.json").write_text(json.dumps([row]))
    found = read(tmp_path / "x.json")
    (example,) = found.examples
    assert (example.prompt[-1], example.answer, example.solution) == (
        {"role": "user", "content": question},
        answer,
        solution,
    )
    assert said in found.said and list(found.about["layouts"].values()) == [1]


def test_what_is_lost_or_contradicts_itself_is_said(tmp_path):
    """Pictures that no model reads, and answers of which one must be wrong; several solutions contradict nobody."""
    row = {"question": "How many?", "answer": "2", "image": None}
    pictured = {"image": {"bytes": None, "path": "1.png"}, "figure_1": {"bytes": None, "path": None}}
    other = [{**row, "question": "how  MANY?", "answer": "3"}, {**row, "solution": "one by one"}]
    write(tmp_path / "x.jsonl", row, *other, {**row, **pictured, "question": "q"})
    found = read(tmp_path / "x.jsonl")
    assert found.about["contradicting"] == 1 and found.about["unread"] == {"image": 1, "figure_1": 1}
    assert "; 1 rows have `image`, which no model here reads; 1 rows have `figure_1`" in found.said
    assert found.said.endswith("; 1 rows answer a question of an earlier row otherwise, and both are kept")
    write(tmp_path / "y.jsonl", row, {**row, "answer": ["3", "2"]}, {**row, "answer": ["2", "3"], "id": "c"})
    found = read(tmp_path / "y.jsonl", duplicates=True).about
    assert found["contradicting"] == 1 and "unread" not in found


LETTER = "\n\nAnswer with the letter of the right choice."


@pytest.mark.parametrize(
    "row, question, answer, solution",
    [
        ({"question": "q", "choices": ["w", "x", "y"], "answer": 1}, "q\n\nA. w\nB. x\nC. y", "B", None),  # MMLU
        ({"question": "q", "options": ["3", "4"], "answer": "B", "answer_index": 0}, "q\n\nA. 3\nB. 4", "B", None),
        ({"question": "q", "choices": ["3", "4"], "answer": "3"}, "q\n\nA. 3\nB. 4", "A", None),
        ({"question": "q", "choices": ["3", "4"], "answer": "1"}, "q\n\nA. 3\nB. 4", "B", None),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            "q\n\n1. x\n2. y",
            "2",
            None,
        ),
        (
            {"question": "q", "options": ["A)21", "B)22"], "rationale": "r", "correct": "B"},
            "q\n\nA)21\nB)22",
            "B",
            "r",
        ),
    ],
)
def test_choices_are_written_below_their_question(tmp_path, row, question, answer, solution):
    write(tmp_path / "x.jsonl", row)
    found = read(tmp_path / "x.jsonl")
    (example,) = found.examples
    assert (example.prompt[-1]["content"], example.answer, example.solution) == (question + LETTER, answer, solution)
    assert "read as multiple choice: `question` with `" in found.said
    assert maths.verify(example, f"It is ({answer}).").reward == 1.0 == 1 - maths.verify(example, "It is (D).").reward


def test_choices_that_stand_in_the_question_stay_there(tmp_path):
    row = {"question": "Is it A. tea, B. milk?", "choices": ["tea", "milk"], "answer": "B"}
    write(tmp_path / "x.jsonl", row, {**row, "question": "Which?", "answer": "D"})
    with pytest.raises(TaskError, match="x.jsonl, line 2: `answer` is 'D', which is none of the choices in `choices`"):
        read(tmp_path / "x.jsonl")
    assert asked(read(tmp_path / "x.jsonl", skip_bad_rows=True).examples) == [row["question"]]
    assert answers(read(tmp_path / "x.jsonl", fields="answer=answer").examples) == ["B", "D"]  # as they stand


def test_other_columns_stay_for_the_verifier_and_teachers():
    assert layouts.laid_out(VERL, {}, "x").row["data_source"] == "math_dapo"
    assert {"level", "type"} <= {*layouts.laid_out(MATH, {}, "x").row}


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"question": "q", "answer": ["1", None]}, "x.jsonl, line 1: `answer, number 2` must be a text or a number"),
        ({**VERL, "reward_model": {"ground_truth": {"target": 3}}}, "`reward_model.ground_truth` must be a text"),
        ({"Problem": " ", "Answer": 3}, "line 1: `Problem` is empty"),
        ({"problem": "p", "solution": "no box\nat all"}, "line 1: `answer` is missing"),
        (
            {"prompt": [*TURNS, {"role": "assistant", "content": "a"}], "answer": "1"},
            "`prompt` must end with a user turn",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
            "holds 'image' among its parts",
        ),
    ],
)
def test_errors_name_the_column_of_the_file(tmp_path, row, sentence):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(TaskError) as error:
        read(tmp_path / "x.jsonl")
    assert sentence in str(error.value)


CALLED = {"type": "function", "function": {"name": "get", "arguments": {"x": 1}}}
SENT = {"type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be kind."}
TOOL = {"role": "tool", "content": "5"}


@pytest.mark.parametrize(
    "row, prompt, said",
    [
        (  # ShareGPT
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2},
            (USER, SAID, USER),
            "conversation: the last turn of `conversations` is the solution, those before it are read; 1 rows have no answer",
        ),
        (  # OpenAI
            {
                "messages": [SYSTEM, USER, {"role": "assistant", "content": None, "tool_calls": [SENT]}, TOOL, SAID],
                "tools": [{"type": "function"}],
            },
            (SYSTEM, USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, TOOL),
            "1 rows have `tools`, which no model here reads",
        ),
        (  # Hermes
            {
                "conversations": [
                    *(
                        {"from": "system", "value": "Be kind."},
                        {"from": "human", "value": "q"},
                        {"from": "gpt", "value": "a"},
                    ),
                    *({"from": "tool", "value": "5"}, {"from": "gpt", "value": "a"}),
                ]
            },
            (SYSTEM, USER, SAID, TOOL),
            "those before it are read",
        ),
        (  # ToolACE
            {
                "system": "Be kind.",
                "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
            },
            (SYSTEM, USER),
            "those before it are read, after `system`",
        ),
        ({"instruction": "p", "input": "below", "output": "a"}, ({"role": "user", "content": "p\n\nbelow"},), "Alpaca"),
        ({"instruction": "q", "input": " ", "output": "a"}, (USER,), "Alpaca"),
    ],
)
def test_conversations_end_with_what_is_imitated(tmp_path, row, prompt, said):
    write(tmp_path / "x.jsonl", row)
    found = read(tmp_path / "x.jsonl")
    (example,) = found.examples
    assert (example.prompt, example.solution, example.answers) == (prompt, "a", ())
    assert said in found.said and found.about["unanswered"] == 1


def test_conversations_with_answers_are_problems(tmp_path):
    write(tmp_path / "x.jsonl", {"conversations": [{"from": "human", "value": "q"}], "answer": 4})
    write(tmp_path / "y.jsonl", {"messages": [USER, SAID], "answer": 4})
    (asked_only,), (shown,) = (read(tmp_path / f"{name}.jsonl").examples for name in "xy")
    assert asked_only.prompt == shown.prompt == (USER,) and answers([asked_only, shown]) == ["4", "4"]
    assert asked_only.solution is None and shown.solution == "a"
    assert "unanswered" not in read(tmp_path / "x.jsonl").about


def test_a_text_to_imitate_needs_no_answer(tmp_path):
    """Where its column is named: else an answer that is missing is an error, as a call is that is no text."""
    write(tmp_path / "x.jsonl", {"system_prompt": "Be kind.", "question": "q", "response": "a"})
    (example,) = read(tmp_path / "x.jsonl", fields="solution=response").examples
    assert (example.prompt, example.solution, example.answers) == ((SYSTEM, USER), "a", ())
    with pytest.raises(
        TaskError, match="`answer` is missing; .*, or only that of a text to imitate, as --fields solution"
    ):
        read(tmp_path / "x.jsonl")
    write(tmp_path / "y.jsonl", {"messages": [USER, {"role": "assistant", "tool_calls": [SENT]}]})
    with pytest.raises(TaskError, match="y.jsonl, line 1: `messages` ends with `tool_calls` and no text"):
        read(tmp_path / "y.jsonl")


def test_tool_turns_names_and_parts_of_text(tmp_path):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": call, "weight": None},
        {"role": "tool", "content": "5", "name": "add", "tool_call_id": "1"},
    ]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": turns, "answer": 5}))
    (example,) = read(tmp_path / "x.jsonl").examples
    assert example.prompt[0] == {"role": "user", "content": "2 + 3?", "name": "ann"}
    assert example.prompt[1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert example.prompt[2] == turns[2]
    to_file(tmp_path / "again.jsonl", [Rollout(example, (), (), "", 0)])
    assert read(tmp_path / "again.jsonl").examples[0].prompt == example.prompt


# ---- columns --------------------------------------------------------------------------------------------------------


def test_columns_by_dotted_path(tmp_path):
    row = {"q": {"text": "one?"}, "labels": [{"gold": 1}], "key": "a", "id": 7, "why": "because", "answer": "not this"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (found,) = read(tmp_path / "x.jsonl", fields="prompt=q.text, answer=labels.0.gold,solution=why,id=").examples
    assert (asked([found]), found.answer, found.solution, found.id) == (["one?"], "1", "because", "x:1")
    gsm = {"query": "q", "reply": "so\n#### 4"}
    (tmp_path / "y.jsonl").write_text(json.dumps(gsm))
    (found,) = read(tmp_path / "y.jsonl", fields="prompt=query,answer=reply").examples
    assert (found.answer, found.solution, found.meta) == ("4", "so", {})


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ("prompt", "--fields prompt: expected FIELD=COLUMN pairs"),
        ("promt=q", "there is no field 'promt'; did you mean prompt?"),
        ("prompt=q,prompt=r", "'prompt' is given twice"),
        ("prompt=q,messages=r", "give `prompt` or `messages`"),
        ("prompt=question.txt", "line 1: `question.txt` is missing; found text; did you mean text?"),
        ("prompt=question.text,answer=gold.0", "line 1: `gold.0` is missing"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, fields, sentence):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": {"text": "q"}, "gold": "1"}))
    with pytest.raises(TaskError) as error:
        read(tmp_path / "x.jsonl", fields=fields)
    assert sentence in str(error.value)


# ---- folders and data sets ------------------------------------------------------------------------------------------


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def numbers(first, last):
    return [{"prompt": f"{i}?", "answer": i} for i in range(first, last)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set" / "data" / "train-00000-of-00002.jsonl", *numbers(0, 3))
    write(tmp_path / "set" / "data" / "train-00001-of-00002.jsonl", *numbers(2, 5))
    write(tmp_path / "set" / "data" / "test.jsonl", *numbers(5, 7))
    write(tmp_path / "set" / ".cache" / "x.jsonl", {"broken": 1})
    write(tmp_path / "set" / "dataset_infos.json", {"broken": 1})
    return tmp_path / "set"


def test_a_folder_is_read_split_by_split_without_duplicates(folder):
    found = read(folder)
    assert answers(found.examples) == list("01234")
    assert (found.about["split"], found.about["rows"], found.about["duplicates"]) == ("train", 6, 1)
    assert "5 problems of 6 rows in 2 files, 1 duplicates left out" in found.said
    assert answers(read(folder, prefer=("test",)).examples) == ["5", "6"]
    assert len(read(folder, duplicates=True).examples) == 6 and len(read(folder, first=2).examples) == 2
    with pytest.raises(TaskError, match="has no split 'dev'; choose one of test, train with --split"):
        read(folder, split="dev")
    with pytest.raises(TaskError, match="--split is for folders"):
        read(folder / "data" / "test.jsonl", split="test")


def test_the_test_split_is_held_out(folder):
    task = problems.task(folder, test_split="test")
    assert (answers(task.train), answers(task.test), task.name) == (list("01234"), ["5", "6"], "set")
    assert task.read["train"]["split"] == "train" and task.read["test"]["split"] == "test"
    assert len(task.read["train"]["files"][0]["sha256"]) == 64
    json.dumps(task.read)


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: "main/test-*"}
- config_name: socratic
  data_files: [{split: train, path: ["socratic/*.jsonl"]}]
---
# A data set
"""


def test_a_card_names_configurations_and_splits(tmp_path):
    for config in ("main", "socratic"):
        write(tmp_path / config / "train-00000.jsonl", *numbers(0, 2 if config == "main" else 9))
    write(tmp_path / "main" / "test-00000.jsonl", *numbers(4, 5))
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(TaskError, match="has the configurations main, socratic; choose one with --config"):
        read(tmp_path)
    assert len(read(tmp_path, config="main").examples) == 2
    assert len(read(tmp_path, config="socratic").examples) == 9
    assert answers(read(tmp_path, config="main", split="test").examples) == ["4"]
    with pytest.raises(TaskError, match="no configuration 'mian'; did you mean main"):
        read(tmp_path, config="mian")


def test_a_hub_data_set_comes_from_the_cache_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--some--set" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    write(snapshot / "main" / "train-0.jsonl", *numbers(0, 4))
    write(snapshot / "main" / "test-0.jsonl", *numbers(4, 6))
    write(tmp_path / "datasets--some--set" / "refs" / "main")
    (tmp_path / "datasets--some--set" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = source("some/set", split="test")
    assert (found.split, found.revision, [p.name for p in found.files]) == ("test", snapshot.name, ["test-0.jsonl"])
    assert answers(read("some/set", config="main").examples) == list("0123")
    with pytest.raises(TaskError, match="none/such is no file or folder, and cannot be had from the Hugging Face hub"):
        read("none/such")


def test_what_the_datasets_library_has_loaded_is_found(tmp_path, monkeypatch):
    """In its own cache: of two versions the newer one, and none of the files that it keeps for itself."""
    arrow = pytest.importorskip("pyarrow")
    from huggingface_hub import constants

    for number, version in enumerate(("older", "newer")):
        folder = tmp_path / "Some-Lab___math-17k_x" / "main" / "0.0.0" / version
        folder.mkdir(parents=True)
        table = arrow.Table.from_pylist([{"prompt": f"{version}?", "answer": "1"}])
        for file in ("math-17k_x-train.arrow", "math-17k_x-test-00000-of-00001.arrow", "cache-1-train.arrow"):
            with arrow.ipc.new_stream(folder / file, table.schema) as stream:
                stream.write_table(table)
            os.utime(folder / file, (number, number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = source("Some-Lab/Math-17kX")
    assert (found.split, found.config, found.revision) == ("train", "main", "newer")
    assert [p.name for p in found.files] == ["math-17k_x-train.arrow"]
    assert asked(read("Some-Lab/Math-17kX", split="test").examples) == ["newer?"]
    with pytest.raises(TaskError, match="in the datasets library's cache. has no configuration 'x'; it has main"):
        source("Some-Lab/Math-17kX", config="x")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does where a data set is gated, or is not there."""

    def do_GET(self):
        gated = self.path.endswith("gated")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_why_the_hub_gives_nothing_is_said(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        for name, why in {
            "gated": "it is gated: ask for access on its page",
            "none": "there is no such data set, or",
        }.items():
            with pytest.raises(
                TaskError, match=rf"some/{name} is no file or folder, .* \({why}.*log in with `hf auth login`"
            ):
                read(f"some/{name}")
        server.shutdown()
    with pytest.raises(TaskError, match="gsm8k does not exist; a data set of the hub is named with its owner"):
        read("gsm8k")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a", "a.parquet.zst"])
def test_names_without_their_endings(tmp_path, name):
    assert stem(tmp_path / name) == "a"
