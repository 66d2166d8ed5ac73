"""Numbers of methods' options that make no sense are refused by name, from Python and on the command line; others are taken."""

import inspect
import math
import types
import typing

import pytest
import tiny
from method_checks import fixture

from sdjax.cli.options import OptionError, check_ranges, default_values, method_factory, method_names, options_class
from sdjax.collect.controls import controlled
from sdjax.errors import MethodError
from sdjax.kernels.distributions import normalise
from sdjax.methods.rethinking_opd import rethinking_opd
from sdjax.methods.sdpo import sdpo
from sdjax.ranges import Range, out_of_range

NEVER = (math.nan, math.inf, -math.inf)


def parts(hint):
    """The types that a type is made of; the ends are numbers with their range, and whatever else."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, tuple):
        return [end for part in typing.get_args(hint) for end in parts(part)]
    inner = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    return parts(inner) if typing.get_origin(inner) is tuple else [hint]


def numeric(method):
    """The ranges of a method's numeric options, by name: `None` for a number that has none."""
    hints, found = typing.get_type_hints(method_factory(method), include_extras=True), {}
    for name, hint in hints.items():
        numbers = [end for end in parts(hint) if typing.get_args(end)[:1] in ((int,), (float,)) or end in (int, float)]
        if name != "return" and numbers:
            found[name] = [
                next((r for r in getattr(n, "__metadata__", ()) if isinstance(r, Range)), None) for n in numbers
            ]
    return found


OPTIONS = [(method, name) for method in method_names() for name in numeric(method)]


def refused(method, name, value):
    """What is said of a value from Python and on the command line; nothing where it is taken."""
    factory, said = method_factory(method), []
    if not out_of_range(factory, {name: value}):
        check_ranges("method", factory, {name: value})
        return said
    for refuse in (lambda: factory(**{name: value}), lambda: check_ranges("method", factory, {name: value})):
        with pytest.raises((MethodError, OptionError)) as raised:
            refuse()
        said.append(str(raised.value))
    return said


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_every_number_has_a_range(method, name):
    """Nobody adds a number without saying which values make sense, and NaN and infinities never do."""
    ranges = numeric(method)[name]
    assert all(ranges)
    default = inspect.signature(method_factory(method)).parameters[name].default
    several = isinstance(default, tuple) or len(ranges) > 1
    for value in (*NEVER, -1, 0, 2):
        given = (value,) * len(ranges) if several else value
        said = refused(method, name, given)
        assert bool(said) is not all(known.holds(value) for known in ranges)
        if said:
            wanted = next(str(known) for known in ranges if not known.holds(value))
            typed = " ".join(map(str, given)) if several else value
            assert said == [
                f"{method}({name}={given!r}): {wanted}",
                f"--method.{name.replace('_', '-')} {typed}: {wanted}",
            ]


@pytest.mark.parametrize("method", method_names())
def test_defaults_are_taken(method):
    check_ranges("method", method_factory(method), default_values(options_class("Options", method_factory(method), {})))


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
    assert refused(*case)[1:] == ([said] if said else [])


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
