"""`sdjax export`: a checkpoint of a run as a model folder."""

from __future__ import annotations

from typing import Any, Literal

import jax

from sdjax.models import adapters, pretrained, templates
from sdjax.models.pretrained import Pretrained
from sdjax.run import places
from sdjax.run.checkpoint import saved_parameters
from sdjax.run.export import write_model
from sdjax.run.folder import RunError
from sdjax.run.starting import Source, source


def export(
    checkpoint: str,
    /,
    *,
    out: str = "",
    model: str = "",
    dtype: Literal["original", "float32", "bfloat16", "float16"] = "original",
) -> str:
    """Writes the parameters of a checkpoint as a folder that sdjax and the transformers library open; adapters folded in.

    Args:
      checkpoint: RUN@STEP: a run's folder, which may be in a bucket, and one of its checkpoints.
      out: the folder to write, which may be in a bucket; by default RUN/model-STEP.
      model: where architecture, tokenizer and frozen weights are read from, if the run does not say.
      dtype: type of the weights; original: that of the model that was trained.
    """
    start = source(checkpoint)
    target = places.place(out or start.folder / f"model-{start.step}")
    if places.names(target):
        raise RunError(f"{target} is not empty: name another folder with --out")
    places.try_writing(target)
    arguments = places.read_json(start.folder / "arguments.json")
    name = model or arguments.get("model")
    if not isinstance(name, str):
        raise RunError(f"{start.folder} does not say what it trained: name a model with --model")
    template = templates.parsed(arguments.get("template", ""))
    student = pretrained.opened(name, chat_template=arguments.get("chat_template"), template=template)
    params = whole(start, student, arguments, name)
    write_model(target, student._replace(params=params), None if dtype == "original" else dtype)
    return f"{start}: model written to {target}"


def whole(start: Source, student: Pretrained, arguments: dict[str, Any], name: str) -> Any:
    """All parameters of a checkpoint's student.  Raises `RunError` if they are not those of the model that was named."""
    policies, _, host = saved_parameters(start.folder / "checkpoints", start.step, ("params",))
    live, lora = policies["live"], adapters.chosen(arguments.get("lora_rank", 0), arguments.get("lora_base", "float"))
    other = RunError(f"{start} was trained from another model than {name}: name its model with --model")
    if adapters.is_adapters(live):
        if lora is None:
            raise RunError(f"{start} holds adapters, and {start.folder}/arguments.json does not say of which rank")
        if adapters.fingerprint(student.params, lora) != host.get("base"):
            raise other
        frozen = adapters.base(student.config, student.params, lora)
        return adapters.completed({adapters.BASE: frozen, "live": live})["live"]
    shapes = lambda tree: [(path, x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if shapes(live) != shapes(student.params):
        raise other
    return live
