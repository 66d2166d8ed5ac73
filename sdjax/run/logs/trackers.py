"""Trackers: where a run's numbers and completions go beside its folder: TensorBoard's files, W&B, MLflow, Trackio.

Their libraries are imported when a run that asks for them (`--log wandb,tensorboard`) begins.  Those that may reach for a network
work in a thread of their own: a server that is slow or gone costs a run no step, and what fails is said once and given up.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from tensorboardX import SummaryWriter

from sdjax import __version__
from sdjax.errors import InputError, nearest


class TrackerError(InputError, ValueError):
    """`--log` names what does not exist or is not installed."""


class Run(NamedTuple):
    """What a tracker is told of a run that goes on after `step` steps.

    `folder` is where files may be written; `begun` says by which id trackers know it, empty where it is new.
    """

    folder: Path
    name: str
    project: str
    config: Mapping[str, Any]
    step: int
    begun: Mapping[str, str] = MappingProxyType({})


class Tracker(Protocol):
    """A place that numbers and texts go to; `id` finds the same place again."""

    id: str

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step, by name."""

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some completions of a step, as rows of a table."""

    def close(self) -> None:
        """Everything is handed over."""


class TensorBoard:
    """Event files in the run's folder."""

    id = ""

    def __init__(self, run: Run):
        self.events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n---\n\n".join("\n\n".join(f"**{k}**: {v}" for k, v in row.items()) for row in rows)
        self.events.add_text("completions", text, step)

    def flush(self) -> None:
        """Writes out what waits to be written."""
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class WandB:
    """Weights & Biases; `WANDB_MODE=offline` keeps all in the run's folder, for `wandb sync`."""

    def __init__(self, run: Run):
        import wandb

        self.wandb, self.id = wandb, run.begun.get("wandb") or secrets.token_hex(4)
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=self.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(silent=True, init_timeout=60, console="off"),
        )
        # Not W&B's own step: it only grows, and a resumed run records some steps anew.
        self.run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"completions": table, "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, at `MLFLOW_TRACKING_URI`; without one, in a database in the run's folder."""

    def __init__(self, run: Run):
        from mlflow import MlflowClient

        server, here = os.environ.get("MLFLOW_TRACKING_URI"), run.folder.absolute()
        files = None if server else (here / "mlflow").as_uri()
        self.client, known = MlflowClient(server or f"sqlite:///{here}/mlflow.db"), run.begun.get("mlflow")
        if known:
            self.id = known
            return
        experiment = self.client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self.client.create_experiment(run.project, files)
        self.id = self.client.create_run(place, run_name=run.name).info.run_id
        for name, value in run.config.items():
            self.client.log_param(self.id, name.replace("@", "-"), str(value)[:6000])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        of = lambda name: name.replace("@", "-at-")  # a character that MLflow refuses
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(of(k), float(v), now, step) for k, v in values.items()])

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.client.log_text(self.id, json.dumps(list(rows), indent=1), f"completions/step-{step}.json")

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """Trackio, kept on this machine (`TRACKIO_DIR`) unless its own variables name a space."""

    def __init__(self, run: Run):
        import trackio

        self.trackio, self.id = trackio, run.begun.get("trackio") or f"{run.name}-{secrets.token_hex(2)}"
        self.run = trackio.init(project=run.project, name=self.id, config=dict(run.config), resume="allow", embed=False)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        table = self.trackio.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
        self.run.log({"completions": table}, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def chosen(log: str) -> list[str]:
    """The names in `--log`.  Raises `TrackerError` for one that is not known, or whose library is missing."""
    names = [name.strip() for name in log.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise TrackerError(f"--log {log}: there is no {name!r}{nearest(name, KINDS)}; there are {', '.join(KINDS)}")
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise TrackerError(f"--log {log}: {name} is not installed: pip install 'sdjax[{name}]'")
    return names


class Background:
    """A tracker at work in a thread of its own, in order; what fails is said once, and the tracker is given up.

    `opened` is called with the tracker's id as soon as it has one.
    """

    MOST = 1000
    """Calls that may wait; further ones are dropped, and said."""

    def __init__(self, name: str, run: Run, say: Callable[[str], None], opened: Callable[[str, str], None]):
        self.name, self.say, self.opened = name, say, opened
        self.calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(self.MOST)
        self.gone = False
        self.thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self.thread.start()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._later(lambda tracker: tracker.numbers(step, values))

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._later(lambda tracker: tracker.completions(step, rows))

    def close(self, seconds: float = 60.0) -> None:
        """Waits for what was handed over, at most this long."""
        self._later(lambda tracker: tracker.close())
        self._later(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._give_up(f"not everything was handed over after {seconds:g} s")

    def _later(self, call: Callable[[Tracker], None] | None) -> None:
        if not self.gone:
            try:
                self.calls.put_nowait(call)
            except queue.Full:
                self._give_up(f"{self.MOST} calls are waiting")

    def _give_up(self, why: str) -> None:
        if not self.gone:
            self.gone = True
            self.say(f"--log {self.name}: {' '.join(why.split())[:300]}; it gets nothing more, and the run goes on")

    def _work(self, run: Run) -> None:
        try:
            tracker = KINDS[self.name](run)
            self.opened(self.name, tracker.id)
            while (call := self.calls.get()) is not None and not self.gone:
                call(tracker)
        except BaseException as error:  # W&B ends the interpreter where it is asked for a key
            self._give_up(f"{type(error).__name__}: {error}")


class Trackers:
    """All trackers of a run.  Nothing that they do ends it."""

    def __init__(self, names: Sequence[str], run: Run, say: Callable[[str], None]):
        self.file, self.lock = run.folder / "trackers.json", threading.Lock()
        run = run._replace(config={**run.config, "revision": revision()}, begun=read(self.file))
        own = lambda name: TensorBoard(run) if name == "tensorboard" else Background(name, run, say, self._opened)
        self.all = [own(name) for name in names]

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""
        for tracker in self.all:
            tracker.numbers(step, values)

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some completions of a step."""
        for tracker in self.all if rows else ():
            tracker.completions(step, rows)

    def flush(self) -> None:
        """Writes out what TensorBoard's files still lack."""
        for tracker in self.all:
            if isinstance(tracker, TensorBoard):
                tracker.flush()

    def close(self) -> None:
        """Hands everything over, within a minute for each."""
        for tracker in self.all:
            tracker.close()

    def _opened(self, name: str, known_as: str) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.file.write_text(json.dumps({**read(self.file), name: known_as}), encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    """An object in a JSON file; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def revision() -> str:
    """The short hash of the checked-out commit, or the package's version."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:  # no git here
        return __version__
    return found.stdout.strip() if found.returncode == 0 else __version__
