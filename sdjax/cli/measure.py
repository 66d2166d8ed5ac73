"""`sdjax evaluate`: the accuracy of a model folder on a file of problems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sdjax.engine.policies import Policy
from sdjax.engine.sensible import check_numbers
from sdjax.engine.tokens import Shapes
from sdjax.models import pretrained, templates
from sdjax.models.transformer import Transformer
from sdjax.run import places
from sdjax.run.evaluate import accuracy
from sdjax.tasks.data.problems import problems
from sdjax.tasks.maths import verify


def measure(
    model: str,
    /,
    *,
    data: str,
    most: int = 0,
    completion: int = 256,
    context: int = 1024,
    rows: int = 16,
    chat_template: str = "",
    template: str = "",
) -> str:
    """Greedy accuracy of a model on a JSON-lines file, answers compared as mathematics.

    Args:
      model: a folder, a run's folder (either may be in a bucket, gs://...), a hub name, or "smollm2".
      data: the file.
      most: read only this many problems; 0 reads all.
      completion: most tokens of an answer.
      context: most tokens of a prompt.
      rows: answers written at a time.
      chat_template: a file with the chat template, for models that have none.
      template: options of the chat template, as --template.enable-thinking false or together as JSON.
    """
    check_numbers({"completion": completion, "context": context, "rows": rows, "most": most})
    examples = problems(data, prefer=("test", "validation", "train")).examples
    with model_folder(model) as name:
        student = pretrained.load(name, chat_template=chat_template, template=templates.parsed(template))
    shapes = Shapes(context=context, completion=completion, rows=rows)
    model = Transformer(student.config, reach=context + completion)
    policy = Policy(model, student.params, student.tokenizer, shapes, origin=student.origin)
    return f"{data}: {accuracy(policy, examples[: most or None], verify)}"


@contextlib.contextmanager
def model_folder(name: str) -> Iterator[str | Path]:
    """Inside, the model to load: that of a run's folder, on this machine also where it is in a bucket; or the name."""
    own = places.place(name)
    if places.in_bucket(own):
        places.try_reading(own)
    exported = next((folder for folder in (own / "model", own) if (folder / "config.json").is_file()), None)
    if exported is None:
        yield name
        return
    with places.to_read(exported) as here:
        yield here
