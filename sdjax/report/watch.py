"""`sdjax watch`: the report of runs that are under way, in a browser on this machine; it comes anew as they go on."""

from __future__ import annotations

import contextlib
import html
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sdjax.report.page import part
from sdjax.report.report import report
from sdjax.report.runs import ReportError
from sdjax.run.storage import places

FILES = ("arguments.json", "metrics.jsonl", "alarms.jsonl", "rollouts.jsonl")
"""What a report is made from."""

NAMES = ("127.0.0.1", "localhost", "[::1]")
"""How a browser may call this machine: a page of another name that leads here (DNS rebinding) reads nothing."""


class Pages:
    """The newest report of some runs; made anew where their files have changed, at most every `every` seconds."""

    def __init__(self, runs: Sequence[str], every: float):
        self.runs, self.every, self.lock = tuple(runs), every, threading.Lock()
        self.seen: list[list | None] | None = None
        self.made, self.version, self.text = -every, 0, ""

    def newest(self) -> tuple[int, str]:
        """The page's version, which grows, and the page."""
        with self.lock:
            if time.monotonic() - self.made >= self.every:
                now = self.state()
                if now != self.seen:
                    self.text, self.seen, self.version = self.written(), now, self.version + 1
                self.made = time.monotonic()
            return self.version, self.text

    def state(self) -> list[list | None]:
        """Marks of the runs' files."""
        return [places.mark(places.place(run) / name) for run in self.runs for name in FILES]

    def written(self) -> str:
        """The report, or what is missing for one."""
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            try:
                report(self.runs, out=str(page))
            except (ReportError, places.PlaceError) as error:
                said = f"<p>{html.escape(str(error))}</p><p>This page comes anew by itself.</p>"
                return f'<!doctype html><meta charset="utf-8"><title>waiting</title>{said}'
            return page.read_text(encoding="utf-8", errors="replace")


def serve(pages: Pages, port: int) -> ThreadingHTTPServer:
    """A server on loopback: `/` is the frame, `/report` the page in it, `/version` says whether there is a newer one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in NAMES:
                self.answer(403, "text/plain", "this server answers to this machine only")
            elif self.path == "/":
                self.answer(200, "text/html", part("watch.html"))
            elif self.path == "/version":
                self.answer(200, "application/json", json.dumps({"version": pages.newest()[0]}))
            elif self.path.split("?")[0] == "/report":
                self.answer(200, "text/html", pages.newest()[1])
            else:
                self.answer(404, "text/plain", "there are /, /report and /version")

        def answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are not said."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ReportError(f"--port {port}: {error.strerror}: name another port, or 0 for a free one") from error


def watch(runs: tuple[str, ...], /, *, port: int = 8321, every: float = 10.0) -> None:
    """Serves the report of run folders on this machine until Ctrl-C; the page comes anew while they go on.

    Args:
      runs: run folders, also in a bucket (gs://...); they may still be without a finished step.
      port: of the page, on loopback only; 0: a free one.
      every: seconds between looks at the runs.
    """
    if not runs:
        raise ReportError("name at least one run folder: sdjax watch runs/mine")
    if not 0 <= port <= 65535:
        raise ReportError(f"--port {port}: expected a port from 0 to 65535")
    if not every > 0:
        raise ReportError(f"--every {every:g}: expected seconds above 0")
    for folder, run in ((places.place(run), run) for run in runs):
        places.try_reading(folder)
        if not folder.is_dir():
            raise ReportError(f"{run} does not exist: name a folder that `sdjax train` has written")
    server = serve(Pages(runs, every), port)
    print(f"watching {', '.join(runs)} at http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
