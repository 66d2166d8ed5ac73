"""Methods that weigh tokens by what teacher and student say: the papers' numbers, limits, stopped gradients.

Section numbers are those of each paper's test list in the design notes: gradients in closed form or by enumeration.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from method_checks import (
    assert_same,
    close,
    expected_gradient,
    fixture,
    loss_and_gradient,
    slopes,
    token_gradients,
    trace_variance,
)
from networks import unoptimised

from sdjax.collect.annotators import Span, ablated
from sdjax.collect.lessons import private_note
from sdjax.collect.memory import NO_REWARDS, OPEN_GATE, entropy_gated, whitened
from sdjax.errors import MethodError
from sdjax.kernels import credit
from sdjax.kernels.advantages import group_advantage
from sdjax.kernels.distributions import normalise
from sdjax.kernels.divergences import jsd, reverse_kl
from sdjax.kernels.estimators import score_coefficient
from sdjax.kernels.policy_gradient import clipped_surrogate
from sdjax.kernels.reductions import sequence_mean, token_mean
from sdjax.kernels.weights import entropy_gate, likelihood_ratio, window_minimum
from sdjax.methods.antisd import antisd
from sdjax.methods.dasd import dasd
from sdjax.methods.dash import dash
from sdjax.methods.egrsd import egrsd
from sdjax.methods.grpo import grpo
from sdjax.methods.iw_opd import iw_opd
from sdjax.methods.msd import msd
from sdjax.methods.opd import opd
from sdjax.methods.opsd import opsd
from sdjax.methods.power_opd import power_opd
from sdjax.methods.pw_opsd import pw_opsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdft import sdft
from sdjax.methods.sdpo import sdpo
from sdjax.methods.topd import topd
from sdjax.methods.trace import trace
from sdjax.methods.vopd import vopd


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


PLAIN = grpo(reduce=token_mean)
WIDE = grpo(reduce=token_mean, clip=(0.2, 0.28))


def mean_under(student, values):
    return float(np.exp(np.asarray(student, np.float64)) @ np.asarray(values, np.float64))


# ---- vOPD -----------------------------------------------------------------------------------------------------------

P, Q = tiny.log(0.7, 0.2, 0.1), tiny.log(0.5, 0.3, 0.2)
REVERSE = np.asarray([0.175945, -0.098118, -0.077827])  # the gradient of KL(student || teacher)
BASELINES = {
    "opd": vopd(baseline="none"),
    "value": vopd(),
    "top 1": vopd(top_k=1),
    "top 2": vopd(top_k=2),
    "top 3": vopd(top_k=3),
    "optimal": vopd(baseline="optimal"),
}


def vopd_advantages(method, student=P, teacher=Q):
    read = lambda token: method.objectives[0].signals({"student": student, "teacher": teacher}, token)
    sig = jax.vmap(read)(jnp.arange(student.size))
    return np.asarray(sig["teacher_logprobs"] - sig["logprobs"] - sig["baseline"])


def test_vopd_advantages():
    close(vopd_advantages(BASELINES["opd"]), [-0.336472, 0.405465, 0.693147])
    close(vopd_advantages(BASELINES["value"]), [-0.251349, 0.490588, 0.778270])
    close(mean_under(P, vopd_advantages(BASELINES["value"])), 0.0, atol=1e-7)
    shift = lambda name: vopd_advantages(BASELINES[name]) - vopd_advantages(BASELINES["opd"])
    close(shift("value"), 0.085123)
    close(shift("top 2"), 0.053814)
    close(mean_under(P, vopd_advantages(BASELINES["top 2"])), -0.031309)
    close(shift("top 1"), 0.0, atol=1e-7)
    close(shift("top 3"), shift("value"))


@pytest.mark.parametrize("name", BASELINES)
def test_vopd_is_unbiased_whatever_the_baseline(name):
    close(expected_gradient(BASELINES[name], P, Q), REVERSE)
    close(token_gradients(BASELINES[name], Q, Q), 0.0, atol=1e-7)


def test_top_k_distillation_is_another_gradient():
    read = sdpo(alpha=1.0, top_k=2, rest=False).objectives[0].signals
    value = lambda dist: read({"student": dist, "teacher": Q}, jnp.asarray(0))["divergence"]
    close(tiny.logit_gradient(value, P), (0.128236, -0.128236, 0.0))


def test_vopd_stops_the_whole_advantage():
    score = np.eye(3) - np.exp(np.asarray(P))
    for method in BASELINES.values():
        close(token_gradients(method, P, Q), -vopd_advantages(method)[:, None] * score)
    # The released code's plain OPD: the student's term is live.  Same mean, other tokens, the sampled one the wrong way.
    leaked = token_gradients(vopd(baseline="none", live_reward=True), P, Q)
    close(token_gradients(BASELINES["opd"], P, Q)[1], (0.283826, -0.324372, 0.040547))
    close(leaked[1], (-0.416174, 0.475628, -0.059453))
    close(np.exp(P) @ leaked, REVERSE)
    close(token_gradients(vopd(live_reward=True), P, Q), -(vopd_advantages(BASELINES["value"]) - 1)[:, None] * score)
    # Negative control: a live baseline, too, changes the gradient.
    live = lambda z: -jnp.sum(reverse_kl(normalise(z), Q) + 0.4) * normalise(z)[1]
    stopped = lambda z: -jnp.sum(reverse_kl(P, Q) + 0.4) * normalise(z)[1]
    assert np.abs(jax.grad(live)(P) - jax.grad(stopped)(P)).max() > 0.1


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.066319, 0.095589, 0.015859)),
        ((0.9, 0.05, 0.05), (0.02, 0.9, 0.08), (0.558, 4.064, 0.255)),
        ((0.25,) * 4, (0.4, 0.3, 0.2, 0.1), (0.146648, 0.135526, 0.135526)),
    ],
)
def test_vopd_variance(student, teacher, expected):
    # The value baseline may raise the variance; the optimal one is the least of all.
    student, teacher = tiny.log(*student), tiny.log(*teacher)
    found = [
        trace_variance(token_gradients(BASELINES[n], student, teacher), student) for n in ("opd", "value", "optimal")
    ]
    close(found, expected, rtol=2e-3 if expected[1] > 1 else 2e-5)
    assert found[2] <= min(found) + 1e-7


def test_vopd_variance_is_quadratic_in_the_baseline():
    close(credit.optimal_baseline(P, Q), 0.331203)
    close(trace_variance(token_gradients(vopd(baseline="none", live_reward=True), P, Q), P), 0.221612, rtol=2e-5)
    close(credit.optimal_baseline(tiny.log(0.9, 0.05, 0.05), tiny.log(0.02, 0.9, 0.08)), 1.280, atol=5e-4)
    uniform = tiny.log(*(0.25,) * 4)
    close(credit.optimal_baseline(uniform, tiny.log(0.4, 0.3, 0.2, 0.1)), -0.121777)
    first, second = tiny.log(0.8, 0.2), tiny.log(0.3, 0.7)
    p, (r1, r2) = 0.8, np.asarray(second - first)
    of = lambda name: trace_variance(token_gradients(BASELINES[name], first, second), first)
    close(of("value"), 2 * p * (1 - p) * (1 - 2 * p) ** 2 * (r1 - r2) ** 2, rtol=1e-5)
    close(of("opd"), 2 * p * (1 - p) * (r1 * (1 - p) + r2 * p) ** 2, rtol=1e-5)
    close(of("optimal"), 0.0, atol=1e-6)
    close(credit.optimal_baseline(jnp.asarray([0.0, -1e30]), first), 0.0)


def test_vopd_without_baseline_is_opd():
    assert_same(vopd(baseline="none"), opd(group_size=1), *fixture())


# ---- RLRT -----------------------------------------------------------------------------------------------------------


def rlrt_batch(student, teacher, reward=(1.0,), credited=True):
    """A row per reward, each a group of its own, so that its advantage is its reward."""
    student, teacher = (jnp.atleast_2d(jnp.log(jnp.asarray(x, jnp.float32))) for x in (student, teacher))
    rows = len(reward)
    old = {"old_logprobs": jnp.broadcast_to(student, (rows, student.shape[1]))}
    old["old_teacher"] = jnp.broadcast_to(teacher, old["old_logprobs"].shape)
    zeros = jnp.zeros(old["old_logprobs"].shape)
    flags = jnp.broadcast_to(jnp.asarray(credited), (rows,))
    groups = jnp.arange(rows)
    return tiny.batch(zeros, behavior=old["old_logprobs"], reward=reward, group=groups, credited=flags, **old)


@pytest.mark.parametrize(
    ("student", "teacher", "mix", "eps", "expected"),
    [
        (0.2, 0.8, 0.5, 0.2, 0.9),
        (0.2, 0.8, 0.5, 1.0, 0.625),
        (0.6, 0.3, 0.5, 0.2, 1.1),
        (0.6, 0.3, 0.5, 1.0, 1.5),
        (0.6, 0.3, 1.0, 1.0, 2.0),
    ],
)
def test_rlrt_hand_values(student, teacher, mix, eps, expected):
    method = rlrt(mix=mix, ratio_eps=eps)
    close(slopes(method, rlrt_batch([student], [teacher])), expected)
    close(slopes(method, rlrt_batch([student], [teacher], credited=False)), 1.0)  # wrong rows, lone successes
    close(slopes(method, rlrt_batch([student], [teacher], reward=[-1.0], credited=False)), -1.0)


def test_rlrt_ratio():
    student, teacher = jnp.log(jnp.asarray([0.2, 0.6])), jnp.log(jnp.asarray([0.8, 0.3]))
    reversed_, forward = likelihood_ratio(student, teacher), likelihood_ratio(teacher, student)
    close(reversed_, (0.25, 2.0))
    close(reversed_ * forward, 1.0)
    clipped = likelihood_ratio(student, teacher, eps=0.2) * likelihood_ratio(teacher, student, eps=0.2)
    assert np.abs(clipped - 1.0).max() > 0.01
    # The student's mean of its own ratio is one plus chi squared, the teacher's ratio has mean one.
    close(mean_under(P, likelihood_ratio(P, Q)), 1 + float(((np.exp(P) - np.exp(Q)) ** 2 / np.exp(Q)).sum()))
    close(mean_under(P, likelihood_ratio(Q, P)), 1.0)


def test_rlrt_bounds():
    student = jnp.exp(-jnp.linspace(0.1, 9.0, 12))
    for mix, eps in ((0.5, 0.2), (0.5, 1.0), (1.0, 1.0)):
        found = slopes(rlrt(mix=mix, ratio_eps=eps), rlrt_batch(student, student[::-1]))
        assert (np.abs(found - 1.0) <= mix * eps + 1e-5).all() and (found >= -1e-6).all()
    batch = rlrt_batch(student, student[::-1], reward=[1.0, 1.0]).replace(group=jnp.zeros(2, jnp.int32))
    close(slopes(rlrt(), batch), 0.0)  # all are right: no advantage


S, SUCCESS = tiny.log(0.5, 0.3, 0.2), np.asarray([0.8, 0.4, 0.1])
BAYES = normalise(S + jnp.log(jnp.asarray(SUCCESS)))


def ideal_teacher_gradient(mix, eps=100.0):
    """The expected ascent direction by enumeration of tokens and outcomes, with the teacher that knows what succeeds."""
    mean = mean_under(S, SUCCESS)
    spread = np.sqrt(mean * (1 - mean))
    method = rlrt(mix=mix, ratio_eps=eps, tis_cap=None)

    def score_weighted(reward, credited):
        # On a one-token row the loss is -A_t log p(y): its logit gradient at token v is -A_v (e_v - p).
        batches = [rlrt_batch([np.exp(S[v])], [np.exp(BAYES[v])], [reward], credited) for v in range(3)]
        return np.asarray([slopes(method, b)[0, 0] for b in batches])

    advantage = SUCCESS * score_weighted((1 - mean) / spread, True) + (1 - SUCCESS) * score_weighted(
        -mean / spread, False
    )
    chances = np.exp(np.asarray(S, np.float64))
    return (chances * advantage) @ (np.eye(3) - chances), advantage


def test_rlrt_lemma_and_ideal_teacher():
    mean = mean_under(S, SUCCESS)
    close(mean, 0.54)
    close(np.exp(BAYES), (0.740741, 0.222222, 0.037037))
    close(S - BAYES, np.log(mean) - np.log(SUCCESS), atol=1e-5)
    close(S - BAYES, (-0.393043, 0.300105, 1.686399), atol=1e-5)
    informative = mean_under(S, np.abs(SUCCESS - mean))
    close(informative, 0.26)
    close(2 * reverse_kl(S, BAYES), 0.461580, rtol=1e-5)
    assert informative**2 <= 2 * reverse_kl(S, BAYES)
    close(likelihood_ratio(S, BAYES), (0.675, 1.35, 5.4), rtol=1e-5)
    close(mean_under(S, likelihood_ratio(S, BAYES)), 1.8225, rtol=1e-5)
    towards_success = np.exp(S) * (SUCCESS - mean)
    close(towards_success, (0.13, -0.042, -0.088))
    for mix, coefficient in ((0.0, 2.006431), (0.5, 1.544952), (1.0, 1.083473)):
        close(ideal_teacher_gradient(mix)[0], coefficient * towards_success, atol=1e-5)
    # Clipping breaks the identity: the directions part, by these factors.
    ratios = ideal_teacher_gradient(0.5, eps=1.0)[0] / towards_success
    close(ratios, (1.666, 1.321, 1.830), atol=6e-4)


def test_rlrt_limits():
    batch, logits, teacher = fixture(on_policy=False)
    extras = {"old_logprobs": batch.behavior_logprobs, "old_teacher": -jnp.ones((4, 5))}
    batch = batch.replace(extras={**extras, "credited": jnp.asarray([True, False, False, False])})
    for same in (rlrt(mix=0.0), rlrt(ratio_eps=0.0), rlrt(tis_cap=None, mix=0.0)):
        assert_same(same, WIDE, batch, logits, teacher)
    equal = batch.replace(extras={**batch.extras, "old_teacher": batch.behavior_logprobs})
    assert_same(rlrt(), WIDE, equal, logits, teacher)
    found = loss_and_gradient(rlrt(), batch, logits, teacher)[1]
    plain = loss_and_gradient(WIDE, batch, logits, teacher)[1]
    assert np.abs(found - plain)[0].max() > 1e-3
    np.testing.assert_array_equal(found[1:], plain[1:])
    # With a decay: half of the mix after half of the batches, GRPO at its end.
    assert_same(rlrt(mix_decay=30), rlrt(mix=0.25), batch, logits, teacher, step=15)
    assert_same(rlrt(mix_decay=30), WIDE, batch, logits, teacher, step=30)


@pytest.mark.parametrize(("student", "teacher", "reward", "expected"), [(0.2, 0.8, 1.0, 1.1), (0.2, 0.8, -1.0, -0.9)])
def test_rlrt_toward_the_teacher_is_rlsd(student, teacher, reward, expected):
    """The advantage reweighting of VPD's note: `A ((1-a) + a clip(exp(sign(A) (log q - log p)), 1-e, 1+e))`, all rows."""
    toward = rlrt(toward=True, ratio_eps=0.2, mix=0.5)
    close(slopes(toward, rlrt_batch([student], [teacher], reward=[reward])), expected)
    # On the other side of the clip both directions' weights are their mirror image around 1.
    close(slopes(rlrt(ratio_eps=0.2), rlrt_batch([student], [teacher], reward=[reward])), 2 * reward - expected)
    # Within the clip they are the ratio and its inverse.
    wide = {"ratio_eps": 100.0, "mix": 1.0}
    found = slopes(rlrt(toward=True, **wide), rlrt_batch([0.4], [0.5], reward=[reward]))
    close(found * slopes(rlrt(**wide), rlrt_batch([0.4], [0.5], reward=[reward])), 1.0, atol=1e-5)


def test_rlrt_group_advantage_is_the_unbiased_one():
    batch = tiny.batch(jnp.zeros((8, 1)), reward=[1, 1, 0, 0, 0, 0, 0, 0], behavior=-jnp.ones((8, 1)))
    flags = {"old_logprobs": -jnp.ones((8, 1)), "old_teacher": -jnp.ones((8, 1)), "credited": jnp.zeros(8, bool)}
    found = slopes(rlrt(), batch.replace(extras=flags)).ravel()
    close(found, [1.620185] * 2 + [-0.540062] * 6, atol=5e-6)  # 1.732051 and -0.577350 by the population's deviation


def test_rlrt_ratio_is_a_constant():
    found = jax.grad(lambda x: likelihood_ratio(x, x - 1.0).sum())(jnp.ones((1, 3)))
    np.testing.assert_array_equal(found, 0.0)
    # Negative control: differentiated, the same credit has another gradient.
    live = jax.grad(lambda x: -jnp.sum((0.5 + 0.5 * jnp.exp(x - 0.5)) * jnp.exp(x - 1.0)))(jnp.ones(1))
    stopped = jax.grad(lambda x: -jnp.sum((0.5 + 0.5 * jnp.exp(0.5)) * jnp.exp(x - 1.0)))(jnp.ones(1))
    assert np.abs(live - stopped).max() > 0.1


# ---- EGRSD ----------------------------------------------------------------------------------------------------------


def gates(method, entropies, mask=None):
    """The weights of a row whose teacher gives the student's own log-probabilities."""
    entropies = jnp.atleast_2d(jnp.asarray(entropies, jnp.float32))
    behavior = -jnp.ones(entropies.shape)
    rows = entropies.shape[0]
    batch = tiny.batch(jnp.zeros(entropies.shape), behavior=behavior, mask=mask, advantage=jnp.ones(rows))
    return slopes(method, batch, teacher_logprobs=behavior, teacher_entropy=entropies)


def test_egrsd_maximum_is_the_raw_one():
    entropies = (0.2, 2.0, 1.6, 1.2, 0.1)
    close(gates(egrsd(), entropies), [[0.97, 0.70, 0.76, 0.82, 0.985]])
    close(gates(egrsd(window=1), entropies), [[0.97, 0.76, 0.82, 0.985, 0.985]])
    # Algorithm 1 takes the maximum after the window's minimum: looking ahead then lowers weights.
    close(gates(egrsd(window=1, windowed_maximum=True), entropies), [[0.9625, 0.70, 0.775, 0.98125, 0.98125]])
    previous = gates(egrsd(), entropies)
    for window in range(1, 5):
        wider = gates(egrsd(window=window), entropies)
        assert (wider >= previous - 1e-6).all()
        previous = wider


def test_egrsd_entropies():
    teacher = tiny.log((0.98, 0.01, 0.01), (0.6, 0.3, 0.1), (1 / 3,) * 3, (0.9, 0.05, 0.05))
    read = egrsd().objectives[0].signals
    found = read({"student": teacher, "teacher": teacher}, jnp.zeros(4, int))["teacher_entropy"]
    close(found, (0.111902, 0.897946, 1.098612, 0.394398))
    close(gates(egrsd(), found), [[0.969443, 0.754796, 0.700000, 0.892301]])
    close(gates(egrsd(strength=1.0), found), [[0.898142, 0.182655, 0.100000, 0.641004]])
    close(gates(egrsd(), (0.5, 0.9)), [[1 - 0.15, 1 - 0.27]])  # below 1 nat nothing is divided
    for strength in (0.3, 0.9, 1.0):
        weights = gates(egrsd(strength=strength), np.linspace(0.0, 5.0, 11))
        assert (weights >= max(0.1, 1 - strength) - 1e-6).all() and (weights <= 1.0 + 1e-6).all()


@pytest.mark.parametrize(
    ("sign", "teacher", "student", "expected"),
    [(1, 0.9, 0.3, 1.2), (-1, 0.9, 0.3, 0.8), (-1, 0.2, 0.4, 1.2), (1, 0.5, 0.4, 1.2), (0, 0.5, 0.4, 1.0)],
)
def test_egrsd_magnitudes(sign, teacher, student, expected):
    batch = tiny.batch([[0]], behavior=[[np.log(student)]], advantage=jnp.asarray([float(sign)]))
    found = slopes(egrsd(strength=0.0), batch, teacher_logprobs=[[np.log(teacher)]], teacher_entropy=[[0.0]])
    close(found, sign * expected)
    assert np.sign(found) == sign


def test_egrsd_limits():
    batch, logits, teacher = fixture(advantage=jnp.asarray([1.0, -0.5, 0.3, 0.0]))
    sig = egrsd().objectives[0].signals({"student": normalise(logits), "teacher": teacher}, batch.completion)
    rlsd = lambda eps: likelihood_ratio(
        sig["teacher_logprobs"], sig["logprobs"], eps=eps, sign=jnp.sign(batch.extras["advantage"])[:, None]
    )
    advantage, taught = batch.extras["advantage"][:, None], batch.contexts["teacher"].valid[:, None]
    now = {"teacher_logprobs": sig["teacher_logprobs"], "teacher_entropy": sig["teacher_entropy"]}
    wanted = lambda eps: np.asarray(batch.mask * advantage * jnp.where(taught, rlsd(eps), 1.0))
    for eps in (0.2, 0.0):
        close(slopes(egrsd(strength=0.0, ratio_eps=eps), batch, logprobs=sig["logprobs"], **now), wanted(eps))
    close(wanted(0.0), batch.mask * advantage)  # REINFORCE
    assert_same(egrsd(window=0, windowed_maximum=True), egrsd(), batch, logits, teacher)
    # Teacher and student agree: only the gate is left.
    equal = slopes(egrsd(), batch, **{**now, "teacher_logprobs": batch.behavior_logprobs})
    gate = entropy_gate(sig["teacher_entropy"], batch.mask & taught)
    close(equal, batch.mask * advantage * jnp.where(taught, gate, 1.0))


def test_egrsd_gradient_and_padding():
    batch, logits, teacher = fixture(taught=True, advantage=jnp.asarray([1.0, -0.5, 0.3, 2.0]))
    _, found = loss_and_gradient(egrsd(window=1), batch, logits, teacher)
    sig = egrsd().objectives[0].signals({"student": normalise(logits), "teacher": teacher}, batch.completion)
    now = {"teacher_logprobs": sig["teacher_logprobs"], "teacher_entropy": sig["teacher_entropy"]}
    weighted = slopes(egrsd(window=1), batch, logprobs=sig["logprobs"], **now)
    score = jax.nn.one_hot(batch.completion, 7) - jax.nn.softmax(logits)
    close(found, -weighted[..., None] * score / batch.mask.sum())
    # Negative control: a live ratio has another gradient.
    live = lambda z: -jnp.sum(jnp.exp(teacher[0, 0, 0] - normalise(z)[0]) * normalise(z)[0])
    stopped = lambda z: -jnp.sum(jnp.exp(teacher[0, 0, 0] - normalise(logits[0, 0])[0]) * normalise(z)[0])
    assert np.abs(jax.grad(live)(logits[0, 0]) - jax.grad(stopped)(logits[0, 0])).max() > 1e-3
    # Garbage entropies outside the mask enter neither the maximum nor a window.
    entropies = np.asarray([[0.5, 1.5, 99.0], [0.2, 99.0, 99.0]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)
    padded, short = gates(egrsd(window=2), entropies, mask), gates(egrsd(window=2), entropies[:1, :2])
    close(padded[0, :2], short[0])
    assert not padded[:, 2].any()


def test_egrsd_line_is_above_the_hyperbola():
    a = 3.0
    hyperbola, line = (lambda h: 1 / (1 + a * h)), (lambda h: 1 - a / (1 + a) * h)
    entropies = np.linspace(0.0, 1.0, 9)
    found = gates(egrsd(strength=a / (1 + a)), entropies)[0]
    close(found, line(entropies))
    close(found[[0, -1]], hyperbola(entropies[[0, -1]]))
    assert (found[1:-1] > hyperbola(entropies[1:-1])).all()


def test_egrsd_running_moments():
    rewards, memory, seen = np.random.default_rng(0).uniform(0.0, 1.5, (6, 4)), NO_REWARDS, []
    for step, batch in enumerate(rewards):
        found, memory = whitened(batch.tolist(), memory, 2)
        expected = batch - 0.5 if step < 2 else (batch - np.mean(seen)) / np.std(seen, ddof=1)
        close(found, expected, rtol=1e-6)
        seen += batch.tolist()
    assert memory["count"] == 24 and memory["steps"] == 6
    assert whitened([1.4, 0.0], {"steps": 10, "count": 10, "mean": 0.0, "squares": 0.0}, 10)[0] == [1.4, 0.0]


# ---- DASD -----------------------------------------------------------------------------------------------------------

ENTROPIES, GAPS = (0.1, 0.2, 0.3, 2.0, 1.5), (0.5, -0.2, 0.1, -1.0, 0.7)


def dasd_bonus(method=None, entropies=ENTROPIES, gaps=GAPS, **rest):
    """What is added to an advantage of 0, by token."""
    return dasd_slopes(method or dasd(beta=1.0), 0.0, entropies, gaps, **rest)


def dasd_slopes(method, reward, entropies=ENTROPIES, gaps=GAPS, mask=None):
    entropies, gaps = (jnp.atleast_2d(jnp.asarray(x, jnp.float32)) for x in (entropies, gaps))
    behavior = -jnp.ones(gaps.shape)
    batch = tiny.batch(jnp.zeros(gaps.shape), behavior=behavior, reward=[reward] * len(gaps), mask=mask)
    batch = batch.replace(group=jnp.arange(len(gaps)))
    return slopes(method, batch, teacher_logprobs=behavior + gaps, entropy=entropies)


def test_dasd_worked_example():
    close(dasd_bonus(), [[0.482575, -0.135309, 0.058351, 0.718185, 0.111983]], atol=5e-6)
    close(dasd_slopes(dasd(beta=0.5), 1.0), [[1.241287, 0.932346, 1.029176, 1.359092, 1.055991]], atol=5e-6)
    close(dasd_slopes(dasd(beta=0.5), -1.0), [[-0.758713, -1.067654, -0.970824, -0.640908, -0.944009]], atol=5e-6)
    scaled = np.asarray([1, -0.4, 0.2, -2, 1.4])
    router = np.asarray([0.965150, 0.954645, 0.941069, -0.491195, 0.133605])
    gate = 1 / (1 + np.exp(1 - np.abs(scaled)))
    close(gate, (0.5, 0.354344, 0.310026, 0.731059, 0.598688))
    close(np.abs(scaled).mean(), 1.0)
    close(dasd_bonus(), [router * gate * scaled], atol=5e-6)
    assert (np.abs(router * gate) < 1).all()
    # The other reading of the threshold repels most tokens.
    other = np.asarray([0.107, -0.027, -0.160, -0.985, -0.944])
    close(dasd_bonus(dasd(beta=1.0, repelled=0.8)), [other * gate * scaled], atol=2e-3)


def test_dasd_symmetries():
    plain = dasd_bonus()
    shifted = 3.0 * np.asarray(ENTROPIES) + 0.7
    close(dasd_bonus(entropies=shifted), plain, atol=1e-4)
    close(dasd_bonus(gaps=5.0 * np.asarray(GAPS)), plain, atol=1e-5)
    close(dasd_bonus(gaps=-np.asarray(GAPS)), -plain)
    np.testing.assert_array_equal(dasd_bonus(entropies=(1.0,) * 5), 0.0)  # no spread: no direction, no NaN
    np.testing.assert_array_equal(dasd_bonus(gaps=(0.0,) * 5), 0.0)
    # At the threshold there is no direction; sure tokens are attracted, unsure ones repelled.
    found = dasd_bonus(entropies=(0.0, 1.0, 2.0, 3.0, 4.0), gaps=(1.0,) * 5, method=dasd(beta=1.0, repelled=0.5))
    close(found[0, 2], 0.0)
    assert (found[0, :2] > 0).all() and (found[0, 3:] < 0).all()
    close(
        found / found[0, 0],
        dasd_bonus(entropies=(0.0, 1.0, 2.0, 3.0, 4.0), gaps=(2.0,) * 5, method=dasd(beta=1.0, repelled=0.5))
        / found[0, 0],
    )


def test_dasd_statistics_are_per_row():
    garbage = lambda x, fill: np.stack([[*x, fill], [fill] * (len(x) + 1)])
    mask = jnp.asarray([[True] * 5 + [False], [True] * 6])
    found = dasd_bonus(entropies=garbage(ENTROPIES, 7.0), gaps=garbage(GAPS, 9.0), mask=mask)
    close(found[0, :5], dasd_bonus()[0], atol=5e-6)
    assert found[0, 5] == 0.0


def test_dasd_limits():
    for on_policy in (True, False):
        assert_same(dasd(beta=0.0), PLAIN, *fixture(on_policy=on_policy))
    batch, logits, _ = fixture()
    assert_same(dasd(), PLAIN, batch, logits, normalise(logits))  # the teacher has nothing to add
    found = assert_same(dasd(), dasd(), *fixture())
    assert np.abs(found - loss_and_gradient(PLAIN, *fixture())[1]).max() > 1e-4
    # Rows without a lesson are plain GRPO.
    np.testing.assert_array_equal(found[2], loss_and_gradient(PLAIN, *fixture())[1][2])


def test_dasd_gap_is_not_centred():
    gap = Q - P
    close(mean_under(P, gap), -reverse_kl(P, Q))


def test_dasd_bonus_is_a_constant():
    batch, logits, teacher = fixture(taught=True)
    _, found = loss_and_gradient(dasd(beta=2.0), batch, logits, teacher)
    sig = dasd().objectives[0].signals({"student": normalise(logits), "teacher": teacher}, batch.completion)
    advantage = slopes(
        dasd(beta=2.0),
        batch,
        teacher_logprobs=sig["teacher_logprobs"],
        entropy=sig["entropy"],
        logprobs=sig["logprobs"],
    )
    score = jax.nn.one_hot(batch.completion, 7) - jax.nn.softmax(logits)
    close(found, -advantage[..., None] * score / batch.mask.sum(), atol=1e-5)


# ---- AntiSD ---------------------------------------------------------------------------------------------------------

LOGITS, INFORMED = jnp.asarray([0.0, 1.0, -1.0]), tiny.log(0.7, 0.2, 0.1)
BONUS = {-20: 0.346574, -2: 0.283110, -1: 0.189943, 0: 0.0, 1: -0.310057, 2: -0.716890, 10: -4.653449}


def antisd_slopes(method, log_ratios, reward=0.0, gate=1.0, behavior=None):
    log_ratios = jnp.atleast_2d(jnp.asarray(log_ratios, jnp.float32))
    behavior = -jnp.ones(log_ratios.shape) if behavior is None else behavior
    rows = len(log_ratios)
    batch = tiny.batch(jnp.zeros(log_ratios.shape), behavior=behavior, reward=[reward] * rows, group=jnp.arange(rows))
    return slopes(method, batch.replace(extras={"log_ratio": log_ratios, "gate": jnp.full(rows, gate)}))


def test_antisd_bonus():
    u = jnp.asarray(list(BONUS), jnp.float32)
    close(antisd_slopes(antisd(coef=1.0), u), [list(BONUS.values())], atol=2e-6)
    close(antisd_slopes(antisd(), u), [0.5 * np.asarray(list(BONUS.values()))], atol=2e-6)
    phi = lambda u: -score_coefficient(u, 0.5)
    assert phi(jnp.zeros(())) == 0.0
    close(jax.grad(phi)(0.0), 0.25)
    close(jax.vmap(jax.grad(phi))(u), 0.5 * jax.nn.sigmoid(u))
    close(phi(u) - phi(-u), u / 2, atol=1e-5)
    np.testing.assert_array_equal(np.sign(phi(u)), np.sign(u))
    small = jnp.asarray([1e-3, -1e-3])
    close(phi(small), small / 4, atol=1e-6)
    close(antisd_slopes(antisd(), [-80.0]), 0.173287)  # the bonus is bounded, the penalty is not


def test_antisd_ascends_the_divergence():
    student = normalise(LOGITS)
    close(jnp.exp(student), (0.244728, 0.665241, 0.090031))
    close(jsd(student, INFORMED, 0.5), 0.123298)
    wanted = tiny.logit_gradient(lambda dist: jsd(dist, INFORMED, 0.5), LOGITS)
    close(wanted, (-0.095207, 0.103055, -0.007848))
    bonus = antisd_slopes(antisd(coef=1.0), INFORMED - student)[0]
    chances = np.exp(np.asarray(student, np.float64))
    direction = lambda a: (chances * a) @ (np.eye(3) - chances)
    close(direction(bonus), wanted)
    close(direction(bonus + 7.0), wanted, atol=1e-5)
    # beta 1 ascends reverse KL, a negative coefficient descends it: the paper's baseline.
    reverse = antisd_slopes(antisd(coef=1.0, beta=1.0), INFORMED - student)[0]
    close(direction(reverse), (-0.387599, 0.445028, -0.057429))
    close(antisd_slopes(antisd(coef=-1.0, beta=1.0), INFORMED - student)[0], INFORMED - student)
    # On sampled tokens the bonus has a positive mean, a push towards whatever was sampled.
    middle = jnp.logaddexp(student, INFORMED) - jnp.log(2.0)
    close(chances @ bonus, 0.060230)
    close(chances @ bonus, reverse_kl(student, middle) / 2)
    close(chances @ np.asarray(INFORMED - student), -reverse_kl(student, INFORMED))


def test_antisd_is_additive():
    u = [1.0, -1.0]
    close(antisd_slopes(antisd(), u, reward=1.0), 1.0 + antisd_slopes(antisd(), u))  # also where all advantages are 0
    np.testing.assert_array_equal(antisd_slopes(antisd(), u, reward=1.0, gate=0.0), 1.0)


def test_antisd_limits():
    batch, logits, teacher = fixture(on_policy=False)
    extras = {"log_ratio": jnp.linspace(-2.0, 2.0, 20).reshape(4, 5), "gate": jnp.ones(4)}
    batch = batch.replace(extras=extras)
    assert_same(antisd(coef=0.0), PLAIN, batch, logits, teacher)
    for silent in ({"gate": jnp.zeros(4)}, {"log_ratio": jnp.zeros((4, 5))}):
        assert_same(antisd(), PLAIN, batch.replace(extras={**extras, **silent}), logits, teacher)
    assert np.abs(loss_and_gradient(antisd(), batch, logits, teacher)[1]).max() > 1e-4


def test_antisd_bonus_is_a_constant():
    batch = tiny.batch([[0]], behavior=[[-1.0]])
    loss = lambda u: tiny.reduced(
        antisd().objectives[0],
        batch.replace(extras={"log_ratio": u, "gate": jnp.ones(1)}),
        {"logprobs": -jnp.ones((1, 1)), "entropy": jnp.zeros((1, 1))},
    )[0]
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((1, 1))), 0.0)
    # Negative control: the bonus itself does depend on the log-ratio.
    assert jax.grad(lambda u: score_coefficient(u, 0.5).sum())(jnp.ones((1, 1))).all()


def test_antisd_gate():
    memory, gates_seen = OPEN_GATE, []
    for median in (0.8, 1.2, 1.0, 1.1, 0.9, *(0.95, 0.94, 0.92, 0.95, 0.99, 1.00, 0.94)):
        gate, memory = entropy_gated(median, memory, 5, 0.93)
        gates_seen.append(gate)
    assert gates_seen == [0] * 5 + [1, 1, 0, 0, 0, 1, 1]
    assert memory["warm"] == [0.8, 1.2, 1.0, 1.1, 0.9]
    assert OPEN_GATE == {"warm": [], "gate": 1.0}  # untouched
    assert entropy_gated(0.5, OPEN_GATE, 0, 0.93)[0] == 1.0


def test_log_ratios_telescope():
    batch, logits, teacher = fixture()
    ratios = lambda dist: jnp.take_along_axis(dist, batch.completion[..., None], -1)[..., 0]
    u = ratios(teacher) - ratios(normalise(logits))
    close(u.sum(-1), ratios(teacher).sum(-1) - ratios(normalise(logits)).sum(-1), atol=1e-5)
    bonus = -score_coefficient(u, 0.5)
    assert np.abs(bonus.sum(-1) + score_coefficient(u.sum(-1), 0.5)).max() > 0.1


# ---- MSD ------------------------------------------------------------------------------------------------------------

TWO = {
    "teacher": tiny.log((0.9, 0.05, 0.05), (0.4, 0.35, 0.25))[None],
    "student": tiny.log((0.3, 0.4, 0.3), (0.4, 0.3, 0.3))[None],
}


def msd_loss(method, tokens=(1, 2), student=TWO["student"], teacher=TWO["teacher"], mask=None):
    batch = tiny.batch([tokens], mask=mask)
    return tiny.loss(method.objectives[0], batch, student=student, teacher=teacher)[0]


def msd_weights(k, teacher, student, token=0, **options):
    read = msd(top_k=k, **options).objectives[0].signals
    return read({"teacher": tiny.log(*teacher), "student": tiny.log(*student)}, jnp.asarray(token))["weight"]


def test_msd_two_tokens():
    close(msd_loss(msd(top_k=3)), 1.017509, rtol=1e-5)
    close(msd_loss(msd(weighted=False)), 0.524086, rtol=1e-5)
    found = msd(top_k=3).objectives[0].signals(TWO, jnp.asarray([[1, 2]]))
    close(found["weight"], [[0.448703, 0.009877]])
    close(found["divergence"], [[1.039721, 0.008451]])
    close(found["weight"] / found["weight"].mean(), [[1.956924, 0.043076]])


def test_msd_confidence_and_disagreement():
    none = (1e-30, 0.5, 0.5)  # the student does not give the teacher's token at all
    close(msd_weights(3, (0.9, 0.05, 0.05), none), 0.641004)
    close(msd_weights(2, (0.9, 0.05, 0.05), none), 0.702528)
    close(msd_weights(3, (1 / 3,) * 3, none), 0.0, atol=1e-6)
    close(msd_weights(3, (1.0, 1e-30, 1e-30), none), 1.0)
    close(msd_weights(3, (0.9, 0.05, 0.05), (1.0, 1e-30, 1e-30)), 0.0, atol=1e-6)
    with pytest.raises(MethodError, match="expected at least 2"):
        msd_weights(1, (0.9, 0.05, 0.05), none)
    # The preferred token is the teacher's likeliest, or read as the sampled one: another weight.
    student = (0.3, 0.4, 0.3)
    assert msd_weights(3, (0.9, 0.05, 0.05), student, token=1) == msd_weights(3, (0.9, 0.05, 0.05), student)
    close(msd_weights(3, (0.9, 0.05, 0.05), student, token=1, sampled_token=True), 0.641004 * 0.6)
    assert abs(msd_loss(msd(top_k=3)) - msd_loss(msd(top_k=3, sampled_token=True))) > 1e-4


def test_msd_limits():
    plain = sdft(alpha=1.0, skip=0, is_cap=None)
    assert_same(msd(weighted=False), plain, *fixture())
    batch, logits, _ = fixture()
    value, found = loss_and_gradient(msd(top_k=5), batch, logits, normalise(logits))
    assert value == 0.0 and np.abs(found).max() < 1e-7
    # Nothing to weigh: the loss is 0, and not NaN.
    uniform = jnp.full((4, 5, 7), -np.log(7.0))
    value, found = loss_and_gradient(msd(top_k=7), batch, logits, uniform)
    assert np.isfinite(value) and np.isfinite(found).all()


def test_msd_direction_and_stopped_weights():
    student, teacher = TWO["student"][:, :1], TWO["teacher"][:, :1]
    # One token: its weight is 1 whatever it was, so the gradient is that of reverse KL.
    found = tiny.logit_gradient(lambda dist: msd_loss(msd(top_k=3), (1,), dist, teacher), student)[0, 0]
    p, gap = np.exp(student[0, 0]), student[0, 0] - teacher[0, 0]
    close(found, p * (gap - p @ gap))
    swapped = tiny.logit_gradient(
        lambda dist: msd_loss(sdft(alpha=0.0, skip=0, is_cap=None), (1,), dist, teacher), student
    )
    assert np.abs(found - swapped[0, 0]).max() > 0.05
    found = tiny.logit_gradient(lambda dist: msd_loss(msd(top_k=3), student=dist), TWO["student"])[0]
    weights = np.asarray([1.956924, 0.043076])[:, None] / 2
    p, gap = np.exp(TWO["student"][0]), TWO["student"][0] - TWO["teacher"][0]
    close(found, weights * p * (gap - (p * gap).sum(-1, keepdims=True)), atol=1e-5)

    def live(dist):
        sig = msd(top_k=3).objectives[0].signals({"student": dist, "teacher": TWO["teacher"]}, jnp.asarray([[1, 2]]))
        weight = -jnp.expm1(jnp.stack([dist[0, 0, 0], dist[0, 1, 0]])) * jnp.asarray([0.641004, 0.016462])
        return jnp.sum(weight / weight.sum() * sig["divergence"][0])

    assert np.abs(tiny.logit_gradient(live, TWO["student"])[0] - found).max() > 0.005  # negative control


def test_msd_ignores_padding():
    longer = {name: jnp.concatenate([x, x[:, :1]], 1) for name, x in TWO.items()}
    close(msd_loss(msd(top_k=3), (1, 2, 0), mask=[[True, True, False]], **longer), 1.017509, rtol=1e-5)


# ---- TRACE ----------------------------------------------------------------------------------------------------------

UNCLIPPED = {"entry_clip": None, "most": 1.0}


def traced(batch, span):
    return batch.replace(extras={"span": jnp.asarray(span, bool)})


SPANS = np.asarray([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)


def test_trace_without_spans_is_grpo():
    batch, logits, teacher = fixture(on_policy=False)
    none, some = traced(batch, np.zeros((4, 5))), traced(batch, SPANS)
    for step in (0, 25, 40):
        assert_same(trace(), WIDE, none, logits, teacher, step=step)
    for step in (40, 300):
        assert_same(trace(), WIDE, some, logits, teacher, step=step)
    assert (
        np.abs(
            loss_and_gradient(trace(), some, logits, teacher)[1] - loss_and_gradient(WIDE, none, logits, teacher)[1]
        ).max()
        > 1e-3
    )


def test_trace_leaves_rows_without_a_teacher_to_grpo():
    """A marked row about which the teacher has nothing to say has no divergence, and keeps its policy gradient."""
    batch, logits, teacher = fixture(on_policy=False, taught=(True, True, False, False))
    marks = SPANS | np.eye(4, 5, dtype=bool)
    method = trace(error_weight=1.0, **UNCLIPPED)
    silent = teacher.at[2:].set(normalise(jnp.arange(7.0)))  # a teacher that was told nothing says something, too
    value, found = loss_and_gradient(method, traced(batch, marks), logits, silent)
    wanted = loss_and_gradient(method, traced(batch, marks & np.asarray([[1], [1], [0], [0]], bool)), logits, teacher)
    close(value, wanted[0])
    close(found, wanted[1])
    assert np.abs(found[2:]).max() > 1e-3


def test_trace_after_its_schedule_is_grpo_alone():
    """Before, one objective reads the teacher; after, another one that does not: the engine never runs both."""
    early, late = trace(schedule=(0.5, 2, 3)).objectives
    assert [(early.due(step), late.due(step)) for step in range(7)] == [(True, False)] * 5 + [(False, True)] * 2
    assert set(early.views) == {"student", "teacher"} and set(late.views) == {"student"}
    batch, logits, teacher = fixture(on_policy=False)
    method = trace()._replace(objectives=(late,))
    assert_same(method, WIDE, traced(batch, SPANS), logits, teacher, step=5)
    assert not trace(schedule=(0.5, 0, 0)).objectives[0].due(0)


def test_trace_weighs_by_the_samplers_importance():
    """`tis_cap` is GRPO's: it multiplies the policy gradient of unmarked tokens, and the weights of spans stay."""
    batch, logits, teacher = fixture(on_policy=False)
    old = batch.behavior_logprobs + jnp.linspace(-1.5, 1.5, 20).reshape(4, 5)
    batch = batch.replace(extras={"span": jnp.asarray(SPANS), "old_logprobs": old})
    sig = {**read_trace(batch, logits, teacher), "logprobs": old}
    term = trace(tis_cap=2.0, most=1.0).objectives[0].terms(batch, sig, 25)["pg"]
    spans = SPANS & np.asarray(batch.contexts["teacher"].valid)[:, None] & np.asarray(batch.mask)
    ratio = np.minimum(np.exp(np.asarray(old - batch.behavior_logprobs)), 2.0)
    close(term.weight, np.where(spans, 0.5, 1.0))
    close(term.importance, ratio)
    assert (ratio == 2.0).any() and trace(tis_cap=2.0).objectives[1].terms(batch, sig, 50)["pg"].importance.shape == (
        4,
        5,
    )


def test_trace_marks_other_tokens_as_a_control():
    """As many as the cap allows, anywhere, or outside the spans, or all: for rows that an annotator has marked."""
    marks = np.arange(40) % 4 == 1
    found = {mask: ablated(marks, mask, 0.25, np.random.default_rng(0)) for mask in ("random", "inverted", "all")}
    assert found["random"].sum() == found["inverted"].sum() == 10 and found["all"].all()
    assert (found["random"] & marks).any() and not (found["inverted"] & marks).any()
    assert (
        found["inverted"][10:].any()
        and (found["random"] != ablated(marks, "random", 0.25, np.random.default_rng(1))).any()
    )
    np.testing.assert_array_equal(ablated(marks, "annotated", 0.25, np.random.default_rng(0)), marks)
    assert not any(ablated(marks & False, mask, 0.25, np.random.default_rng(0)).any() for mask in found)
    # The cap does not take away what the control marks.
    batch, logits, teacher = fixture(taught=True)
    everything = traced(batch, np.ones((4, 5)))
    weight = trace(mask="all").objectives[0].terms(everything, read_trace(batch, logits, teacher), 0)["pg"].weight
    np.testing.assert_array_equal(np.asarray(weight) == 0.0, np.asarray(batch.mask))


def test_trace_schedule():
    batch, zero = traced(tiny.batch(jnp.zeros((1, 4)), reward=[1.0]), np.ones((1, 4))), jnp.zeros((1, 4))
    sig = {"logprobs": zero, "entropy": zero, "key_kl": zero + 1.0, "error_kl": zero}

    def at(step):
        terms = trace(most=1.0).objectives[0].terms(batch, sig, step)
        return float(terms["span_kl"].coef), float(terms["pg"].weight[0, 0])

    assert [at(k) for k in (0, 9, 10, 25, 40)] == [(0.5, 0), (0.5, 0), (0.5, 0), (0.25, 0.5), (0, 1)]
    lambdas = np.asarray([at(k)[0] for k in range(60)])
    close([lambdas.sum(), (lambdas**2).sum()], [12.75, 5.126389])
    close([lambdas[1:].sum(), (lambdas[1:] ** 2).sum()], [12.25, 4.876389])


def span_gradient(method, student, teacher, reward, **rest):
    """The logit gradient of the divergence of a marked token, by its branch."""
    batch = traced(tiny.batch([[0]], reward=[reward], group=[0]), [[True]])

    def loss(dist):
        sig = method.objectives[0].signals(
            {"student": dist[None, None], "teacher": teacher[None, None]}, batch.completion
        )
        return tiny.reduced(method.objectives[0], batch, sig)[1]["span_kl"]

    value = lambda dist: (
        method.objectives[0]
        .terms(
            batch,
            method.objectives[0].signals(
                {"student": dist[None, None], "teacher": teacher[None, None]}, batch.completion
            ),
            0,
        )["span_kl"]
        .value[0, 0]
    )
    return loss(student), tiny.logit_gradient(value, student)


def test_trace_divergences():
    both = trace(error_weight=1.0, **UNCLIPPED)
    value, found = span_gradient(both, P, Q, 1.0)
    close(value, 0.092033)
    close(found, (0.2, -0.1, -0.1))
    value, found = span_gradient(both, P, Q, 0.0)
    close(value, 0.085123)
    close(found, REVERSE)
    confident, wanted = tiny.log(0.9, 0.05, 0.05), tiny.log(0.02, 0.9, 0.08)
    close(span_gradient(both, confident, wanted, 0.0)[1], (0.493817, -0.307417, -0.186399))
    close(span_gradient(both, confident, wanted, 1.0)[1], (0.88, -0.85, -0.03))
    close(jsd(confident, wanted, 1.0) - sum(np.exp(confident[1:]) * (confident - wanted)[1:]), 3.43, atol=5e-3)


def test_trace_hard_clip_cancels_the_lift():
    student, teacher = tiny.log(0.01, 0.495, 0.495), tiny.log(0.9, 0.05, 0.05)
    close(span_gradient(trace(**UNCLIPPED), student, teacher, 1.0)[1], (-0.89, 0.445, 0.445))
    value, found = span_gradient(trace(most=1.0), student, teacher, 1.0)
    close(value, -0.1793, atol=5e-5)
    close(found, (0.001, -0.0005, -0.0005))
    p, q, kept = np.exp(student), np.exp(teacher), np.asarray([0, 1, 1])
    close(found, p * (q @ kept) - q * kept)
    value, found = span_gradient(trace(most=1.0, straight_through=True), student, teacher, 1.0)
    close(value, -0.1793, atol=5e-5)
    close(found, (-0.89, 0.445, 0.445))
    # Only a token that the student nearly gives already is still lifted.
    found = span_gradient(trace(most=1.0), tiny.log(0.46, 0.54), tiny.log(0.5, 0.5), 1.0)[1]
    assert found[0] < 0


def test_trace_routes():
    batch, logits, teacher = fixture(taught=True)
    batch = traced(batch, SPANS)
    moved = teacher.at[~SPANS].set(normalise(jnp.arange(7.0)))
    np.testing.assert_array_equal(
        *(loss_and_gradient(trace(error_weight=1.0), batch, logits, t)[1] for t in (teacher, moved))
    )
    # At the plateau marked tokens have no policy gradient: with an equal teacher they are not trained at all.
    _, found = loss_and_gradient(trace(error_weight=1.0, **UNCLIPPED), batch, logits, normalise(logits))
    active = np.asarray(SPANS & np.asarray(batch.mask))
    assert np.abs(found[active]).max() < 1e-6 < np.abs(found[~active & np.asarray(batch.mask)]).min(0).max()
    # The cap: at most a quarter of a row, the earliest.
    capped = trace(error_weight=1.0).objectives[0].terms(batch, read_trace(batch, logits, teacher), 0)
    kept = np.asarray(capped["pg"].weight) == 0.0
    assert (kept.sum(-1) <= np.floor(0.25 * np.asarray(batch.mask).sum(-1))).all()
    assert kept[0].tolist() == [True, False, False, False, False]


def read_trace(batch, logits, teacher):
    return trace().objectives[0].signals({"student": normalise(logits), "teacher": teacher}, batch.completion)


def test_trace_normalises_by_the_whole_row():
    def value(length):
        batch = traced(tiny.batch(jnp.zeros((1, length)), reward=[1.0]), np.arange(length)[None] < 2)
        ones = jnp.ones((1, length))
        sig = {"logprobs": ones, "entropy": ones, "key_kl": 3.0 * ones, "error_kl": ones}
        return float(tiny.reduced(trace(most=1.0).objectives[0], batch, sig)[1]["span_kl"])

    close(value(4), 3.0 * 2 / 4)
    close(value(8), value(4) / 2)


def test_trace_in_a_group_that_is_all_correct():
    batch, logits, teacher = fixture(taught=True)
    batch = traced(batch.replace(reward=jnp.ones(4)), SPANS)
    method = trace(**UNCLIPPED)
    _, found = loss_and_gradient(method, batch, logits, teacher)
    lengths = np.asarray(batch.mask).sum(-1)[:, None, None]
    wanted = (
        0.5 * (jax.nn.softmax(logits) - jnp.exp(teacher)) / lengths / 4 * (SPANS & np.asarray(batch.mask))[..., None]
    )
    close(found, wanted)
    assert not loss_and_gradient(method, batch, logits, teacher, step=40)[1].any()


def test_trace_mixtures_are_linear():
    batch, logits, teacher = fixture(taught=True)
    batch = traced(batch, SPANS)
    of = lambda key, error: loss_and_gradient(
        trace(key_weight=key, error_weight=error, **UNCLIPPED), batch, logits, teacher
    )[1]
    close(of(0.3, 0.7), 0.3 * of(1.0, 0.0) + 0.7 * of(0.0, 1.0))


def test_trace_note_tells_kinds_only():
    example = tiny.TASK.train[0]
    note = lambda *spans: private_note(example, spans, True)
    assert note(Span(0, 3, "case split"), Span(5, 9, "sign")) == note(Span(7, 8, "sign"), Span(1, 2, "case split"))
    assert note(Span(0, 3, "sign")) != note(Span(0, 3, "case split"))
    assert note() is None and note(Span(0, 3, " ")) is None
    assert note(Span(0, 3, ""), Span(5, 9, "sign ")) == note(Span(7, 8, "sign"))
    assert private_note(example, [Span(0, 1, "sign")], False) != note(Span(0, 1, "sign"))
    assert example.solution not in note(Span(0, 3, "sign"))[-1]["content"]


# ---- IW-OPD, PW-OPSD, TOP-D, PowerOPD, DASH: recent-field, section 6, items 1 to 5 ------------------------------------


def opd_slopes(method, gaps, **rest):
    gaps = jnp.atleast_2d(jnp.asarray(gaps, jnp.float32))
    batch = tiny.batch(jnp.zeros(gaps.shape), behavior=-2.0 * jnp.ones(gaps.shape), **rest)
    return slopes(method, batch, teacher_logprobs=batch.behavior_logprobs + gaps)


def test_pw_opsd_weights():
    over = jnp.ones((1, 4), bool)
    weights = credit.position_weight(over, lowest=0.25, centre=0.3, width=0.1)
    close(weights, [[0.361035, 0.759384, 0.972005, 0.997620]])
    close(weights.mean(), 0.772511)
    padded = credit.position_weight(jnp.asarray([[1, 1, 1, 1, 0, 0]], bool), lowest=0.25, centre=0.3, width=0.1)
    close(padded, [[0.361035, 0.759384, 0.972005, 0.997620, 0, 0]])
    falling = credit.position_weight(over, lowest=0.25, centre=0.5, width=-0.1)
    close(falling, credit.position_weight(over, lowest=0.25, centre=0.5, width=0.1)[:, ::-1])
    sig = {"divergence": jnp.ones((1, 4)), "entropy": jnp.ones((1, 4))}
    close(tiny.reduced(pw_opsd().objectives[0], tiny.batch(jnp.zeros((1, 4))), sig)[0], 0.772511)


def test_pw_opsd_limit():
    plain = opsd(reduce=sequence_mean)
    found = assert_same(pw_opsd(lowest=1.0), plain, *fixture())
    weighted = loss_and_gradient(pw_opsd(), *fixture())[1]
    over = fixture()[0].mask & fixture()[0].contexts["teacher"].valid[:, None]
    close(weighted, found * np.asarray(credit.position_weight(over, lowest=0.25, centre=0.3, width=0.1))[..., None])


def test_iw_opd_weights():
    gaps = np.asarray([0.4, -0.2, 0.1, -0.3])
    close(opd_slopes(iw_opd(), gaps), [gaps * [1.5, 1.3, 1.2, 1.15]])
    close(opd_slopes(iw_opd(gamma=2.0), gaps)[0, 0], 3.0 * 0.4)
    mask = jnp.asarray([[1, 1, 1, 1, 0]], bool)
    close(opd_slopes(iw_opd(), [*gaps, 9.0], mask=mask), [[*(gaps * [1.5, 1.3, 1.2, 1.15]), 0.0]])
    close(credit.remaining_share(jnp.zeros((1, 3)), jnp.ones((1, 3), bool)), 1.0)


@pytest.mark.parametrize("on_policy", [True, False])
def test_opd_limits(on_policy):
    data = fixture(on_policy=on_policy)
    assert_same(iw_opd(gamma=0.0), opd(), *data)
    plain, small = (loss_and_gradient(m, *data) for m in (opd(), power_opd(alpha=1e-4, scaled=True)))
    close(small[0], plain[0], rtol=2e-3)
    close(small[1], plain[1], atol=2e-4)
    if on_policy:
        assert_same(topd(alpha=1.0, discount=0.0, normalised=False), opd(), *data)


def test_topd_rewards():
    method = lambda alpha: topd(alpha=alpha, discount=0.0, normalised=False)
    ratios = np.asarray([1e-30, 0.5, 1.0, 3.0])
    close(opd_slopes(method(0.5), np.log(ratios)), [[-0.693147, -0.287682, 0.0, 0.693147]])
    close(opd_slopes(method(0.9), np.log(ratios)), [[-2.302585, -0.597837, 0.0, 1.029619]])
    close(opd_slopes(method(1.0), np.log(ratios[1:])), [np.log(ratios[1:])])
    # Returns are means of what is to come; the group's tokens share one mean and one deviation.
    rewards = np.asarray([0.0, 1.0, 2.0])
    close(opd_slopes(topd(alpha=1.0, normalised=False), rewards), [[1.0, 1.5, 2.0]], atol=1e-5)
    found = opd_slopes(topd(alpha=1.0, discount=0.0), [[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]], group=[0, 0, 1])
    close(found[:2], (np.asarray([[1.0, 2.0], [3.0, 6.0]]) - 3.0) / np.std([1, 2, 3, 6]), atol=1e-5)
    np.testing.assert_array_equal(found[2], 0.0)
    np.testing.assert_array_equal(opd_slopes(topd(), [[0.0, 0.0]]), 0.0)


def test_power_rewards():
    of = lambda q, p, alpha: credit.power_difference(jnp.log(p), jnp.log(q), alpha)
    close([of(0.8, 0.5, 1.0), of(0.8, 0.5, 5.0)], [0.3, 0.29643], atol=1e-6)
    close([of(0.1, 0.9, 1.0), of(0.1, 0.9, 5.0)], [-0.8, -0.59048], atol=1e-6)
    close(of(0.8, 0.5, 1e-4) / 1e-4, np.log(0.8 / 0.5), rtol=1e-3)
    assert of(0.3, 0.3, 5.0) == 0.0
    extremes = credit.power_difference(jnp.asarray([-1e30, 0.0]), jnp.asarray([0.0, -1e30]), 5.0)
    close(extremes, [1.0, -1.0])
    batch = tiny.batch([[0]], behavior=jnp.log(jnp.asarray([[0.5]])))
    close(slopes(power_opd(), batch, teacher_logprobs=jnp.log(jnp.asarray([[0.8]]))), 0.29643, atol=1e-6)


def test_dash_weights():
    rewards = np.asarray([[0.1, 0.4, 0.1, 0.2]])
    sig = {"divergence": jnp.asarray(rewards), "entropy": jnp.zeros((1, 4))}
    batch = tiny.batch(jnp.zeros((1, 4)))
    terms = lambda method, sig=sig, batch=batch: method.objectives[0].terms(batch, sig, 0)["divergence"]
    factors = 1 / (1 + np.exp(5 * (rewards - 0.2)))
    close(factors, [[0.622459, 0.268941, 0.622459, 0.5]])
    weights = terms(dash()).weight
    close(weights, [[1, 1.622459, 1.436347, 1.894067]])
    close((weights * rewards).sum(), 1.271432)
    later, total = 0.0, 0.0
    for reward, factor in zip(rewards[0, ::-1], factors[0, ::-1], strict=True):
        later = reward + factor * later
        total += later
    close(total, 1.271432)
    close(terms(dash(kappa=0.0)).weight, [[1, 1.5, 1.75, 1.875]])
    close(terms(dash(horizon=0.0)).weight, 1.0)
    # A token outside the loss passes on what came before it.
    gap = {"divergence": jnp.asarray([[0.1, 9.0, 0.4, 0.1, 0.2]]), "entropy": jnp.zeros((1, 5))}
    masked = tiny.batch(jnp.zeros((1, 5)), mask=[[True, False, True, True, True]])
    close(terms(dash(), gap, masked).weight, [[1, 0, 1.622459, 1.436347, 1.894067]])


def test_dash_limit():
    assert_same(dash(horizon=0.0), opsd(), *fixture())
    assert np.abs(loss_and_gradient(dash(), *fixture())[1] - loss_and_gradient(opsd(), *fixture())[1]).max() > 1e-4
    # The weights are constants: the gradient is theirs times plain OPSD's.
    batch, logits, teacher = fixture()
    sig = opsd().objectives[0].signals({"student": normalise(logits), "teacher": teacher}, batch.completion)
    weight = dash().objectives[0].terms(batch, sig, 0)["divergence"].weight
    found = loss_and_gradient(dash(), batch, logits, teacher)[1]
    close(found, np.asarray(weight)[..., None] * loss_and_gradient(opsd(), batch, logits, teacher)[1])


def test_window_minimum_never_looks_into_padding():
    close(window_minimum(jnp.asarray([[2.0, 1.0, 0.1]]), jnp.asarray([[True, True, False]]), 2), [[1.0, 1.0, 0.0]])


# ---- all of them ----------------------------------------------------------------------------------------------------

EXTRAS = {
    "advantage": jnp.asarray([1.0, -0.5, 0.3, 2.0]),
    "credited": jnp.asarray([True, False, False, True]),
    "old_logprobs": -jnp.ones((4, 5)),
    "old_teacher": -2.0 * jnp.ones((4, 5)),
    "log_ratio": jnp.ones((4, 5)),
    "gate": jnp.ones(4),
    "span": jnp.asarray(SPANS),
}
ALL = {f.__name__: f() for f in (vopd, rlrt, egrsd, dasd, antisd, trace, iw_opd, pw_opsd, topd, power_opd, dash)} | {
    "msd": msd(top_k=3),
    "vopd optimal": vopd(baseline="optimal"),
    "trace both": trace(error_weight=1.0),
}


@pytest.mark.parametrize("name", ALL)
def test_masked_positions_change_nothing(name):
    batch, logits, teacher = fixture(**EXTRAS)
    outside = ~batch.mask[..., None]
    dirty = lambda x, fill: jnp.where(outside, fill, x)
    read = lambda z, t: loss_and_gradient(ALL[name], batch, z, t)
    value, found = read(logits, teacher)
    other, moved = read(dirty(logits, 3.0 * jnp.cos(logits)), dirty(teacher, normalise(jnp.sin(9.0 * logits))))
    assert value == other and np.abs(found).max() > 0
    inside = np.asarray(batch.mask)
    np.testing.assert_array_equal(found[inside], moved[inside])
    assert not found[~inside].any()


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_what_is_frozen(name):
    batch, logits, teacher = fixture(**EXTRAS)
    loss = lambda t: tiny.loss(ALL[name].objectives[0], batch, student=normalise(logits), teacher=t)[0]
    found = jax.grad(loss)(teacher)
    # Divergences do depend on the teacher, which the engine stops; everything made of log-ratios is a constant.
    if name not in ("pw_opsd", "dash", "msd", "trace", "trace both"):
        np.testing.assert_array_equal(found, 0.0)


# ---- options that the papers' ablations need --------------------------------------------------------------------------


def test_rlrt_weights_of_mean_one():
    """Per row: what is left is the placement.  Rows without credit stay as they are."""
    batch, _, _ = fixture(on_policy=False)
    old = batch.behavior_logprobs
    informed = old + jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)
    extras = {"old_logprobs": old, "old_teacher": informed, "credited": jnp.asarray([True, False, False, True])}
    batch = batch.replace(extras=extras)
    term = lambda m: m.objectives[0].terms(batch, {"logprobs": old, "entropy": jnp.zeros_like(old)}, 0)["pg"]
    plain, rescaled = term(rlrt(tis_cap=None)), term(rlrt(tis_cap=None, mean_one_weights=True))
    over = np.asarray(batch.mask)
    for row, kept in enumerate(over):
        weight = np.asarray(plain.weight)[row][kept]
        close(np.asarray(rescaled.weight)[row][kept], weight / weight.mean())
    assert abs(np.asarray(plain.weight)[0][over[0]].mean() - 1.0) > 0.05
    np.testing.assert_array_equal(plain.value, rescaled.value)


def test_antisd_centred():
    """The teacher's part has mean 0 over the tokens that hear it, and nothing else changes."""
    batch, _, _ = fixture(on_policy=False)
    gap = jnp.sin(jnp.arange(20.0)).reshape(4, 5)
    batch = batch.replace(extras={"log_ratio": gap, "gate": jnp.asarray([1.0, 1.0, 0.0, 1.0])})
    sig = {"logprobs": batch.behavior_logprobs, "entropy": jnp.zeros_like(gap)}
    found = lambda m: np.asarray(m.objectives[0].terms(batch, sig, 0)["bonus"].value)
    heard = np.asarray(batch.mask) & np.asarray([[True], [True], [False], [True]])
    plain, centred = found(antisd()), found(antisd(centred=True))
    assert abs(centred[heard].mean()) < 1e-6 < abs(plain[heard].mean())
    close((plain - centred)[heard], plain[heard].mean())


def test_antisd_and_dasd_are_their_surrogates():
    """Both parts together are the clipped surrogate of the whole advantage, whatever the ratio and the sign."""
    batch, _, _ = fixture(on_policy=False)
    gap, gate = 3.0 * jnp.sin(jnp.arange(20.0)).reshape(4, 5), jnp.asarray([1.0, 1.0, 0.0, 1.0])
    batch = batch.replace(extras={"log_ratio": gap, "gate": gate})
    logprobs = batch.behavior_logprobs + jnp.cos(jnp.arange(20.0)).reshape(4, 5)
    reward = group_advantage(batch.reward, batch.group, batch.valid)[:, None]
    bonus = score_coefficient(gap, 0.5)
    whole = reward + 2.0 * gate[:, None] * bonus

    def loss(x):
        return tiny.reduced(antisd(coef=2.0).objectives[0], batch, {"logprobs": x, "entropy": jnp.zeros_like(x)})[0]

    direct = lambda x: token_mean(clipped_surrogate(x, batch.behavior_logprobs, whole, (0.2, 0.2)), batch.mask)
    assert bool(((whole > 0) != (reward > 0)).any())
    close(loss(logprobs), direct(logprobs))
    close(jax.grad(loss)(logprobs), jax.grad(direct)(logprobs))


@pytest.mark.parametrize(("about", "unit"), [("mean", "deviation"), ("threshold", "magnitude")])
def test_dasd_other_readings(about, unit):
    """Per row against NumPy: the spread about the quantile, the gap in standard deviations."""
    batch, _, _ = fixture(on_policy=False)
    said, heard, spread = (jnp.sin(jnp.arange(20.0) * k).reshape(4, 5) for k in (1.0, 2.0, 3.0))
    sig = {"logprobs": said, "teacher_logprobs": heard, "entropy": 1.0 + spread}
    found = dasd(about=about, unit=unit).objectives[0].terms(batch, sig, 0)
    taught = np.asarray(batch.contexts["teacher"].valid)
    for row in np.flatnonzero(taught):
        kept = np.asarray(batch.mask)[row]
        entropy, gap = np.asarray(sig["entropy"])[row][kept], np.asarray(heard - said)[row][kept]
        level = np.quantile(entropy, 0.8)
        centre = entropy.mean() if about == "mean" else level
        scale = np.abs(gap).mean() if unit == "magnitude" else gap.std()
        wanted = np.tanh((level - entropy) / (np.abs(entropy - centre).mean() + 1e-6))
        close(np.asarray(found["direction"].value)[row][kept], wanted, atol=1e-5)
        d = gap / (scale + 1e-6)
        close(np.asarray(found["bonus"].value)[row][kept], wanted * d / (1 + np.exp(1 - np.abs(d))), atol=1e-5)


def test_egrsd_teachers():
    assert egrsd().snapshots["teacher"](1.0, 0.0, 20) == 0.0  # frozen
    assert egrsd(ema_rate=0.01).snapshots["teacher"](jnp.ones(()), jnp.zeros(()), 20) == pytest.approx(0.01)
    copies = egrsd(copy_every=20).snapshots["teacher"]
    assert [float(copies(1.0, 0.0, jnp.int32(step))) for step in (19, 20, 21, 40)] == [0.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="two teachers"):
        egrsd(copy_every=20, ema_rate=0.01)
