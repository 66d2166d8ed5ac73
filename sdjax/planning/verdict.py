"""What a plan means: bytes by what needs them, a roofline in seconds, whether it fits and what to change; also as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.planning.chips import Chip
from sdjax.planning.gpus import GPUS, MOST, SHARE
from sdjax.planning.plan import Cost, Plan

ASSUMED = """matrix products at the peak of bfloat16, memory, links (two of each TPU) and network at full speed; exchanges wait
  for nothing and nothing overlaps with them; a decoding step reads the weights and {cache}"""

CACHE = {True: "all of the cache", False: "what is written of the cache"}
"""What a step of decoding reads on GPUs, and elsewhere."""


def totals(plan: Plan) -> dict[str, float]:
    """Bytes of one device while it updates and while it samples; the state is there in both."""
    state = sum(plan.state.values())
    beside = lambda cost: cost.memory["temporary"] + max(cost.memory["outputs"] - cost.memory["donated"], 0.0)
    return {"update": state + max(map(beside, plan.updates)), "sampler": state + beside(plan.sampler)}


def seconds(plan: Plan) -> dict[str, float]:
    """A roofline of one step: products at the peak, memory and links at their full speed, exchanges not hidden.

    `update = max(FLOP / peak, bytes / bandwidth) + exchanged / link speed`; every step of decoding reads the weights and
    what is written of the cache.
    """
    chip = plan.chip
    update = sum(max(c.flops / chip.flops, c.accessed / chip.bandwidth) + exchanging(c, chip) for c in plan.updates)
    reading = plan.steps * plan.decoding / chip.bandwidth
    return {"update": update, "sampler": max(plan.sampler.flops / chip.flops, reading) + exchanging(plan.sampler, chip)}


def exchanging(cost: Cost, chip: Chip) -> float:
    """Seconds of a program's exchanges: through links, and at the same time through the network where there is one."""
    between = cost.network / chip.network if cost.network else 0.0
    return max(sum(cost.exchanged.values()) / chip.exchange, between)


def advice(plan: Plan) -> str:
    """What to change where it does not fit, by the largest part."""
    needed = totals(plan)
    if sum(plan.state.values()) > 0.7 * available(plan):
        return "parameters, optimizer and snapshots alone fill the device: use more devices, or --lora-rank"
    if needed["sampler"] > needed["update"]:
        return "sampling needs most: a longer model axis splits the weights, fewer prompts shorten the cache"
    return (
        "the update's temporaries need most: fewer rows or tokens per chunk, a longer model axis, more devices, or shorter "
        "completions; --scan costs a copy of parameters and gradients"
    )


def exchanged(costs: tuple[Cost, ...]) -> dict[str, float]:
    """Bytes that one device receives in several programs, by kind."""
    kinds = sorted({kind for cost in costs for kind in cost.exchanged})
    return {kind: sum(cost.exchanged.get(kind, 0.0) for cost in costs) for kind in kinds}


def report(plan: Plan) -> str:
    """The plan as text."""
    gigabytes = lambda name, value: f"  {name:38s}{value / 1e9:10.2f} GB"
    needed = totals(plan)
    lines = [f"{plan.devices} x {plan.device}, on each:", "memory"]
    lines += [gigabytes(name, value) for name, value in plan.state.items()]
    lines += [
        gigabytes("gradients", plan.gradients),
        gigabytes("activations, logits, gathered weights", max(activations(plan), 0.0)),
        gigabytes("update, in all", needed["update"]),
        gigabytes("cache", plan.cache),
        gigabytes("sampler, in all", needed["sampler"]),
    ]
    for name, costs in (("update", plan.updates), ("sampler", (plan.sampler,))):
        lines += [name, f"  {'matrix products':38s}{sum(c.flops for c in costs) / 1e12:10.2f} TFLOP"]
        lines.append(gigabytes("memory read and written", sum(c.accessed for c in costs)))
        lines += [gigabytes(f"received by {kind}", value) for kind, value in exchanged(costs).items()]
        lines.append(f"  {'compiled in':38s}{sum(c.compiling for c in costs):10.0f} s")
    return "\n".join(lines + verdict(plan, needed))


def activations(plan: Plan) -> float:
    """Bytes of the largest update's temporaries without the gradients."""
    return max(c.memory["temporary"] for c in plan.updates) - plan.gradients


def verdict(plan: Plan, needed: Mapping[str, float]) -> list[str]:
    """Whether it fits the memory that is known, and the estimated seconds, where the chip is known."""
    lines = [f"nothing is known of the speed of {plan.device!r}"]
    if plan.chip is not None:
        lines = ["at best, by the roofline"]
        lines += [f"  {name:38s}{value:10.3f} s" for name, value in seconds(plan).items()]
        lines.append(f"  assumed: {ASSUMED.format(cache=CACHE[plan.device in GPUS])}")
    if available(plan) is None:
        return [*lines, "nothing is known of its memory"]
    most, room = max(needed.values()), available(plan)
    there = f"{most / 1e9:.1f} of {room / 1e9:.0f} GB"
    if plan.device in GPUS:
        there += f" ({room / GPUS[plan.device].memory:.2f} of the GPU's, which JAX takes at its start: {SHARE})"
    if most <= room:
        return [*lines, f"fits: {there}"]
    if plan.device in GPUS and most <= MOST * GPUS[plan.device].memory:
        return [*lines, f"fits only with {SHARE}={MOST}: {there}"]
    return [*lines, f"does not fit: {there}; {advice(plan)}"]


def available(plan: Plan) -> float | None:
    """Bytes that a device has, as far as that is known."""
    return plan.memory if plan.memory is not None else plan.chip and plan.chip.memory


# ---- as JSON ----------------------------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    nested = {"chip": plan.chip and plan.chip._asdict(), "sampler": plan.sampler._asdict()}
    return plan._asdict() | nested | {"updates": [cost._asdict() for cost in plan.updates]}


def from_json(found: Mapping[str, Any]) -> Plan:
    """The plan that `as_json` made."""
    nested = {"chip": found["chip"] and Chip(**found["chip"]), "sampler": Cost(**found["sampler"])}
    return Plan(**{**found, **nested, "updates": tuple(Cost(**cost) for cost in found["updates"])})
