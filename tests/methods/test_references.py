"""Every method's value and gradient against float64 references, on one batch that hides nothing.

Ragged rows, two of them cut off, holes in the mask, an off-policy sampler, unbalanced groups, partial rewards, rows
without a lesson, one without a trained token, a padding row; and infinities and NaN wherever a loss must not look.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_batch as made
import reference_distributions as distributions
import reference_rewards as rewards
import reference_tokens as tokens
import tiny
from reference_batch import hostile, sequence_mean, sources, token_mean, with_extras

from sdjax.cli import options
from sdjax.collect.memory import told_apart
from sdjax.kernels.distributions import normalise
from sdjax.kernels.reductions import reduce_terms
from sdjax.kernels.reductions import token_mean as token_mean_of_tokens
from sdjax.methods.opsd import opsd_v1
from sdjax.types import STUDENT, Rollout

PLAIN = hostile()
TOKENS = np.random.default_rng(3)
drawn = lambda scale=1.0: scale * TOKENS.normal(size=PLAIN.over.shape)
OLD = PLAIN.behavior + drawn(0.2)
SCORED = with_extras(PLAIN, old_logprobs=OLD, old_teacher=PLAIN.said(PLAIN.dists["teacher"]))
CREDITED = with_extras(SCORED, credited=PLAIN.taught & (PLAIN.reward >= 0.5))
EVIDENCE = with_extras(PLAIN, evidence=drawn())
GATED = with_extras(PLAIN, log_ratio=drawn(), gate=np.where(PLAIN.taught, 1.0, 0.0))
ADVANTAGES = np.asarray([1.0, -0.5, 0.3, 0.0, 2.0, -1.2, 0.7, -0.1, 0.4, 0.9, 5.0])
WHITENED = with_extras(PLAIN, advantage=ADVANTAGES)
CORRECTED = with_extras(PLAIN, advantage=ADVANTAGES, correction=np.arange(11) % 3 == 2)
STEPS = with_extras(PLAIN, step=np.cumsum(np.arange(6) % 2 == 0, axis=-1) * np.ones((11, 1), int) - 1)
GOLDEN = sources(PLAIN, reference=(3, 5), untaught=(3, 5))
REPAIRED = sources(PLAIN, reference=(3, 6, 8), untaught=(0, 1, 2, 4, 5, 7, 9))
REPAIRED = dataclasses.replace(REPAIRED, taught=np.isin(np.arange(11), (2, 3, 6)))
TWO_AUTHORS = sources(PLAIN, teacher=(0, 5, 8))
PAIRS = sources(PLAIN, teacher=(0, 4, 7, 2, 6), untaught=())
PAIRS = with_extras(PAIRS, pair=np.asarray([0, 0, 9, 9, 1, 1, 7, 2, 2, 6, 2]))
SPANS = with_extras(PLAIN, span=TOKENS.random(PLAIN.over.shape) < 0.6)
MARKED = with_extras(PLAIN, span=np.ones(PLAIN.over.shape, bool))


def told_apart_by(data, prior="behavior"):
    """What VPD's host half adds, from the references' own implicit rewards."""
    rows = [
        Rollout(tiny.TASK.train[0], (0,) * int(data.over[i].any()), (), "", 0, reward=data.reward[i])
        for i in range(len(data.reward))
    ]
    rows = [r.read_by(teacher=() if t else None) for r, t in zip(rows, data.taught & data.valid, strict=True)]
    found, _ = told_apart(rows, tokens.implicit(data, prior=prior), 0.5, None, 1.0)
    return with_extras(data, **{k: np.asarray([r.extras[k] for r in found]) for k in found[0].extras})


def garbage(x, over):
    """The array with infinities and NaN outside of the trained tokens."""
    x = np.array(x, np.float32)
    dirt = np.resize(np.asarray([np.nan, np.inf, -np.inf], np.float32), x.shape)
    return jnp.asarray(np.where(over, x, dirt))


def as_batch(data, views):
    """The references' batch as a method sees it."""
    per_token = lambda x: x.ndim == 2 and x.dtype.kind == "f"
    extras = {name: garbage(x, data.over) if per_token(x) else x for name, x in vars(data.extras).items()}
    # The padding row and the row without trained tokens are kept out by `valid` and by `mask`.
    mask = data.over | ~data.valid[:, None]
    found = tiny.batch(
        data.token,
        behavior=garbage(data.behavior, data.over),
        reward=data.reward,
        group=data.group,
        mask=mask,
        taught=data.taught,
        views=("student", *views),
        **extras,
    )
    rows = {"source": jnp.asarray(data.source, jnp.int32), "valid": data.valid, "finished": data.finished}
    return found.replace(**{name: jnp.asarray(x) for name, x in rows.items()})


def addends(objective, data, step=0):
    """The references' batch, the views' distributions, and `terms(distributions)`, whose signals are full of garbage."""
    views = {name: name if name in made.VIEWS else "teacher" for name in objective.views}
    dists = {name: jnp.asarray(data.dists[source], jnp.float32) for name, source in views.items()}
    batch = as_batch(data, [name for name in views if name != "student"])

    def terms(dists):
        signals = objective.signals(dists, batch.completion)
        hidden = lambda x: jnp.where(data.over, x, jnp.where(jnp.arange(x.shape[1]) % 2 == 0, jnp.nan, jnp.inf))
        return objective.terms(batch, {name: hidden(value) for name, value in signals.items()}, jnp.asarray(step))

    return batch, dists, terms


def ours(objective, data, trained="student", step=0):
    """The objective's loss and its gradient in the trained view's logits."""
    batch, dists, terms = addends(objective, data, step)
    trainable = {name for name, view in objective.views.items() if view.trainable}
    assert trainable == {trained}

    def loss(logits):
        over = batch.mask & batch.valid[:, None]
        return reduce_terms(terms({**dists, trained: normalise(logits)}), over, token_mean_of_tokens)[0]

    value, found = jax.value_and_grad(loss)(dists[trained])
    return float(value), np.asarray(found)


OPD, ENTRIES = {"teacher": "teacher"}, {"clip": None}
CASES = {
    # name: (method, its options, reference, data)
    "sft": ("sft", {}, rewards.sft(), PLAIN),
    "mixsd": ("mixsd", {}, rewards.sft(), PLAIN),
    "tessy": ("tessy", {}, rewards.sft(), PLAIN),
    "grpo": ("grpo", {}, rewards.grpo(), PLAIN),
    "grpo kl": ("grpo", {"kl_coef": 0.3, "dual_clip": 1.1}, rewards.grpo(kl_coef=0.3, dual=1.1), PLAIN),
    "grpo tis": ("grpo", {"tis_cap": 1.1}, rewards.grpo(tis=rewards.capped(1.1)), SCORED),
    "grpo icepop": (
        "grpo",
        {"tis_bounds": (0.8, 1.3), "tis_level": "sequence"},
        rewards.grpo(tis=rewards.icepop_rows(0.8, 1.3)),
        SCORED,
    ),
    "grpo batch": ("grpo", {"compared": "batch"}, rewards.against("batch"), PLAIN),
    "grpo others": ("grpo", {"compared": "leave_one_out"}, rewards.against("others"), PLAIN),
    "dr_grpo": ("dr_grpo", {"length": 8}, rewards.grpo(normalised=False, length=8), PLAIN),
    "dr_grpo wide": (
        "dr_grpo",
        {"length": 8, "clip": (0.05, 0.3)},
        rewards.grpo(normalised=False, length=8, clip=(0.05, 0.3)),
        PLAIN,
    ),
    "dapo": ("dapo", {}, rewards.grpo(token_mean, clip=(0.2, 0.28)), PLAIN),
    "gspo": ("gspo", {}, rewards.gspo(), PLAIN),
    "gspo centred": ("gspo", {"normalised": False}, rewards.gspo(normalised=False), PLAIN),
    "gspo wide": ("gspo", {"clip": (0.1, 0.2)}, rewards.gspo((0.1, 0.2)), PLAIN),
    "cispo": ("cispo", {}, rewards.cispo(), PLAIN),
    "cispo centred": ("cispo", {"normalised": False}, rewards.cispo(normalised=False), PLAIN),
    "cispo verl": ("cispo", {"clip": (0.2, 0.28)}, rewards.cispo((0.2, 0.28)), PLAIN),
    "cispo batch": ("cispo", {"compared": "batch"}, rewards.cispo(scaled_by_batch=True), PLAIN),
    "opsa": ("opsa", {}, rewards.opsa(), PLAIN),
    "atmanrl": ("atmanrl", {}, rewards.grpo(normalised=False), PLAIN),
    "atmanrl row": ("atmanrl", {"ratio": "sequence"}, rewards.atmanrl_sequence(), PLAIN),
    "antisd": ("antisd", {}, rewards.antisd(), GATED),
    "antisd centred": ("antisd", {"centred": True, "coef": 0.9}, rewards.antisd(0.9, True), GATED),
    "rlcsd": ("rlcsd", {}, rewards.rlcsd(), EVIDENCE),
    "rlcsd strong": (
        "rlcsd",
        {"coef": 2.0, "tau": 0.5, "threshold": 0.8},
        rewards.rlcsd(2.0, 0.5, 0.8),
        EVIDENCE,
    ),
    "rlrt": ("rlrt", {}, rewards.rlrt(), CREDITED),
    "rlrt toward": (
        "rlrt",
        {"toward": True, "ratio_eps": 0.2, "mix": 0.9},
        rewards.rlrt(0.9, 0.2, toward=True),
        CREDITED,
    ),
    "rlrt mean one": ("rlrt", {"mean_one_weights": True}, rewards.rlrt(mean_one=True), CREDITED),
    "rlrt later": ("rlrt", {"mix_decay": 30}, rewards.rlrt(0.3), CREDITED),
    "egrsd": ("egrsd", {}, rewards.egrsd(), WHITENED),
    "egrsd ahead": ("egrsd", {"window": 2, "strength": 1.0}, rewards.egrsd(1.0, window=2), WHITENED),
    "egrsd algorithm": (
        "egrsd",
        {"window": 1, "windowed_maximum": True},
        rewards.egrsd(window=1, windowed_maximum=True),
        WHITENED,
    ),
    "dasd": ("dasd", {}, rewards.dasd(), PLAIN),
    "dasd other": (
        "dasd",
        {"beta": 0.5, "about": "threshold", "unit": "deviation", "repelled": 0.6},
        rewards.dasd(0.5, 0.6, "threshold", "deviation"),
        PLAIN,
    ),
    "cipo": ("cipo", {"kl_coef": 0.1, "coef": 0.7}, rewards.cipo(0.7, 0.1), CORRECTED),
    "sort": ("sort", {}, rewards.sort(), REPAIRED),
    "sort rescaled": (
        "sort",
        {"mean_one_weights": True, "uplift_cap": 0.5, "plan_rate": 0.8, "coef": 2.0, "normalised": False},
        rewards.sort(2.0, 0.8, 0.5, normalised=False),
        REPAIRED,
    ),
    "opd": ("opd", {}, tokens.opd(), PLAIN),
    "opd to go": ("opd", {"discount": 0.9, "coef": 0.5, "rl_weight": 2.0}, tokens.opd(0.5, 0.9, 2.0), PLAIN),
    "opd full": ("opd", {"full_vocabulary": True}, tokens.full(made.kl), PLAIN),
    **{
        f"opd {name}": ("opd", {"direct": name}, tokens.opd_direct(name, 7), PLAIN)
        for name in ("k1", "k2", "k3", "k3_plus", "top_k_forward_kl")
    },
    "vopd": ("vopd", {}, tokens.vopd(), PLAIN),
    "vopd top k": ("vopd", {"top_k": 2}, tokens.vopd(k=2), PLAIN),
    "vopd optimal": ("vopd", {"baseline": "optimal"}, tokens.vopd("optimal"), PLAIN),
    "vopd leak": ("vopd", {"baseline": "none", "live_reward": True}, tokens.vopd("none", live_reward=True), PLAIN),
    "iw_opd": ("iw_opd", {}, tokens.iw_opd(), PLAIN),
    "power_opd": ("power_opd", {}, tokens.power_opd(), PLAIN),
    "power_opd small": ("power_opd", {"alpha": 0.3, "scaled": True}, tokens.power_opd(0.3, True), PLAIN),
    "topd": ("topd", {}, tokens.topd(), PLAIN),
    "topd plain": (
        "topd",
        {"alpha": 0.8, "discount": 0.5, "normalised": False},
        tokens.topd(0.8, 0.5, False),
        PLAIN,
    ),
    "minillm": ("minillm", {}, tokens.minillm(), PLAIN),
    "minillm sums": (
        "minillm",
        {"discount": 0.7, "length_normalised": False},
        tokens.minillm(0.7, length_normalised=False),
        PLAIN,
    ),
    "minillm discounted": ("minillm", {"discount": 0.7}, tokens.minillm(0.7), PLAIN),
    "minillm trl": (
        "minillm",
        {"count_present": True, "discount": 0.9},
        tokens.minillm(0.9, count_present=True),
        PLAIN,
    ),
    "minillm whole": ("minillm", {"single_step": False}, tokens.minillm(single_step=False), PLAIN),
    "stable_opd": ("stable_opd", {}, tokens.stable_opd(), GOLDEN),
    "stable_opd sampled": ("stable_opd", {"anchor": "sampled"}, tokens.stable_opd(sampled=True), GOLDEN),
    "stable_opd strong": ("stable_opd", {"gold_coef": 0.7, "kl_coef": 0.4}, tokens.stable_opd(0.7, 0.4), GOLDEN),
    "gkd": ("gkd", {}, tokens.full(lambda p, q: made.jsd(p, q, 0.5)), PLAIN),
    "gkd forward": ("gkd", {"beta": 0.0}, tokens.full(lambda p, q: made.jsd(p, q, 0.0)), PLAIN),
    "gkd top k": (
        "gkd",
        {"beta": 0.3, "top_k": 2},
        tokens.full(lambda p, q: made.jsd(made.kept(p, q, 2, "rest"), made.kept(q, q, 2, "rest"), 0.3)),
        PLAIN,
    ),
    "opsd": ("opsd", {}, distributions.opsd(), PLAIN),
    "opsd reverse": ("opsd", {"beta": 1.0, "clip": 0.2}, distributions.opsd(1.0, 0.2), PLAIN),
    "opsd top k": ("opsd", {"teacher_top_k": 3, "clip": None}, distributions.opsd(clip=None, k=3), PLAIN),
    "opsd sampled": ("opsd", {"sampled_token": True}, distributions.sampled_policy_gradient(1.1), PLAIN),
    "op2sd": ("op2sd", {"beta": 0.5}, distributions.opsd(0.5), PLAIN),
    "pw_opsd": ("pw_opsd", {}, distributions.opsd(weight=distributions.rising(), mean=sequence_mean), PLAIN),
    "pw_opsd falling": (
        "pw_opsd",
        {"lowest": 0.1, "centre": 0.6, "width": -0.2, "entry_clip": None},
        distributions.opsd(clip=None, weight=distributions.rising(0.1, 0.6, -0.2), mean=sequence_mean),
        PLAIN,
    ),
    "dash": ("dash", {}, distributions.opsd(weight=distributions.looking_ahead()), PLAIN),
    "dash short": (
        "dash",
        {"kappa": 2.0, "horizon": 0.4},
        distributions.opsd(weight=distributions.looking_ahead(2.0, 0.4)),
        PLAIN,
    ),
    "sdft": ("sdft", {}, distributions.sdft(), PLAIN),
    "sdft paper": ("sdft", {"alpha": 1.0, "skip": 0, "is_cap": 1.1}, distributions.sdft(1.0, 0, 1.1), PLAIN),
    "sdft offline": ("sdft", {"from_teacher": True, "skip": 1}, distributions.sdft(skip=1, most=None), PLAIN),
    "sdpo": ("sdpo", {}, distributions.sdpo(), PLAIN),
    "sdpo top k": ("sdpo", {"top_k": 2, "alpha": 1.0, "is_cap": 1.1}, distributions.sdpo(1.0, 2, most=1.1), PLAIN),
    "sdpo narrow": (
        "sdpo",
        {"top_k": 3, "alpha": 0.0, "rest": False, "is_cap": None},
        distributions.sdpo(0.0, 3, "renormalised", None),
        PLAIN,
    ),
    "sdpo trust": ("sdpo", {"trust": 0.3}, distributions.sdpo(trust=0.3), PLAIN),
    "sdpo mixed": ("sdpo", {"rl_weight": 0.9}, distributions.sdpo(rl_weight=0.9), PLAIN),
    "sdpo sampled": (
        "sdpo",
        {"sampled_token": True, "alpha": 1.0},
        distributions.sampled_policy_gradient(capped_at=2.0),
        PLAIN,
    ),
    "sdpo sequence": ("sdpo", {"sequence_level": True}, distributions.sdpo_sequence(), PLAIN),
    "sdpo sequence clipped": (
        "sdpo",
        {"sequence_level": True, "alpha": 1.0, "advantage_clip": 0.3},
        distributions.sdpo_sequence(bound=0.3),
        PLAIN,
    ),
    "sdpo sampled clipped": (
        "sdpo",
        {"sampled_token": True, "alpha": 1.0, "advantage_clip": 0.3},
        distributions.sampled_clipped(0.3),
        PLAIN,
    ),
    "sdpo test time": ("sdpo", {"alpha": 1.0, "advantage_clip": 0.7}, distributions.sdpo_test_time(0.7), PLAIN),
    "mopd": ("mopd", {"alpha": 1.0, "top_k": 3}, distributions.sdpo(1.0, 3), PLAIN),
    "mopd steps": ("mopd", {"step_level": True}, distributions.mopd_steps(), STEPS),
    "msd": ("msd", {}, distributions.msd(), PLAIN),
    "msd plain": ("msd", {"weighted": False}, tokens.full(made.kl, sequence_mean), PLAIN),
    "msd sampled": ("msd", {"top_k": 3, "sampled_token": True}, distributions.msd(3, True), PLAIN),
    "purified_opsd": ("purified_opsd", {}, distributions.purified_opsd(), PLAIN),
    "purified_opsd wide": ("purified_opsd", {"beta": 4.0, "alpha": 0.0}, distributions.purified_opsd(4.0, 0.0), PLAIN),
    "resd": ("resd", {}, distributions.resd(), PLAIN),
    "resd both": (
        "resd",
        {"low": 0.5, "high": 1.5, "alpha": 0.5, "is_cap": 1.1, "balance_powers": (0.5, 2.0), "top_k": 3},
        distributions.resd(0.5, 3, 0.5, 1.5, 1.1, (0.5, 2.0)),
        PLAIN,
    ),
    "rethinking_opd": ("rethinking_opd", {"top_k": 3}, distributions.rethinking_opd(3), PLAIN),
    "rethinking_opd union": (
        "rethinking_opd",
        {"top_k": 2, "support": "union", "weights": "teacher", "rl_weight": 0.5},
        distributions.rethinking_opd(2, "union", "teacher", rl_weight=0.5),
        PLAIN,
    ),
    "rethinking_opd apart": (
        "rethinking_opd",
        {"top_k": 2, "support": "symmetric_difference"},
        distributions.rethinking_opd(2, "symmetric_difference", raw=True),
        PLAIN,
    ),
    "rethinking_opd shared": (
        "rethinking_opd",
        {"top_k": 3, "support": "intersection", "weights": "uniform"},
        distributions.rethinking_opd(3, "intersection", "uniform"),
        PLAIN,
    ),
    "rethinking_opd old": (
        "rethinking_opd",
        {"top_k": 3, "rollout_time": True},
        distributions.rethinking_opd(3, old="sampler"),
        PLAIN,
    ),
    "rethinking_opd sampled": ("rethinking_opd", {"top_k": 0}, distributions.rethinking_sampled, PLAIN),
    "rethinking_opd eq 5": (
        "rethinking_opd",
        {"top_k": 3, "loss": "renormalised"},
        distributions.rethinking_renormalised(3),
        PLAIN,
    ),
    "brts": ("brts", {"top_k": 3}, distributions.brts(), TWO_AUTHORS),
    "brts full": ("brts", {"top_k": None, "coef": 2.0}, distributions.brts(2.0, 7), TWO_AUTHORS),
    "pbsd": ("pbsd", {}, tokens.pbsd(), PAIRS),
    "pbsd per token": ("pbsd", {"beta": 2.0, "per_token": True}, tokens.pbsd(2.0, True), PAIRS),
    "vpd m": ("vpd", {"every": 0}, distributions.sdpo(most=None), PLAIN),
    "trace": ("trace", {}, distributions.trace(0), SPANS),
    "trace later": ("trace", {}, distributions.trace(25), SPANS),
    "trace errors": (
        "trace",
        {"error_weight": 0.6, "key_weight": 0.2, "most": 0.6, "entry_clip": None, "top_k": 3},
        distributions.trace(12, key=0.2, error=0.6, most=0.6, clip=None, k=3),
        MARKED,
    ),
}
STEP = {"rlrt later": 12, "trace later": 25, "trace errors": 12}
E_STEPS = {"vpd e": "behavior", "vpd e initial": "prior"}


def agree(found, wanted):
    """Value and gradient agree to float32, and the gradient is not nothing."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=3e-5, atol=3e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-4, atol=3e-6)
    assert np.abs(wanted[1]).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    method, chosen, reference, data = CASES[name]
    objective = options.method_factory(method)(**chosen).objectives[0]
    agree(ours(objective, data, step=STEP.get(name, 0)), made.value_and_gradient(reference, data))


@pytest.mark.parametrize("name", E_STEPS)
def test_vpd_trains_its_teacher(name):
    prior = E_STEPS[name]
    objective = options.method_factory("vpd")(prior="current" if prior == "behavior" else "initial").objectives[0]
    data = told_apart_by(PLAIN, prior)
    agree(ours(objective, data, "teacher"), made.value_and_gradient(tokens.vpd_e_step(prior=prior), data, "teacher"))


@pytest.mark.parametrize("success", [0.2, 0.9])
def test_traces_threshold_is_the_methods(success):
    """Which branch a partial reward takes: 0.3 is right at 0.2, and 0.7 wrong at 0.9."""
    objective = options.method_factory("trace")(success=success, error_weight=0.6, most=1.0).objectives[0]
    reference = distributions.trace(0, error=0.6, most=1.0, success=success)
    agree(ours(objective, MARKED), made.value_and_gradient(reference, MARKED))


def test_opsa_leaves_its_threshold_alone():
    """A token exactly as likely as the threshold is not below it."""
    batch = tiny.batch([[0, 0]], behavior=[[np.log(0.25), np.log(0.2)]])
    zeros = jnp.zeros((1, 2))
    term = (
        options.method_factory("opsa")(threshold=0.25)
        .objectives[0]
        .terms(batch, {"logprobs": zeros, "entropy": zeros}, 0)
    )
    np.testing.assert_array_equal(term["pg"].weight, [[0.0, 1.0]])


def test_opsd_version_one():
    agree(
        ours(opsd_v1().objectives[0], PLAIN),
        made.value_and_gradient(distributions.opsd(0.5, None, 1.2), PLAIN),
    )


FIRST = {method: (name, options.method_factory(method)) for name, (method, *_) in reversed(CASES.items())}
"""The first case of every method, and its factory."""


@pytest.mark.parametrize("method", [m for m, (_, f) in FIRST.items() if "reduce" in inspect.signature(f).parameters])
def test_tokens_are_averaged_as_told(method):
    """Every trained term of a method with the option `reduce`."""
    name, factory = FIRST[method]
    chosen, data = CASES[name][1], CASES[name][3]
    told = lambda value, over: token_mean_of_tokens(value, over)
    _, dists, terms = addends(factory(**chosen, reduce=told).objectives[-1], data)
    found = [term.reduce for term in terms(dists).values() if float(term.coef) != 0.0]
    assert found and all(reduce is told for reduce in found)


said = lambda view: lambda data: data.said(data.dists[view])
student, teacher, behavior = said("student"), said("teacher"), lambda data: data.behavior
heard, trained = lambda data: data.heard, lambda data: data.over
one_each = lambda data: data.over & (np.cumsum(data.over, axis=-1) == 1)
own = lambda data: data.over & (data.source == STUDENT)[:, None]
drift = {"log_ratio": (lambda data: behavior(data) - teacher(data), heard)}
live_drift = {"log_ratio": (lambda data: student(data) - teacher(data), heard)}
LOGGED = {
    # method: {name: (what is averaged, over which tokens)}
    "antisd": {
        "bonus": (lambda data: -0.5 * (np.log1p(np.exp(data.extras.log_ratio)) - np.log(2.0)), trained),
        "gate": (lambda data: data.taught[:, None] * np.ones(data.over.shape), one_each),
    },
    "dasd": {
        name: (lambda data, i=i: rewards.directed(data)[i], heard) for i, name in enumerate(("direction", "bonus"))
    },
    "egrsd": {
        "gate": (lambda data: rewards.sure(data), heard),
        "teacher_entropy": (lambda data: made.entropy(data.dists["teacher"]), heard),
    },
    "iw_opd": drift,
    "msd": {"weight": (lambda data: distributions.sure_and_apart(data), heard)},
    "opd": drift,
    "opsa": {"penalised": (lambda data: np.exp(data.behavior) < 0.1, trained)},
    "power_opd": {
        **drift,
        "token_reward": (lambda data: np.exp(5.0 * teacher(data)) - np.exp(5.0 * behavior(data)), heard),
    },
    "purified_opsd": {
        "shortcut": (lambda data: np.abs(said("reference")(data) - student(data)), heard),
        "kept": (lambda data: np.abs(said("informed")(data) - said("reference")(data)), heard),
    },
    "rlrt": {"credit": (rewards.rebellious, lambda data: data.over & data.extras.credited[:, None])},
    "stable_opd": drift,
    "topd": {
        **live_drift,
        "token_reward": (lambda data: np.log(0.5 * np.exp(teacher(data) - student(data)) + 0.5), heard),
    },
    "vopd": {**live_drift, "baseline": (lambda data: -made.kl(data.dists["student"], data.dists["teacher"]), heard)},
}
ENTROPY_OVER = {"egrsd": heard, "vopd": heard, "sort": own}
ELSEWHERE = {"ignored_ratios", "informative", "margin"}
"""Tested with their methods: they are of groups and pairs, or of garbage."""


@pytest.mark.parametrize("method", FIRST)
def test_what_is_logged(method):
    """Sign, scale and population of all that a method logs and does not train; alignment has tests of its own."""
    name, factory = FIRST[method]
    chosen, data = CASES[name][1], CASES[name][3]
    batch, dists, terms = addends(factory(**chosen).objectives[-1], data)
    found = terms(dists)
    means = reduce_terms(found, batch.mask & batch.valid[:, None], token_mean_of_tokens)[1]
    logged = {n for n, term in found.items() if float(term.coef) == 0.0}
    entropy = {"entropy": (lambda data: made.entropy(data.dists["student"]), ENTROPY_OVER.get(method, trained))}
    known = {**LOGGED.get(method, {}), **entropy}
    assert logged - ELSEWHERE <= known.keys() or method == "rethinking_opd"
    for n in logged & known.keys():
        value, over = known[n]
        np.testing.assert_allclose(means[n], token_mean(value(data), over(data)), rtol=3e-5, err_msg=n)


def test_every_method_has_a_reference():
    assert {method for method, *_ in CASES.values()} == set(options.method_names())
