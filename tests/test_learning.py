"""Every method teaches: a tiny model that can only read the answer learns to recall it.  Slow: `make test-slow`.

The student's accuracy *without* the context is measured before (chance, 1/8) and after, on questions in a wording that
training did not use, over three seeds of pre-training, sampling and order.
"""

import inspect

import optax
import pytest
import tiny
from hint_reader import SHAPES, hint_reader

from sdjax import options
from sdjax.contexts import question, with_solution
from sdjax.fit import fit
from sdjax.train import Experiment

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
# What a method needs here beside its defaults: group sizes and rates of a task of a few hundred tokens.
OPTIONS: dict[str, dict] = {}
STEPS: dict[str, int] = {}
# Methods whose claim is not a gain in accuracy from a teacher's context, or that do not show one here: why.
OTHERWISE: dict[str, str] = {
    "opsa": "has no teacher: it pushes unlikely tokens down and cannot know the answer",
}


def lesson(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


def method(name):
    factory = options.method_factory(name)
    known = inspect.signature(factory).parameters
    offered = {"group_size": 4, "lesson": lesson, **OPTIONS.get(name, {})}
    return factory(**{k: v for k, v in offered.items() if k in known})


def accuracies(name, seed, folder):
    experiment = Experiment(
        method=method(name),
        task=tiny.TASK,
        student=hint_reader(seed),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3)),
        shapes=SHAPES,
        steps=STEPS.get(name, 60),
        prompts=8,
        seed=seed,
        export=False,
    )
    result = fit(experiment, folder)
    return result.before.solved, result.after.solved


@pytest.mark.parametrize("name", [n for n in options.method_names() if n not in OTHERWISE])
def test_accuracy_without_the_context_rises(name, tmp_path):
    found = [accuracies(name, seed, tmp_path / str(seed)) for seed in SEEDS]
    before, after = (sum(x) / len(SEEDS) for x in zip(*found, strict=True))
    print(f"{name}: {before:.3f} -> {after:.3f}  {[f'{b:.2f}->{a:.2f}' for b, a in found]}")
    # 24 questions in all: two standard errors of a share near 1/8 are 0.14.
    assert after > before + 0.14, found
