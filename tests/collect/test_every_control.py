"""Every control of every method: it changes what it says and only that, or it is refused when the method is wrapped."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import unoptimised

from sdjax.cli.options import method_factory, method_names
from sdjax.collect import controls
from sdjax.collect.annotators import Span
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.controls import ControlError
from sdjax.engine.tokens import Shapes, collate
from sdjax.engine.train import all_views
from sdjax.kernels.distributions import normalise
from sdjax.methods.antisd import antisd
from sdjax.methods.dasd import dasd
from sdjax.methods.dash import dash
from sdjax.methods.egrsd import egrsd
from sdjax.methods.iw_opd import iw_opd
from sdjax.methods.msd import msd
from sdjax.methods.op2sd import op2sd
from sdjax.methods.opd import opd
from sdjax.methods.opsa import opsa
from sdjax.methods.pw_opsd import pw_opsd
from sdjax.methods.rlcsd import rlcsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdpo import sdpo
from sdjax.methods.sort import sort
from sdjax.samplers.staleness import bounded, lagged
from sdjax.types import SHAPING, STUDENT, Verdict

SHAPES = Shapes(context=512, completion=8, rows=8, tokens_per_chunk=None)
EXAMPLES = tiny.TASK.train[:6:2]
METHODS = method_names()


def halves(environment, rollouts, key):
    """Spans for TRACE: the first half of every text."""
    return [[Span(0, len(r.text) // 2, "step")] for r in rollouts]


def to_the_end(texts, chunks):
    """Turns for TESSY: nobody hands over before the chunk's end."""
    return [(len(chunk), False) for chunk in chunks]


def told(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


SMALL = {"group_size": 4, "lesson": told, "warmup": 0, "annotate": halves, "delimiter": " ", "plans": "redacted"}
SMALL |= {"end": "", "tagger_rollouts": 2, "retries": 1, "verified": False}
OWN = {
    "atmanrl": {"steps": 2},
    "egrsd": {"warmup": 10},
    "mixsd": {"temperature": 1.0},
    "opsa": {"threshold": 1.0 / len(tiny.tokenizer())},
    "tessy": {"taggers": lambda environment: dict.fromkeys(("student", "teacher"), to_the_end)},
}


quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


@functools.cache
def made(name):
    """The method with a lesson, where it takes one, and small batches."""
    factory = method_factory(name)
    chosen = {**SMALL, **OWN.get(name, {})}
    return factory(**{k: v for k, v in chosen.items() if k in inspect.signature(factory).parameters})


def verdict(example, text):
    """One prompt is lost, the others by parity: there are successes, failures and prompts without a success."""
    lost = example.id == EXAMPLES[1].id and text != example.solution
    return Verdict(0.0 if lost else tiny.parity(example, text).reward, "try again")


def rows(method):
    environment = tiny.environment(method, verify=verdict, more=tiny.endless(3), shapes=SHAPES)
    return method.collect(environment, list(EXAMPLES), jax.random.key(3), method.memory)[0]


@functools.cache
def plain_rows(name):
    return rows(made(name))


def batch_of(method, rollouts):
    return jax.tree.map(jnp.asarray, collate(rollouts, all_views(method), tiny.tokenizer(), SHAPES))


def signals_of(objective, batch, seed=0):
    """What an objective's signals are of random distributions; the sampler's log-probabilities are not the student's."""
    size = (*batch.completion.shape, len(tiny.tokenizer()))
    keys = jax.random.split(jax.random.key(seed), len(objective.views))
    dists = {name: normalise(jax.random.normal(key, size)) for name, key in zip(objective.views, keys, strict=True)}
    return objective.signals(dists, batch.completion)


def terms_of(method, batch, step=0):
    """The trained terms of all objectives, by objective and name."""
    return {
        (place, name): term
        for place, objective in enumerate(method.objectives)
        for name, term in objective.terms(batch, signals_of(objective, batch), jnp.int32(step)).items()
        if not (isinstance(term.coef, int | float) and term.coef == 0)
    }


def population(term, batch):
    over = batch.mask & batch.valid[:, None]
    return np.asarray(over if term.over is None else over & (term.over if term.over.ndim == 2 else term.over[:, None]))


def per_token(term, batch):
    """Whether the weight differs between tokens of a row."""
    weight, over = np.asarray(term.weight), population(term, batch) if term.value.ndim == 2 else None
    if weight.ndim != 2 or over is None:
        return False
    weight = np.broadcast_to(weight, over.shape)
    return any(np.ptp(w[o]) > 0 for w, o in zip(weight, over, strict=True) if o.any())


def same(first, second):
    """Whether two terms say the same."""
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(parts(first), parts(second), strict=True))


def parts(term):
    return term.value, term.weight, True if term.over is None else term.over, term.coef, term.importance


def refused(change, method, option):
    """The control is refused, in one sentence that names the option."""
    with pytest.raises(ControlError, match=re.escape(option)) as error:
        change(method)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_what_views_are_told_is_declared():
    for name in METHODS:
        views = {**all_views(made(name)), **made(name).early}
        asked = lambda r: (None, question(r.example), r.contexts["student"])
        more = {v for r in plain_rows(name) for v, chat in r.contexts.items() if v in views and chat not in asked(r)}
        # A method may have nothing to tell in this batch, but tells nothing more in secret.
        assert more <= {v for v, view in views.items() if view.told}, name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("control", ["mismatched", "reference-only", "none"])
def test_context(name, control):
    method = made(name)
    views = {view for view, v in {**all_views(method), **method.early}.items() if v.told}
    change = lambda m: controls.with_teacher_context(m, control)
    if not views:
        return refused(change, method, f"control.context={control}")
    changed = change(method)
    assert changed.objectives == method.objectives
    moved, scored = set(), False
    for before, after in zip(plain_rows(name), rows(changed), strict=True):
        assert (after.tokens, after.logprobs, after.reward) == (before.tokens, before.logprobs, before.reward)
        assert (after.group, after.trained, after.source) == (before.group, before.trained, before.source)
        for view, chat in before.contexts.items():
            assert view in views or after.contexts[view] == chat
            moved |= {view} if after.contexts[view] != chat else set()
            assert chat is not None or after.contexts[view] is None
        scored |= any(not np.array_equal(value, after.extras[name]) for name, value in before.extras.items())
    # What an objective reads is read in another context; what was scored in `collect` has other numbers.
    assert moved == (views if method.early.keys().isdisjoint(views) or "teacher" in views else set())
    assert scored == (bool(method.early) or name == "vpd")  # VPD scores what its E-step reads once more


@pytest.mark.parametrize("name", METHODS)
def test_weights(name):
    method, batch = made(name), batch_of(made(name), plain_rows(name))
    before = terms_of(method, batch)
    weighted = {place for place, term in before.items() if per_token(term, batch)}
    declared = [(place, credit) for place, o in enumerate(method.objectives) for credit in o.credit]
    single = {(place, credit) for place, credit in declared if isinstance(credit, str)}
    paired = {(place, part) for place, credit in declared if not isinstance(credit, str) for part in credit}
    assert weighted == single | paired
    shuffle, rescale = (lambda m, c=c: controls.with_token_weights(m, c) for c in ("shuffled", "mean-one"))
    if not weighted:
        refused(shuffle, method, "control.weights=shuffled")
    else:
        after = terms_of(shuffle(method), batch)
        assert {place for place in before if not same(before[place], after[place])} == weighted
        for place in weighted:
            over = population(before[place], batch)
            assert same(before[place]._replace(weight=0.0), after[place]._replace(weight=0.0))
            for old, new, kept in zip(before[place].weight, after[place].weight, over, strict=True):
                np.testing.assert_array_equal(np.sort(old[kept]), np.sort(new[kept]))
        assert any(not same(term, terms_of(shuffle(method), batch, 1)[place]) for place, term in after.items())
    if not single:
        return refused(rescale, method, "control.weights=mean-one")
    after = terms_of(rescale(method), batch)
    for place in before:
        if place in single:
            assert after[place].weight[population(after[place], batch)].mean() == pytest.approx(1.0, rel=1e-5)
        assert same(before[place]._replace(weight=0.0), after[place]._replace(weight=0.0))
        assert place in single or same(before[place], after[place])
    return None


@pytest.mark.parametrize("name", METHODS)
def test_length_penalty(name):
    method, batch = made(name), batch_of(made(name), plain_rows(name))
    change = lambda m: controls.with_length_penalty(m, 30.0)
    if not any(o.rewarded for o in method.objectives):
        shaped = batch.replace(extras={**batch.extras, SHAPING: jnp.arange(len(batch.reward), dtype=jnp.float32)})
        before, after = terms_of(method, batch), terms_of(method, shaped)
        assert all(same(before[place], after[place]) for place in before)
        return refused(change, method, "control.length-penalty=30")
    found = rows(change(method))
    for before, after in zip(plain_rows(name), found, strict=True):
        assert (after.tokens, after.reward, after.contexts) == (before.tokens, before.reward, before.contexts)
        if after.source == STUDENT:
            assert after.returns == pytest.approx(before.returns - 0.3 * len(before.tokens))
        for extra, value in before.extras.items():
            assert extra in ("advantage", SHAPING) or np.array_equal(value, after.extras[extra])
    before, after = terms_of(method, batch), terms_of(method, batch_of(method, found))
    assert any(not same(before[place], after[place]) for place in before)
    return None


def test_pairs_are_shuffled_together():
    """A credit with a sign keeps it: where a token is raised, it is not lowered."""
    for name in ("antisd", "dasd"):
        method, batch = made(name), batch_of(made(name), plain_rows(name))
        found = terms_of(controls.with_token_weights(method, "shuffled"), batch)
        raised, lowered = (np.asarray(found[0, part].weight) for part in ("raised", "lowered"))
        assert (raised * lowered == 0.0).all() and raised.any() and lowered.any()
        plain = terms_of(method, batch)
        net = lambda terms: np.asarray(terms[0, "raised"].weight - terms[0, "lowered"].weight)
        over = np.asarray(batch.mask & batch.valid[:, None])
        for row, kept in enumerate(over):
            np.testing.assert_array_equal(np.sort(net(plain)[row][kept]), np.sort(net(found)[row][kept]))


def test_options_that_switch_the_credit_off_switch_its_controls_off():
    for method in (
        antisd(coef=0.0),
        dasd(beta=0.0),
        dash(horizon=0.0),
        egrsd(strength=0.0, ratio_eps=0.0),
        iw_opd(gamma=0.0),
        msd(weighted=False),
        opsa(penalty=0.0),
        pw_opsd(lowest=1.0),
        rlcsd(coef=0.0),
        rlrt(mix=0.0),
    ):
        refused(lambda m: controls.with_token_weights(m, "shuffled"), method, "control.weights=shuffled")
    for still in (egrsd(strength=0.0), egrsd(ratio_eps=0.0)):
        assert controls.with_token_weights(still, "shuffled") != still
    refused(lambda m: controls.with_teacher_context(m, "none"), opd(), "control.context=none")
    refused(
        lambda m: controls.with_teacher_context(m, "mismatched"), op2sd(context="none"), "control.context=mismatched"
    )
    refused(lambda m: controls.with_length_penalty(m, 1.0), sdpo(), "control.length-penalty=1")
    assert controls.with_length_penalty(sdpo(rl_weight=0.5), 1.0) != sdpo(rl_weight=0.5)


def test_diagnostics_need_both_views():
    for method in (antisd(), made("grpo")):
        refused(lambda m: controls.controlled(m, diagnose=True), method, "control.diagnose")
    assert controls.controlled(sdpo(), diagnose=True) != sdpo()


def test_importance_weights_are_not_shuffled_as_credit():
    """In either order of the two wrappers."""
    method = bounded(made("rlrt"), 5, cap=2.0)
    batch = batch_of(made("rlrt"), plain_rows("rlrt"))
    extras = {"staleness": jnp.zeros(len(batch.reward)), "staleness_dropped": jnp.zeros(len(batch.reward))}
    batch = batch.replace(extras={**batch.extras, **extras})
    orders = (
        controls.with_token_weights(method, "shuffled"),
        bounded(controls.with_token_weights(made("rlrt"), "shuffled"), 5, cap=2.0),
    )
    plain = terms_of(method, batch)[0, "pg"]
    assert np.ptp(np.asarray(plain.importance)) > 0.1
    for order in orders:
        np.testing.assert_array_equal(terms_of(order, batch)[0, "pg"].importance, plain.importance)
        assert not np.array_equal(terms_of(order, batch)[0, "pg"].weight, plain.weight)


def test_a_control_survives_a_batch_without_a_lesson():
    """SORT tells a plan only where every attempt fails."""
    method = controls.with_teacher_context(sort(group_size=2), "mismatched")
    solved = tiny.environment(method, verify=lambda *_: Verdict(1.0), shapes=SHAPES)
    found, _ = method.collect(solved, list(EXAMPLES), jax.random.key(0), method.memory)
    assert len(found) == 6 and all("plan" not in r.contexts for r in found)


def test_ages_of_rollouts_survive_scoring():
    """What RLCSD and MiniLLM score in `collect` does not replace what a sampler noted."""
    for name in ("rlcsd", "minillm"):
        method = bounded(lagged(made(name), 1), 0)
        environment = tiny.environment(method, verify=verdict, shapes=SHAPES)
        noted = jax.tree.map(lambda x: x, method.memory)
        found, memory = method.collect(environment, list(EXAMPLES), jax.random.key(3), noted)
        assert found and all(r.extras["staleness"] == 0 for r in found)
        assert not method.collect(environment, list(EXAMPLES), jax.random.key(4), memory)[0]
