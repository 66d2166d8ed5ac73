"""A run of seconds whose attempts are conversations: a random model speaks with a world that repeats how often it was spoken to.

Each turn is taught by what followed it.  In the environment, `TINY_SLOW=SECONDS` makes every answer of the world take that long.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import talks

from sdjax.cli.options import Choice
from sdjax.collect.turns import by_turn
from sdjax.engine.train import Experiment
from sdjax.models.pretrained import Pretrained
from sdjax.run.settings import Settings
from sdjax.tasks.worlds import in_world
from sdjax.types import Task, Verdict

METHOD = "sdpo"
SETTINGS = Settings(
    steps=3,
    prompts=2,
    lr=1e-2,
    context=32,
    completion=64,
    memory="off",
    rows=4,
    tokens_per_chunk=None,
    evaluation=0,
    save_every=1,
    completions_every=1,
)
OPTIONS = {"sdpo": {"group_size": 2, "ema_rate": 0.5, "top_k": None}}
TURNS = 2


def experiment(*, method: Choice, settings: Settings = SETTINGS, export: bool = False) -> Experiment:
    """Conversations by a model that knows nothing."""
    echo, policy = talks.echo(TURNS), talks.policy()
    task = Task("talks", talks.EXAMPLES[:2], talks.EXAMPLES[2:], lambda example, text: Verdict(0.0))
    return settings.experiment(
        method=settings.method(method.first(lambda built: by_turn(built, TURNS, lesson))),
        task=in_world(task, echo._replace(step=slowly(echo.step), turns=TURNS)),
        student=Pretrained(policy.model.config, policy.params, policy.tokenizer),
        export=export,
    )


def lesson(rollout, number):
    """A few bytes: what followed the turn."""
    said = [m["content"] for m in rollout.turns[number].observations]
    return ({"role": "user", "content": " ".join(said)},) if said else None


def slowly(step):
    """The same step, later."""

    def later(example, messages):
        time.sleep(float(os.environ.get("TINY_SLOW", "0")))
        return step(example, messages)

    return later
