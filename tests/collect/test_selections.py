"""What of a batch is learnt from: rows, questions, routes, parts of references; and when a teacher is renewed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import whole_runs
from method_checks import close, fixture, loss_and_gradient
from networks import unoptimised

from sdjax.collect import refreshing, selections
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.controls import with_teacher_context
from sdjax.collect.refreshing import RefreshError, with_refresh
from sdjax.collect.selections import MASK, RIGHT, WEIGHT, SelectionError, part, routed, selected, with_rows
from sdjax.kernels.distributions import logprob, normalise
from sdjax.kernels.reductions import token_mean
from sdjax.methods.antisd import antisd
from sdjax.methods.grpo import grpo
from sdjax.methods.opd import opd
from sdjax.methods.opsd import opsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdpo import sdpo
from sdjax.methods.stable_opd import stable_opd
from sdjax.samplers.staleness import bounded, lagged
from sdjax.types import REFERENCE, Rollout


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def told(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


def rows_of(rewards, source=0):
    """Rollouts of one group per list of rewards."""
    return [
        Rollout(tiny.TASK.train[g], (1, 2), (0.0, 0.0), "", g, reward=r, source=source)
        for g, some in enumerate(rewards)
        for r in some
    ]


def marks(batch, right, weight=None):
    """The extras of a selection."""
    extras = {RIGHT: jnp.asarray(right), WEIGHT: jnp.ones(len(right)) if weight is None else jnp.asarray(weight)}
    return batch.replace(extras={**batch.extras, **extras})


# ---- rows and questions ---------------------------------------------------------------------------------------------


def test_nothing_is_selected_by_default():
    method = sdpo()
    assert selected(method) is method


def test_weights_of_questions_by_their_pass_rate():
    rows = rows_of([(1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 1)])
    found = selections.marked(rows, 0.5, (1.0, 1.0))
    raw = np.asarray([0.25 * 0.75, 0.5 * 0.5, 0.0])
    close([found[i].extras[WEIGHT] for i in (0, 4, 8)], raw / raw.mean())
    hard = np.asarray([0.75, 0.5, 0.0]) ** 2
    close([selections.marked(rows, 0.5, (0.0, 2.0))[i].extras[WEIGHT] for i in (0, 4, 8)], hard / hard.mean())
    assert {r.extras[WEIGHT] for r in selections.marked(rows, 0.5)} == {1.0}
    assert [r.extras[RIGHT] for r in found] == [r.reward >= 0.5 for r in rows]
    # Partial credit below the threshold is a failure; nothing learnable: all 0; a reference has its question's weight.
    assert {r.extras[WEIGHT] for r in selections.marked(rows_of([(0.4, 0.01), (1, 1)]), 0.5, (1.0, 1.0))} == {0.0}
    golden = [*rows, dataclasses.replace(rows[0], source=REFERENCE, group=1, reward=1.0)]
    assert selections.marked(golden, 0.5, (1.0, 1.0))[-1].extras[WEIGHT] == found[4].extras[WEIGHT]
    alone = rows_of([(1.0,)], source=REFERENCE)
    assert selections.marked(alone, 0.5, (1.0, 1.0))[0].extras[WEIGHT] == 1.0


@pytest.mark.parametrize("kind", ["successes", "failures"])
def test_rows_of_one_outcome_keep_the_groups_advantage(kind):
    batch, logits, teacher = fixture(on_policy=False)
    right = np.asarray([True, False, False, True])
    batch = marks(batch, right)
    plain, method = grpo(reduce=token_mean), with_rows(grpo(reduce=token_mean), kind, (0.0, 0.0))
    whole, found = (loss_and_gradient(m, batch, logits, teacher)[1] for m in (plain, method))
    rows, mask = right == (kind == "successes"), np.asarray(batch.mask)
    assert not found[~rows].any()
    close(found[rows], whole[rows] * mask.sum() / mask[rows].sum(), atol=1e-5, rtol=1e-4)


def test_weights_multiply_rows_whatever_the_term():
    batch, logits, teacher = fixture(on_policy=False)
    weight = jnp.asarray([0.5, 0.5, 2.0, 2.0])
    for method in (grpo(reduce=token_mean), sdpo(top_k=None), opd(), rlrt(tis_cap=None, mix=0.0)):
        extras = {
            "credited": jnp.zeros(4, bool),
            "old_logprobs": batch.behavior_logprobs,
            "old_teacher": batch.behavior_logprobs,
        }
        data = marks(batch.replace(extras={**batch.extras, **extras}), [True] * 4, weight), logits, teacher
        plain = loss_and_gradient(method, *data)[1]
        found = loss_and_gradient(with_rows(method, "all", (1.0, 1.0)), *data)[1]
        close(found, plain * np.asarray(weight)[:, None, None], atol=1e-6, rtol=1e-4)
        assert np.abs(plain).max() > 1e-4


def test_references_stay_when_failures_are_left_out():
    method = with_rows(stable_opd(), "successes", (0.0, 0.0))
    batch, logits, teacher = fixture()
    batch = marks(batch.replace(source=jnp.asarray([0, REFERENCE, 0, 0])), [False, False, False, False])
    found = loss_and_gradient(method, batch, logits, teacher)[1]
    assert np.abs(found[1]).max() > 1e-4 and not found[[0, 2, 3]].any()


# ---- routing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [sdpo(top_k=None), opsd(clip=None, temperature=1.0)], ids=["sdpo", "opsd"])
def test_routing_against_numpy(method):
    """Failures with a lesson: this method's divergence; successes, and failures without: GRPO; one denominator."""
    batch, logits, teacher = fixture(on_policy=False, taught=(True, True, False, True))
    batch = marks(batch, [True, False, False, True])
    value, found = loss_and_gradient(routed(method), batch, logits, teacher)
    dist, mask = normalise(logits), np.asarray(batch.mask)
    own = np.asarray(logprob(dist, batch.completion), np.float64)
    ratio = np.exp(own - np.asarray(batch.behavior_logprobs))
    advantage = np.asarray([1, -1, -1, 1])[:, None] / np.sqrt(2)
    surrogate = np.maximum(-ratio * advantage, -np.clip(ratio, 0.8, 1.2) * advantage)
    sig = method.objectives[0].signals({"student": dist, "teacher": teacher}, batch.completion)
    term = method.objectives[0].terms(batch, sig, 0)["divergence"]
    distilled = np.asarray(term.value * term.weight * term.importance)
    losses = np.stack([surrogate[0], distilled[1], surrogate[2], surrogate[3]])
    assert value == pytest.approx(losses[mask].sum() / mask.sum(), rel=1e-4)
    # The distilled row's gradient is that of the method alone, by what all rows count.
    alone = loss_and_gradient(method, batch, logits, teacher)[1]
    taught = mask[[0, 1, 3]].sum()
    close(found[1], alone[1] * taught / mask.sum(), atol=1e-6, rtol=1e-4)


def test_routing_leaves_golden_rows_alone():
    method = stable_opd()
    batch, logits, teacher = fixture()
    batch = marks(batch.replace(source=jnp.asarray([0, 0, 0, REFERENCE])), [False] * 4)
    plain, found = (loss_and_gradient(m, batch, logits, teacher)[1] for m in (method, routed(method)))
    assert np.abs(plain[3]).max() > 1e-4
    close(found[3], plain[3], atol=1e-6)


def test_only_objectives_with_a_teacher_are_routed_and_then_made_of_rewards():
    distilled, plain = sdpo(top_k=None), grpo()
    both = distilled._replace(objectives=(*plain.objectives, *distilled.objectives))
    found = routed(both).objectives
    assert found[0] is plain.objectives[0] and found[1].rewarded and not distilled.objectives[0].rewarded
    assert found[1].views == distilled.objectives[0].views


def test_routing_needs_a_teacher():
    with pytest.raises(SelectionError, match="no teacher"):
        routed(grpo())


# ---- parts of references --------------------------------------------------------------------------------------------


def test_parts_of_a_text():
    text = "one two\n three  four"
    assert part(text, 0.5, "beginning", "x") == "one two"
    assert part(text, 0.01, "beginning", "x") == "one"
    masked = part(text, 0.5, "masked", "x")
    assert masked.count(MASK) == 2 and masked == part(text, 0.5, "masked", "x")
    assert {part(text, 0.5, "masked", str(i)) for i in range(20)} - {masked}
    assert [a == b or a == MASK for a, b in zip(masked.split(), text.split(), strict=True)] == [True] * 4
    assert part("", 0.5, "masked", "x") == "" == part("", 0.5, "beginning", "x")


@pytest.mark.parametrize("shown", ["beginning", "masked"])
def test_only_the_teacher_reads_a_part(shown):
    method = sdpo(group_size=2, top_k=None, ema_rate=0.0, lesson=told)
    changed = selections.with_partial_references(method, 0.5, shown)
    environment, examples, key = tiny.environment(method), list(tiny.TASK.train[:2]), jax.random.key(0)
    before, after = (m.collect(environment, examples, key, None)[0] for m in (method, changed))
    for old, new in zip(before, after, strict=True):
        assert (old.tokens, old.contexts["student"]) == (new.tokens, new.contexts["student"])
        left = part(old.example.solution, 0.5, shown, old.example.id)
        whole = old.contexts["teacher"][-1]["content"]
        assert new.contexts["teacher"][-1]["content"] == left.join(whole.rsplit(old.example.solution, 1))
        assert new.contexts["teacher"][-1]["privileged"] == left != old.example.solution


def test_views_that_score_while_collecting_read_the_part_too():
    method = antisd(group_size=2, warmup=0)
    environment, examples, key = tiny.environment(method), list(tiny.TASK.train[:2]), jax.random.key(0)
    run = lambda m: m.collect(environment, examples, key, m.memory)[0]
    whole, some = run(method), run(selections.with_partial_references(method, 0.4))
    assert [r.tokens for r in whole] == [r.tokens for r in some]
    names = [n for n, x in whole[0].extras.items() if np.ndim(x)]
    assert names and any(
        (np.asarray(a.extras[n]) != np.asarray(b.extras[n])).any()
        for n in names
        for a, b in zip(whole, some, strict=True)
    )
    # Inside a control: the next problem's part.
    both = with_teacher_context(selections.with_partial_references(opsd(group_size=1), 0.5), "mismatched")
    rows = both.collect(tiny.environment(both), examples, key, None)[0]
    for row, other in zip(rows, examples[::-1], strict=True):
        assert part(other.solution, 0.5, "beginning", other.id) in row.contexts["teacher"][-1]["content"]


def test_parts_are_refused_where_nothing_is_told():
    for method in (grpo(), opd()):
        with pytest.raises(SelectionError, match="no teacher's context"):
            selected(method, share=0.5)
    with pytest.raises(SelectionError, match="share=1.5"):
        selected(opsd(), share=1.5)


# ---- renewed teachers -----------------------------------------------------------------------------------------------


def test_a_clock_replaces_the_methods_rule():
    method = with_refresh(sdpo(), 3)
    live, old = {"x": jnp.ones(1)}, {"x": jnp.zeros(1)}
    assert [float(method.snapshots["teacher"](live, old, jnp.int32(s))["x"][0]) for s in range(1, 7)] == [
        0,
        0,
        1,
        0,
        0,
        1,
    ]
    with pytest.raises(RefreshError, match="no snapshot"):
        with_refresh(sdpo(ema_rate=1.0), 3)
    with pytest.raises(RefreshError, match="no snapshot"):
        selected(grpo(kl_coef=0.1), refresh_gain=0.0)


def test_the_gate_opens_on_gain_alone():
    """Window 2: the first level is .2; a copy needs a gain above .1, two batches since the last, and short attempts."""
    memory, due = refreshing.START, []
    for reward, length in [(0.2, 2), (0.2, 2), (0.4, 2), (0.4, 9), (0.4, 2), (0.9, 2), (0.9, 2), (0.9, 2)]:
        row = dataclasses.replace(rows_of([(reward,)])[0], tokens=(1,) * length)
        memory = refreshing.seen([row], memory, least=2, gain=0.1, window=2, longest=5)
        memory = json.loads(json.dumps(memory))
        due.append(memory["due"])
    # .2 .3 | .4 but 9 tokens in the window, twice | .65: copied | .9: too soon | .9: copied
    assert due == [False, False, False, False, False, True, False, True]


def gate(method):
    return method.snapshots["teacher"].open


def test_wrappers_look_for_the_gate_where_it_lies():
    method = with_refresh(sdpo(), 1, gain=0.0)
    for wrapped in (method, lagged(method, 1), bounded(lagged(method, 1), 3), bounded(method, 2)):
        inner = wrapped.memory
        for due in (True, False):
            memory = json.loads(json.dumps(inner).replace('"due": false', f'"due": {json.dumps(due)}'))
            assert gate(wrapped)(memory) is due


@pytest.mark.usefixtures("cached")
@pytest.mark.slow
def test_a_run_renews_its_teacher_at_the_gate_and_no_other(tmp_path):
    """From the command line: a gate that cannot open leaves the teacher as it was; one that must copies the student."""
    kept = []
    for name, gain in (("shut", "9"), ("open", "-9")):
        more = (
            "--no-replay",
            "--select.refresh-gain",
            gain,
            "--select.refresh-every",
            "1",
            "--select.refresh-window",
            "1",
        )
        command = ["train", whole_runs.FILE, "--out", tmp_path / name, "--steps", "2", "--evaluation", "0", *more]
        assert whole_runs.run_here(*command) == 0
        arrays, _ = whole_runs.saved(tmp_path / name, 2)
        first = next(n for n in arrays if "snapshots" in n and "embed" in n)
        live = next(n for n in arrays if "params" in n and "embed" in n and "snapshots" not in n and "opt" not in n)
        kept.append((arrays[first], arrays[live]))
    start = np.asarray(tiny.pretrained().params["embed"])
    np.testing.assert_array_equal(kept[0][0], start)
    assert (kept[0][1] != start).any()
    np.testing.assert_array_equal(kept[1][0], kept[1][1])
