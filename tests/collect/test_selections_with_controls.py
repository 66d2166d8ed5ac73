"""Every selection beside every control: both do what each does alone, or the pair is refused when the method is built."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import unoptimised

from sdjax.collect import selections
from sdjax.collect.contexts import question
from sdjax.collect.selections import MASK, RIGHT, WEIGHT, SelectionError, changed, narrowed, part, times_rows
from sdjax.kernels.distributions import normalise
from sdjax.methods.egrsd import egrsd
from sdjax.types import SHAPING, Verdict

EXAMPLES = tuple(tiny.TASK.train[:6:2])
METHOD = egrsd(group_size=3, ema_rate=0.1)
"""Its teacher is told the solution and is a snapshot, it weighs tokens, and its advantage is made of rewards."""

SELECTIONS = {
    "rows": {"rows": "failures"},
    "pass rate": {"pass_rate": (1.0, 1.0)},
    "route": {"route": True},
    "beginning": {"share": 0.5},
    "masked": {"share": 0.5, "shown": "masked"},
    "clock": {"refresh_every": 2},
    "gate": {"refresh_gain": -9.0, "refresh_window": 1},
}
CONTROLS = {
    "mismatched": {"context": "mismatched"},
    "reference only": {"context": "reference-only"},
    "none": {"context": "none"},
    "shuffled": {"weights": "shuffled"},
    "mean one": {"weights": "mean-one"},
    "length": {"length_penalty": 30.0},
    "diagnose": {"diagnose": True},
}
PAIRS = [(s, c) for s in SELECTIONS for c in CONTROLS]
CONTEXTS = ("mismatched", "reference only", "none")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def verdict(example, text):
    """One prompt is solved always, the others by parity."""
    return Verdict(1.0) if example.id == EXAMPLES[1].id else tiny.parity(example, text)


def made(selection, control):
    return changed(METHOD, SELECTIONS.get(selection, {}), CONTROLS.get(control, {}))


@functools.cache
def both(selection, control):
    """Rollouts and terms of the method with a selection and a control; `None` is none."""
    method = made(selection, control)
    environment = tiny.environment(method, verify=verdict)
    rows, memory = method.collect(environment, list(EXAMPLES), jax.random.key(3), method.memory)
    batch = tiny.collected(method, rows)
    (objective,) = method.objectives
    size = (*batch.completion.shape, len(tiny.tokenizer()))
    dists = {v: normalise(jax.random.normal(jax.random.key(i), size)) for i, v in enumerate(objective.views)}
    terms = objective.terms(batch, objective.signals(dists, batch.completion), jnp.int32(0))
    return method, rows, batch, terms, memory


def whole(x, like):
    """A term's part in its value's shape."""
    x = jnp.asarray(x)
    return np.asarray(jnp.broadcast_to(x[:, None] if x.ndim == 1 < like.ndim else x, like.shape))


def same(first, second, **near):
    """Two terms are the same where they count."""
    over = [whole(True if t.over is None else t.over, t.value) for t in (first, second)]
    np.testing.assert_array_equal(*over)
    for name in ("value", "weight", "importance"):
        sides = [np.where(over[0], whole(getattr(t, name), t.value), 0.0) for t in (first, second)]
        np.testing.assert_allclose(*sides, **{"rtol": 1e-6, "atol": 1e-7, **near})
    assert np.all(first.coef == second.coef)


@pytest.mark.parametrize("selection, control", PAIRS)
@pytest.mark.slow
def test_the_pair_keeps_what_each_says(selection, control):
    """Texts, outcomes and what is noted of them; what teachers read; when a teacher is renewed."""
    if control == "none" and selection in ("beginning", "masked"):
        with pytest.raises(SelectionError, match=re.escape("select.share=0.5: with control.context=none")) as error:
            made(selection, control)
        assert "\n" not in str(error.value)
        return
    method, rows, *_ = both(selection, control)
    plain, selected, controlled = (both(*names)[1] for names in ((None, None), (selection, None), (None, control)))
    following = dict(zip((e.id for e in EXAMPLES), (*EXAMPLES[1:], EXAMPLES[0]), strict=True))
    for row, bare, one, other in zip(rows, plain, selected, controlled, strict=True):
        assert (row.tokens, row.reward, row.group) == (bare.tokens, bare.reward, bare.group)
        assert row.contexts["student"] == question(row.example)
        told, alone = row.contexts["teacher"][-1], bare.contexts["teacher"][-1]
        if selection in ("beginning", "masked"):
            source = following[row.example.id] if control == "mismatched" else row.example
            left = part(source.solution, 0.5, selection if selection == "beginning" else "masked", source.id)
            assert left in told["content"] and source.solution not in told["content"] and told["privileged"] == left
            assert (MASK in left) == (selection == "masked")
            assert (question(source)[-1]["content"] in told["content"]) == (control != "reference only")
        else:
            assert row.contexts["teacher"] == other.contexts["teacher"]
        assert (told["content"] != alone["content"]) == (control in CONTEXTS or selection in ("beginning", "masked"))
        # What a selection notes is what it notes alone; what a control notes as well.
        notes = {**one.extras, **{n: x for n, x in other.extras.items() if n not in bare.extras}}
        assert row.extras.keys() == notes.keys()
        for name, value in notes.items():
            expected = other.extras[name] if name == "advantage" else value
            np.testing.assert_array_equal(row.extras[name], expected)
        assert (SHAPING in row.extras) == (control == "length")
    due = lambda names: both(*names)[4]["refresh"]["due"] if selection == "gate" else None
    assert due((selection, control)) == due((selection, None))
    live, old = {"x": jnp.ones(1)}, {"x": jnp.zeros(1)}
    rules = [m.snapshots["teacher"] for m in (method, both(selection, None)[0])]
    if selection != "gate":
        assert [[float(r(live, old, jnp.int32(s))["x"][0]) for s in (1, 2, 3)] for r in rules][::-1] == [
            [float(r(live, old, jnp.int32(s))["x"][0]) for s in (1, 2, 3)] for r in rules
        ]


@pytest.mark.parametrize("selection, control", [p for p in PAIRS if p[0] not in ("route", "beginning", "masked")])
def test_the_selection_acts_on_what_the_control_makes_of_a_term(selection, control):
    _, _, batch, terms, _ = both(selection, control)
    base = both(None, control)[3]
    assert terms.keys() == base.keys()
    for name, term in base.items():
        if not selections.measured(term):
            if selection == "rows":
                term = narrowed(term, ~batch.extras[RIGHT])
            if selection == "pass rate":
                term = times_rows(term, batch.extras[WEIGHT])
        if control == "mean one" and name == "pg":
            over = np.asarray(batch.mask) & whole(True if term.over is None else term.over, term.value)
            weight = whole(term.weight, term.value)
            term = term._replace(weight=np.where(over, weight / weight[over].mean(), 0.0))
            assert np.ptp(weight[over]) > 0.05
        same(terms[name], term, rtol=1e-5)
    right = np.asarray(batch.extras.get(RIGHT, np.zeros(len(batch.reward), bool)))
    assert selection not in ("rows", "pass rate") or 0 < right.sum() < len(batch.reward)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_routed_method_is_controlled(control):
    """Distilled rows keep the control's weights, and their mean is one; the others learn from shaped rewards."""
    batch, terms, bare = *both("route", control)[2:4], both(None, control)[3]
    routed = both("route", None)[3]
    kept = np.asarray(batch.mask) & ~np.asarray(batch.extras[RIGHT])[:, None]
    assert 0 < kept.any(-1).sum() < len(batch.reward) and terms.keys() == routed.keys() | bare.keys()
    pg, alone = terms["pg"], bare["pg"]
    assert whole(pg.over, pg.value)[np.asarray(batch.mask)].all()
    np.testing.assert_array_equal(np.asarray(pg.value)[~kept & np.asarray(batch.mask)], 0.0)
    np.testing.assert_allclose(np.asarray(pg.value)[kept], np.asarray(alone.value)[kept], rtol=1e-6)
    weight, own = whole(pg.weight, pg.value)[kept], whole(alone.weight, pg.value)[kept]
    if control == "mean one":
        own = whole(routed["pg"].weight, pg.value)[kept]
        own = own / own.mean()
        assert weight.mean() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(weight, own, rtol=1e-5)
    assert np.ptp(weight) > 0.05
    before, after = (np.asarray(t["rewards"].value) for t in (routed, terms))
    assert np.array_equal(before, after) == (control != "length")
    same(terms["distilled"], routed["distilled"])
    np.testing.assert_array_equal(terms["rewards"].weight, routed["rewards"].weight)
