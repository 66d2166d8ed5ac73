"""Numbers that make no sense: every name at its least value and below it."""

import math

import pytest

from sdjax.engine.sensible import LEAST, POSITIVE, ExperimentError, check_numbers


@pytest.mark.parametrize("name", LEAST)
def test_the_least_value_is_allowed_and_the_next_below_refused(name):
    check_numbers({name: LEAST[name]})
    check_numbers({name: True})  # a switch is no number
    for wrong in (LEAST[name] - 1, LEAST[name] - 0.5, math.nan, -math.inf):
        with pytest.raises(ExperimentError, match=f"^{name}={wrong}: expected at least {LEAST[name]}$"):
            check_numbers({"other": 1, name: wrong})


def test_counts_begin_at_one_and_what_can_be_switched_off_at_zero():
    assert {LEAST[name] for name in ("steps", "prompts", "rows", "context", "train_size")} == {1}
    assert {LEAST[name] for name in ("seed", "warmup", "save_every", "temperature", "lag")} == {0}


@pytest.mark.parametrize("name", POSITIVE)
def test_rates_are_above_zero_and_finite(name):
    for right in (1e-9, 0.5, 1, 2.0):
        check_numbers({name: right})
    for wrong in (0, 0.0, -1e-3, math.inf, math.nan):
        with pytest.raises(ExperimentError, match=f"^{name}={wrong}: expected a number above 0$"):
            check_numbers({name: wrong})


def test_minibatches_divide_prompts():
    for right in ({"prompts": 6, "minibatches": 3}, {"prompts": 3}, {"minibatches": 3}):
        check_numbers(right)
    with pytest.raises(ExperimentError, match="minibatches=4 does not divide prompts=6"):
        check_numbers({"prompts": 6, "minibatches": 4})


def test_other_names_and_other_things_are_left_alone():
    check_numbers({"other": -3.0, "steps": "many", "lr": None, "prompts": False, "minibatches": (1,)})
