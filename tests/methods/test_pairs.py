"""PBSD and StableOPD: the papers' numbers; the host halves, memories and updates of all weighted methods on a tiny model."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from method_checks import assert_same, close, expected_gradient, fixture, loss_and_gradient
from networks import unoptimised
from quick import slow_but

from sdjax.collect.annotators import Span
from sdjax.collect.contexts import question
from sdjax.engine.score import token_signals
from sdjax.engine.snapshots import refresh_snapshots
from sdjax.engine.train import make_update
from sdjax.kernels.distributions import normalise
from sdjax.kernels.divergences import reverse_kl
from sdjax.kernels.estimators import sampled_kl
from sdjax.kernels.reductions import sequence_mean, token_mean
from sdjax.methods import egrsd as egrsd_module
from sdjax.methods.antisd import antisd
from sdjax.methods.dasd import dasd
from sdjax.methods.dash import dash
from sdjax.methods.egrsd import egrsd
from sdjax.methods.iw_opd import iw_opd
from sdjax.methods.msd import msd
from sdjax.methods.opd import opd
from sdjax.methods.pbsd import pbsd
from sdjax.methods.power_opd import power_opd
from sdjax.methods.pw_opsd import pw_opsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.stable_opd import stable_opd
from sdjax.methods.topd import topd
from sdjax.methods.trace import trace
from sdjax.methods.vopd import vopd
from sdjax.types import REFERENCE, STUDENT, TEACHER


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


# ---- PBSD: its note, section 6 --------------------------------------------------------------------------------------


def pairs(tokens, **rest):
    """One pair per two rows of tokens: the teacher's, then the student's."""
    rows = len(tokens)
    extras = {"pair": jnp.arange(rows) // 2}
    batch = tiny.batch(tokens, group=jnp.arange(rows) // 2, **extras, **rest)
    return batch.replace(source=jnp.asarray([TEACHER, STUDENT] * (rows // 2)))


def pair_loss(method, preferred, other, student, teacher):
    """The loss of one pair of one-token texts."""
    batch = pairs(jnp.stack([preferred, other])[:, None])
    both = lambda dist: jnp.broadcast_to(dist, (2, 1, dist.size))
    return tiny.loss(method.objectives[0], batch, student=both(student), teacher=both(teacher))[0]


def pair_gradient(method, preferred, other, student, teacher):
    found = lambda dist: pair_loss(method, jnp.asarray(preferred), jnp.asarray(other), dist, teacher)
    return tiny.logit_gradient(found, student)


def population_gradient(method, student, teacher, sampler):
    """Expected over both texts: the preferred one from the teacher, the other from `sampler`."""
    of_pair = lambda z, a, b: pair_loss(method, a, b, normalise(z), teacher)
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij"))
    found = jax.vmap(jax.grad(of_pair), (None, 0, 0))(student, first, second)
    chances = np.exp(np.asarray(teacher, np.float64))[first] * np.exp(np.asarray(sampler, np.float64))[second]
    return chances @ np.asarray(found, np.float64)


def test_pbsd_hand_gradient():
    student, teacher = tiny.log(0.2, 0.3, 0.5), tiny.log(0.5, 0.3, 0.2)
    method = pbsd(beta=0.5)
    close(pair_loss(method, jnp.asarray(0), jnp.asarray(2), student, teacher), 1.252763)
    close(pair_gradient(method, 0, 2, student, teacher), (-0.357143, 0.0, 0.357143))
    margin = tiny.loss(
        method.objectives[0],
        pairs([[0], [2]]),
        student=jnp.broadcast_to(student, (2, 1, 3)),
        teacher=jnp.broadcast_to(teacher, (2, 1, 3)),
    )[1]["margin"]
    close(margin, -0.916291)
    close(pair_loss(method, jnp.asarray(0), jnp.asarray(2), student, student), np.log(2))
    close(pair_loss(method, jnp.asarray(1), jnp.asarray(1), student, teacher), np.log(2))
    np.testing.assert_allclose(pair_gradient(method, 1, 1, student, teacher), 0.0, atol=1e-9)


def test_pbsd_is_bounded():
    for gap in (-1e4, 1e4):
        sig = {"logprobs": -jnp.ones((2, 1)), "teacher_logprobs": jnp.asarray([[gap], [-1.0]])}
        loss = lambda x: tiny.reduced(
            pbsd(beta=0.5).objectives[0],
            pairs([[0], [1]]),
            {**sig, "logprobs": x, "entropy": x},  # noqa: B023
        )[0]
        value, found = jax.value_and_grad(loss)(sig["logprobs"])
        assert np.isfinite(value) and (np.abs(found) <= 0.5).all()


def test_pbsd_regularised_optimum():
    teacher, reward = tiny.log(0.5, 0.3, 0.2), jnp.asarray([0.0, 1.0, 0.0])
    objective = lambda dist, beta: float(jnp.exp(dist) @ reward - beta * reverse_kl(dist, teacher))
    best = lambda beta, reward=reward: normalise(teacher + reward / beta)
    close(jnp.exp(best(1.0)), (0.329927, 0.538102, 0.131971))
    close(jnp.exp(best(0.5)), (0.171426, 0.760004, 0.068570))
    close(jnp.exp(teacher + reward).sum(), 1.515485)
    close([objective(best(b), b) for b in (1.0, 0.5, 2.0)], (0.415735, 0.535229, 0.355650))
    close(objective(teacher, 1.0), 0.3)
    other = tiny.log(0.2, 0.3, 0.5)
    close(objective(other, 1.0), 0.025113)
    close(objective(best(1.0), 1.0) - float(reverse_kl(other, best(1.0))), 0.025113)
    close(best(1.0, jnp.full(3, 7.0)), teacher)


T, FIXED = tiny.log(0.2, 0.3, 0.5), tiny.log(0.6, 0.3, 0.1)


@pytest.mark.parametrize(
    ("beta", "minimiser"),
    [
        (0.5, (0.001733, 0.023397, 0.974870)),
        (1.0, (0.023256, 0.104651, 0.872093)),
        (2.0, (0.075298, 0.195630, 0.729071)),
    ],
)
def test_pbsd_overshoots_the_teacher(beta, minimiser):
    found = normalise(T + (T - FIXED) / beta)
    close(jnp.exp(found), minimiser, atol=2e-6)
    close(population_gradient(pbsd(beta=beta), found, T, FIXED), 0.0, atol=1e-6)
    assert np.abs(population_gradient(pbsd(beta=beta), T, T, FIXED)).max() > 0.01
    # A student equal to the teacher stays: the self-consistent fixed point.
    close(population_gradient(pbsd(beta=beta), T, T, T), 0.0, atol=1e-7)


def test_pbsd_small_beta_is_forward_kl():
    close(population_gradient(pbsd(beta=0.01), FIXED, T, FIXED) / 0.01, (0.202825, 0.000065, -0.202891), atol=1e-5)
    close((np.exp(FIXED) - np.exp(T)) / 2, (0.2, 0.0, -0.2))
    # Stale texts of the student are no control variate: what they add does not vanish.
    stale = population_gradient(pbsd(beta=0.01), FIXED, T, tiny.log(0.2, 0.6, 0.2)) / 0.01
    assert np.abs(stale - np.asarray([0.2, 0.0, -0.2])).max() > 0.05


def test_pbsd_pairs_by_index_and_sums_tokens():
    keys = jax.random.split(jax.random.key(0), 3)
    logits, teacher = (jax.random.normal(k, (6, 3, 4)) for k in keys[:2])
    tokens = jax.random.randint(keys[2], (6, 3), 0, 4)
    mask = jnp.arange(3) < jnp.asarray([3, 2, 1, 3, 2, 2])[:, None]
    batch, method = pairs(tokens, mask=mask), pbsd(beta=0.3)
    value, found = loss_and_gradient(method, batch, logits, normalise(teacher))
    ratios = np.where(
        mask, np.take_along_axis(normalise(logits) - normalise(teacher), tokens[..., None], -1)[..., 0], 0
    )
    margins = 0.3 * (ratios.sum(-1)[::2] - ratios.sum(-1)[1::2])
    close(value, np.log1p(np.exp(-margins)).mean(), rtol=1e-5)
    lengths = np.asarray(mask).sum(-1)
    means = 0.3 * ((ratios.sum(-1) / lengths)[::2] - (ratios.sum(-1) / lengths)[1::2])
    close(
        loss_and_gradient(pbsd(beta=0.3, per_token=True), batch, logits, normalise(teacher))[0],
        np.log1p(np.exp(-means)).mean(),
        rtol=1e-5,
    )
    # Rows in another order, a row of padding among them: the same pairs.
    order = jnp.asarray([4, 1, 0, 5, 3, 2, 2])
    shuffled = jax.tree.map(lambda x: x[order], batch).replace(valid=jnp.arange(7) < 6)
    again, moved = loss_and_gradient(method, shuffled, logits[order], normalise(teacher)[order])
    close(again, value)
    close(moved[:6], found[order[:6]])


def test_pbsd_teacher_only_scales():
    student, teacher = tiny.log(0.2, 0.3, 0.5), tiny.log(0.5, 0.3, 0.2)
    wanted = lambda t: tiny.logit_gradient(lambda d: pair_loss(pbsd(), jnp.asarray(0), jnp.asarray(2), d, t), student)
    one, other = wanted(teacher), wanted(tiny.log(0.1, 0.1, 0.8))
    close(one / one[2], other / other[2])
    found = jax.grad(lambda t: pair_loss(pbsd(), jnp.asarray(0), jnp.asarray(2), student, t))(teacher)
    np.testing.assert_array_equal(found, 0.0)


# ---- StableOPD: its note, section 6 ---------------------------------------------------------------------------------

STUDENT_DIST, TEACHER_DIST, INITIAL = tiny.log(0.6, 0.3, 0.1), tiny.log(0.2, 0.5, 0.3), tiny.log(0.5, 0.3, 0.2)


def golden(batch, rows):
    """The batch with these rows golden solutions, about which the teacher says nothing."""
    rows = jnp.asarray(rows, bool)
    teacher = batch.contexts["teacher"].replace(valid=batch.contexts["teacher"].valid & ~rows)
    contexts = {**batch.contexts, "teacher": teacher}
    return batch.replace(source=jnp.where(rows, REFERENCE, STUDENT), contexts=contexts)


def test_stable_opd_without_additions_is_opd():
    plain, none = opd(reduce=sequence_mean), {"gold_coef": 0.0, "kl_coef": 0.0}
    assert_same(stable_opd(**none), plain, *fixture())
    close(
        loss_and_gradient(stable_opd(gold_coef=0.1, kl_coef=0.0), *fixture())[1],
        loss_and_gradient(plain, *fixture())[1],
    )
    batch, logits, teacher = fixture()
    equal = batch.replace(mask=jnp.ones((4, 5), bool))
    assert_same(stable_opd(**none), opd(), equal, logits, teacher)  # one length: both means are the same
    # Clipping acts off-policy only.
    off = fixture(on_policy=False)
    difference = loss_and_gradient(stable_opd(**none), *off)[1] - loss_and_gradient(plain, *off)[1]
    assert np.abs(difference).max() > 1e-4


def test_stable_opd_policy_gradient():
    method = stable_opd(kl_coef=0.0)
    read = lambda token: method.objectives[0].signals({"student": STUDENT_DIST, "teacher": TEACHER_DIST}, token)
    sig = jax.vmap(read)(jnp.arange(3))
    gap = np.asarray(sig["teacher_logprobs"] - sig["logprobs"])
    close(gap, (-1.098612, 0.510826, 1.098612))
    close(np.exp(STUDENT_DIST) @ gap, -0.396058)
    close(expected_gradient(method, STUDENT_DIST, TEACHER_DIST), (0.421532, -0.272065, -0.149467))
    close(expected_gradient(method, STUDENT_DIST, STUDENT_DIST), 0.0, atol=1e-7)


def test_stable_opd_anchor_and_gold():
    batch = golden(tiny.batch([[1]], views=("student", "teacher", "reference")), [True])
    own = golden(batch, [False])
    of = lambda method, batch, name, dist=STUDENT_DIST: tiny.loss(
        method.objectives[0],
        batch,
        student=dist[None, None],
        teacher=TEACHER_DIST[None, None],
        reference=INITIAL[None, None],
    )[1][name]
    slope = lambda *a: tiny.logit_gradient(
        lambda d: a[0].objectives[0].terms(a[1], signals(a[0], a[1], d), 0)[a[2]].value.sum(), STUDENT_DIST
    )

    def signals(method, batch, dist):
        views = {"student": dist[None, None], "teacher": TEACHER_DIST[None, None], "reference": INITIAL[None, None]}
        return method.objectives[0].signals(views, batch.completion)

    method = stable_opd()
    close(of(method, own, "drift"), 0.040078)
    close(slope(method, own, "drift"), (0.085346, -0.012023, -0.073323))
    close(of(method, own, "drift", INITIAL), 0.0, atol=1e-8)
    close(sampled_kl(STUDENT_DIST, INITIAL, "k1"), (0.182322, 0.0, -0.693147))
    close(sampled_kl(STUDENT_DIST, INITIAL, "k3"), (0.015655, 0.0, 0.306853))
    close(np.exp(STUDENT_DIST) @ sampled_kl(STUDENT_DIST, INITIAL, "k1"), 0.040078)
    sampled = stable_opd(anchor="sampled")
    tokens = [own.replace(completion=jnp.full((1, 1), v)) for v in range(3)]
    close(np.exp(STUDENT_DIST) @ np.asarray([of(sampled, b, "drift") for b in tokens]), 0.040078)
    close(
        np.exp(STUDENT_DIST) @ np.stack([slope(sampled, b, "drift") for b in tokens]), (0.085346, -0.012023, -0.073323)
    )
    close(of(method, batch, "gold"), 1.203973)
    close(slope(method, batch, "gold"), (0.6, -0.7, 0.1))
    # Golden rows are no rollouts, rollouts no golden rows.
    assert of(method, batch, "pg") == of(method, batch, "drift") == of(method, own, "gold") == 0.0
    # All three together, the rollout's token in expectation.
    total = expected_gradient(stable_opd(kl_coef=0.0), STUDENT_DIST, TEACHER_DIST)
    total = total + 0.1 * slope(method, batch, "gold") + 0.01 * slope(method, own, "drift")
    close(total, (0.482386, -0.342185, -0.140200))
    close(
        tiny.reduced(method.objectives[0], own, signals(method, own, STUDENT_DIST))[0],
        of(method, own, "pg") + 0.01 * 0.040078,
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"), [(1.3, 0.5, 0.6, 0), (0.7, -0.5, -0.4, 0), (1.0, 0.5, 0.5, 0.5)]
)
def test_stable_opd_clips(ratio, advantage, value, slope):
    batch = tiny.batch([[0]], behavior=[[-1.0]])
    sig = {"teacher_logprobs": jnp.full((1, 1), -1.0 + advantage), "entropy": jnp.zeros((1, 1))}
    loss = lambda x: tiny.reduced(stable_opd(kl_coef=0.0).objectives[0], batch, {**sig, "logprobs": x})[0]
    found, moved = jax.value_and_grad(loss)(jnp.full((1, 1), -1.0 + np.log(ratio)))
    close([-found, -moved[0, 0]], [value, slope], rtol=1e-5)


def test_stable_opd_masks_and_stops():
    batch, logits, teacher = fixture()
    batch = golden(batch, [False, True, False, True])
    _, found = loss_and_gradient(stable_opd(), batch, logits, teacher, reference=normalise(jnp.sin(logits)))
    assert not found[~np.asarray(batch.mask)].any() and found[np.asarray(batch.mask)].any(-1).all()
    moved = teacher.at[jnp.asarray([1, 3])].set(normalise(jnp.arange(7.0)))
    again = loss_and_gradient(stable_opd(), batch, logits, moved, reference=normalise(jnp.sin(logits)))[1]
    np.testing.assert_array_equal(found, again)
    loss = lambda t: tiny.loss(
        stable_opd(kl_coef=0.0).objectives[0], batch, student=normalise(logits), teacher=t, reference=t
    )[0]
    np.testing.assert_array_equal(jax.grad(loss)(teacher), 0.0)


# ---- host halves on a tiny model ------------------------------------------------------------------------------------


def every_second(environment, rollouts, key):
    """An annotator for tests: the whole text of every second rollout."""
    return [[Span(0, len(r.text), "sign")] if i % 2 else [] for i, r in enumerate(rollouts)]


FOUR = {"group_size": 4}
OPTIONS = {
    vopd: FOUR,
    rlrt: FOUR,
    egrsd: {**FOUR, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    trace: {**FOUR, "temperature": 1.0, "annotate": every_second, "error_weight": 1.0, "most": 1.0},
    dasd: FOUR,
    antisd: {**FOUR, "warmup": 1},
    stable_opd: FOUR,
    msd: {**FOUR, "top_k": 5},
    pbsd: {"pairs": 4},
    iw_opd: FOUR,
    pw_opsd: {**FOUR, "top_p": 1.0, "top_k": 0},
    topd: FOUR,
    # With the published power a tiny model's rewards, fifth powers of 1/35, are all but 0.
    power_opd: {**FOUR, "alpha": 0.5},
    dash: {**FOUR, "top_p": 1.0, "top_k": 0},
}
names = lambda f: f.__name__


@functools.cache
def made(factory):
    return factory(**OPTIONS[factory])


def environment_of(method):
    """A snapshot that a method has is the tiny model itself; `initial` is always there."""
    plain = tiny.environment(method)
    return plain._replace(policies={"initial": plain.live, **plain.policies})


@functools.cache
def written(factory):
    """What a method collects from two batches of two questions, and its memory after each."""
    method, memory, batches = made(factory), made(factory).memory, []
    for number in range(2):
        examples = tiny.TASK.train[2 * number : 2 * number + 2]
        rows, memory = method.collect(environment_of(method), examples, jax.random.key(3 * number), memory)
        batches.append((tuple(rows), json.dumps(memory)))
    return tuple(batches)


def test_student_reads_the_question_alone():
    for factory, number in itertools.product(OPTIONS, (0, 1)):
        rows, _ = written(factory)[number]
        assert all(r.contexts["student"] == r.example.prompt for r in rows)
        assert {r.source for r in rows} <= {STUDENT, TEACHER, REFERENCE}


def test_informed_teachers_read_the_solution():
    for factory in (egrsd, dasd, pw_opsd, dash, pbsd):
        assert all(r.example.solution in r.contexts["teacher"][-1]["content"] for r in written(factory)[0][0])
    for row in written(antisd)[0][0]:
        told = row.contexts["teacher"][-1]["content"]
        assert ("incorrect" in told) == (row.reward < 0.5)
    for factory in (vopd, iw_opd, topd, power_opd):
        assert all(r.contexts["teacher"] == r.example.prompt for r in written(factory)[0][0])
    assert all("safe" in r.contexts["teacher"][-1]["content"] for r in written(msd)[0][0])


def test_rlrt_credits_other_successes():
    rows = [r for batch, _ in written(rlrt) for r in batch]
    for row in rows:
        peers = [
            r for r in rows if r.group == row.group and r.example == row.example and r is not row and r.reward >= 0.5
        ]
        assert row.extras["credited"] == (row.reward >= 0.5 and bool(peers))
        close(row.extras["old_logprobs"], row.logprobs, atol=1e-4)
    assert {bool(r.extras["credited"]) for r in rows} == {True, False}


def test_trace_annotates_while_it_distils():
    method, (rows, memory) = made(trace), written(trace)[0]
    assert memory == "1"
    for number, row in enumerate(rows):
        assert (row.contexts["teacher"] is not None) == bool(number % 2)
        assert row.extras["span"].any() == bool(number % 2 and row.text)
    late, memory = method.collect(environment_of(method), tiny.TASK.train[:2], jax.random.key(0), 40)
    assert memory == 41 and not any(r.extras["span"].any() or r.contexts["teacher"] for r in late)
    quiet = trace(**{**OPTIONS[trace], "error_weight": 0.0})
    rows, _ = quiet.collect(environment_of(quiet), tiny.TASK.train[:2], jax.random.key(0), 0)
    assert all(r.reward >= 0.5 for r in rows if r.extras["span"].any())
    rule = refresh_snapshots(method)
    new = lambda step: float(rule(jnp.asarray(3.0), {"renewed": jnp.asarray(1.0)}, step)["renewed"])
    assert [new(s) for s in (1, 9, 10, 11)] == [1.0, 1.0, 3.0, 1.0]


def test_egrsd_rewards_short_answers():
    for number, (rows, memory) in enumerate(written(egrsd)):
        earned = [r.reward * (1 + 0.5 * (1 - len(r.tokens) / 8)) for r in rows]
        close([r.extras["advantage"] for r in rows], np.asarray(earned) - 0.5)
        assert json.loads(memory)["steps"] == number + 1 and json.loads(memory)["count"] == 8 * (number + 1)
    # At a quarter of the limit a correct answer earns 1.375, at the limit 1; a wrong one nothing.
    row = lambda length, reward: tiny.row("red " * length, reward, tokens=(6,) * length).read_by(teacher=None)
    method = egrsd()
    base = lambda *_: ([row(2, 1.0), row(8, 1.0), row(2, 0.0)], None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(egrsd_module, "opsd", lambda **options: method._replace(collect=base))
        rows, _ = egrsd().collect(environment_of(method), [], None, method.memory)
    close([r.extras["advantage"] + 0.5 for r in rows], [1.375, 1.0, 0.0])


def test_antisd_gate_waits():
    (first, _), (second, memory) = written(antisd)
    assert {r.extras["gate"] for r in first} == {0.0}
    medians = [np.median(np.concatenate([r.extras["teacher_entropy"] for r in rows])) for rows in (first, second)]
    close(json.loads(memory)["warm"], [medians[0]])
    assert json.loads(memory)["gate"] == float(medians[1] >= 0.93 * medians[0])
    unsolved = [dataclasses.replace(e, solution=None) for e in tiny.TASK.train[:2]]
    env = environment_of(made(antisd))._replace(verify=lambda *_: tiny.parity(None, "\x01"))
    rows, after = made(antisd).collect(env, unsolved, jax.random.key(0), {"warm": [1.0], "gate": 1.0})
    assert after == {"warm": [1.0], "gate": 1.0} and {r.extras["gate"] for r in rows} == {0.0}


def test_stable_opd_brings_golden_rows():
    rows, _ = written(stable_opd)[0]
    gold = [r for r in rows if r.source == REFERENCE]
    assert [r.group for r in gold] == [0, 1] and [r.text for r in gold] == [r.example.solution for r in gold]
    assert all(r.contexts["teacher"] is None and r.contexts["reference"] == r.example.prompt for r in gold)
    assert len(rows) == 10
    batch = tiny.collected(made(stable_opd), rows)
    assert batch.valid.all() and batch.contexts["student"].tokens.shape[0] == 2
    none = stable_opd(gold_coef=0.0, **FOUR)
    rows, _ = none.collect(environment_of(none), tiny.TASK.train[:2], jax.random.key(0), None)
    assert {r.source for r in rows} == {STUDENT}


def test_pbsd_pairs():
    rows, _ = written(pbsd)[0]
    assert [r.source for r in rows] == [TEACHER] * 8 + [STUDENT] * 8
    for a, b in zip(rows[:8], rows[8:], strict=True):
        assert a.extras["pair"] == b.extras["pair"] and a.group == b.group and a.contexts == b.contexts
    assert [r.tokens for r in rows[:8]] != [r.tokens for r in rows[8:]]
    batch = tiny.collected(made(pbsd), rows)
    assert batch.extras["pair"].dtype == jnp.int32 and sorted(batch.extras["pair"].tolist()) == sorted([*range(8)] * 2)
    unsolved = [dataclasses.replace(e, solution=None) for e in tiny.TASK.train[:2]]
    assert made(pbsd).collect(environment_of(made(pbsd)), unsolved, jax.random.key(0), None) == ([], None)


def test_msd_reads_english():
    example = dataclasses.replace(tiny.TASK.train[0], meta={"english": "how are you"})
    method = made(msd)
    rows, _ = method.collect(environment_of(method), [example, tiny.TASK.train[1]], jax.random.key(0), None)
    assert "how are you" in rows[0].contexts["teacher"][-1]["content"]
    assert "In English:" not in rows[4].contexts["teacher"][-1]["content"]
    method = msd(from_teacher=True, **OPTIONS[msd])
    rows, _ = method.collect(environment_of(method), tiny.TASK.train[:2], jax.random.key(0), None)
    assert {r.source for r in rows} == {TEACHER} and rows[0].contexts["student"] == rows[0].example.prompt


def test_lessons_make_one_model_enough():
    told = lambda rollout, rollouts: question(rollout.example)
    for factory in (vopd, iw_opd, topd, power_opd, stable_opd):
        assert factory().objectives[0].views["teacher"].policy == "teacher"
        method = factory(lesson=told)
        view = method.objectives[0].views["teacher"]
        assert (view.policy, view.trainable, view.per_rollout, view.told) == ("initial", False, True, True)
        assert set(method.snapshots) == {"initial"}
    for factory in OPTIONS:
        method = factory() if factory is trace else factory(lesson=told)
        policies_read = {v.policy for v in method.objectives[0].views.values()}
        assert policies_read <= {"live", *method.snapshots}


@pytest.mark.parametrize("factory", [egrsd, antisd, trace], ids=names)
def test_memory_survives_json_and_replays(factory):
    method = made(factory)
    start = json.loads(json.dumps(method.memory))
    assert start == method.memory
    first = json.loads(written(factory)[0][1])
    rows, memory = method.collect(environment_of(method), tiny.TASK.train[2:4], jax.random.key(3), first)
    again, text = written(factory)[1]
    assert json.dumps(memory) == text
    assert [r.tokens for r in rows] == [r.tokens for r in again]
    for one, other in zip(rows, again, strict=True):
        assert all(np.array_equal(one.extras[name], other.extras[name]) for name in other.extras)


# ---- the whole device half on a tiny model --------------------------------------------------------------------------


@pytest.mark.parametrize("factory", slow_but((trace, antisd, pbsd), OPTIONS), ids=names)
def test_one_update(factory):
    method = made(factory)
    parameters, networks = tiny.others(environment_of(method))
    # Another teacher than the student: else on the first batch of some methods there is nothing to learn.
    parameters = {name: tiny.pretrained(1).params for name in parameters}
    traces, objective = [], method.objectives[0]
    # Counted here: a jitted function's own cache may be emptied by what other tests compile.
    counted = objective._replace(terms=lambda *data: traces.append(1) or objective.terms(*data))
    update = make_update(counted, networks, optax.sgd(0.1), tiny.SHAPES, token_mean)
    before = tiny.pretrained().params
    params = jax.tree.map(jnp.array, before)
    opt_state = optax.sgd(0.1).init(params)
    for number, (rows, _) in enumerate(written(factory)):
        batch = tiny.collected(method, rows, 2)
        params, opt_state, outcome = update(params, opt_state, parameters, batch, jnp.asarray(number))
        assert outcome.finite and outcome.useful and np.isfinite(outcome.loss)
        assert all(np.isfinite(x) for x in outcome.terms.values())
    assert len(traces) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
    assert all(jax.tree.leaves(moved))


def plain_question(rollout, rollouts):
    return question(rollout.example)


@pytest.mark.parametrize(
    "method",
    [vopd(), egrsd(lesson=plain_question), msd(top_k=5, lesson=plain_question), trace(top_k=5), stable_opd()],
    ids=["vopd", "egrsd", "msd", "trace", "stable opd"],
)
def test_same_reader_same_policy_is_exactly_zero(method):
    views = method.objectives[0].views
    told = lambda r: r.read_by(**{name: question(r.example) for name in views})
    rows = [told(dataclasses.replace(r, group=i, extras={})) for i, r in enumerate(written(vopd)[0][0])]
    batch, params = tiny.collected(method, rows), tiny.pretrained().params
    used = {view.policy for view in views.values()}
    run = lambda b: token_signals(
        views, method.objectives[0].signals, dict.fromkeys(used, tiny.model()), dict.fromkeys(used, params), b
    )
    sig = jax.jit(run)(batch)
    if "teacher_logprobs" in sig:
        np.testing.assert_array_equal(sig["teacher_logprobs"], sig["logprobs"])
    for name in {"baseline", "divergence", "key_kl", "error_kl", "drift"} & {*sig}:
        np.testing.assert_array_equal(sig[name], 0.0)


@pytest.mark.parametrize("factory", [rlrt, antisd], ids=names)
def test_same_reader_scores_exactly_zero(factory):
    method = factory(group_size=1, lesson=plain_question)
    rows, _ = method.collect(environment_of(method), tiny.TASK.train[:8], jax.random.key(0), method.memory)
    for row in rows:
        if factory is antisd:
            np.testing.assert_array_equal(row.extras["log_ratio"], 0.0)
        else:
            np.testing.assert_array_equal(row.extras["old_teacher"], row.extras["old_logprobs"])


def test_pbsd_needs_both_rows_of_a_pair():
    """A student's row that staleness dropped takes its partner with it."""
    sig = {"logprobs": -jnp.ones((4, 2)), "teacher_logprobs": -jnp.full((4, 2), 2.0), "entropy": jnp.zeros((4, 2))}
    batch = tiny.batch(jnp.zeros((4, 2)), pair=jnp.asarray([0, 1, 0, 1]), group=[0, 1, 0, 1])
    batch = batch.replace(source=jnp.asarray([TEACHER, TEACHER, STUDENT, STUDENT]))
    whole, _ = tiny.reduced(pbsd().objectives[0], batch, sig)
    close(whole, np.log(2.0))  # equal ratios
    alone, _ = tiny.reduced(pbsd().objectives[0], batch.replace(valid=jnp.asarray([True, True, True, False])), sig)
    close(alone, np.log(2.0))
    nothing, _ = tiny.reduced(pbsd().objectives[0], batch.replace(valid=jnp.asarray([True, True, False, False])), sig)
    assert float(nothing) == 0.0
