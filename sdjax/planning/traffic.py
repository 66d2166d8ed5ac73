"""Bytes that a compiled program reads from memory and writes to it, from its text.

Every fusion, product and kernel reads its operands and writes its results once; what is inside it never leaves the chip,
and of an array that it only slices or updates in part the part counts.  Loops count as often as they run, which XLA's own
count does not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from sdjax.devices.programs import Instruction, bytes_of, called_by, computations, loop_trips

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "copy-done", "all-gather-done", "all-reduce-done", "async-done"),
    *("collective-permute-done", "send", "recv", "send-done", "recv-done", "async-start", "async-update"),
}
SLICES = {"dynamic-slice", "slice", "gather"}
UPDATE = "dynamic-update-slice"
RUN = {"while", "conditional", "call", "async-start"}
"""What runs the computations that it names one instruction after the other."""

PASSED = {"bitcast", "reshape", "transpose", "copy", "convert"}
"""What inside a fusion only hands on its operand, of which then no more is read than what reads this."""

ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")

Parts = Mapping[str, list[Instruction]]


def accessed_bytes(text: str, trips: int = 1) -> float:
    """Bytes that one device reads and writes in one call.

    Of the branches of a condition the dearest counts; a loop of unknown length counts `trips` times.
    """
    parts, entry = computations(text)

    @functools.cache
    def cost(name: str) -> float:
        return of_computation(parts, name) + sum(inside(x) for x in parts[name] if x.kind in RUN)

    def inside(x: Instruction) -> float:
        found = [cost(other) for other in called_by(parts, x)]
        if x.kind == "conditional":
            return max(found, default=0.0)
        return sum(found) * (loop_trips(parts, x, trips) if x.kind == "while" else 1)

    return cost(entry)


def of_computation(parts: Parts, name: str) -> float:
    """Bytes of one run of a computation, without those that it runs."""
    known = {x.name: x for x in parts[name]}
    return sum(of_instruction(parts, known, x) for x in parts[name] if x.kind not in FREE)


def of_instruction(parts: Parts, known: Mapping[str, Instruction], x: Instruction) -> float:
    """Bytes that an instruction reads and writes."""
    operands = operands_of(x)
    size = lambda name: in_memory(type_of(known, name))
    if x.kind in SLICES:
        return 2 * in_memory(x.type)
    if x.kind == UPDATE:
        return 2 * size(operands[1])
    if x.kind == "copy-start":
        return 2 * size(operands[0])
    called = re.search(r"calls=%?([\w.-]+)", x.rest)
    if x.kind != "fusion" or called is None:
        return in_memory(x.type) + sum(map(size, operands))
    body = parts[called[1]]
    share = lambda i, name: min(read_inside(parts, body, i), size(name))
    return min(written_inside(body), in_memory(x.type)) + sum(share(i, name) for i, name in enumerate(operands))


def read_inside(parts: Parts, body: list[Instruction], number: int) -> float:
    """Bytes that a fusion reads of its operand of this number at most: slices, or all of it."""
    own = next((x.name for x in body if x.kind == "parameter" and x.rest.startswith(f"{number})")), None)
    return read_of(parts, body, own)


def read_of(parts: Parts, body: list[Instruction], name: str | None) -> float:
    """Bytes that all readers inside a fusion read of this value at most."""
    return sum(read_by(parts, body, x, name) for x in body if name in operands_of(x))


def read_by(parts: Parts, body: list[Instruction], reader: Instruction, name: str | None) -> float:
    """Bytes that an instruction inside a fusion reads of an operand at most."""
    operands = operands_of(reader)
    if reader.kind in PASSED and reader is not body[-1]:
        return read_of(parts, body, reader.name)
    if reader.kind in SLICES:
        return in_memory(reader.type)
    if reader.kind == UPDATE and operands[0] == name:
        return 0.0
    called = re.search(r"calls=%?([\w.-]+)", reader.rest)
    return read_inside(parts, parts[called[1]], operands.index(name)) if called else float("inf")


def written_inside(body: list[Instruction]) -> float:
    """Bytes that a fusion writes at most: the parts that it updates, or all of its results."""
    known = {x.name: x for x in body}
    results = [body[-1].name] if body[-1].kind != "tuple" else operands_of(body[-1])
    updates = [made_by(known, known[name]) for name in results if name in known]
    if not updates or any(x.kind != UPDATE for x in updates):
        return float("inf")
    return sum(in_memory(known[operands_of(x)[1]].type) for x in updates)


def made_by(known: Mapping[str, Instruction], x: Instruction) -> Instruction:
    """What makes a value that inside a fusion is only handed on."""
    while x.kind in PASSED and operands_of(x)[0] in known:
        x = known[operands_of(x)[0]]
    return x


def operands_of(x: Instruction) -> list[str]:
    """The names of an instruction's operands; `name#1` is the second part of a tuple."""
    return re.findall(r"%([\w.-]+(?:#\d+)*)", x.rest.split("), ")[0])


def type_of(known: Mapping[str, Instruction], name: str) -> str:
    """The type of an operand; "" of what comes from elsewhere."""
    base, *numbers = name.split("#")
    found = known[base].type if base in known else ""
    for number in numbers if found else ():
        found = elements(found)[int(number)]
    return found


def elements(type_text: str) -> list[str]:
    """The types in a tuple's: `(f32[2]{0}, (s32[], u8[4]))` -> `["f32[2]{0}", "(s32[], u8[4])"]`."""
    depth, found = 0, [""]
    for letter in type_text.strip()[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found]


def in_memory(type_text: str) -> float:
    """Bytes of a type's arrays, without those that lie in memory on the chip (`S(1)` in their layout)."""
    arrays = ARRAY.findall(type_text)
    return sum(
        bytes_of(kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims, layout in arrays
        if "S(" not in layout
    )
