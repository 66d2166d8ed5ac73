"""GRPO and its siblings, SFT, distillation and the published self-distillation methods: numbers, limits, host halves."""

import dataclasses
import functools
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from networks import unoptimised
from quick import slow_but

from sdjax.cli import options
from sdjax.collect import rollouts as host
from sdjax.collect.contexts import question
from sdjax.engine.policies import ema, frozen, occasion, refresh
from sdjax.engine.score import token_signals
from sdjax.engine.snapshots import refresh_snapshots
from sdjax.engine.train import make_update
from sdjax.kernels import estimators
from sdjax.kernels.distributions import entropy, logprob, normalise, temper
from sdjax.kernels.reductions import token_mean, token_sum
from sdjax.methods import gkd as gkd_module
from sdjax.methods.cispo import cispo
from sdjax.methods.dapo import dapo
from sdjax.methods.dr_grpo import dr_grpo
from sdjax.methods.gkd import gkd
from sdjax.methods.grpo import grpo
from sdjax.methods.gspo import gspo
from sdjax.methods.opd import opd
from sdjax.methods.opsd import opsd, opsd_v1
from sdjax.methods.sdft import sdft
from sdjax.methods.sdpo import TEST_TIME, peer_or_feedback, sdpo
from sdjax.methods.sft import sft
from sdjax.run.prompts import Prompts
from sdjax.types import REFERENCE, STUDENT, TEACHER, Rollout, Verdict, View

STUDENT_DIST, TEACHER_DIST = tiny.log(0.5, 0.3, 0.2), tiny.log(0.1, 0.6, 0.3)
FORWARD, REVERSE, HALF = (0.4, -0.3, -0.1), (0.546878, -0.362649, -0.184229), (0.105420, -0.074191, -0.031229)
VALUES = {0.0: 0.376584, 1.0: 0.515682, 0.5: 0.103295, 0.3: 0.082794, 0.7: 0.092576}
GRADIENTS = {0.0: FORWARD, 1.0: REVERSE, 0.5: HALF, 0.3: (0.085358, -0.061513, -0.023845)}
LOG_RATIOS = tuple(np.log([1.2, 0.9, 1.1, 0.7, 1.3, 0.8]))

close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-6)


quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


def divergence(method, student=STUDENT_DIST, teacher=TEACHER_DIST, token=0, **others):
    """The divergence that a method computes at one position."""
    dist = {"student": student, "teacher": teacher, **others}
    return method.objectives[0].signals(dist, jnp.asarray(token))["divergence"]


def gradient(method, student=STUDENT_DIST, **rest):
    """Its gradient with respect to the student's logits."""
    return tiny.logit_gradient(lambda dist: divergence(method, dist, **rest), student)


def expected_gradient(method, student=STUDENT_DIST, teacher=TEACHER_DIST, **rest):
    """The mean logit gradient of the loss over all tokens of one position, sampled from the student."""

    def of_token(logits, token):
        dist = normalise(logits)
        behavior = jax.lax.stop_gradient(dist[token])[None, None]
        batch = tiny.batch(jnp.reshape(token, (1, 1)), behavior=behavior, **rest)
        views = {"student": dist[None, None], "teacher": teacher[None, None]}
        return tiny.loss(method.objectives[0], batch, **views)[0]

    found = jax.vmap(jax.grad(of_token), (None, 0))(student, jnp.arange(student.size))
    return np.asarray(jnp.exp(student) @ found)


def repeated(dist, rows, length):
    """The same distribution everywhere, `[rows, length, V]`."""
    return jnp.broadcast_to(dist, (rows, length, dist.size))


def logprob_gradient(method, batch, logprobs, **signals):
    """The gradient `[B, T]` of a method's loss with respect to the log-probabilities of the batch's tokens."""
    logprobs = jnp.asarray(logprobs, jnp.float32)
    zeros = {"entropy": jnp.zeros_like(logprobs)}

    def loss(x):
        return tiny.reduced(method.objectives[0], batch, {**zeros, **signals, "logprobs": x})[0]

    return np.asarray(jax.grad(loss)(logprobs))


def four(rewards, **rest):
    """A batch of one group of four rows with one token each."""
    return tiny.batch(jnp.zeros((4, 1)), reward=rewards, **rest)


# ---- GKD: its note, section 6 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", VALUES)
def test_gkd_values(beta):
    close(divergence(gkd(beta=beta)), VALUES[beta])
    if beta not in (0.0, 1.0):
        close(divergence(gkd(beta=beta), TEACHER_DIST, STUDENT_DIST), divergence(gkd(beta=1.0 - beta)))


@pytest.mark.parametrize("beta", GRADIENTS)
def test_gkd_logit_gradients(beta):
    close(gradient(gkd(beta=beta)), GRADIENTS[beta])
    close(gradient(gkd(beta=beta), teacher=STUDENT_DIST), 0.0, atol=1e-7)
    assert divergence(gkd(beta=beta), STUDENT_DIST, STUDENT_DIST) == 0.0


def test_gkd_scale_jumps_at_the_ends():
    close(divergence(gkd(beta=0.001)), 0.000376, atol=1e-6)
    close(divergence(gkd(beta=0.001)) / 0.001, VALUES[0.0], rtol=2e-3)
    close(divergence(gkd(beta=0.999)) / 0.001, VALUES[1.0], rtol=2e-3)


@pytest.mark.parametrize(("lmbda", "seq_kd"), [(0.0, False), (0.0, True), (1.0, False), (0.5, True)])
def test_gkd_coin(monkeypatch, lmbda, seq_kd):
    asked = []
    say = lambda who: lambda *_, **__: asked.append(who) or []
    monkeypatch.setattr(gkd_module, "attempts", say("student"))
    monkeypatch.setattr(gkd_module, "by_teacher", say("teacher"))
    monkeypatch.setattr(gkd_module, "references", say("dataset"))
    collect = gkd(lmbda=lmbda, seq_kd=seq_kd).collect
    for _ in range(2):
        for number in range(20):
            collect(tiny.environment(), [], jax.random.key(number), None)
    assert asked[:20] == asked[20:]  # the coin is the key's
    other = "teacher" if seq_kd else "dataset"
    expected = {0.0: {other}, 1.0: {"student"}}.get(lmbda, {"student", other})
    assert set(asked) == expected
    assert lmbda != 0.5 or 5 <= asked[:20].count("student") <= 15


def test_gkd_writers(small):
    env, examples = small, tiny.TASK.train[:2]
    rows, _ = gkd(lmbda=0.0).collect(env, examples, jax.random.key(0), None)
    assert [r.source for r in rows] == [REFERENCE] * 2
    assert [r.text for r in rows] == [e.solution for e in examples]
    assert all(tiny.tokenizer().decode(r.tokens) == f"{r.text} <end>" for r in rows)
    method = gkd(lmbda=0.0, seq_kd=True, group_size=4, temperature=1.0)
    rows, _ = method.collect(env, examples, jax.random.key(0), None)
    _, key = jax.random.split(jax.random.key(0))
    expected = host.sample(env.policies["teacher"], examples, key, n=4)
    assert [r.tokens for r in rows] == [r.tokens for r in expected]
    assert {r.source for r in rows} == {TEACHER}
    rows, _ = gkd(lmbda=1.0, group_size=4).collect(env, examples, jax.random.key(0), None)
    assert {r.source for r in rows} == {STUDENT}


def test_masked_positions_change_nothing():
    garbage = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    rows = lambda last: jnp.broadcast_to(jnp.stack([STUDENT_DIST, last]), (4, 2, 3))
    batch, teacher = tiny.batch([[0, 1]] * 4, mask=[[True, False]] * 4), repeated(TEACHER_DIST, 4, 2)
    nothing = batch.replace(mask=jnp.zeros((4, 2), bool))
    for method in (gkd(), sdft(skip=0), sdpo(top_k=None), opsd(), opd()):
        loss = lambda dist, batch: tiny.loss(method.objectives[0], batch, student=dist, teacher=teacher)[0]  # noqa: B023
        clean, dirty = (jax.value_and_grad(loss)(rows(last), batch) for last in (TEACHER_DIST, garbage))
        assert clean[0] == dirty[0] != 0.0
        np.testing.assert_array_equal(clean[1][:, 0], dirty[1][:, 0])
        assert loss(rows(TEACHER_DIST), nothing) == 0.0


# ---- OPD ------------------------------------------------------------------------------------------------------------


def test_opd_is_reverse_kl_by_enumeration():
    close(expected_gradient(opd()), REVERSE)
    close(expected_gradient(opd(full_vocabulary=True)), REVERSE)
    close(expected_gradient(opd(coef=2.5)), 2.5 * np.asarray(REVERSE))
    close(expected_gradient(opd(discount=1.0)), REVERSE)  # one position: nothing comes later
    # A live log-ratio, differentiated directly, is no gradient at all: the advantage has to be a constant.
    direct = tiny.logit_gradient(
        lambda dist: jnp.exp(jax.lax.stop_gradient(dist)) @ estimators.sampled_kl(dist, TEACHER_DIST, "k1"),
        STUDENT_DIST,
    )
    close(direct, 0.0)


def test_any_baseline_is_free():
    # The reward beside that of a rollout without trained tokens: a constant beside the log-ratio, whatever the token.
    def of_token(logits, token, reward):
        dist = normalise(logits)
        said = jax.lax.stop_gradient(dist[token])
        batch = tiny.batch(
            jnp.asarray([[token], [0]]), behavior=[[said], [0.0]], reward=[reward, 0.0], mask=[[True], [False]]
        )
        views = {name: jnp.stack([d, d])[:, None] for name, d in (("student", dist), ("teacher", TEACHER_DIST))}
        return tiny.loss(opd(rl_weight=1.0).objectives[0], batch, **views)[0]

    one = lambda token, reward: np.asarray(jax.grad(of_token)(STUDENT_DIST, token, reward))
    chances, tokens = np.exp(STUDENT_DIST), range(STUDENT_DIST.size)
    for reward in (0.0, 3.0):
        close(sum(chances[token] * one(token, reward) for token in tokens), REVERSE)
    assert np.abs(one(0, 3.0) - one(0, 0.0)).max() > 0.1


def test_opd_advantages():
    batch = four([1.0, 0.0, 0.0, 1.0], behavior=[[-1.0], [-2.0], [-0.5], [-3.0]])
    teacher = jnp.asarray([[-2.0], [-1.0], [-0.5], [-2.5]])
    found = lambda **o: logprob_gradient(
        opd(reduce=token_sum, **o), batch, batch.behavior_logprobs, teacher_logprobs=teacher
    )
    gap = teacher - batch.behavior_logprobs
    close(found(), -gap)  # A = -(log b - log q)
    close(found(coef=0.0, rl_weight=1.0).ravel(), [-0.5, 0.5, 0.5, -0.5])  # centred, without deviation
    close(found(coef=0.5, rl_weight=2.0).ravel(), -0.5 * gap.ravel() - 2.0 * np.asarray([0.5, -0.5, -0.5, 0.5]))
    off = logprob_gradient(opd(reduce=token_sum), batch, batch.behavior_logprobs + 0.5, teacher_logprobs=teacher)
    close(off, -np.exp(0.5) * gap)  # the importance weight has no clip


@pytest.mark.parametrize(
    ("discount", "expected"),
    [(0.0, (0.1, -0.2, 0.3, 0.4)), (1.0, (0.6, 0.5, 0.7, 0.4)), (0.9, (0.4546, 0.394, 0.66, 0.4))],
)
def test_opd_returns_to_go(discount, expected):
    batch = tiny.batch([[0, 0, 0, 0]], behavior=[[-1.0] * 4])
    teacher = batch.behavior_logprobs + jnp.asarray([[0.1, -0.2, 0.3, 0.4]])
    method = opd(discount=discount, reduce=token_sum)
    close(-logprob_gradient(method, batch, batch.behavior_logprobs, teacher_logprobs=teacher), [expected])


def test_opd_stops_the_advantage():
    batch = tiny.batch([[0, 1]], behavior=[[-1.0, -2.0]])
    now = batch.behavior_logprobs

    def loss(teacher):
        sig = {"logprobs": now, "teacher_logprobs": teacher, "entropy": now}
        return tiny.reduced(opd().objectives[0], batch, sig)[0]

    np.testing.assert_array_equal(jax.grad(loss)(now - 0.5), 0.0)
    # Negative control: the same loss without the stop.
    assert jax.grad(lambda teacher: jnp.mean(-jnp.exp(now - now) * (teacher - now)))(now - 0.5).all()


# ---- OPSD: its note, section 6 --------------------------------------------------------------------------------------

CLEAN = {"temperature": 1.0, "clip": None}


def test_opsd_clipped_values():
    close(divergence(opsd(temperature=1.0)), -0.060944)
    for no_clip in (0.4159, 100.0, None):
        close(divergence(opsd(temperature=1.0, clip=no_clip)), VALUES[0.0])


def test_opsd_clip_turns_the_gradient_round():
    clipped, plain = gradient(opsd(temperature=1.0)), gradient(opsd(**CLEAN))
    close(clipped, (-0.05, 0.03, 0.02))
    close(plain, FORWARD)
    assert (np.sign(clipped) == -np.sign(plain)).all()
    for clip in (0.0, 0.05, 0.2, 1.0, None):
        close(gradient(opsd(temperature=1.0, clip=clip)).sum(), 0.0)


@pytest.mark.parametrize("beta", GRADIENTS)
def test_opsd_without_clip_is_the_divergence(beta):
    close(divergence(opsd(beta=beta, **CLEAN)), VALUES[beta])
    close(gradient(opsd(beta=beta, **CLEAN)), GRADIENTS[beta])


def test_opsd_version_one():
    v1 = opsd_v1()
    close(divergence(v1), divergence(gkd(beta=0.5), temper(STUDENT_DIST, 1.2), temper(TEACHER_DIST, 1.2)))
    close(gradient(opsd_v1(temperature=1.0)), HALF)


def test_opsd_tempers_both_sides():
    hot = opsd(temperature=2.0, clip=None)
    close(divergence(hot), divergence(opsd(**CLEAN), temper(STUDENT_DIST, 2.0), temper(TEACHER_DIST, 2.0)))
    # The gradient carries 1/T: p - q of the tempered distributions, halved.
    expected = (np.exp(temper(STUDENT_DIST, 2.0)) - np.exp(temper(TEACHER_DIST, 2.0))) / 2.0
    close(gradient(hot), expected)


def test_opsd_sampled_token_is_reverse_kl():
    method = opsd(temperature=1.0, sampled_token=True)
    close(expected_gradient(method), REVERSE)
    close(expected_gradient(sdpo(sampled_token=True, alpha=1.0)), REVERSE)
    mean = jnp.exp(STUDENT_DIST) @ jnp.stack([divergence(method, token=t) for t in range(3)])
    close(mean, VALUES[1.0])


def test_opsd_teacher_top_k():
    close(divergence(opsd(teacher_top_k=3, **CLEAN)), VALUES[0.0])
    student, teacher = tiny.log(3 / 5, 2 / 5), tiny.log(2 / 3, 1 / 3)  # of the teacher's two likeliest, renormalised
    close(divergence(opsd(teacher_top_k=2, **CLEAN)), divergence(gkd(beta=0.0), student, teacher))


# ---- SDFT: its note, section 6 --------------------------------------------------------------------------------------


def test_sdft_direction():
    close(divergence(sdft()), VALUES[0.0])
    close(gradient(sdft()), FORWARD)
    close(divergence(sdft(alpha=1.0)), VALUES[1.0])
    cross_entropy = lambda dist: -jnp.sum(jnp.exp(TEACHER_DIST) * dist)
    close(gradient(sdft()), tiny.logit_gradient(cross_entropy, STUDENT_DIST))


def test_sdft_skips_the_first_tokens():
    method, teacher = sdft(is_cap=None), repeated(TEACHER_DIST, 4, 5)

    def loss(dist, length):
        batch = tiny.batch(jnp.zeros((4, 5)), mask=jnp.broadcast_to(jnp.arange(5) < length, (4, 5)))
        return tiny.loss(method.objectives[0], batch, student=dist, teacher=teacher)[0]

    for length in (1, 3):
        value, found = jax.value_and_grad(loss)(repeated(STUDENT_DIST, 4, 5), length)
        assert value == 0.0
        np.testing.assert_array_equal(found, 0.0)
    value, found = jax.value_and_grad(loss)(repeated(STUDENT_DIST, 4, 5), 5)
    close(value, VALUES[0.0])
    np.testing.assert_array_equal(found[:, :3], 0.0)
    assert found[:, 3:].all()


def test_sdft_divides_by_what_is_counted():
    sig = {"divergence": jnp.full((1, 10), 2.0), "logprobs": jnp.zeros((1, 10)), "entropy": jnp.zeros((1, 10))}
    assert tiny.reduced(sdft().objectives[0], tiny.batch(jnp.zeros((1, 10))), sig)[0] == 2.0


def test_sdft_row_weight():
    ratios = np.log([9.0, 9.0, 9.0, 0.5, 4.0])  # the first three are skipped, the last is capped at 2
    behavior = jnp.full((1, 5), -1.0)
    batch = tiny.batch(jnp.zeros((1, 5)), behavior=behavior)

    def loss(method, logprobs):
        sig = {"divergence": jnp.full((1, 5), 2.0), "logprobs": logprobs, "entropy": logprobs}
        return tiny.reduced(method.objectives[0], batch, sig)[0]

    now = behavior + ratios
    close(loss(sdft(), now), 2.0 * 1.25)
    assert loss(sdft(), behavior) == loss(sdft(is_cap=None), now) == loss(sdft(from_teacher=True), now) == 2.0
    np.testing.assert_array_equal(jax.grad(lambda x: loss(sdft(), x))(now), 0.0)
    # Negative control: the weight itself does depend on the log-probabilities.
    weight = lambda x: jnp.mean(jnp.minimum(jnp.exp(x - behavior), 2.0)[:, 3:])
    assert jax.grad(weight)(now)[0, 3] != 0.0


# ---- SDPO: its note, section 6 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "full", "top_1"), [(0.0, 0.376584, 0.368064), (1.0, 0.515682, 0.510826), (0.5, 0.103295, 0.101749)]
)
def test_sdpo_values(alpha, full, top_1):
    close(divergence(sdpo(alpha=alpha, top_k=None)), full)
    close(divergence(sdpo(alpha=alpha, top_k=1)), top_1)
    close(divergence(sdpo(alpha=alpha, top_k=2)), full)  # two of three and a rest: nothing is merged
    for k in (3, 100):
        assert divergence(sdpo(alpha=alpha, top_k=k)) == divergence(sdpo(alpha=alpha, top_k=None))
        close(gradient(sdpo(alpha=alpha, top_k=k)), gradient(sdpo(alpha=alpha, top_k=None)))


def test_sdpo_without_rest_may_exceed_the_full_value():
    close(divergence(sdpo(alpha=1.0, top_k=2, rest=False)), 0.612437)
    close(divergence(sdpo(alpha=0.0, top_k=2, rest=False)), 0.497738)
    close(divergence(sdpo(alpha=1.0, top_k=1, rest=False)), 0.0)


def test_sdpo_reverse_gradient_is_a_policy_gradient():
    advantage = np.asarray(TEACHER_DIST - STUDENT_DIST)
    chances = np.exp(np.asarray(STUDENT_DIST))
    for shift in (0.0, 7.0):
        moved = advantage + shift
        close(gradient(sdpo(alpha=1.0, top_k=None)), -chances * (moved - chances @ moved))


def test_sdpo_trust_region_teacher():
    initial, plain = tiny.log(0.6, 0.3, 0.1), sdpo(top_k=None, alpha=0.0)
    of = lambda trust: divergence(sdpo(top_k=None, alpha=0.0, trust=trust), initial=initial)
    close(of(0.0), divergence(plain, teacher=initial))
    close(of(1.0), divergence(plain))
    close(of(0.25), divergence(plain, teacher=tiny.log(0.43977, 0.40926, 0.15097)), atol=1e-5)
    method = sdpo(trust=0.25)
    assert set(method.snapshots) == {"initial"}
    assert method.objectives[0].views["teacher"].policy == "live"


def taught_gradient(method, batch):
    """The gradient of a loss with respect to the student's logits at every token of a batch with a teacher."""
    shape = (*batch.completion.shape, 3)
    logits = jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
    behavior = jax.lax.stop_gradient(logprob(normalise(logits), batch.completion))
    batch = batch.replace(behavior_logprobs=behavior)
    loss = lambda z: tiny.loss(
        method.objectives[0], batch, student=normalise(z), teacher=jnp.broadcast_to(TEACHER_DIST, shape)
    )
    return jax.grad(lambda z: loss(z)[0])(logits), loss(logits)[1]


def test_sdpo_mixed_with_grpo():
    batch = tiny.batch([[0, 1], [2, 0], [1, 1], [2, 2]], reward=[1.0, 0.0, 0.0, 1.0])
    centred = grpo(normalised=False, reduce=token_mean)
    policy_gradient, _ = taught_gradient(centred, batch)
    distillation, _ = taught_gradient(sdpo(), batch)
    close(taught_gradient(sdpo(rl_weight=1.0), batch)[0], policy_gradient)
    mixed, terms = taught_gradient(sdpo(rl_weight=0.9), batch)
    close(mixed, 0.9 * policy_gradient + 0.1 * distillation)
    assert set(terms) == {"divergence", "entropy", "pg"}
    assert set(taught_gradient(sdpo(rl_weight=0.0), batch)[1]) == {"divergence", "entropy"}
    # On the sampler's own tokens the importance weight is 1.
    np.testing.assert_array_equal(taught_gradient(sdpo(is_cap=None), batch)[0], distillation)


def test_sdpo_at_sequence_level():
    """The ablation of section 6, item 8: every token's advantage is the row's mean of log q/p."""
    batch = tiny.batch([[0, 1], [2, 0]], mask=[[1, 1], [1, 0]])
    logits = jnp.sin(jnp.arange(12.0)).reshape(2, 2, 3)
    dist = normalise(logits)
    sampled = logprob(dist, batch.completion)
    batch = batch.replace(behavior_logprobs=sampled)
    loss = lambda z, method, teacher: tiny.loss(method.objectives[0], batch, student=normalise(z), teacher=teacher)[0]
    teacher = jnp.broadcast_to(TEACHER_DIST, dist.shape)
    found = jax.grad(loss)(logits, sdpo(sequence_level=True), teacher)
    gap, over = logprob(teacher, batch.completion) - sampled, np.asarray([[1, 1], [1, 0]])
    mean = (gap * over).sum(-1, keepdims=True) / over.sum(-1, keepdims=True)
    score = jax.nn.one_hot(batch.completion, 3) - jnp.exp(dist)
    close(found, -(mean * over)[..., None] * score / over.sum())
    np.testing.assert_array_equal(jax.grad(loss)(logits, sdpo(sequence_level=True), dist), 0.0)
    # A row of one token is the sampled token's estimate of reverse KL.
    single = jax.grad(loss)(logits, sdpo(sampled_token=True, alpha=1.0), teacher)
    close(found[1], single[1])
    assert np.abs(found[0] - single[0]).max() > 1e-3


def speaks_to(batch, rows):
    """The batch with a teacher that speaks about some rows only."""
    teacher = batch.contexts["teacher"].replace(valid=jnp.asarray(rows, bool))
    return batch.replace(contexts={**batch.contexts, "teacher": teacher})


@pytest.mark.parametrize(
    "method",
    [sdpo(), opsd(), sdft(skip=0), gkd(), opd(), opd(full_vocabulary=True)],
    ids=["sdpo", "opsd", "sdft", "gkd", "opd", "opd full"],
)
def test_no_lesson_no_loss(method):
    batch = tiny.batch([[0, 1], [2, 0], [1, 1], [2, 2]], reward=[1.0, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(taught_gradient(method, speaks_to(batch, [0, 0, 0, 0]))[0], 0.0)
    found, _ = taught_gradient(method, speaks_to(batch, [1, 1, 0, 0]))
    assert found[:2].any() and not found[2:].any()


def test_rows_without_a_lesson_still_have_a_reward():
    batch = speaks_to(tiny.batch([[0, 1], [2, 0], [1, 1], [2, 2]], reward=[1.0, 0.0, 0.0, 1.0]), [1, 1, 0, 0])
    centred, _ = taught_gradient(grpo(normalised=False, reduce=token_mean), batch)
    close(taught_gradient(sdpo(rl_weight=0.5), batch)[0][2:], 0.5 * centred[2:])
    close(taught_gradient(opd(rl_weight=0.5), batch)[0][2:], 0.5 * centred[2:])


# ---- snapshots ------------------------------------------------------------------------------------------------------


FOLLOWED = [f for f in map(options.method_factory, options.method_names()) if "ema_rate" in signature(f).parameters]


@pytest.mark.parametrize("factory", FOLLOWED, ids=lambda f: f.__name__)
def test_self_teacher_rates(factory):
    live = factory(ema_rate=1.0)
    assert all(o.views["teacher"].policy == "live" for o in live.objectives)
    assert not live.snapshots
    frozen = refresh_snapshots(factory(ema_rate=0.0))
    old, now = jnp.asarray([1.0, 1e-8]), jnp.asarray([3.0, 1e8])
    np.testing.assert_array_equal(frozen({"w": now}, {"teacher": {"w": old + 0.0}}, 1)["teacher"]["w"], old)
    slow = refresh_snapshots(factory(ema_rate=0.05))
    close(slow({"w": jnp.asarray(3.0)}, {"teacher": {"w": jnp.asarray(1.0)}}, 1)["teacher"]["w"], 1.1)


def test_ema_of_a_constant():
    rule, value = ema(0.1), jnp.asarray(1.0)
    for step in range(5):
        value = rule(jnp.asarray(3.0), value, step)
    close(value, 3.0 - 0.9**5 * 2.0)
    assert rule(jnp.asarray(3.0), value, 0) is not value
    assert ema(1.0)(jnp.asarray(3.0), value, 0) == 3.0
    assert [float(refresh(2)(jnp.asarray(3.0), jnp.asarray(1.0), step)) for step in (1, 2, 3)] == [1.0, 3.0, 1.0]


def test_when_teachers_move():
    """SDFT's after every optimiser step (its notes, section 3), SDPO's once per batch (its notes, section 6, item 4)."""
    assert occasion(sdft().snapshots["teacher"]) == "update" and occasion(sdpo().snapshots["teacher"]) == "trained"
    assert occasion(refresh(10)) == occasion(frozen()) == "batch"


def test_published_teachers():
    close(0.05, sdpo().snapshots["teacher"](jnp.asarray(1.0), jnp.asarray(0.0), 0))
    close(0.01, sdft().snapshots["teacher"](jnp.asarray(1.0), jnp.asarray(0.0), 0))
    assert opsd().snapshots["teacher"](jnp.asarray(1.0), jnp.asarray(0.0), 0) == 0.0
    assert set(opd(teacher="initial").snapshots) == set(gkd(teacher="initial").snapshots) == {"initial"}
    assert not opd().snapshots and not gkd().snapshots


# ---- GRPO and its siblings ------------------------------------------------------------------------------------------


def advantages(method, rewards, **rest):
    """What multiplies minus the gradient of each row's only log-probability, in units of its share of the mean."""
    batch = four(rewards, **rest)
    return -4.0 * logprob_gradient(method, batch, batch.behavior_logprobs).ravel()


def test_group_advantages():
    close(advantages(grpo(), [1, 0, 0, 1]), [0.866024, -0.866024, -0.866024, 0.866024])
    close(advantages(grpo(), [1, 0, 0, 0]), [1.499997, -0.499999, -0.499999, -0.499999])  # unbiased deviation
    for method in (grpo(normalised=False), dr_grpo(length=1)):
        close(advantages(method, [1, 0, 0, 1]), [0.5, -0.5, -0.5, 0.5])
        close(advantages(method, [1, 0, 0, 0]), [0.75, -0.25, -0.25, -0.25])
    close(advantages(grpo(), [3, 1, 1, 3]), advantages(grpo(), [1, 0, 0, 1]), atol=1e-5)


@pytest.mark.parametrize("factory", [grpo, dr_grpo, dapo, gspo, cispo])
def test_equal_rewards_no_gradient(factory):
    for reward in (0.0, 1.0, 0.1):
        np.testing.assert_array_equal(advantages(factory(), [reward] * 4), 0.0)


@pytest.mark.parametrize(
    ("ratio", "up", "down"),
    [(0.5, (-0.5, -0.5), (0.8, 0)), (1, (-1, -1), (1, 1)), (1.5, (-1.28, 0), (1.5, 1.5)), (4, (-1.28, 0), (3, 0))],
)
def test_clipping_table(ratio, up, down):
    method = grpo(clip=(0.2, 0.28), dual_clip=3.0)
    for (value, slope), sign in ((up, 1.0), (down, -1.0)):
        batch = tiny.batch([[0]], reward=[sign], behavior=[[-1.0]])  # a group of one: the advantage is the reward
        now = jnp.full((1, 1), -1.0 + np.log(ratio))
        sig = {"logprobs": now, "entropy": now}
        close(tiny.reduced(method.objectives[0], batch, sig)[1]["pg"], value, rtol=1e-5)
        close(logprob_gradient(method, batch, now), slope, rtol=1e-5)


def one_row(method, log_ratios, reward=1.0):
    """Loss and gradient of one row with given log-ratios; its advantage is its reward."""
    behavior = jnp.full((1, len(log_ratios)), -1.0)
    batch = tiny.batch(jnp.zeros((1, len(log_ratios))), reward=[reward], behavior=behavior)
    now = behavior + jnp.asarray(log_ratios)
    value, _ = tiny.reduced(method.objectives[0], batch, {"logprobs": now, "entropy": now})
    return float(value), logprob_gradient(method, batch, now).ravel()


def test_dapo_clips_higher():
    close(one_row(dapo(), [np.log(1.27)])[1], -1.27)
    close(one_row(dapo(), [np.log(1.29)])[1], 0.0)
    close(one_row(grpo(), [np.log(1.27)])[1], 0.0)


def test_cispo_never_drops_a_gradient():
    verl = cispo(clip=(0.2, 0.28))
    for method, low, high in ((verl, -0.8, -1.28), (cispo(), -0.5, -1.5)):
        close(one_row(method, [np.log(0.5)])[1], low)
        close(one_row(method, [np.log(1.5)])[1], high)
    close(one_row(cispo(), [np.log(8.0)])[1], -5.0)


def test_gspo_ratio():
    open_clip = gspo(clip=(0.5, 0.5))
    value, slopes = one_row(open_clip, [0.2, -0.1, 0.05])
    close(value, -1.051271)
    close(slopes, [-1.051271 / 3] * 3)  # the sequence's gradient, -s A mean_t grad log p
    close(one_row(gspo(clip=(0.5, 0.5)), [0.2])[1], one_row(grpo(clip=(0.5, 0.5)), [0.2])[1])
    assert not one_row(gspo(), [0.2, -0.1, 0.05])[1].any()  # the published width is passed
    close(one_row(gspo(), [0.001, -0.0005])[1], [-0.5, -0.5], rtol=1e-3)


def test_siblings_coincide_on_policy():
    batch = tiny.batch(jnp.zeros((4, 3)), reward=[1, 0, 0, 0], behavior=jnp.linspace(-3.0, -1.0, 12).reshape(4, 3))
    first, *others = (logprob_gradient(f(), batch, batch.behavior_logprobs) for f in (grpo, dapo, gspo, cispo))
    for other in others:
        close(other, first)
    # Off-policy they part.
    moved = [logprob_gradient(f(), batch, batch.behavior_logprobs + 0.3) for f in (grpo, gspo, cispo)]
    assert np.abs(moved[0] - moved[2]).max() > 1e-3
    assert np.abs(moved[1] - moved[2]).max() > 1e-3


def test_dr_grpo_ignores_length():
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    batch = tiny.batch(jnp.zeros((2, 4)), reward=[1.0, 0.0], mask=mask)
    of = lambda method: np.abs(logprob_gradient(method, batch, batch.behavior_logprobs))
    close(of(dr_grpo(length=8)), mask * 0.5 / 16)
    close(of(dr_grpo(length=16)), of(dr_grpo(length=8)) / 2)
    close(of(grpo(normalised=False)), mask * np.asarray([[0.5 / 8], [0.5 / 4]]))  # the short row's tokens weigh more


@pytest.mark.parametrize(
    ("method", "group", "expected"),
    [
        (dapo(), [0, 1], 10 / 6),
        (cispo(), [0, 1], -10 / 6),
        (grpo(), [0, 1], 2.0),
        (gspo(), [0, 1], 2.0),
        (dr_grpo(length=8), [0, 0], -2 / 16),
        (dr_grpo(length=8), [0, 1], 0.0),
    ],
)
def test_reductions(method, group, expected):
    # Rows of four tokens with loss 1 and two tokens with loss 3; CISPO's value has another sign: log p is -1.  In one
    # group the rewards are 1 and -1 about their mean, and alone Dr. GRPO's are about themselves.
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    batch = tiny.batch(jnp.zeros((2, 4)), reward=[-1.0, -3.0], group=group, mask=mask, behavior=-jnp.ones((2, 4)))
    sig = {"logprobs": -jnp.ones((2, 4)), "entropy": jnp.zeros((2, 4))}
    value, _ = tiny.reduced(method.objectives[0], batch, sig)
    close(value, expected)


def test_truncated_importance_weights():
    behavior = jnp.full((1, 3), -2.0)
    old = behavior + jnp.asarray([[0.5, -0.3, 1.2]])
    batch = tiny.batch(jnp.zeros((1, 3)), reward=[1.0], behavior=behavior, old_logprobs=old)
    method = grpo(tis_cap=2.0, reduce=token_sum)
    close(-logprob_gradient(method, batch, old), [[1.64872, 0.74082, 2.0]])
    batch = batch.replace(extras={"old_logprobs": behavior})
    close(-logprob_gradient(method, batch, behavior), 1.0)


def test_what_a_reward_is_compared_with():
    """Two groups of unequal spread: by the group's deviation, by the batch's (ScaleRL), or with the other rows (RLOO)."""
    rewards = np.asarray([1.0, 0.0, 0.0, 0.0, 0.6, 0.2, 0.6, 0.2])
    batch = tiny.batch(jnp.zeros((8, 1)), reward=rewards, group=[0] * 4 + [1] * 4)
    of = lambda **how: -8 * logprob_gradient(grpo(**how), batch, jnp.zeros((8, 1)))[:, 0]
    groups = rewards.reshape(2, 4)
    centred = groups - groups.mean(1, keepdims=True)
    close(of(), (centred / (groups.std(1, ddof=1, keepdims=True) + 1e-6)).ravel(), rtol=1e-5)
    close(of(compared="batch"), (centred / centred.std(ddof=1)).ravel(), rtol=1e-5)
    others = [(row.sum() - row) / 3 for row in groups]
    close(of(compared="leave_one_out"), (groups - others).ravel(), rtol=1e-5)
    cispo_too = -8 * logprob_gradient(cispo(compared="batch"), batch, jnp.zeros((8, 1)))[:, 0]
    close(cispo_too, of(compared="batch"))
    equal = batch.replace(reward=jnp.ones(8))
    for how in ("group", "batch", "leave_one_out"):
        assert not logprob_gradient(grpo(compared=how), equal, jnp.zeros((8, 1))).any()


def test_informative_groups_are_counted():
    batch = tiny.batch(jnp.zeros((4, 1)), reward=[1.0, 1.0, 0.0, 1.0], group=[0, 0, 1, 1])
    zeros = jnp.zeros((4, 1))
    terms = tiny.reduced(grpo().objectives[0], batch, {"logprobs": zeros, "entropy": zeros})[1]
    assert float(terms["informative"]) == 0.5


def test_ratios_that_count_for_nothing_are_counted():
    batch = tiny.batch(jnp.zeros((2, 4)), behavior=[[-9.0, -1.0, np.nan, -np.inf], [-1.0, -6.0, -8.0, 0.0]])
    batch = batch.replace(mask=batch.mask.at[1, 2].set(False))
    sig = {"logprobs": jnp.full((2, 4), -0.5), "entropy": jnp.zeros((2, 4))}
    loss, terms = tiny.reduced(grpo().objectives[0], batch, sig)
    assert np.isfinite(loss)
    close(terms["ignored_ratios"], 3 / 7)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"tis_cap": 2.0}, [[2.0, 0.5], [1.0, 2.0]]),
        ({"tis_bounds": (0.5, 2.0)}, [[0.0, 0.5], [1.0, 0.0]]),
        ({"tis_cap": 2.0, "tis_level": "sequence"}, [[1.5, 1.5], [2.0, 2.0]]),
        ({"tis_bounds": (0.0, 3.0), "tis_level": "sequence"}, [[1.5, 1.5], [0.0, 0.0]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("factory", [grpo, dr_grpo, dapo, gspo, cispo], ids=lambda f: f.__name__)
def test_weights_of_the_samplers_numerics(factory, how, expected):
    """Ratios of the scorer to the sampler of (3, 1/2) and (1, 9): truncated or dropped, per token or per row."""
    old = jnp.full((2, 2), -1.0)
    behavior = old - jnp.log(jnp.asarray([[3.0, 0.5], [1.0, 9.0]]))
    batch = tiny.batch(jnp.zeros((2, 2)), behavior=behavior, reward=[1.0, 0.0], old_logprobs=old)
    sig = {"logprobs": old, "entropy": jnp.zeros((2, 2))}
    weight = factory(**how).objectives[0].terms(batch, sig, 0)["pg"].importance
    close(jnp.broadcast_to(weight, (2, 2)), expected)


@pytest.mark.parametrize(
    ("direct", "value", "gradient"),
    [
        ("k1", 0.515682, (0.0, 0.0, 0.0)),
        ("k2", None, REVERSE),
        ("k3", 0.515682, FORWARD),
        ("k3_plus", 0.515682, REVERSE),
        ("top_k_forward_kl", 0.376584, FORWARD),
    ],
)
def test_opd_with_verls_losses(direct, value, gradient):
    """Mean value and mean gradient over the student's tokens: k1 teaches nothing, k3 a forward KL."""
    method = opd(direct=direct)
    close(expected_gradient(method), gradient)
    dist = {"student": STUDENT_DIST, "teacher": TEACHER_DIST}
    values = [float(method.objectives[0].signals(dist, jnp.asarray(v))[direct]) for v in range(3)]
    if value is not None:
        assert float(np.exp(np.asarray(STUDENT_DIST)) @ values) == pytest.approx(value, abs=2e-6)


def test_reference_penalty():
    method = grpo(kl_coef=0.1)
    batch = tiny.batch([[0]], behavior=[[-1.0]])
    sig = {"logprobs": jnp.full((1, 1), -1.0), "reference_logprobs": jnp.full((1, 1), -1.5)}
    loss, terms = tiny.reduced(method.objectives[0], batch, {**sig, "entropy": jnp.zeros((1, 1))})
    close(terms["reference_kl"], np.exp(-0.5) - 1 + 0.5)
    close(loss, 0.1 * (np.exp(-0.5) - 1 + 0.5))
    assert set(method.snapshots) == {"reference"}


def test_sft_is_cross_entropy():
    batch = tiny.batch([[0, 1, 2]], mask=[[True, True, False]])
    found, terms = tiny.loss(sft().objectives[0], batch, student=repeated(STUDENT_DIST, 1, 3))
    close(found, -(np.log(0.5) + np.log(0.3)) / 2)
    close(terms["entropy"], entropy(STUDENT_DIST))


# ---- host halves on a tiny model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """An environment with every policy's name."""
    plain = tiny.environment()
    return plain._replace(policies={**plain.policies, "initial": plain.live}, more=tiny.endless(2, 2))


def options(factory):
    """Sizes that all methods share, so that the sampler is compiled once."""
    return {sft: {}, gkd: {"group_size": 4, "lmbda": 1.0}}.get(factory, {"group_size": 4})


FACTORIES = (sft, grpo, dr_grpo, dapo, gspo, cispo, opd, gkd, opsd, sdft, sdpo)
names = lambda f: f.__name__


@functools.cache
def made(factory):
    return factory(**options(factory))


@functools.cache
def written(factory, number=0):
    """What a method collects from two questions of the tiny model, which is every policy but `teacher`."""
    method = made(factory)
    environment = tiny.environment(method, more=tiny.endless(2, 2))
    examples = tiny.TASK.train[2 * number : 2 * number + 2]
    rollouts, memory = method.collect(environment, examples, jax.random.key(3 * number), method.memory)
    assert memory is None
    return tuple(rollouts)


@pytest.mark.parametrize("factory", FACTORIES, ids=names)
def test_student_reads_the_question_alone(factory):
    rollouts = written(factory)
    batch = tiny.collected(made(factory), rollouts)
    contexts = batch.contexts["student"]
    groups = list(dict.fromkeys(r.group for r in rollouts))
    for row, group in enumerate(groups):
        example = next(r.example for r in rollouts if r.group == group)
        expected = tiny.tokenizer().apply_chat_template(
            list(question(example)), add_generation_prompt=True, return_dict=False
        )
        assert contexts.tokens[row][contexts.mask[row]].tolist() == expected
    assert len(contexts.tokens) == len(groups)


def test_teachers_read_the_solution(small):
    for factory in (opsd, sdft):
        for r in written(factory):
            assert r.example.solution in r.contexts["teacher"][-1]["content"]
            assert r.contexts["student"] == r.example.prompt
    unsolved = [dataclasses.replace(e, solution=None) for e in tiny.TASK.train[:2]]
    for method in (opsd(group_size=4), sdft(group_size=4)):
        rollouts, _ = method.collect(small._replace(verify=tiny.parity), unsolved, jax.random.key(0), None)
        assert [r.contexts["teacher"] for r in rollouts] == [None] * 8
    assert sdft(from_teacher=True).collect(small, unsolved, jax.random.key(0), None)[0] == []
    assert sft().collect(small, unsolved, jax.random.key(0), None)[0] == []


def test_sdft_from_teacher(small):
    method, examples = sdft(from_teacher=True, group_size=4, ema_rate=1.0), tiny.TASK.train[:2]
    rollouts, _ = method.collect(small, examples, jax.random.key(0), None)
    assert {r.source for r in rollouts} == {TEACHER}
    told = [r.contexts["teacher"] for r in rollouts[::4]]
    expected = host.sample(small.live, examples, jax.random.key(0), n=4, context=lambda e: told[examples.index(e)])
    assert [r.tokens for r in rollouts] == [r.tokens for r in expected]
    assert all(r.contexts["student"] == r.example.prompt != r.contexts["teacher"] for r in rollouts)


def row(text, reward, group=0, feedback=None):
    return Rollout(tiny.TASK.train[group], (), (), text, group, reward=reward, feedback=feedback)


def test_peers_never_include_self():
    lesson = peer_or_feedback()
    rows = [row("red", 1.0), row("green", 1.0), row("blue", 0.0), row("gold", 1.0, group=1), row("pink", 0.0, group=2)]
    told = [lesson(r, rows) for r in rows]
    assert [t and t[-1]["privileged"] for t in told] == ["green", "red", "red", None, None]
    # Equal texts are different rollouts.
    twins = [row("red", 1.0), row("red", 1.0)]
    assert host.solved_peer(twins[0], twins) is twins[1]


def test_feedback_only_without_a_peer():
    alone, peer = row("blue", 0.0, feedback="too large"), row("red", 1.0, feedback="never shown")
    said = lambda lesson, rows: [t and t[-1]["content"] for t in (lesson(r, rows) for r in rows)]
    assert "too large" in said(peer_or_feedback(), [alone])[0]
    assert said(peer_or_feedback(use_feedback=False), [alone]) == [None]
    first, second = said(peer_or_feedback(), [alone, peer])
    assert "red" in first and "too large" not in first and second is None
    assert "too large" in said(peer_or_feedback(feedback_beside_solution=True), [alone, peer])[0]
    thought = [row("blue", 0.0), row("<think>hm</think>red", 1.0)]
    assert "hm" not in said(peer_or_feedback(), thought)[0]
    assert "hm" in said(peer_or_feedback(thinking=True), thought)[0]


def test_collecting_is_a_function_of_the_key(small):
    for factory in (grpo, sdpo):
        again, _ = made(factory).collect(tiny.environment(made(factory)), tiny.TASK.train[:2], jax.random.key(0), None)
        assert tuple(again) == written(factory)


# ---- DAPO's host half -----------------------------------------------------------------------------------------------


class Alternating:
    """A verdict that is 1 for every second answer, and always 0 for examples whose key is even."""

    def __init__(self):
        self.count = 0

    def __call__(self, example, text):
        self.count += 1
        return Verdict(float(example.meta["key"] % 2 and self.count % 2))


def chosen(*keys):
    return [next(e for e in tiny.TASK.train if e.meta["key"] == key) for key in keys]


def test_dapo_replaces_constant_groups(small):
    supply = iter([chosen(2, 4), chosen(3, 5)])
    env = small._replace(verify=Alternating(), more=lambda: next(supply))
    rollouts, _ = dapo(group_size=4, overlong=0.0).collect(env, chosen(0, 1), jax.random.key(0), None)
    assert [r.group for r in rollouts] == [0] * 4 + [1] * 4  # renumbered, whole
    assert [r.example.meta["key"] for r in rollouts] == [1] * 4 + [3] * 4  # 5 is surplus
    assert [r.reward for r in rollouts].count(1.0) == 4
    batch = tiny.collected(made(dapo), rollouts)
    assert batch.valid.all()
    assert next(supply, None) is None


def test_dapo_refills_from_further_prompts_in_every_round(small):
    """With `rounds` the batch under way is attempted again; what replaces its groups is never that batch itself."""
    prompts = Prompts(tiny.TASK.train, 2, seed=0, rounds=2)
    drawn, more = [], lambda: drawn.append(prompts.more()) or drawn[-1]
    for _ in range(4):
        taken = prompts.take()
        supplied = len(drawn)
        env = small._replace(verify=Alternating(), more=more)
        rollouts, _ = dapo(group_size=4, overlong=0.0).collect(env, taken, jax.random.key(0), None)
        assert len({r.example.id for r in rollouts}) == 2  # no prompt twice, as two groups
        assert all(e not in taken for batch in drawn[supplied:] for e in batch)
    assert drawn


def test_dapo_gives_up(small):
    never = small._replace(verify=lambda *_: Verdict(0.0))
    with pytest.raises(host.RolloutError, match="only 0 of 2 groups .* 2 rounds"):
        dapo(group_size=4, rounds=2).collect(never, chosen(0, 1), jax.random.key(0), None)
    with pytest.raises(host.RolloutError, match="no further examples"):
        dapo(group_size=4).collect(never._replace(more=None), chosen(0, 1), jax.random.key(0), None)


def test_dapo_penalises_long_answers(small):
    env = small._replace(verify=Alternating())
    plain, _ = dapo(group_size=4, overlong=0.0).collect(env, chosen(1, 3), jax.random.key(0), None)
    env = small._replace(verify=Alternating())
    method = dapo(group_size=4, overlong=0.5, overlong_factor=2.0, overlong_filter=True)
    shaped, _ = method.collect(env, chosen(1, 3), jax.random.key(0), None)
    for before, after in zip(plain, shaped, strict=True):
        assert before.tokens == after.tokens
        assert after.reward == before.reward  # what the verifier said stays
        close(after.returns - before.returns, -2.0 * max(0.0, (len(after.tokens) - 4) / 4))
        assert after.trained == (None if after.finished else (False,) * 8)
    assert any(not r.finished for r in shaped)
    batch = tiny.collected(method, shaped)
    assert not batch.mask[~np.asarray(batch.finished)].any()


def test_dapo_counts_no_token_of_a_row_that_it_filters():
    """Such a row changes neither sum nor divisor: of 3 and 8 tokens, weighed +A and -A, a mean over the first 3 is left."""
    method, example = dapo(group_size=2, overlong=0.0, overlong_filter=True), tiny.TASK.train[0]
    logits = np.log(np.random.default_rng(0).dirichlet(np.ones(len(tiny.tokenizer())), (2, 8)))

    def loss(trained):
        rows = []
        for place, (tokens, filtered) in enumerate((((7, 8, 9), None), ((9,) * 8, trained))):
            sampled = tuple(float(logits[place, time, token]) for time, token in enumerate(tokens))
            contexts, reward = {"student": example.prompt}, float(place == 0)
            rows.append(Rollout(example, tokens, sampled, "", 0, reward=reward, contexts=contexts, trained=filtered))
        return float(tiny.loss(method.objectives[0], tiny.collected(method, rows), student=logits)[0])

    close(loss((False,) * 8), loss(None) * 11 / (3 - 8), rtol=1e-5)
    assert loss(None) > 0.1  # both rows: (3 - 8) A over 11 tokens


def test_written_rows_say_when_they_were_cut(small):
    example = tiny.TASK.train[0]
    make = lambda text: host.written(example, text, small.live, group=0, source=REFERENCE)
    assert make("red " * 7).finished
    assert make("red " * 7).tokens[-1] == tiny.tokenizer().eos_token_id
    cut = make("red " * 8)
    assert not cut.finished and len(cut.tokens) == 8


# ---- the whole device half on a tiny model --------------------------------------------------------------------------


@pytest.mark.parametrize("factory", slow_but((grpo, gkd, sdpo), FACTORIES), ids=names)
def test_one_update(factory):
    method = made(factory)
    parameters, networks = tiny.others(tiny.environment(method))
    update = make_update(method.objectives[0], networks, optax.sgd(0.1), tiny.SHAPES, token_mean)
    before = tiny.pretrained().params
    params = jax.tree.map(jnp.array, before)
    opt_state = optax.sgd(0.1).init(params)
    made_before = tiny.programs("update")
    for number in range(2):
        batch = tiny.collected(method, written(factory, number), 2)
        params, opt_state, outcome = update(params, opt_state, parameters, batch, jnp.asarray(number))
        assert outcome.finite and outcome.useful
        assert np.isfinite(outcome.loss) and outcome.grad_norm > 0
    assert tiny.programs("update") == made_before + 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
    assert all(jax.tree.leaves(moved))


def signals_and_loss(method, batch, views, live, others):
    """Signals and loss of a batch with these views."""
    names = {view.policy for view in views.values()}
    params = {**dict.fromkeys(names, others), "live": live}
    objective = method.objectives[0]
    sig = token_signals(views, objective.signals, dict.fromkeys(names, tiny.model()), params, batch)
    return tiny.reduced(objective, batch, sig)[0], sig


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def plain_question(rollout, rollouts):
    return question(rollout.example)


def test_same_reader_same_policy_is_exactly_zero():
    methods = {
        "opd": opd(),
        "opd full": opd(full_vocabulary=True),
        "gkd": gkd(beta=0.5),
        "gkd forward": gkd(beta=0.0),
        "opsd": opsd(lesson=plain_question),
        "opsd v1": opsd_v1(teacher_top_k=5, lesson=plain_question),
        "sdft": sdft(skip=0, lesson=plain_question),
        "sdpo": sdpo(top_k=5, lesson=plain_question),
        "sdpo trust": sdpo(trust=0.3, top_k=None, lesson=plain_question),
    }
    told = lambda r: r.read_by(**{name: question(r.example) for name in ("student", "teacher", "initial")})
    rows = [told(dataclasses.replace(r, group=i)) for i, r in enumerate(written(grpo)[::2])]
    batch, params = tiny.collected(methods["sdpo trust"], rows), tiny.pretrained().params

    # All methods read the same: one program for all of them.
    def signals(dist, token):
        return {name: method.objectives[0].signals(dist, token) for name, method in methods.items()}

    def losses(live, fixed):
        views = {"student": View(trainable=True), "teacher": View("teacher"), "initial": View("teacher")}
        networks = dict.fromkeys(("live", "teacher"), tiny.model())
        sig = token_signals(views, signals, networks, {"live": live, "teacher": fixed}, batch)
        return {name: tiny.reduced(m.objectives[0], batch, sig[name])[0] for name, m in methods.items()}, sig

    found, sig = jax.jit(jax.jacrev(losses, has_aux=True))(params, params)
    for name in methods:
        assert largest(found[name]) < 1e-5, name
    # The advantage compares with the sampler's log-probabilities, which agree up to rounding.
    own = sig.pop("opd")
    np.testing.assert_array_equal(own["teacher_logprobs"], own["logprobs"])
    close(own["teacher_logprobs"], batch.behavior_logprobs, atol=1e-5)
    for name, own in sig.items():
        # The trust region's teacher is normalised once more, which may round.
        size = 1e-12 if name == "sdpo trust" else 0.0
        assert largest(own["reverse_kl" if name == "opd full" else "divergence"]) <= size, name


def test_a_live_teacher_gets_no_gradient():
    method, batch, params = (
        sdpo(ema_rate=1.0, top_k=5),
        tiny.collected(made(sdpo), written(sdpo)),
        tiny.pretrained().params,
    )
    views = method.objectives[0].views
    # Negative control: a teacher with parameters of its own that is trained too.
    apart = {**views, "teacher": views["teacher"]._replace(policy="fixed", trainable=True)}
    of = lambda views: lambda live, fixed: signals_and_loss(method, batch, views, live, fixed)[0]
    stopped = jax.jit(jax.grad(of(views)))(params, params)
    student, teacher = jax.jit(jax.grad(of(apart), (0, 1)))(params, params)
    assert largest(jax.tree.map(jnp.subtract, stopped, student)) < 1e-6
    assert largest(teacher) > 1e-4


# ---- options that the papers' ablations need --------------------------------------------------------------------------


def test_sdpo_mixture_counts_all_rows():
    """Eq. 3 mixes advantages: with one taught row of four the distillation has a quarter of its weight, not all."""
    batch = speaks_to(tiny.batch([[0, 1], [2, 0], [1, 1], [2, 2]], reward=[1.0, 0.0, 0.0, 1.0]), [1, 0, 0, 0])
    alone = taught_gradient(sdpo(), batch)[0][0]
    reward = taught_gradient(grpo(normalised=False, reduce=token_mean), batch)[0][0]
    close(taught_gradient(sdpo(rl_weight=0.9), batch)[0][0], 0.9 * reward + 0.1 * alone / 4)


def test_sdpo_advantage_clip():
    """No entry's advantage exceeds the bound; a bound that nothing reaches is the reverse KL."""
    student, teacher = tiny.log(0.6, 0.3, 0.1), tiny.log(0.001, 0.299, 0.7)
    of = lambda **how: gradient(sdpo(alpha=1.0, top_k=None, **how), student, teacher=teacher)
    close(of(advantage_clip=50.0), of())
    p, gap = np.exp(np.asarray(student)), np.clip(np.asarray(teacher - student), -2.0, 2.0)
    close(of(advantage_clip=2.0), -p * (gap - p @ gap))
    assert np.abs(of(advantage_clip=2.0) - of()).max() > 0.1
    row = lambda **how: expected_gradient(sdpo(alpha=1.0, sampled_token=True, **how), student, teacher)
    close(row(advantage_clip=2.0), of(advantage_clip=2.0), atol=1e-5)
    with pytest.raises(ValueError, match="advantage_clip=5 needs alpha=1"):
        sdpo(advantage_clip=5.0)
    assert sdpo(**TEST_TIME).objectives[0].views["teacher"].told


def test_a_success_may_be_shown_itself():
    right, peer, wrong = row("red", 1.0), row("blue", 1.0), row("green", 0.0)
    shown = lambda lesson, r: lesson(r, [right, peer, wrong])[-1]["content"]
    assert "red" in shown(peer_or_feedback(shown_itself=True), right)
    assert "blue" in shown(peer_or_feedback(shown_itself=True), peer)
    assert "red" in shown(peer_or_feedback(shown_itself=True), wrong)
    assert "blue" in shown(peer_or_feedback(), right) and "red" in shown(peer_or_feedback(), peer)
