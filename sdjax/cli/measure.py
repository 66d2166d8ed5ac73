"""`sdjax evaluate`: the accuracy of a model folder on a file of problems."""

from __future__ import annotations

from pathlib import Path

from sdjax.engine.policies import Policy
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import check_numbers
from sdjax.models import pretrained, templates
from sdjax.models.transformer import Transformer
from sdjax.run.evaluate import accuracy
from sdjax.tasks.jsonl import read_jsonl
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
      model: a folder, a run's folder, a hub name, or "smollm2".
      data: the file.
      most: read only this many problems; 0 reads all.
      completion: most tokens of an answer.
      context: most tokens of a prompt.
      rows: answers written at a time.
      chat_template: a file with the chat template, for models that have none.
      template: options of the chat template, as --template.enable-thinking false or together as JSON.
    """
    check_numbers({"completion": completion, "context": context, "rows": rows, "most": most})
    examples, _ = read_jsonl(Path(data))
    exported = Path(model) / "model"
    name = exported if (exported / "config.json").is_file() else model
    student = pretrained.load(name, chat_template=chat_template, template=templates.parsed(template))
    shapes = Shapes(context=context, completion=completion, rows=rows)
    policy = Policy(Transformer(student.config), student.params, student.tokenizer, shapes, origin=student.origin)
    return f"{data}: {accuracy(policy, examples[: most or None], verify)}"
