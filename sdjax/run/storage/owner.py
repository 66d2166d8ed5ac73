"""Whose a run's folder is, where no lock tells: a bucket, or a disk of several machines.

`owner.json` has a random token of the process that took the folder last.  Whoever goes on with a run takes the folder
without asking, so that a process that is dead holds nobody up.  A process that finds another one's token when it saves
ends itself.  No clock is read, and of several that take the folder at once the last one keeps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from pathlib import Path

from sdjax.errors import InputError
from sdjax.run.storage import places

FILE = "owner.json"


class TakenError(InputError, RuntimeError):
    """Another process goes on with this run."""


class Owner:
    """This process as the owner of a folder, once it has taken it."""

    def __init__(self, folder: Path):
        self.folder, self.token = folder, ""

    def take(self) -> None:
        """Makes the folder this process's, whoever had it."""
        self.token = secrets.token_hex(16)
        who = f"process {os.getpid()} on {socket.gethostname()}"
        places.replace_text(self.folder / FILE, json.dumps({"token": self.token, "who": who}))

    def other(self) -> str:
        """Who has taken the folder since, in words; empty if nobody has, or if the folder cannot be read now."""
        # Whatever a bucket's client makes of one that does not answer: what is saved there then says so.
        with contextlib.suppress(Exception):
            found = places.read_json(self.folder / FILE)
            return "" if found["token"] == self.token else str(found["who"])
        return ""

    def check(self) -> None:
        """Raises `TakenError` if another process has taken the folder."""
        if who := self.other():
            raise TakenError(f"{self.folder}: {who} goes on with this run: this process ends, and saves nothing more")
