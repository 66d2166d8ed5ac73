"""`sdjax scaling`: how an update's exchanges and arithmetic grow with the mesh, compiled for virtual devices.

Not speed: devices that share one processor's cores say nothing of that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import optax

from sdjax.cli.options import Choice
from sdjax.devices import programs, sharding
from sdjax.devices.layout import laid_parameters, laid_rows, laid_whole
from sdjax.engine import sketch, train
from sdjax.engine.needs import laid_beside, parameters_of
from sdjax.engine.tokens import Shapes
from sdjax.models.transformer import Transformer
from sdjax.planning.plan import costliest, model_config, self_taught

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For machine code that never runs; the exchanges are decided before."""


class Row(NamedTuple):
    """One mesh: what one device does and receives in one update."""

    mesh: tuple[int, ...]
    prompts: int
    flops: float
    state: float  # bytes of parameters, optimizer and snapshots
    exchanged: dict[str, float]  # bytes received, by kind of exchange


def scaling(
    *,
    method: Choice,
    model: str = "qwen3-1.7b",
    layers: int = 2,
    meshes: tuple[str, ...] = ("1x1", "2x1", "4x1", "8x1", "1x2", "1x4", "1x8", "4x2", "2x4"),
    prompts: int = 8,
    weak: bool = False,
    context: int = 64,
    completion: int = 64,
    tokens_per_chunk: int | None = 512,
) -> list[Row]:
    """The cost of a method's updates on each mesh.

    Args:
      model: a public model's name.
      layers: how many of its layers are compiled, since all are alike.
      meshes: devices along the data and the model axis and, of mixtures of experts, along an expert axis.
      prompts: problems per step in all, or with `weak` for every device of the data axis.
      weak: the batch grows with the data axis.
      context: tokens of the student's context; the other views' have those of a completion more.
      completion: tokens of an attempt.
      tokens_per_chunk: positions whose logits are held at once, on each device of the data axis.
    """
    config = model_config(model).first(layers)
    built, sketched, own = self_taught(method)
    rows, lengths = sketch.rows_per_prompt(sketched), {v: context + completion for v in sketched.contexts}
    found = []
    for shape in map(sharding.mesh_shape, meshes):
        count = prompts * (math.prod((shape[0], *shape[2:])) if weak else 1)
        batch = sketch.sized(sketched, count, rows, completion, {**lengths, "student": context}, own)
        shapes = Shapes(context, completion, count * rows, None, tokens_per_chunk)
        with sharding.on(sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])):
            found.append(row_of(built, Transformer(config), batch, shapes, shape, count))
    return found


def row_of(method: Any, network: Transformer, batch: Any, shapes: Shapes, mesh: tuple[int, ...], prompts: int) -> Row:
    """The cost of all updates of the costliest batch on the entered mesh."""
    optimizer = optax.adamw(1e-6)
    params = laid_parameters(parameters_of(network.config))
    opt_state, snapshots = laid_beside(method, optimizer, params)
    networks = dict.fromkeys(("live", *method.snapshots), network)
    flops, exchanged = 0.0, {}
    for objective in costliest(method):
        update = train.make_update(objective, networks, optimizer, shapes)
        lowered = update.lower(params, opt_state, snapshots, laid_rows(batch), laid_whole())
        text = lowered.compile(compiler_options=UNOPTIMISED).as_text()
        flops += programs.product_flops(text)
        for kind, size in programs.collective_bytes(text).items():
            exchanged[kind] = exchanged.get(kind, 0.0) + size
    state = programs.bytes_on_device((params, opt_state, snapshots))
    return Row(mesh, prompts, flops, state, exchanged)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    kinds = sorted({kind for row in rows for kind in row.exchanged})
    lines = [
        "| mesh | prompts | GFLOP per device | state MB | " + " | ".join(f"{kind} MB" for kind in kinds) + " |",
        "|" + "---|" * (4 + len(kinds)),
    ]
    for row in rows:
        cells = [sharding.named(row.mesh), str(row.prompts), f"{row.flops / 1e9:.1f}", f"{row.state / 1e6:.0f}"]
        cells += [f"{row.exchanged.get(kind, 0.0) / 1e6:.1f}" for kind in kinds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
