"""Fine-tuning on correct traces written with and without the solution (Kim et al. 2026, arXiv:2603.24472, section 4, Table 2).

    python experiments/degrade/off_policy.py

The same questions, all traces correct: unguided ones, and ones written after reading such an unguided trace.  Guided traces
are shorter, so a second arm reads more of them, up to the same number of tokens.
"""

from __future__ import annotations

from functools import partial

import jax

from sdjax.cli.options import from_command_line
from sdjax.collect.contexts import question, with_solution
from sdjax.engine.policies import Policy
from sdjax.methods.sft import sft
from sdjax.models.pretrained import Pretrained
from sdjax.study import testbed
from sdjax.study.arms import arm, every_seed, trained
from sdjax.study.settings import StudySettings
from sdjax.study.tables import shown, table
from sdjax.tasks import scratchpad
from sdjax.types import Example

ARMS = ("unguided", "guided", "guided, equal tokens")


def correct_texts(policy: Policy, examples: list[Example], key, n: int, context=question) -> dict[str, str]:
    """The first correct of `n` answers to each example, `{id: text}`; examples without one are left out."""
    tried = testbed.first_correct(policy, examples, key, n, context)
    return {e.id: text for e, (good, text) in zip(examples, tried, strict=True) if good}


def traces(base: Pretrained, train_size: int, samples: int, seed: int, only_correct: bool) -> dict:
    """Unguided and guided correct traces of the same training problems: `{"unguided": {id: text}, "guided": ...}`."""
    policy = testbed.policy_of(base)
    examples = list(scratchpad.scratchpad(train_size=train_size, test_size=1, seed=seed).train)
    if not only_correct:  # a model that knows nothing
        return {kind: {e.id: e.solution for e in examples} for kind in ("unguided", "guided")}
    alone, told = jax.random.split(jax.random.key(seed))
    unguided = correct_texts(policy, examples, alone, samples)
    examples = [e for e in examples if e.id in unguided]
    guided = correct_texts(policy, examples, told, samples, lambda e: with_solution(question(e), unguided[e.id]))
    return {"unguided": {name: unguided[name] for name in guided}, "guided": guided}


def fine_tuning(base: Pretrained, texts: dict[str, str], train_size: int, steps: int, batch: int, lr: float, seed: int):
    """One run of SFT on texts by example id."""
    task = scratchpad.scratchpad(train_size=train_size, test_size=1, seed=seed)
    task = task._replace(train=tuple(e for e in task.train if e.id in texts))
    return testbed.run(sft(texts=lambda e: texts[e.id]), base, task, steps=steps, prompts=batch, lr=lr, seed=seed)


def study(
    *,
    settings: StudySettings = StudySettings(problems=128),
    steps: int = 32,
    batch: int = 32,
    lr: float = 1e-3,
    train_size: int = 256,
    samples: int = 4,
) -> str:
    """Writes both sets of traces, fine-tunes on them, and shows how all families fare.

    Args:
      steps: batches of the arms that see equally many traces.
      batch: traces per batch.
      lr: learning rate of AdamW.
      train_size: training problems; those without a correct trace of either kind are left out.
      samples: attempts at a correct trace; with `smoke` the traces are reference solutions.
    """
    chosen = settings.shortened()
    if chosen.smoke:
        steps, batch, train_size, samples = 2, 2, 4, 2
    families = scratchpad.FAMILIES[:1] if chosen.smoke else scratchpad.FAMILIES
    base, identity = testbed.student(chosen.model, chosen.smoke)
    common = {"model": identity, "train_size": train_size, "samples": samples}

    def prepared(name: str, seed: int):
        write = lambda _: traces(base, train_size, samples, seed, not chosen.smoke)
        texts = arm(chosen.out, "traces", {**common, "seed": seed}, write)
        tokens = {kind: sum(len(t.split()) + 1 for t in some.values()) for kind, some in texts.items()}
        many = round(steps * tokens["unguided"] / tokens["guided"]) if name == "guided, equal tokens" else steps
        e = fine_tuning(base, texts[name.split(",")[0]], train_size, many, batch, lr, seed)
        measured = testbed.held_out_problems(chosen.problems, seed, families)
        probe = partial(testbed.everywhere, problems=measured, key=jax.random.key(1000 + seed))
        arguments = {**common, "arm": name, "steps": many, "batch": batch, "lr": lr}
        arguments |= {"problems": chosen.problems, "seed": seed}
        told = {"experiment": "off-policy", "arm": name, "seed": seed}
        return arguments, lambda folder: trained(e, folder, probe, many, told)

    runs = every_seed(chosen.out, "off-policy", ARMS, chosen.seeds, prepared)
    rows = []
    for name, at in (("base", 0), *((name, -1) for name in ARMS)):
        some = [r[at] for r in runs[ARMS[0] if name == "base" else name]]
        rows.append({"texts": name, "steps": shown([r["step"] for r in some], digits=0), **testbed.fares(some)})
    return table(rows)


if __name__ == "__main__":
    print(from_command_line(study))
