"""What names a model on the command line: a folder, a hub name, a run, a run's checkpoint, or an adapter."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sdjax.models import adapters, pretrained, templates
from sdjax.models.files import peft_files
from sdjax.models.pretrained import Pretrained
from sdjax.run.folder import RunError
from sdjax.run.starting import Source, source
from sdjax.run.storage import places
from sdjax.run.storage.checkpoint import saved_parameters


def named(name: str, *, base: str = "", chat_template: str = "", template: dict[str, Any] | None = None) -> Pretrained:
    """The model that a name stands for, adapters folded in.

    Args:
      name: "smollm2", a hub name, a folder of the transformers library, a .gguf file, a run's folder (its model), RUN@STEP
        (one of its checkpoints), or a folder of the peft library.  Folders may be in a bucket.
      base: the model that a checkpoint or an adapter belongs to, where it does not say so itself.
      chat_template, template: as in `pretrained.load`.

    Raises: ModelError, RunError, PlaceError.
    """
    how = {"chat_template": chat_template, "template": template or {}}
    if re.search(r"@\d+$", name) and not Path(name).exists():
        found = checkpointed(source(name), base, **how)
        return found._replace(params=adapters.folded(found.params))
    with model_folder(name) as folder:
        if (Path(folder) / peft_files.CONFIG).is_file():
            return adapted(Path(folder), base, **how)
        copied = places.in_bucket(places.place(name))  # and gone before its weights would be read
        return pretrained.load(folder, **how) if copied else pretrained.opened(folder, **how)


def checkpointed(start: Source, base: str = "", **how: Any) -> Pretrained:
    """The student of a run as it was at a checkpoint, adapters beside their weights; what `how` leaves empty is that of the run.

    Raises: RunError if the run does not say which model it trained, or trained another than `base`.
    """
    try:
        arguments = places.read_json(start.folder / "arguments.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{start.folder / 'arguments.json'} cannot be read ({error})") from error
    name = base or arguments.get("model")
    if not isinstance(name, str):
        raise RunError(f"{start.folder} does not say what it trained: name a model with --model")
    own = {
        "chat_template": arguments.get("chat_template"),
        "template": templates.parsed(arguments.get("template", "")),
    }
    student = pretrained.opened(name, **{**own, **{option: value for option, value in how.items() if value}})
    return student._replace(params=whole(start, student, arguments, name))


def whole(start: Source, student: Pretrained, arguments: dict[str, Any], name: str) -> Any:
    """All parameters of a checkpoint's student.  Raises `RunError` if they are not those of the model that was named."""
    policies, _, host = saved_parameters(start.folder / "checkpoints", start.step, ("params",))
    told = arguments.get("lora_rank", 0), arguments.get("lora_base", "float"), arguments.get("lora_experts", False)
    live, lora = policies["live"], adapters.chosen(*told)
    other = RunError(f"{start} was trained from another model than {name}: name its model with --model")
    if adapters.is_adapters(live):
        if lora is None:
            raise RunError(f"{start} holds adapters, and {start.folder}/arguments.json does not say of which rank")
        if adapters.fingerprint(student.params, lora) != host.get("base"):
            raise other
        kept = pretrained.kept_in(student.params, arguments.get("params_dtype"))
        return adapters.beside(student.config, kept, live, lora)
    shapes = lambda tree: [(path, x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if shapes(live) != shapes(student.params):
        raise other
    return live


def adapted(folder: Path, base: str = "", **how: Any) -> Pretrained:
    """A model with an adapter of the peft library folded in."""
    fields = peft_files.fields(folder)
    name = base or fields.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder} is an adapter and does not name its model: name it with --base")
    student = pretrained.load(name, **how)
    lora, tree = peft_files.load(folder, student.config)
    return student._replace(params=adapters.folded(adapters.beside(student.config, student.params, tree, lora)))


@contextlib.contextmanager
def model_folder(name: str) -> Iterator[str | Path]:
    """Inside, the model to load: that of a run's folder, on this machine also where it is in a bucket; or the name.

    Raises: RunError for a run that has no model yet.
    """
    own = places.place(name)
    if places.in_bucket(own):
        places.try_reading(own)
    files = ("config.json", peft_files.CONFIG)
    found = next((f for f in (own / "model", own) if any((f / file).is_file() for file in files)), None)
    if found is None:
        if (own / "arguments.json").is_file():
            steps = sorted(int(n) for n in places.names(own / "checkpoints") if n.isdigit())
            other = f"name a checkpoint, {name}@{steps[-1]}" if steps else "it has no checkpoints either"
            raise RunError(f"{name} is a run without a model, which it leaves at its end: {other}")
        yield name
        return
    with places.to_read(found) as here:
        yield here
