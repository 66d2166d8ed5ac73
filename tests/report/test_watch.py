"""`sdjax watch`: the page comes anew as a run goes on, in a real browser, and for this machine only."""

import contextlib
import http.client
import json
import threading
import time

import browser
import pytest

from sdjax.__main__ import main
from sdjax.report.watch import Pages, serve


def metrics(folder, steps, accuracy=0.3):
    folder.mkdir(exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps({"experiment": "sums.py", "method": "sdpo", "steps": 9}))
    rows = [{"step": 0, "evaluation": {"accuracy": accuracy, "low": 0.2, "high": 0.4}}]
    rows += [{"step": step, "reward": 0.1 * step, "length": 5.0} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextlib.contextmanager
def served(*runs, every=1e-9):
    server = serve(Pages([str(run) for run in runs], every), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_page_is_made_anew_where_its_run_went_on_and_only_there(tmp_path):
    run = metrics(tmp_path / "run", 0)
    with served(run) as port:
        assert "has no finished step" in get(port, "/report")[1]
        metrics(run, 3)
        first = get(port, "/version")[1]
        assert "of 9: not finished" in get(port, "/report")[1]
        assert get(port, "/version")[1] == first
        (run / "alarms.jsonl").write_text(
            json.dumps({"step": 3, "kind": "collapse", "says": "<b>it fell</b>: from 1 to 0"}) + "\n"
        )
        assert get(port, "/version")[1] != first
        assert "&lt;b&gt;it fell&lt;/b&gt;: from 1 to 0" in get(port, "/report")[1]


def test_other_names_and_paths_read_nothing(tmp_path):
    with served(metrics(tmp_path / "run", 1)) as port:
        assert get(port, "/report", Host="evil.example:80")[0] == 403
        assert get(port, "/../arguments.json")[0] == 404
        assert get(port, "/report", Host=f"localhost:{port}")[0] == 200


def test_what_cannot_be_watched_is_said(tmp_path, capsys):
    run = str(metrics(tmp_path / "run", 1))
    with served(run) as port:
        for arguments, words in (
            ([], "name at least one run folder"),
            ([str(tmp_path / "none")], "does not exist"),
            ([run, "--port", "99999"], "--port 99999"),
            ([run, "--every", "0"], "--every 0"),
            ([run, "--port", str(port)], f"--port {port}"),
        ):
            assert main(["watch", *arguments]) == 2
            assert words in capsys.readouterr().err


@pytest.mark.skipif(browser.program() is None, reason="Chromium is not installed")
def test_a_browser_shows_what_is_new_where_its_reader_was(tmp_path):
    run, chromium = metrics(tmp_path / "run", 3), browser.Browser(tmp_path / "chromium")
    with served(run) as port, contextlib.closing(chromium):
        tab = chromium.open(f"http://127.0.0.1:{port}/")

        def shows(text, seconds=60):
            end = time.monotonic() + seconds
            while text not in (tab.js("document.getElementById('report').contentDocument?.body?.innerText") or ""):
                assert time.monotonic() < end, text
                time.sleep(0.2)

        shows("of 9: not finished")
        tab.js("document.getElementById('report').contentWindow.scrollTo(0, 200)")
        metrics(run, 9)
        shows("finished\n", 60)
        shows("0.9")
        end = time.monotonic() + 10
        while tab.js("document.getElementById('report').contentWindow.scrollY") != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert tab.js("document.title").endswith("training report")
        assert tab.complaints() == []
