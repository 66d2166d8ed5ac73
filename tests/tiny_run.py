"""A run of seconds: a random model on the recall task, with a method that replays rollouts from its memory.

For tests of whole runs.  In the environment, `TINY_KILL=PLACE:STEP` ends the process by SIGKILL at one of the places
below, and `TINY_SLOW=SECONDS` makes every verdict take that long.
"""

import dataclasses
import os
import signal
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sdjax.cli.options import Choice
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.remembered import Remembered
from sdjax.engine.train import Experiment
from sdjax.run.settings import Settings
from sdjax.run.storage import manifest
from sdjax.types import Example, Method, Rollout, Task

METHOD = "sdpo"
SETTINGS = Settings(
    steps=6,
    prompts=2,
    lr=1e-2,
    weight_decay=0.1,
    context=48,
    completion=8,
    rows=8,
    tokens_per_chunk=None,
    evaluation=3,
    evaluate_every=2,
    save_every=2,
)
OPTIONS = {"sdpo": {"group_size": 2, "ema_rate": 0.5, "top_k": None}, "grpo": {"group_size": 2, "normalised": False}}


def experiment(
    *, method: Choice, settings: Settings = SETTINGS, export: bool = False, replay: bool = True
) -> Experiment:
    """Recall by a model that knows nothing.

    Args:
      export: the run ends with a model folder.
      replay: batches hold rollouts of the batch before, too.
    """
    own = settings.method(method, lesson)
    return settings.shortened().experiment(
        method=remembering(own) if replay else own,
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, verify),
        student=student(),
        export=export,
    )


def student():
    """Loaded late: tests make sure that bad options are refused before."""
    return tiny.pretrained()


def lesson(rollout: Rollout, rollouts: list[Rollout]):
    return with_solution(question(rollout.example), rollout.example.solution)


def verify(example: Example, text: str):
    time.sleep(float(os.environ.get("TINY_SLOW", "0")))
    return tiny.parity(example, text)


# ---- a method with a memory -----------------------------------------------------------------------------------------


def remembering(method: Method) -> Method:
    """The method with the first rollouts of the batch before added to each batch, and counters, all in its memory."""

    def collect(environment, examples, key, memory):
        fresh, _ = method.collect(environment, examples, key, None)
        groups = max(r.group for r in fresh) + 1
        replayed = [unpacked(r) for r in memory["replay"]] or [r for r in fresh if r.group == 0]
        old = [dataclasses.replace(r, group=groups) for r in replayed]
        written = zlib.crc32(repr([(r.tokens, r.logprobs) for r in fresh]).encode())
        memory = {
            "batches": memory["batches"] + 1,
            "written": memory["written"] | {f"batch {memory['batches']}": written},
            "replay": [dataclasses.asdict(r) for r in fresh if r.group == 0],
        }
        return [*fresh, *old], memory

    return method._replace(collect=collect, memory={"batches": 0, "written": Remembered(), "replay": []})


def unpacked(row: dict) -> Rollout:
    """A rollout from what `dataclasses.asdict` made of it and JSON brought back."""
    chat = lambda turns: None if turns is None else tuple(turns)
    example = Example(**{**row["example"], "prompt": chat(row["example"]["prompt"])})
    lists = {name: tuple(row[name]) for name in ("tokens", "logprobs")}
    return Rollout(**{**row, **lists, "example": example, "contexts": {k: chat(v) for k, v in row["contexts"].items()}})


# ---- sudden death ---------------------------------------------------------------------------------------------------


def kill_at(place: str, step: int) -> None:
    """Ends this process if `TINY_KILL` says so."""
    if os.environ.get("TINY_KILL") == f"{place}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving() -> None:
    """Makes the places `arrays` (written, but still under Orbax's temporary name) and `manifest` (not yet written)."""
    rename, write_manifest = os.rename, manifest.write

    def dying_rename(source, *rest, **named):
        name = Path(source).name
        if "orbax-checkpoint-tmp" in name:
            kill_at("arrays", int(name.split(".")[0]))
        return rename(source, *rest, **named)

    def dying_write_manifest(folder, step, content):
        kill_at("manifest", step)
        return write_manifest(folder, step, content)

    os.rename, manifest.write = dying_rename, dying_write_manifest


if "TINY_KILL" in os.environ:
    die_while_saving()
