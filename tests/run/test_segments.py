"""What is remembered by key, beside the checkpoints: each save writes what is new, and everything is restored."""

import json
import shutil

import pytest
from states import assert_same, state
from whole_runs import arguments, assert_same_end, run_here, saved

from sdjax.collect.remembered import Remembered, apart
from sdjax.run.folder import RunError
from sdjax.run.learner import as_restored
from sdjax.run.storage import checkpoint, manifest, places
from sdjax.run.storage.checkpoint import CheckpointError
from sdjax.run.storage.places import place
from sdjax.run.storage.saving import Keep, Saver
from sdjax.run.storage.segments import FOLDER


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else place(request.getfixturevalue("bucket"))


def save(saver, step, memory, **rest):
    assert saver.ensure(state(step), {"memory": memory, **rest}, {})


def restored(folder, step=None):
    return checkpoint.restore(folder, state(), step)[1]


def test_everything_is_restored_from_what_each_save_wrote(folder):
    """Two mappings and plain values; a key that is replaced; old checkpoints have what there was."""
    saver, texts, plans, expected = Saver(folder, Keep(3)), Remembered(), Remembered({"a": None}), {}
    for step in range(1, 12):
        texts |= {f"problem {i}": {"text": f"é {i}", "step": step} for i in range(step * 3 - 4, step * 3)}
        plans |= {"a": step} if step % 2 else {}
        memory = {"texts": texts, "inner": {"plans": plans}, "count": step}
        expected[step] = json.loads(json.dumps({"texts": dict(texts), "inner": {"plans": dict(plans)}, "count": step}))
        save(saver, step, memory, more=[step])
    for step in (9, 10, 11):
        host = restored(folder, step)
        assert host == {"memory": expected[step], "more": [step]}
        assert [*host["memory"]["texts"]] == [*expected[step]["texts"]]  # in this order, too
        assert isinstance(host["memory"]["inner"]["plans"], Remembered)
    again = Saver(folder, Keep(2))  # another process goes on, and then another one
    memory = restored(folder)["memory"]
    save(again, 12, {**memory, "texts": memory["texts"] | {"new": 1}})
    assert restored(folder)["memory"] == {**expected[11], "texts": {**expected[11]["texts"], "new": 1}}
    assert_same(checkpoint.restore(folder, state(), 11)[0], state(11))


def test_a_save_writes_as_much_with_100_000_entries_as_with_10(tmp_path, monkeypatch):
    """Bytes of the manifest and of what is remembered; of n saves all files together have about n log2 n entries."""
    written, replace = {}, places.replace_text
    monkeypatch.setattr(places, "replace_text", lambda path, text: replace(path, text) or written.update({path: text}))
    sizes = {}
    for count in (10, 100_000):
        folder = tmp_path / str(count)
        saver, memory = Saver(folder), Remembered({f"problem-{i}": "3 + 4 = 7" for i in range(count)})
        save(saver, 1, memory)
        save(saver, 2, memory := memory | {f"other-{i}": "3 + 4 = 7" for i in range(20)})
        sizes[count] = []
        for step in range(3, 7):
            written.clear()
            save(saver, step, memory := memory | {f"new-{step}-{i}": "3 + 4 = 7" for i in range(4)})
            assert len(written) == 2
            sizes[count].append(sum(map(len, written.values())))
        assert restored(folder)["memory"] == memory
    assert (
        max(sizes[100_000]) <= max(sizes[10]) + 1000
    )  # times in the manifest differ; an entry too many for each would be megabytes


def test_there_are_few_files_and_each_entry_is_written_few_times(tmp_path, monkeypatch):
    written, replace = [], places.replace_text
    monkeypatch.setattr(places, "replace_text", lambda path, text: replace(path, text) or written.append((path, text)))
    saver, memory = Saver(tmp_path), Remembered()
    for step in range(1, 65):
        save(saver, step, memory := memory | {f"{step}": step})
        assert len(places.names(tmp_path / FOLDER)) <= 9  # of the two checkpoints that stay, and log2 64 is 6
    entries = sum(text.count("\n") for path, text in written if path.parent.name == FOLDER)
    assert entries == 64 + 64 // 2 * 6  # each joins another of its size six times, a half of it each time
    assert restored(tmp_path)["memory"] == memory == {f"{i}": i for i in range(1, 65)}


def test_a_log_that_was_begun_anew_is_written_anew(tmp_path):
    """Where much was replaced, or a method began another one."""
    saver, memory = Saver(tmp_path), Remembered()
    for step in range(1, 5):
        for number in range(400):
            memory |= {"a": [step, number], f"{step}": number}
        save(saver, step, memory)
        assert restored(tmp_path)["memory"] == memory == {"a": [step, 399], **{f"{s}": 399 for s in range(1, step + 1)}}
    save(saver, 5, Remembered({"b": 1}))
    assert restored(tmp_path)["memory"] == {"b": 1} and restored(tmp_path, 4)["memory"] == memory
    save(saver, 6, {"other": Remembered({"b": 2})})
    assert restored(tmp_path)["memory"] == {"other": {"b": 2}} and restored(tmp_path, 5)["memory"] == {"b": 1}


def test_files_that_a_kill_left_are_not_read_and_go(folder):
    """One that no manifest names, and the merged one that a save would have named, were it not killed before that."""
    saver, memory = Saver(folder), Remembered({"a": 1})
    save(saver, 1, memory)
    saver.segments.write(2, {(): memory | {"lost": 2}})
    assert "2.jsonl" in places.names(folder / FOLDER)
    assert restored(folder)["memory"] == {"a": 1}
    again = Saver(folder)
    save(again, 2, restored(folder)["memory"] | {"b": 3})
    save(again, 3, restored(folder)["memory"])
    assert restored(folder)["memory"] == {"a": 1, "b": 3} and "1.jsonl" not in places.names(folder / FOLDER)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_is_named_with_the_last_good_checkpoint(folder, damage):
    saver, memory = Saver(folder), Remembered({f"{i}": "text" for i in range(50)})
    save(saver, 1, memory)
    save(saver, 2, memory | {"new": "other"})
    file = folder / FOLDER / "2.jsonl"
    text = file.read_bytes()
    places.remove(file)
    if damage != "gone":
        file.write_bytes(text[:-3] if damage == "cut" else text.replace(b"other", b"Other"))
    says = (
        rf"2 is damaged \({FOLDER}/2.jsonl (does not match its checksum|is missing)\); the last good one is \S+1; to go"
    )
    with pytest.raises(CheckpointError, match=says):
        restored(folder)
    assert restored(folder, 1)["memory"] == memory
    saver = Saver(folder)
    save(saver, 3, memory)  # whoever goes on is not held up by it


def test_what_is_not_json_is_refused():
    memory = {"texts": Remembered({"a": 1}), "count": (1, 2)}
    assert as_restored(memory) == {"texts": {"a": 1}, "count": [1, 2]}
    assert as_restored(memory)["texts"] is memory["texts"] and apart(as_restored(memory["texts"]))[1]
    with pytest.raises(RunError, match="the method's memory cannot be saved as JSON: Object of type set"):
        as_restored({"some": {1}})


def test_a_run_of_an_earlier_version_goes_on(reference, tmp_path, cached):
    """Its manifests hold all that was remembered; what it does next is the same, bit for bit."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    saves = folder / "checkpoints"
    places.remove(saves / "10.json")
    content = manifest.read(saves, 8)
    content.pop(FOLDER)
    content["host"]["memory"]["written"] = dict(saved(reference, 8)[1]["memory"]["written"])
    places.remove(saves / FOLDER)
    manifest.write(saves, 8, content)
    assert run_here(*arguments(folder, "--resume")) == 0
    assert_same_end(folder, reference)
    assert places.names(saves / FOLDER) and len(saved(folder)[1]["memory"]["written"]) == 10
