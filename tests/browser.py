"""A real headless Chromium for tests, driven by its DevTools protocol over two pipes: nothing to install beside it."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


def program() -> str | None:
    """Where Chromium is, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One Chromium process with a user folder of its own."""

    def __init__(self, folder: Path):
        commands, self.to_write = os.pipe()
        self.to_read, answers = os.pipe()
        # It reads commands from file 3 and answers on file 4: numbers out of the way of both, then a shell moves them.
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (commands, answers)]
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                'exec "$@" 3<&{} 4>&{}'.format(*high),
                "bash",
                program(),
                *FLAGS,
                f"--user-data-dir={folder}",
            ],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for file in (commands, answers, *high):
            os.close(file)
        self.number, self.buffer, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **parameters):
        """Sends a command and returns its result; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.to_write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds: float = 60):
        """The next message."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            assert select.select([self.to_read], [], [], max(0, deadline - time.monotonic()))[0], "no answer"
            block = os.read(self.to_read, 1 << 20)
            assert block, "the browser has ended"
            self.buffer += block
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, **shape) -> "Page":
        return Page(self, url, **shape)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.to_write)  # at the end of its commands the browser ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to_read)


class Page:
    """A tab; `loading` is the seconds until the document and its script were done."""

    def __init__(self, browser: Browser, url: str, width=1280, height=900, dark=False, media="", scripts=True):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.browser.events.clear()
        started = time.monotonic()
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")
        self.loading = time.monotonic() - started

    def call(self, method: str, **parameters):
        return self.browser.call(method, self.session, **parameters)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def wait(self, method: str) -> None:
        """Waits for an event."""
        while not any(e.get("method") == method for e in self.browser.events):
            self.browser.events.append(self.browser.receive())

    def js(self, expression: str):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def seen(self, *methods: str) -> list[dict]:
        """Events of these kinds so far."""
        self.js("0")
        return [e for e in self.browser.events if e.get("method") in methods and e.get("sessionId") == self.session]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, violations of the page's policy."""
        said = [json.dumps(e["params"]) for e in self.seen("Runtime.exceptionThrown", "Log.entryAdded")]
        console = self.seen("Runtime.consoleAPICalled")
        return said + [
            json.dumps(e["params"]) for e in console if e["params"]["type"] in ("error", "warning", "assert")
        ]

    def requests(self) -> list[str]:
        """Every address that was asked for, other than the page's own."""
        urls = [e["params"]["request"]["url"] for e in self.seen("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def press(self, key: str) -> None:
        """A key, as a person presses it."""
        named = {"key": key} if len(key) > 1 else {"key": key, "text": key}
        codes = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
        codes |= {"ArrowDown": 40, " ": 32}
        named |= {"windowsVirtualKeyCode": codes.get(key, ord(key[0].upper())), "code": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def point(self, selector: str) -> None:
        """The mouse over an element, which is scrolled to first."""
        x, y = self.js(
            f"(()=>{{const e=document.querySelector({json.dumps(selector)});e.scrollIntoView({{block:'center',"
            "behavior:'instant'});const b=e.getClientRects()[0];return [b.x+b.width/2,b.y+b.height/2]})()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, selector: str | None = None) -> bytes:
        """A PNG of the whole page, or of one element."""
        find = f"document.querySelector({json.dumps(selector)})" if selector else "document.documentElement"
        box = self.js(
            f"(()=>{{const b={find}.getBoundingClientRect();return {{x:b.x+scrollX,y:b.y+scrollY,width:b.width,"
            "height:b.height,scale:1}})()"
        )
        shot = self.call("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
