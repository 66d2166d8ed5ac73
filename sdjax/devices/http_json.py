"""What this project asks of servers: JSON posted over HTTP, again where a server is busy; one sentence where it fails."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sdjax.errors import InputError

KEY = "SDJAX_API_KEY"
"""The environment's variable that holds a server's key: options are written to a run's folder."""


class EngineError(InputError, RuntimeError):
    """An external engine cannot be used; the message names it, says why and what to do."""


def check_url(url: str) -> None:
    """Raises `EngineError` unless it is the address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineError(f"{url!r} is not the address of a server: expected one like http://localhost:8000/v1")


def check_reachable(url: str, timeout: float = 10.0) -> None:
    """Raises `EngineError` unless something listens at a server's address: asked before anything is loaded."""
    check_url(url)
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout).close()
    except OSError as error:
        raise EngineError(f"{url} cannot be reached ({error}): is the server up, and is this its address?") from error


def ask(url: str, body: Mapping[str, Any], headers: Mapping[str, str], *, timeout: float, retries: int) -> Any:
    """The JSON answer to a request (`None` for an empty one).  Raises `EngineError`."""
    why = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(0.5 * 2 ** (attempt - 1))
        try:
            status, text = post(url, body, headers, timeout)
        except TimeoutError:
            why = f"no answer within {timeout:g} seconds"
            continue
        except (OSError, http.client.HTTPException) as error:
            why = f"{type(error).__name__}: {error}"
            continue
        if status == 200:
            return parsed(url, text)
        why = f"status {status}: {' '.join(text.split())[:300]}"
        if status != 429 and status < 500:
            hint = f": is {KEY} its key?" if status in (401, 403) else ""
            if status == 404 and url.endswith("/completions") and "/v1/" not in url:
                hint = ": an address mostly ends in /v1, as http://localhost:8000/v1"
            raise EngineError(f"{url} refused a request ({why}){hint}")
    times = f" ({retries + 1} attempts)" if retries else ""
    raise EngineError(f"{url} did not answer{times}, at last: {why}: is the server up, and is this its address?")


def post(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout: float) -> tuple[int, str]:
    """Status and text of the answer to one POST, on a connection of its own."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()


def parsed(url: str, text: str) -> Any:
    """An answer's JSON; `None` where there is no text."""
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise EngineError(f"{url} answered with something that is not JSON: {text[:100]!r}") from error
