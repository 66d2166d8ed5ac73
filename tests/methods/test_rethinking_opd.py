"""Rethinking OPD: its losses and metrics on the numbers of its design note, its cold start, and its continuations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import whole_runs
from method_checks import assert_same, close, expected_gradient, fixture, loss_and_gradient
from networks import unoptimised

from sdjax.collect.contexts import question, with_solution
from sdjax.collect.continuations import with_continuation_gains
from sdjax.collect.diagnostics import auroc, auroc_by_prompt, auroc_of_groups
from sdjax.collect.rollouts import attempts, sample
from sdjax.engine.generate import GREEDY
from sdjax.kernels.distributions import normalise
from sdjax.methods.brts import brts
from sdjax.methods.opd import opd
from sdjax.methods.rethinking_opd import rethinking_opd
from sdjax.methods.sft import sft
from sdjax.types import STUDENT, TEACHER, Verdict

P, Q = (normalise(jnp.asarray(z)) for z in ((2.0, 1.0, 0.0, -1.0), (1.0, 1.5, 0.5, -0.5)))
near = functools.partial(np.testing.assert_allclose, atol=2e-6)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


# ---- the device half ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"top_k": 2}, (0.330034, -0.281999, -0.035116, -0.012919)),
        ({"top_k": 2, "loss": "renormalised"}, (0.294918, -0.294918, 0.0, 0.0)),
        ({"top_k": 2, "raw_weights": True}, (0.290693, -0.248384, -0.03093, -0.011379)),
        ({"top_k": None}, (0.343933, -0.228798, -0.08417, -0.030964)),
        ({"top_k": 0}, (0.343933, -0.228798, -0.08417, -0.030964)),
        ({}, (0.343933, -0.228798, -0.08417, -0.030964)),  # 16 of 4 tokens
    ],
    ids=str,
)
def test_expected_gradients(how, expected):
    """Over tokens that the student samples; that of the sampled form is exactly the full divergence's."""
    near(expected_gradient(rethinking_opd(**how), P, Q), expected)


@pytest.mark.parametrize("on_policy", [True, False])
def test_limits(on_policy):
    """On ragged rows of which one has no teacher."""
    data = fixture(on_policy=on_policy)
    assert_same(rethinking_opd(top_k=None), opd(full_vocabulary=True), *data)
    assert_same(rethinking_opd(top_k=3), brts(coef=0.0, top_k=3), *data)
    assert_same(rethinking_opd(top_k=None, loss="renormalised"), opd(full_vocabulary=True), *data)
    assert_same(rethinking_opd(top_k=0, clip=(1.0, 1e9), dual_clip=None), opd(), *data)


def test_candidates_of_rollout_time_against_numpy():
    """Two updates on a batch: candidates, weights and advantages are the sampler's, the ratio is clipped."""
    batch, logits, teacher = fixture()
    old = normalise(logits + 0.4 * jnp.sin(7.0 * logits))
    method = rethinking_opd(top_k=2, rollout_time=True)
    dists = {"student": normalise(logits), "teacher": teacher, "sampler": old}
    value = float(tiny.loss(method.objectives[0], batch, **dists)[0])
    p, q, b = (np.asarray(dists[name], np.float64) for name in ("student", "teacher", "sampler"))
    over = np.asarray(batch.mask) & np.asarray(batch.contexts["teacher"].valid)[:, None]
    total = 0.0
    for i, t in zip(*np.nonzero(over), strict=True):
        ids = np.argsort(-b[i, t])[:2]
        weight = np.exp(b[i, t, ids]) / np.exp(b[i, t, ids]).sum()
        advantage = -weight * (b[i, t, ids] - q[i, t, ids])
        ratio = np.exp(p[i, t, ids] - b[i, t, ids])
        loss = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
        total += np.where(advantage < 0, np.minimum(loss, -3 * advantage), loss).sum()
    assert value == pytest.approx(total / over.sum(), rel=1e-5)
    assert method.objectives[0].views["sampler"].policy == "sampler"
    live, other = {"x": jnp.ones(1)}, {"x": jnp.zeros(1)}
    assert method.snapshots["sampler"](live, other, jnp.int32(3))["x"] == 1.0  # renewed after every batch


def test_reward_beside_the_teacher():
    """GRPO's advantage on the sampled token of every row, the one without a teacher included."""
    batch, logits, teacher = fixture()
    both, alone = (loss_and_gradient(rethinking_opd(rl_weight=w), batch, logits, teacher)[1] for w in (0.5, 0.0))
    row = 2  # no teacher, reward 0 in a group of (0, 1): the advantage is -1 / sqrt 2
    assert not alone[row].any()
    chance = np.exp(np.asarray(normalise(logits)))[row, 0]
    hot = np.eye(7)[int(batch.completion[row, 0])]
    near(both[row, 0], 0.5 * (hot - chance) / np.sqrt(2) / np.asarray(batch.mask).sum(), atol=1e-5)


def test_metrics_of_the_note():
    first, second = tiny.log(0.40, 0.25, 0.15, 0.12, 0.08), tiny.log(0.20, 0.35, 0.05, 0.30, 0.10)
    batch = tiny.batch([[0, 0]], taught=[True])
    wide = lambda dist: jnp.broadcast_to(dist, (1, 2, 5))
    terms = tiny.loss(rethinking_opd(top_k=3).objectives[0], batch, student=wide(first), teacher=wide(second))[1]
    near(terms["overlap"], 2 / 3)
    near(terms["overlap_advantage"], -0.065043)
    near((terms["student_mass"], terms["teacher_mass"]), (0.65, 0.55))
    near(terms["entropy_gap"], 0.023586)
    near(terms["extreme_token_gap"], 0.40 - 0.20)
    near(terms["log_ratio"], np.log(0.20 / 0.40))
    near(terms["divergence"], 0.447416)


def test_padding_and_garbage_change_nothing():
    batch, logits, teacher = fixture()
    outside = ~batch.mask[..., None]
    for how in ({}, {"top_k": 0}, {"loss": "renormalised", "support": "union", "top_k": 2}):
        method = rethinking_opd(**how)
        value, found = loss_and_gradient(method, batch, logits, teacher)
        dirty = jnp.where(outside, 3.0 * jnp.cos(logits), logits)
        other, moved = loss_and_gradient(method, batch, dirty, jnp.where(outside, normalise(jnp.sin(logits)), teacher))
        assert value == other and np.abs(found).max() > 1e-4
        np.testing.assert_array_equal(found[np.asarray(batch.mask)], moved[np.asarray(batch.mask)])
        assert not moved[~np.asarray(batch.mask)].any() and not moved[2].any()


def test_auroc_per_prompt_is_not_that_of_all_rows():
    """An easy prompt with high rewards and a hard one with low: within each the wrong row is rewarded more."""
    reward, correct, prompt = [0.8, 0.9, 0.1, 0.2, 0.5], [True, False, True, False, True], [0, 0, 1, 1, 2]
    assert auroc_by_prompt(reward, correct, prompt) == 0.0 < auroc(reward, correct)
    over = jnp.ones(5, bool)
    share, rows = auroc_of_groups(jnp.asarray(reward), jnp.asarray(correct), over, jnp.asarray(prompt))
    assert np.asarray(rows).tolist() == [True, False, True, False, False]
    assert float(share[rows].mean()) == 0.0
    draw = np.random.default_rng(0)
    values, right, group = draw.normal(size=24).round(1), draw.random(24) < 0.4, np.repeat(np.arange(6), 4)
    share, rows = auroc_of_groups(*(jnp.asarray(x) for x in (values, right, np.ones(24, bool), group)))
    assert float(share[rows].mean()) == pytest.approx(auroc_by_prompt(values, right, group))
    # Rows that the teacher says nothing about compare with nobody; without a mixed prompt there is nothing to say.
    share, rows = auroc_of_groups(jnp.asarray(reward), jnp.asarray(correct), over.at[1].set(False), jnp.asarray(prompt))
    assert np.asarray(rows).tolist() == [False, False, True, False, False]
    share, rows = auroc_of_groups(jnp.asarray(reward), over, over, jnp.asarray(prompt))
    assert np.asarray(rows).all() and (np.asarray(share) == 0.5).all()
    assert np.isnan(auroc_by_prompt(reward, [True] * 5, prompt))


# ---- the host half --------------------------------------------------------------------------------------------------


def ended(example, text):
    """A verdict by which random texts differ."""
    return Verdict(float(len(text) % 3 == 0))


def told(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


@functools.cache
def collected(batches=1, prompts=2, **how):
    method = rethinking_opd(group_size=4, **how)
    environment, memory = tiny.environment(method, verify=ended), method.memory
    for number in range(batches):
        examples = list(tiny.TASK.train[:prompts])
        rollouts, memory = method.collect(environment, examples, jax.random.key(number), memory)
    return method, rollouts, memory


def test_four_rollouts_and_an_external_teacher_that_reads_the_question():
    method, rollouts, _ = collected()
    assert [r.group for r in rollouts] == [0] * 4 + [1] * 4
    assert all(r.contexts == dict.fromkeys(("student", "teacher"), question(r.example)) for r in rollouts)
    assert method.objectives[0].views["teacher"].policy == "teacher" and not method.snapshots
    informed = rethinking_opd(lesson=told)
    assert informed.objectives[0].views["teacher"].policy == "initial" and set(informed.snapshots) == {"initial"}


def test_the_cold_start_is_written_by_the_teacher_and_imitated():
    """Whole texts only; the loss on them is that of SFT, and afterwards that of the method without a cold start."""
    method, rollouts, memory = collected(cold_start=1, prompts=8)
    assert memory == 1 and rollouts and all(r.source == TEACHER for r in rollouts)
    assert all(r.finished and r.contexts["teacher"] is None for r in rollouts)
    environment = tiny.environment(verify=ended)
    plain = sample(environment.policies["teacher"], list(tiny.TASK.train[:8]), jax.random.key(0), n=4)
    assert [r.tokens for r in rollouts] == [r.tokens for r in plain if r.finished and r.text]
    assert len(rollouts) < len(plain)
    batch = tiny.collected(method, rollouts)
    logits = jax.random.normal(jax.random.key(5), (*batch.completion.shape, 40))
    assert_same(method, sft(), batch, logits, normalise(jnp.sin(logits)))
    imitation, distillation = method.objectives
    assert set(imitation.views) == {"student"}  # no forward pass of the teacher
    assert [(imitation.due(n), distillation.due(n)) for n in (0, 1, 2)] == [(True, False), (False, True), (False, True)]
    _, later, memory = collected(batches=2, cold_start=1)
    assert memory == 2 and all(r.source == STUDENT for r in later)
    batch = tiny.collected(method, later, 2)
    logits = jax.random.normal(jax.random.key(5), (*batch.completion.shape, 40))
    method = method._replace(objectives=(distillation,))
    assert_same(method, rethinking_opd(), batch, logits, normalise(jnp.sin(logits)))


def test_an_informed_teacher_reads_its_lesson_before_it_writes():
    seen = []

    def lesson(rollout, rollouts):
        seen.append((rollout.text, rollouts))
        return told(rollout, rollouts)

    collected(cold_start=1, lesson=lesson)
    assert seen and all(given == ("", []) for given in seen)


def test_continuations_are_the_teachers_and_judged_whole():
    environment = tiny.environment(verify=ended)
    _, rollouts, _ = collected()
    seen = []

    def verify(example, text):
        seen.append(text)
        return ended(example, text)

    environment = environment._replace(verify=verify)
    depths = (2, 5)
    found = with_continuation_gains(environment, rollouts, jax.random.key(3), depths, teacher="teacher")
    long = {d: [r for r in rollouts if len(r.tokens) > d] for d in depths}
    assert len(seen) == sum(map(len, long.values())) and 0 < len(long[5]) <= len(long[2])
    texts = iter(seen)
    for depth in depths:
        for r in rollouts:
            gain = found[rollouts.index(r)].extras[f"continuation_gain/{depth}"]
            if r not in long[depth]:
                assert gain == 0.0
                continue
            text = next(texts)
            begin = tiny.tokenizer().decode(list(r.tokens[:depth]), skip_special_tokens=True).strip()
            assert text.startswith(begin)
            assert gain == ended(None, text).reward - (r.reward >= 0.5)
    # The student itself would go on differently.
    teacher_texts, seen[:] = list(seen), []
    with_continuation_gains(environment, rollouts, jax.random.key(3), depths, teacher="live")
    assert teacher_texts != seen


def test_a_greedy_continuation_of_a_greedy_prefix_is_the_text_itself():
    environment = tiny.environment(verify=ended)
    own = attempts(environment, list(tiny.TASK.train[:3]), jax.random.key(0), n=1, sampling=GREEDY)
    seen = []
    environment = environment._replace(verify=lambda e, text: (seen.append(text), Verdict(0.0))[1])
    own = [r.read_by(teacher=question(r.example)) for r in own]
    with_continuation_gains(environment, own, jax.random.key(9), (3,), teacher="live", sampling=GREEDY)
    assert seen == [r.text for r in own if len(r.tokens) > 3]


def test_gains_are_averaged_over_the_rows_that_are_long_enough():
    batch = tiny.batch(jnp.zeros((4, 4)), taught=[True, True, True, False])
    present = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    gain = {"continuation_gain/2": jnp.asarray([1.0, -0.5, 9.0, 9.0])}
    batch = batch.replace(present=present, mask=present, extras=gain)
    dist = jnp.broadcast_to(P, (4, 4, 4))
    terms = tiny.loss(rethinking_opd().objectives[0], batch, student=dist, teacher=dist)[1]
    close(terms["continuation_gain/2"], 0.25)


@pytest.mark.usefixtures("cached")
@pytest.mark.slow
def test_the_recipe_from_the_command_line(tmp_path):
    """A cold start, then distillation, with continuation gains at two depths."""
    how = (
        "--method",
        "rethinking_opd",
        "--method.cold-start",
        "1",
        "--method.depths",
        "2",
        "5",
        "--method.group-size",
        "4",
    )
    command = ["train", whole_runs.FILE, *how, "--no-replay", "--prompts", "4", "--steps", "2", "--evaluation", "0"]
    assert whole_runs.run_here(*command, "--out", tmp_path / "run") == 0
    first, second = whole_runs.lines(tmp_path / "run")
    assert first["nll"] > 0.0 == first["read_by_teacher"] and "divergence" not in first
    assert "nll" not in second and second["divergence"] > 0.0 and 0.0 < second["overlap"] <= 1.0
    assert {"auroc", "continuation_gain/2", "continuation_gain/5"} <= second.keys()
