"""Logs of a run whose folder is in a bucket: they are appended to on this machine, and copied there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sdjax.run.logs import records
from sdjax.run.storage import places
from sdjax.run.storage.owner import Owner
from sdjax.tasks import judges

LOGS = ("metrics.jsonl", "alarms.jsonl", "rollouts.txt", records.ROLLOUTS, "trackers.json", "tensorboard", "mlflow.db")
LOGS += (judges.FILE,)
"""What a run appends to; everything else in its folder is written in one go."""


class Mirror:
    """Where a run's logs are written, `own`: the run's folder, or for one in a bucket a folder on this machine.

    Once the folder is another process's, nothing is copied there.
    """

    def __init__(self, folder: Path):
        self.folder, self.own, self.owner = folder, folder, Owner(folder)
        if places.in_bucket(folder):
            self.own = Path(tempfile.mkdtemp(prefix="sdjax-"))
        self.sent: dict[str, list | None] = {}

    def fetch(self) -> None:
        """Brings the logs of a run that goes on to this machine."""
        if self.own == self.folder:
            return
        for name in places.listing(self.folder):
            if name.split("/")[0] in LOGS:
                (self.own / name).parent.mkdir(parents=True, exist_ok=True)
                (self.own / name).write_bytes(places.read_bytes(self.folder / name))

    def push(self) -> None:
        """Copies what has changed; a line that is being written may be cut, and is dropped by whoever resumes."""
        if self.own == self.folder or self.owner.other():
            return
        for name in places.listing(self.own):
            mark = places.mark(self.own / name)
            if self.sent.get(name) != mark:
                places.write_bytes(self.folder / name, (self.own / name).read_bytes())
                self.sent[name] = mark

    def close(self) -> None:
        """Copies what has changed and removes the folder on this machine."""
        if self.own != self.folder:
            self.push()
            shutil.rmtree(self.own, ignore_errors=True)
