"""What every experiment has: each option says what it is, and becomes what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from sdjax.cli import options
from sdjax.cli.options import options_class, spelled_out
from sdjax.devices.memory import MemoryShortage
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.tokens import refuse, shorten
from sdjax.errors import InputError
from sdjax.methods.grpo import grpo
from sdjax.methods.sft import sft
from sdjax.run.settings import Settings, check_answers
from sdjax.tasks import maths
from sdjax.types import Task

TASK = Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity)


def experiment(**chosen):
    return Settings(**chosen).experiment(method=grpo(), task=TASK, student=tiny.pretrained())


def test_every_option_has_a_heading_and_a_help_text():
    for field in dataclasses.fields(Settings):
        assert field.metadata["heading"] and field.metadata["help"], field.name


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 7), ("prompts", 6), ("rounds", 2), ("minibatches", 2), ("epochs", 3), ("seed", 5), ("remat", True)]
    + [("memory", "12GB"), ("scan", True), ("evaluation", 9), ("evaluate_every", 4), ("save_every", 11)],
)
def test_a_setting_reaches_the_experiment(field, value):
    assert getattr(experiment(**{field: value}), field) == value != getattr(experiment(), field)


def test_the_others_reach_it_under_other_names():
    some = experiment(bf16=True, mesh="4x2", lora_rank=3, lora_base="int8")
    assert some.dtype == jnp.bfloat16 and some.mesh == (4, 2) and (some.lora.rank, some.lora.base) == (3, "int8")
    shapes = experiment(context=33, completion=22, rows=11, rows_per_chunk=4, tokens_per_chunk=5).shapes
    assert (shapes.context, shapes.completion, shapes.rows) == (33, 22, 11)
    assert (shapes.rows_per_chunk, shapes.tokens_per_chunk, shapes.too_long) == (4, 5, refuse)
    assert experiment(shorten_prompts=True).shapes.too_long is shorten
    assert experiment(teacher_context=77).shapes.lesson == 77


def test_a_boolean_that_may_be_chosen_is_a_flag():
    options = options_class("Options", lambda *, settings=Settings(): None, {})
    said = lambda *arguments: spelled_out(arguments, options)
    assert said("--remat", "--steps", "3") == ["--remat", "True", "--steps", "3"]
    assert said("--no-remat", "--bf16") == ["--remat", "False", "--bf16"]
    assert said("--remat", "False") == ["--remat", "False"]


def test_rewards_without_answers_are_refused_before_anything_is_loaded():
    """Compared with nothing every attempt is wrong; texts can be imitated, and another verifier may need no answer."""
    missing = TASK._replace(verify=maths.verify, read={"train": {"unanswered": 3}})
    with pytest.raises(InputError, match="3 problems of recall have no answer, and this method .* --method sft"):
        Settings(model="nowhere").experiment(method=grpo(), task=missing)
    check_answers(missing, sft())
    check_answers(missing._replace(verify=tiny.parity), grpo())


def test_a_budget_that_is_no_size_is_refused_at_once():
    with pytest.raises(MemoryShortage, match="--memory much: expected auto, off, or a size such as 12GB"):
        Settings(memory="much")


def first_step(settings, gradient, weight=2.0):
    """What the optimizer makes of a gradient, for a single weight."""
    optimizer, params = settings.chosen_optimizer(), jnp.float32(weight)
    state, moved = optimizer.init(params), []
    for _ in range(3):
        update, state = optimizer.update(jnp.float32(gradient), state, params)
        moved.append(float(update))
    return moved


def test_the_learning_rate_rises_over_the_warmup():
    # Adam's first steps have the size of the learning rate, whatever the gradient.
    plain = dataclasses.replace(Settings(), lr=0.1, weight_decay=0.0, warmup=0)
    assert jnp.allclose(jnp.array(first_step(plain, 0.5)), -0.1, atol=1e-4)
    assert jnp.allclose(
        jnp.array(first_step(dataclasses.replace(plain, warmup=2), 0.5)), jnp.array([-0.05, -0.075, -0.1]), atol=1e-4
    )


def test_weight_decay_and_clipping_are_as_chosen():
    decayed = dataclasses.replace(Settings(), lr=0.1, weight_decay=0.5)
    assert first_step(decayed, 0.5)[0] == pytest.approx(-0.1 - 0.1 * 0.5 * 2.0, abs=1e-4)
    clip = dataclasses.replace(Settings(), clip_norm=1e-3).chosen_optimizer()
    moments = clip.update(jnp.float32(5.0), clip.init(jnp.float32(0.0)), jnp.float32(0.0))[1]
    assert max(abs(float(x)) for x in jax.tree.leaves(moments)) == pytest.approx(
        1.0
    )  # Adam's count; moments are clipped
    assert sorted(abs(float(x)) for x in jax.tree.leaves(moments))[1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "chosen", [{"steps": 0}, {"lr": -1.0}, {"mesh": "4by2"}, {"lora_base": "int8"}, {"minibatches": 3, "prompts": 4}]
)
def test_a_setting_that_makes_no_sense_is_refused_at_once(chosen):
    with pytest.raises(InputError, match=next(iter(chosen))):
        Settings(**chosen)


def test_smoke_is_two_steps_and_nothing_else_changes_them():
    settings = Settings(steps=40, prompts=8, minibatches=4)
    assert settings.shortened() is settings
    few = dataclasses.replace(settings, smoke=True).shortened()
    assert (few.steps, few.prompts, few.minibatches, few.save_every) == (2, 2, 1, 0)


# ---- on the command line ------------------------------------------------------------------------------------------------


def told(*, settings: Settings = Settings(steps=40), own: int = 3) -> tuple[Settings, int]:
    """An experiment.

    Args:
      own: of this one.
    """
    return settings, own


def test_settings_are_plain_options_with_the_defaults_of_the_experiment():
    known = options.options_class("Options", told, {})
    assert {"steps", "own", "lora_rank"} <= {*options.option_names(known)}
    assert options.default_values(known)["steps"] == 40
    assert (
        options.help_texts(known)["steps"] == "batches to train on"
        and options.help_texts(known)["own"] == "of this one."
    )


def test_chosen_options_come_back_as_settings():
    known = options.options_class("Options", told, {})
    chosen = options.shallow(known())
    settings, own = options.call(told, {**chosen, "lr": 0.5, "own": 4})
    assert (settings.lr, settings.steps, own) == (0.5, 40, 4)
    with pytest.raises(ExperimentError, match="steps=0"):
        options.call(told, {**chosen, "steps": 0})
