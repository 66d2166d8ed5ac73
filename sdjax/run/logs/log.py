"""What a run says while it goes on: a line of progress, JSON lines, TensorBoard events, rollouts as text.

Steps count from 1 in all of them: `step` 3 is the third batch, and an evaluation at `step` 3 came after it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from sdjax.run.logs import records
from sdjax.run.logs import trackers as tracked
from sdjax.run.logs.sentinels import Alarm
from sdjax.run.logs.trackers import Trackers
from sdjax.run.storage.places import replace_text
from sdjax.tasks.completions import split
from sdjax.types import Rollout, View

SHOWN = {
    "reward": "reward {:.2f}",
    "divergence": "divergence {:.3f}",
    "loss": "loss {:.3g}",
    "length": "{:.0f} tokens",
    "tokens_per_second": "{:.0f} tok/s",
}
"""What the line of progress shows of a step's numbers."""

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal."""


class RunLog:
    """Writes `metrics.jsonl` and rollouts into a run folder, the same to trackers, and progress to the terminal.

    Rollouts stand in `rollouts.txt` for people and in `rollouts.jsonl` for `sdjax report`.

    `trackers` makes the trackers from the function that says what goes wrong with them; by default TensorBoard's alone.
    After a resume at `step`, lines of later steps are dropped first, so that no step is recorded twice.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        step: int = 0,
        console: Console | None = None,
        *,
        trackers: Callable[[Callable[[str], None]], Trackers] | None = None,
    ):
        self.console = console or Console()
        self.file, self.texts = folder / "metrics.jsonl", folder / "rollouts.txt"
        drop_metrics_after(self.file, step)
        drop_rollouts_after(self.texts, step)
        self.records = folder / records.ROLLOUTS
        drop_metrics_after(self.records, step)  # its lines say their step, too
        self.alarms = folder / "alarms.jsonl"
        drop_metrics_after(self.alarms, step)
        self.trackers = (trackers or on_disk(folder, step))(self.say)
        self.steps, self.last_line = steps, -math.inf
        line = TextColumn("{task.fields[line]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(10), TimeRemainingColumn(compact=True))
        # Steps may take a minute: the speed is estimated over an hour.
        self.progress = Progress(
            *columns, line, console=self.console, transient=True, expand=True, speed_estimate_period=3600
        )
        self.bar = self.progress.add_task("", total=steps, completed=step, line="")
        if self.console.is_terminal:
            self.progress.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records one step's numbers; shows the main ones (at most every ten seconds where there is no terminal)."""
        self.write({"step": step, **values})
        self.trackers.numbers(step, values)
        line = "  ".join(form.format(values[name]) for name, form in SHOWN.items() if name in values)
        self.progress.update(self.bar, completed=step, line=line)
        due = step == self.steps or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and due:
            left = self.progress.tasks[0].time_remaining
            ending = f"  {left:.0f} s left" if left and step < self.steps else ""
            self.say(f"step {step}/{self.steps}  {line}{ending}")
            self.last_line = time.monotonic()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of an evaluation after `step` steps."""
        self.write({"step": step, "evaluation": values})
        self.trackers.numbers(step, {f"evaluation/{name}": value for name, value in values.items()})

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        append(self.file, {name: plain(value) for name, value in line.items()})

    def alarm(self, step: int, alarms: Sequence[Alarm], **where: bool) -> None:
        """Says what sentinels noticed, and records it in `alarms.jsonl`; `evaluation=True`: after an evaluation."""
        for alarm in alarms:
            self.say(f"step {step}: {alarm.says}")
            append(self.alarms, {"step": step, **alarm._asdict(), **where})

    def rollouts(self, step: int, rollouts: Sequence[Rollout], most: int = 4) -> None:
        """Writes the first rollouts of a step as text: what was read, what was written, what it earned."""
        with open(self.texts, "a", encoding="utf-8") as file:
            for r in rollouts[:most]:
                file.write(f"==== step {step}  example {r.example.id}  reward {r.reward:g}  tokens {len(r.tokens)}\n")
                for view, chat in sorted(r.contexts.items()):
                    said = "(nothing)" if chat is None else "\n".join(f"[{m['role']}] {m['content']}" for m in chat)
                    file.write(f"-- {view} reads\n{said}\n")
                thinking, answer, open_ = split(r.text)
                if thinking:
                    file.write(f"-- thinking{' (does not end)' if open_ else ''}\n{thinking}\n")
                file.write(f"-- {'answer' if thinking else 'completion'}\n{answer}\n")
                if r.feedback:
                    file.write(f"-- feedback\n{r.feedback}\n")

    def tokens(self, step: int, rollouts: Sequence[Rollout], tokenizer: Any, views: Mapping[str, View]) -> None:
        """Writes the first rollouts of a step token by token, for `sdjax report`, and their texts to the trackers."""
        records.append_rollouts(self.records, step, rollouts, tokenizer, views)
        self.trackers.completions(step, [records.row(step, r) for r, _ in records.first_groups(rollouts, 4)])

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table."""
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def flush(self) -> None:
        """Writes out what TensorBoard's writer still holds; the other files are closed after each line."""
        self.trackers.flush()

    def close(self) -> None:
        """Stops the progress bar and hands over what trackers wait for."""
        if self.console.is_terminal:
            self.progress.stop()
        self.trackers.close()


def on_disk(folder: Path, step: int) -> Callable[[Callable[[str], None]], Trackers]:
    """TensorBoard's event files, and no other tracker."""
    return functools.partial(Trackers, ["tensorboard"], tracked.Run(folder, folder.name, "sdjax", {}, step))


class NoLog:
    """The log of a process that neither writes nor speaks: `RunLog`'s functions, doing nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        getattr(RunLog, name)
        return lambda *_, **__: None


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite become `null`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_metrics_after(path: Path, step: int) -> None:
    """Drops what a run that goes on after `step` steps records anew: later batches, and evaluations from there on.

    A half-written last line goes too.
    """

    def stays(text: str) -> bool:
        try:
            line = json.loads(text)
            return line["step"] < step if "evaluation" in line else line["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        replace_text(path, "".join(line + "\n" for line in lines if stays(line)))


def drop_rollouts_after(path: Path, step: int) -> None:
    """Cuts a file of rollouts before the first one of a later step."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        starts = re.finditer(r"^==== step (\d+)  example ", text, re.MULTILINE)
        replace_text(path, text[: next((m.start() for m in starts if int(m[1]) > step), len(text))])
