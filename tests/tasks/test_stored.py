"""Sequences that stay out of memory hold what was put in, in order, and say where there is no room for it."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from sdjax.tasks.code.judging import ScriptTests
from sdjax.tasks.data import stored
from sdjax.tasks.data.stored import Chosen, Stored, rows_at
from sdjax.tasks.errors import TaskError
from sdjax.types import Example

ITEMS = [
    Example(str(i), ({"role": "user", "content": "ü" * i},), ("a", "b"), meta={"tests": ScriptTests(("1",), ("2",), 1)})
    for i in range(200)
]


@pytest.fixture(params=["in memory", "in a file"])
def kept(request, monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", 1 << 25 if request.param == "in memory" else 1000)
    found = Stored(ITEMS)
    assert found.file._rolled == (request.param == "in a file")
    return found


def test_items_come_back_in_their_order(kept):
    assert list(kept) == ITEMS and len(kept) == 200
    assert kept[0] == ITEMS[0] and kept[-1] == ITEMS[-1] and list(kept[5:50:3]) == ITEMS[5:50:3]
    assert list(kept[:100][-10:]) == ITEMS[90:100] and list(Chosen(kept, [3, 1])[1:]) == [ITEMS[1]]
    in_file = kept.file._rolled
    assert isinstance(kept.settled(), Stored if in_file else tuple) and list(kept.settled()) == ITEMS
    assert isinstance(rows_at(kept.settled(), [3, 1]), Chosen if in_file else tuple)
    assert list(rows_at(kept.settled(), [3, 1])) == [ITEMS[3], ITEMS[1]]
    kept.add(ITEMS[7])
    assert kept[200] == ITEMS[7] and kept[3] == ITEMS[3]
    for beyond in (201, -202):
        with pytest.raises(IndexError):
            kept[beyond]


def test_many_threads_read_at_once(kept):
    wrong = []
    read = lambda first: wrong.extend(i for i in range(first, 200, 4) if kept[i] != ITEMS[i])
    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_full_disk_is_said(kept, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept.file, "write", full)
    with pytest.raises(
        TaskError, match=rf"{tempfile.gettempdir()}: .* \(No space left on device\); name another .* TMPDIR"
    ):
        kept.add(ITEMS[0])
    assert list(kept) == ITEMS


READ = """
import resource, sys
import pyarrow.parquet
from sdjax.tasks.data import problems
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
task = problems.task(sys.argv[1])
some = task.train[99]
assert (len(task.train) + len(task.test), some.id) == (30000, f"p:{int(some.prompt[0]['content'][:9]) + 1}")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_takes_little_memory(tmp_path, kind):
    """300 MB of rows, in Parquet one group: what stays are buffers and the index."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"{i:9d}: {'why? ' * 1000}", "answer": "5", "solution": "so " * 1700} for i in range(30_000)]
    if kind == "jsonl":
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(
            table, tmp_path / "p.parquet", row_group_size=len(rows), compression="none", use_dictionary=False
        )
    command = [sys.executable, "-c", READ, str(tmp_path / f"p.{kind}")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(run.stdout) < 130, run.stdout
