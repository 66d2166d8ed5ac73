"""What has been proposed against the degradation, side by side: one testbed, one budget of rollouts, one rate.

    python experiments/degrade/remedies.py

All arms sample at temperature 1 and without filters, so that they differ in what is done with the rollouts only.  Teachers
that are told a peer's answer read one with its thinking (`c = s`); those of OPSD's family the reference solution, which has
neither slips nor hedges.  vOPD and StableOPD, made for a larger teacher, have the initial model with the reference.
"""

from __future__ import annotations

from functools import partial

import jax

from sdjax.cli.options import from_command_line
from sdjax.collect.controls import with_teacher_context
from sdjax.engine.policies import Policy
from sdjax.methods.antisd import antisd
from sdjax.methods.dasd import dasd
from sdjax.methods.egrsd import egrsd
from sdjax.methods.grpo import grpo
from sdjax.methods.opsa import opsa
from sdjax.methods.opsd import opsd, reference_solution
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdpo import sdpo
from sdjax.methods.stable_opd import stable_opd
from sdjax.methods.trace import trace
from sdjax.methods.vopd import vopd
from sdjax.run.measuring.evaluate import pass_at_k
from sdjax.study import testbed
from sdjax.study.arms import every_seed, trained
from sdjax.study.settings import TrainingSettings
from sdjax.study.tables import changes, shares, table
from sdjax.tasks import scratchpad
from sdjax.types import Method

PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""OPSD's and EGRSD's sampling without their filters."""

KS = (1, 2, 4, 8, 16)

ARMS = {
    "GRPO": partial(grpo, **testbed.GRPO),
    "SDPO": partial(sdpo, **testbed.SDPO, ema_rate=0.0, lesson=testbed.peer()),
    "OPSD": partial(opsd, **PLAIN),
    "OPSD without its clip": partial(opsd, **PLAIN, clip=None),
    "AntiSD": partial(antisd, lesson=testbed.peer()),
    "RLRT": partial(rlrt, lesson=testbed.peer()),
    "EGRSD": partial(egrsd, **PLAIN),
    "DASD": dasd,
    "TRACE": partial(trace, temperature=1.0),
    "vOPD": partial(vopd, lesson=reference_solution),
    "StableOPD": partial(stable_opd, lesson=reference_solution),
    "no teacher (OPSA)": opsa,
}
"""Name to method, with its paper's options but for sampling and what the teacher reads."""

CONTROLS = {
    "SDPO, mismatched": ("SDPO", "mismatched"),
    "SDPO, reference only": ("SDPO", "reference-only"),
    "SDPO, no lesson": ("SDPO", "none"),
    "OPSD, mismatched": ("OPSD", "mismatched"),
    "OPSD, reference only": ("OPSD", "reference-only"),
}
"""Name to arm and what its teacher reads instead: another problem's lesson, the lesson alone, the question alone."""


def method_of(name: str, group: int) -> Method:
    """The method of an arm or of a control."""
    arm, context = CONTROLS.get(name, (name, "matched"))
    return with_teacher_context(ARMS[arm](group_size=group), context)


def probed(policy: Policy, problems: dict, samples: int, some: int, key) -> dict:
    """The policy on all families, and the share of the first `some` in-domain problems solved by one of k samples."""
    everywhere, repeated = jax.random.split(key)
    tried = problems["in_domain"][:some]
    solved = pass_at_k(policy, tried, scratchpad.verify, repeated, n=samples, ks=KS)
    found = testbed.everywhere(policy, problems, everywhere)
    return {**found, **{f"pass@{k}": share for k, share in solved.items()}}


def study(
    *,
    settings: TrainingSettings = TrainingSettings(),
    arms: tuple[str, ...] = (*ARMS, *CONTROLS),
    train_size: int = 512,
    repeated: int = 48,
    samples: int = 16,
) -> str:
    """Runs every method and control with every seed, and shows how all families fare, and pass@k where it was trained.

    Args:
      arms: which of the arms and controls; the base model stands above them.
      train_size: distinct training problems.
      repeated, samples: so many of the in-domain ones are answered so many times, for pass@k.
    """
    chosen = settings.shortened()
    if chosen.smoke:
        train_size, repeated, samples, arms = 4, 2, 2, ("OPSD", "SDPO, mismatched")
    families = scratchpad.FAMILIES[:1] if chosen.smoke else scratchpad.FAMILIES
    base, identity = testbed.student(chosen.model, chosen.smoke)
    measured = {"model": identity, "problems": chosen.problems, "repeated": repeated, "samples": samples}
    sizes = {"steps": chosen.steps, "prompts": chosen.prompts, "lr": chosen.lr}

    def prepared(name: str, seed: int):
        held_out = testbed.held_out_problems(chosen.problems, seed, families)
        probe = partial(probed, problems=held_out, samples=samples, some=repeated, key=jax.random.key(1000 + seed))
        own = {**measured, "arm": name, "seed": seed}
        if name == "base":
            return own, lambda _: [{"step": 0, **probe(testbed.policy_of(base))}]
        task = scratchpad.scratchpad(train_size=train_size, test_size=1, seed=seed)
        experiment = testbed.run(method_of(name, chosen.group), base, task, **sizes, seed=seed)
        told = {"experiment": "remedies", "arm": name, "seed": seed}
        own |= {**sizes, "group": chosen.group, "train_size": train_size}
        return own, lambda folder: trained(experiment, folder, probe, 0, told)

    runs = every_seed(chosen.out, "remedies", ("base", *arms), chosen.seeds, prepared)
    last = {name: [r[-1] for r in some] for name, some in runs.items()}
    # A control against the arm that it changes, everything else against the base model.
    pairs = [(name, CONTROLS.get(name, ("base",))[0]) for name in last if name != "base"]
    pairs = [(name, other) for name, other in pairs if other in last]
    rows = [{"arm": name, "against": other, **against(last[name], last[other])} for name, other in pairs]
    return f"{table([{'arm': name, **cells(some, repeated)} for name, some in last.items()])}\n\n{table(rows)}"


def cells(results: list[dict], repeated: int) -> dict[str, str]:
    """What the table says of one arm; the answers to one problem count as one answer in the intervals of pass@k."""
    passed = [name for name in results[0] if name.startswith("pass@")]
    solved = {f"{name}, %": shares(results, what=name, answers=repeated) for name in passed}
    return {"seeds": str(len(results)), **testbed.fares(results), **solved}


def against(results: list[dict], before: list[dict]) -> dict[str, str]:
    """Differences seed by seed."""
    first = lambda some: [{"pass@1": 100 * r["pass@1"]} for r in some]
    return {**testbed.differs(results, before), "pass@1, points": changes(first(results), first(before), "pass@1")}


if __name__ == "__main__":
    print(from_command_line(study))
