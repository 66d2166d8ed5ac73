"""What a compiled program costs, read from its text: collectives by kind and bytes, FLOPs, memory by term.

All figures are of one device and one call.  Instructions inside loops count as often as the loop runs where XLA knows
how often that is, and `trips` times where it does not: a sampler's loop, which ends when every row has ended.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
"""Of element types whose name does not end with their bits (`f32`, `s8`, `u4`, ...); an unknown one counts nothing."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)


class Instruction(NamedTuple):
    """One line of a program: its result's type, what it does, and the rest of the line (operands, attributes)."""

    name: str
    type: str
    kind: str
    rest: str


class Collective(NamedTuple):
    """One exchange between devices: the result's shapes, which devices take part, how often it happens."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: float  # of the result on one device, of one exchange
    group: tuple[int, ...]  # the devices that take part, by their number in the mesh
    times: int

    @property
    def moved(self) -> float:
        """Bytes that one device receives over all exchanges, with ring algorithms."""
        devices = len(self.group)
        others = devices - 1
        share = {"all-reduce": 2 * others / devices, "reduce-scatter": others, "collective-permute": 1.0}
        return self.times * self.bytes * share.get(self.kind, others / devices)

    def through_network(self, per_host: int) -> float:
        """Of those the bytes that come through the network adapter of one device, where a host has so many devices.

        A ring that crosses from host to host uses the adapters of all its devices there.
        """
        hosts = {device // per_host for device in self.group}
        return self.moved * len(hosts) / len(self.group) if len(hosts) > 1 else 0.0


# ---- reading --------------------------------------------------------------------------------------------------------


def shapes_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every array in a type: `(f32[2,3]{1,0}, s32[])` -> `[("f32", (2, 3)), ("s32", ())]`."""
    found = re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", type_text)
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found]


def bytes_of(kind: str, shape: tuple[int, ...]) -> float:
    """Bytes of an array."""
    digits = re.search(r"^[a-z]+(\d+)", kind)
    return math.prod(shape) * BITS.get(kind, int(digits[1]) if digits else 0) / 8


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation of a compiled program's text, and the name of its entry."""
    found: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (parts := INSTRUCTION.match(line)):
            current.append(Instruction(*parts.groups()))
    return found, entry


def times(parts: Mapping[str, list[Instruction]], entry: str, trips: int = 1) -> dict[str, int]:
    """How often every computation runs in one call.  All branches of a condition count, as if each were taken."""
    found = dict.fromkeys(parts, 0)

    def visit(name: str, often: int) -> None:
        found[name] += often
        for x in parts[name]:
            turns = loop_trips(parts, x, trips) if x.kind == "while" else 1
            for other in called_by(parts, x):
                visit(other, often * turns)

    visit(entry, 1)
    return found


def called_by(parts: Mapping[str, list[Instruction]], x: Instruction) -> list[str]:
    """The computations that an instruction names: a loop's body and condition, a condition's branches, a fusion's body."""
    names = [name for _, called in CALLED.findall(x.rest) for name in re.findall(r"[\w.-]+", called)]
    return [name for name in names if name in parts]


def loop_trips(parts: Mapping[str, list[Instruction]], loop: Instruction, unknown: int) -> int:
    """How often a loop's body runs, if XLA says so, or compares a counter that starts at 0 with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = parts.get(
        next((name.lstrip("%") for how, name in CALLED.findall(loop.rest) if how == "condition"), ""), []
    )
    bounds = {x.name: x.rest.split(")")[0] for x in condition if x.kind == "constant"}
    last = condition[-1] if condition else None
    if last is None or last.kind != "compare" or "direction=LT" not in last.rest:
        return unknown
    compared = re.findall(r"%?([\w.-]+)", last.rest.split(")")[0])
    bound = bounds.get(compared[-1], "")
    return int(bound) if bound.isdigit() else unknown


def group_of(rest: str, everybody: int) -> tuple[int, ...]:
    """Which devices exchange with one another, in the first group: XLA lists groups, or tiles them, or names axes of a mesh.

    Of pairs the two that are farthest apart.  Raises `ValueError` for another form: a guess would be a wrong figure.
    """
    numbers = lambda text: tuple(int(n) for n in re.findall(r"\d+", text))
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return max(map(numbers, re.findall(r"\d+,\d+", pairs[1])), key=lambda pair: abs(pair[0] - pair[1]))
    if "replica_groups={}" in rest:
        return tuple(range(everybody))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(listed(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))[0].tolist())
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return numbers(groups[1])
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        return group_on_mesh(*meshed.groups())
    written = rest[rest.find("replica_groups=") :][:200]
    raise ValueError(f"which devices take part cannot be read from {written!r}")


def listed(text: str) -> np.ndarray:
    """Devices in the order that XLA writes as a shape and its transposition: `[4,2]T(1,0)` -> 0 2 4 6 1 3 5 7."""
    shape, _, order = text.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    there = np.arange(math.prod(sizes)).reshape(sizes)
    return there.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else there


def group_on_mesh(axes: str, ids: str, named: str) -> tuple[int, ...]:
    """The first group along axes of a mesh: `'data'=4,'model'=2` and `'data'`; part of an axis is `'axis':(before)size`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    count = math.prod(sizes.values())
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", ids)
    devices = (listed(order[1]) if order else np.arange(count)).reshape(list(sizes.values()))
    chosen = dict.fromkeys(sizes, np.zeros(1, int))
    for axis, before, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named):
        size = int(part or sizes[axis])
        step = sizes[axis] // (int(before or 1) * size)
        chosen[axis] = (chosen[axis][:, None] + step * np.arange(size)).ravel()
    return tuple(devices[np.ix_(*chosen.values())].ravel().tolist())


# ---- what it costs --------------------------------------------------------------------------------------------------


def collectives(text: str, trips: int = 1) -> list[Collective]:
    """Every exchange between devices in a compiled program's text."""
    parts, entry = computations(text)
    often, found = times(parts, entry, trips), []
    partitions = re.search(r"num_partitions=(\d+)", text)
    everybody = int(partitions[1]) if partitions else 1
    for name, instructions in parts.items():
        for x in instructions:
            kind = x.kind.removesuffix("-start")
            if kind not in KINDS or not often[name]:
                continue
            arrays = shapes_of(x.type)
            # What starts an exchange in the background lists its operands first.
            arrays = arrays[len(arrays) // 2 :] if x.kind.endswith("-start") and kind != "all-reduce" else arrays
            size = sum(bytes_of(*a) for a in arrays)
            found.append(Collective(kind, tuple(s for _, s in arrays), size, group_of(x.rest, everybody), often[name]))
    return found


def collective_bytes(text: str, trips: int = 1) -> dict[str, float]:
    """Bytes that one device receives in one call, by kind of exchange; kinds that do not occur are left out."""
    totals: dict[str, float] = {}
    for c in collectives(text, trips):
        totals[c.kind] = totals.get(c.kind, 0.0) + c.moved
    return totals


def network_bytes(text: str, per_host: int, trips: int = 1) -> float:
    """Bytes that one device receives from other hosts in one call, through its own network adapter."""
    return sum(c.through_network(per_host) for c in collectives(text, trips))


def product_flops(text: str, trips: int = 1) -> float:
    """FLOP of all matrix products of one device: two per multiply-add, loops counted."""
    parts, entry = computations(text)
    often, total = times(parts, entry, trips), 0.0
    for name, instructions in parts.items():
        shapes = {x.name: shapes_of(x.type)[0][1] for x in instructions if shapes_of(x.type)}
        for x in instructions:
            if x.kind != "dot":
                continue
            operand = shapes_of(x.rest.split(")")[0])
            left = operand[0][1] if operand else shapes[re.search(r"%?([\w.-]+)", x.rest)[1]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
            inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
            total += 2.0 * often[name] * inner * math.prod(shapes_of(x.type)[0][1])
    return total


def memory(compiled: Any) -> dict[str, float]:
    """Bytes of a compiled program on one device: what comes in, goes out, is reused, and lies between."""
    stats = compiled.memory_analysis()
    return {
        "arguments": float(stats.argument_size_in_bytes),
        "outputs": float(stats.output_size_in_bytes),
        "donated": float(stats.alias_size_in_bytes),
        "temporary": float(stats.temp_size_in_bytes),
        "code": float(stats.generated_code_size_in_bytes),
        "peak": float(stats.peak_memory_in_bytes),
    }


def bytes_on_device(tree: Any) -> float:
    """Bytes of one device's part of a tree of arrays, or of shapes with a sharding."""

    def own(x: Any) -> float:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        itemsize = 4 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else x.dtype.itemsize
        return float(math.prod(shape) * itemsize)

    return sum(own(x) for x in jax.tree.leaves(tree))
