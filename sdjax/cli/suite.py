"""`sdjax bench --suite`: the step of `sdjax bench` in bfloat16 and float32, with machine and versions, in one file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import psutil

from sdjax import __version__
from sdjax.cli.bench import bench
from sdjax.cli.options import OptionError
from sdjax.tasks.bounded import cores

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax", "numpy")


def machine() -> dict[str, Any]:
    """What was measured on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": cores(),
        "memory GB": psutil.virtual_memory().total / 1e9,
        "load average before": os.getloadavg()[0],
    }


def processor() -> str:
    """The processor's name as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that a measurement depends on, where they are installed."""
    found = {"python": platform.python_version(), "sdjax": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def suite(
    *,
    out: str = "bench.json",
    model: str = "random:smollm2-135m",
    prompts: int = 2,
    group: int = 4,
    completion: int = 32,
    rollout_rows: int = 8,
    repeats: int = 2,
    tokens_per_chunk: int = 64,
    rows_per_chunk: int | None = None,
    remat: bool = True,
    scan: bool = False,
) -> str:
    """Measures one step of SDPO in bfloat16 and in float32 beside the machine's ceilings, and writes everything to a file.

    Args:
      out: the file, JSON: machine, versions, sizes, and by type what `sdjax bench` prints.
      model: as for `sdjax bench`.
      prompts: distinct prompts.
      group: completions of each prompt.
      completion: tokens of each completion, exactly.
      rollout_rows: also times sampling this many rows of one prompt each.
      repeats: timed calls after the first; medians are written.
      tokens_per_chunk: positions whose logits are held at once.
      rows_per_chunk: rows whose activations are held at once.
      remat: recompute blocks in the backward pass.
      scan: loop over the layers of an update.

    Raises: `OptionError` for a number below 1, or a file that cannot be written.
    """
    sizes = {name: value for name, value in locals().items() if name != "out"}
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"--out {out}: expected a file in a folder that exists")
    found = {"machine": machine(), "versions": versions(), "sizes": sizes, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    # The smaller type first: the most memory that a process has had never falls.
    for name, bf16 in (("bfloat16", True), ("float32", False)):
        found[name] = bench(**sizes, bf16=bf16)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return f"written to {path}"
