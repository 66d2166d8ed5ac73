"""How much memory there is for a run: of an accelerator by its own account, of a machine by the system's and its limits."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any, NamedTuple

import jax
import psutil

from sdjax.devices.processes import everyone
from sdjax.errors import InputError

SHARED, OWN = 0.15, 0.05
"""The share of the memory there is that is left alone: of a machine's, which others use too; of an accelerator's."""


class MemoryShortage(InputError, RuntimeError):
    """Something does not fit the memory there is; the message says what it needs, what there is and what to do."""


class Room(NamedTuple):
    """Bytes of one device: what may still be taken, what there is in all, and which memory that is, in words."""

    free: float
    total: float
    what: str

    def __str__(self) -> str:
        return f"{gigabytes(self.free)} of {self.what} ({gigabytes(self.total)} in all)"


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def room(budget: str = "auto", device: Any = None) -> Room:
    """What each device of this run may still take: what there is less a margin, or what `budget` allows.

    `budget` is "auto", or a size of one device, as "12GB".  Of several processes the smallest counts.  Devices of one
    processor share its memory.

    Raises: MemoryShortage if `budget` is not such a text.
    """
    allowed, device = parsed(budget), device or jax.local_devices()[0]
    found = of_accelerator(device) if device.platform != "cpu" else of_machine()
    if allowed is not None:
        found = Room(allowed, allowed, f"memory allowed by --memory {budget}")
    frees, totals = zip(*everyone([found.free, found.total]), strict=True)
    return found._replace(free=min(frees), total=min(totals))


def parsed(budget: str) -> float | None:
    """Bytes of a text such as "12GB" or "800MB"; `None` for "auto".  Raises `MemoryShortage` for another text."""
    if budget == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)B?", budget, re.IGNORECASE)
    if not match:
        raise MemoryShortage(f"--memory {budget}: expected auto, off, or a size such as 12GB")
    scale = 1024 if "i" in match[2].lower() else 1000
    return float(match[1]) * scale ** ("KMGT".index(match[2][0].upper()) + 1)


def of_accelerator(device: Any) -> Room:
    """An accelerator's memory as its allocator reports it."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit") or stats.get("bytes_reservable_limit")
    what = f"memory on each {device.device_kind}"
    if not limit:
        return Room(float("inf"), float("inf"), what)
    return Room(max(0.0, (1 - OWN) * limit - stats.get("bytes_in_use", 0)), float(limit), what)


def of_machine() -> Room:
    """This machine's memory, as far as its devices may share it: available to new programs, within every limit."""
    memory, devices = psutil.virtual_memory(), len(jax.local_devices())
    free, total = float(memory.available), float(memory.total)
    for limit, used in (*of_control_groups(), *of_address_space()):
        free, total = min(free, limit - used), min(total, limit)
    return Room(max(0.0, (1 - SHARED) * free) / devices, total / devices, "this machine's free memory")


def of_control_groups(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[float, float]]:
    """`(limit, used)` of every control group that this process is in and that has a limit, as containers have.

    Pages of files that the system would give up count as free.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if (there := of_control_group(folder, *names)) is not None:
                found.append(there)
            if folder == top:
                break
    return found


def of_control_group(folder: Path, limit: str, used: str) -> tuple[float, float] | None:
    """`(limit, used)` of one group, `None` without a limit."""
    try:
        most, now = float((folder / limit).read_text()), float((folder / used).read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        stat = {}
    idle = float(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return (most, max(0.0, now - idle)) if most < 2**60 else None


def of_address_space() -> list[tuple[float, float]]:
    """`(limit, used)` of what `ulimit -v` allows this process, if it does."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        []
        if limit == resource.RLIM_INFINITY
        else [(float(limit), float(psutil.Process(os.getpid()).memory_info().vms))]
    )


def peak(device: Any = None) -> float:
    """The most bytes that this process has had until now: on an accelerator by its allocator, else resident on the machine."""
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    return float(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def exhausted(error: Exception) -> bool:
    """Whether an error says that memory could not be had."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
