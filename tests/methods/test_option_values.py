"""Values of methods' options that make no sense are refused by name, before anything is loaded; all others are taken."""

import inspect
import math
import typing

import pytest
import tiny
from method_checks import fixture

from sdjax.cli.options import OptionError, default_values, method_factory, method_names, options_class
from sdjax.cli.ranges import RANGES, check_options, range_of
from sdjax.collect.controls import controlled
from sdjax.kernels.distributions import normalise
from sdjax.methods.rethinking_opd import rethinking_opd
from sdjax.methods.sdpo import sdpo

ODD = (-1, 0, math.nan, math.inf, -math.inf)


def numeric(method):
    """The numeric options of a method, by name: how many numbers each has (1, or the size of its tuple)."""
    found = {}
    factory = method_factory(method)
    for name, hint in typing.get_type_hints(factory).items():
        some = [h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is tuple]
        parts = typing.get_args(some[0]) if some else (hint, *typing.get_args(hint))
        if name in inspect.signature(factory).parameters and any(p in (int, float) for p in parts):
            found[name] = len([p for p in parts if p is not Ellipsis]) if some else 1
    return found


OPTIONS = [(method, name) for method in method_names() for name in numeric(method)]


def refused(method, name, value):
    """The sentence with which a value is refused; empty where it is taken."""
    size = numeric(method)[name]
    default = inspect.signature(method_factory(method)).parameters[name].default
    value = (value,) * size if isinstance(default, tuple) or size > 1 else value
    try:
        check_options(method, {name: value})
    except OptionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_every_number_has_a_range(method, name):
    """Nobody adds a number without saying which values make sense, and NaN and infinities never do."""
    assert range_of(method, name) is not None
    for value in (math.nan, math.inf, -math.inf):
        said = refused(method, name, value)
        assert said.startswith(f"--method.{name.replace('_', '-')} ") and ": expected " in said
    known = range_of(method, name)
    for value in ODD[:2]:
        assert bool(refused(method, name, value)) is not known.holds(value)


@pytest.mark.parametrize("method", method_names())
def test_defaults_are_taken(method):
    check_options(method, default_values(options_class("Options", method_factory(method), {})))


def test_no_range_is_left_over():
    """Every range belongs to an option that there is."""
    known = {name for _, name in OPTIONS} | {f"{method}.{name}" for method, name in OPTIONS}
    assert not RANGES.keys() - known


TABLE = {
    ("rethinking_opd", "depths", (64, -1)): "--method.depths 64 -1: expected at least 0",
    ("grpo", "group_size", 0): "--method.group-size 0: expected at least 1",
    ("grpo", "clip", (0.2, -0.1)): "--method.clip 0.2 -0.1: expected at least 0",
    ("grpo", "dual_clip", 1.0): "--method.dual-clip 1.0: expected above 1",
    ("grpo", "tis_bounds", (2.0, 0.5)): "--method.tis-bounds 2.0 0.5: expected the first at most the second",
    ("cipo", "share", (0.9, 0.2, 0.8)): "--method.share 0.9 0.2 0.8: expected the first between the other two",
    ("minillm", "mix", 1.0): "--method.mix 1.0: expected at least 0 and below 1",
    ("rlrt", "mix", 1.0): "",
    ("opsd", "temperature", 0.0): "--method.temperature 0.0: expected above 0",
    ("grpo", "temperature", 0.0): "",
    ("gkd", "beta", 1.5): "--method.beta 1.5: expected at least 0 and at most 1",
    ("msd", "top_k", 1): "--method.top-k 1: expected at least 2",
    ("sdpo", "top_k", 0): "--method.top-k 0: expected at least 1",
    ("sdpo", "top_k", None): "",
    ("opsd", "top_k", 0): "",
    ("sdpo", "rest", False): "",
    ("sdpo", "success", 0.0): "--method.success 0.0: expected above 0 and at most 1",
    ("pw_opsd", "width", 0.0): "--method.width 0.0: expected other than 0",
    ("pw_opsd", "width", -0.1): "",
    ("antisd", "coef", -1.0): "",
    ("rlcsd", "coef", -1.0): "--method.coef -1.0: expected at least 0",
    ("resd", "high", 0.5): "--method.high 0.5: expected at least 1",
    ("iw_opd", "gamma", math.nan): "--method.gamma nan: expected at least 0",
    ("sdft", "skip", 10**12): "",
}


@pytest.mark.parametrize(("case", "said"), TABLE.items(), ids=str)
def test_sentences(case, said):
    method, name, value = case
    found = ""
    try:
        check_options(method, {name: value})
    except OptionError as error:
        found = str(error)
    assert found == said


@pytest.mark.parametrize("instrumented", [True, False])
def test_diagnostics_take_the_threshold_of_success(instrumented):
    """A quarter of the rewards and of the threshold tell the same rows apart; the default threshold then finds no success."""
    batch, logits, teacher = fixture()
    dists = {"student": normalise(logits), "teacher": teacher}
    if instrumented:
        make, name = lambda success: controlled(sdpo(), diagnose=True, success=success), "diagnostic/log_ratio_correct"
    else:
        make, name = lambda success: rethinking_opd(success=success), "auroc"
    quarter = batch.replace(reward=batch.reward / 4.0)
    read = lambda batch, success: float(tiny.loss(make(success).objectives[0], batch, **dists)[1][name])
    assert read(quarter, 0.2) == read(batch, 0.5) != read(quarter, 0.5)
