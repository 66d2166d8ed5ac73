"""Folders on a disk and in a bucket: the same functions, and one sentence for what cannot be used."""

import json
import os
import socket
import threading
import time

import pytest
from whole_runs import arguments, run_here

from sdjax.run.folder import RunError, claim
from sdjax.run.storage import places
from sdjax.run.storage.mirror import Mirror
from sdjax.run.storage.places import PlaceError, place


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """A folder that is not there yet."""
    return tmp_path / "run" if request.param == "disk" else place(request.getfixturevalue("bucket"))


def test_files_and_folders(folder):
    assert places.names(folder) == [] and places.listing(folder / "a") == {}
    places.try_writing(folder)
    assert places.names(folder) == []
    places.make(folder)
    places.replace_text(folder / "note.json", json.dumps({"long": "ü" * 100}))
    places.replace_text(folder / "note.json", '{"a": 1}')
    assert places.read_json(folder / "note.json") == {"a": 1}
    with places.to_write(folder / "model") as here:
        (here / "deep").mkdir(parents=True)
        (here / "deep" / "weights").write_bytes(b"12345")
        (here / "config.json").write_text("{}")
    assert places.names(folder) == ["model", "note.json"]
    assert {name: size for name, (size, _) in places.listing(folder).items()} == {
        "model/config.json": 2,
        "model/deep/weights": 5,
        "note.json": 8,
    }
    sums = [sum_ for _, sum_ in places.listing(folder).values()]
    assert all(sums) if places.in_bucket(folder) else not any(sums)
    with places.to_read(folder / "model") as here:
        assert (here / "deep" / "weights").read_bytes() == b"12345"
        assert here.is_dir() and not places.in_bucket(here)
    places.remove(folder / "model")
    places.remove(folder / "model")
    places.remove(folder / "nothing.json")
    assert places.names(folder) == ["note.json"]


def test_one_of_two_runs_claims_a_folder(folder):
    claim(folder, {"lr": 1}, resume=False)
    with pytest.raises(RunError, match="another run has begun there just now: name another folder with --out"):
        claim(folder, {"lr": 2}, resume=False)
    assert places.read_json(folder / "arguments.json") == {"lr": 1}
    claim(folder, {"lr": 1, "mesh": "2x1"}, resume=True)
    assert places.read_json(folder / "arguments.json") == {"lr": 1, "mesh": "2x1"}
    assert places.names(folder) == ["arguments.json"]


def test_several_that_begin_at_once(folder):
    """One of them wins, whoever it is."""
    won = []

    def begin(number):
        try:
            claim(folder, {"run": number}, resume=False)
            won.append(number)
        except RunError:
            pass

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and places.read_json(folder / "arguments.json") == {"run": won[0]}


def test_logs_are_mirrored_and_fetched(folder):
    """What is appended grows in the bucket, too; other files of the folder are left alone."""
    places.make(folder)
    places.replace_text(folder / "arguments.json", "{}")
    mirror = Mirror(folder)
    mirror.fetch()
    (mirror.own / "tensorboard").mkdir()
    for line in ("one\n", "two\n"):
        with open(mirror.own / "metrics.jsonl", "a") as file:
            file.write(line)
        (mirror.own / "tensorboard" / "events").write_bytes(line.encode())
        mirror.push()
    assert (folder / "metrics.jsonl").read_text() == "one\ntwo\n"
    mirror.close()
    assert mirror.own.exists() == (mirror.own == folder)
    again = Mirror(folder)
    again.fetch()
    assert (again.own / "metrics.jsonl").read_text() == "one\ntwo\n"
    assert (again.own / "tensorboard" / "events").read_bytes() == b"two\n"
    assert places.names(folder) == ["arguments.json", "metrics.jsonl", "tensorboard"]
    again.close()


# ---- what cannot be used --------------------------------------------------------------------------------------------

REFUSED = {
    "s3://bucket/run": r"s3://bucket/run: runs are kept on a disk or in a bucket .*gs://.*, not in s3://: name another",
    "https://host/run": "not in https://",
    "gs://bucket": "gs://bucket: expected gs://bucket/folder",
    "gs:///run": "expected gs://bucket/folder",
    "gs://bucket//run": "expected gs://bucket/folder",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_places_are_refused_by_name(name, capfd):
    with pytest.raises(PlaceError, match=REFUSED[name]):
        place(name)
    assert run_here(*arguments(name)) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"sdjax: {name}: ") and said.count("\n") == 1


def test_without_the_client_its_installation_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    places.file_system.cache_clear()
    with pytest.raises(PlaceError, match=r"gs:// needs a client of Google Cloud Storage: pip install 'sdjax\[gcs\]'"):
        place("gs://bucket/run")


def test_a_bucket_that_does_not_exist(bucket, capfd):
    started = time.monotonic()
    for command in (arguments("gs://no-such-bucket/run"), ["report", "gs://no-such-bucket/run"]):
        assert run_here(*command) == 2
        said = capfd.readouterr().err
        assert said.startswith("sdjax: gs://no-such-bucket/run ") and said.count("\n") == 1, said
    assert time.monotonic() - started < 15


def test_a_server_that_does_not_answer(bucket, monkeypatch, capfd):
    """It takes the connection and says nothing: told within seconds, before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(places, "SECONDS", 1.0)
        fresh = __import__("fsspec").filesystem("gcs", skip_instance_cache=True)
        monkeypatch.setattr(places, "file_system", lambda: fresh)
        assert run_here(*arguments("gs://bucket/run")) == 2
    assert "gs://bucket/run does not answer within 1 s: is there a network, and" in capfd.readouterr().err


def test_folders_on_a_disk_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=r"file.run cannot be written \(Not a directory\): name another folder"):
        places.try_writing(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run_here(*arguments(tmp_path / "run")) == 2
    assert "run cannot be written (Permission denied): name another folder with --out" in capfd.readouterr().err


def test_a_mark_changes_with_its_file(bucket, tmp_path):
    for folder in (tmp_path, places.place(bucket)):
        path = folder / "a.txt"
        assert places.mark(path) is None
        places.replace_text(path, "one")
        first = places.mark(path)
        assert places.mark(path) == first
        places.replace_text(path, "two")
        assert places.mark(path) != first
