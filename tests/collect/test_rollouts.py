"""Rollouts, their scores and the snapshots: the right numbers on the right rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import config, full_logits, network, read_lines, tokenizer, unoptimised

from sdjax.collect import rollouts
from sdjax.collect.contexts import question, with_solution
from sdjax.engine import policies
from sdjax.engine.chats import render
from sdjax.engine.generate import GREEDY, Sampling, mixture
from sdjax.engine.policies import Environment, Policy, ema, frozen, refresh
from sdjax.engine.tokens import Shapes
from sdjax.kernels.distributions import logprob, normalise
from sdjax.run.logs import records
from sdjax.tasks.data.problems import problems
from sdjax.types import REFERENCE, STUDENT, TEACHER, Example, Rollout, Verdict, View


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def example(number, words):
    return Example(f"e{number}", ({"role": "user", "content": words},), answer=f"a{number}", solution=f"w9{number}")


EXAMPLES = (example(0, "w1 w2"), example(1, "w3"), example(2, "w4 w5 w6 w7"))
SHAPES = Shapes(context=24, completion=6, tokens_per_chunk=16)


def policy(name="mixed", seed=0, **shapes):
    model, params = network(name, seed)
    return Policy(model, params, tokenizer(), dataclasses.replace(SHAPES, **shapes))


def verify(example, text):
    """Solved where the text has an even number of letters; says whose answer it looked at."""
    return Verdict(1.0 if len(text) % 2 == 0 else 0.25, f"{example.id}: {text}")


ENVIRONMENT = Environment({"live": policy(), "teacher": policy("plain")}, verify)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def attempts():
    return rollouts.attempts(ENVIRONMENT, EXAMPLES, KEY, n=3)


# ---- sampling -----------------------------------------------------------------------------------------------------


def test_attempts_are_judged_groups_in_order_that_the_student_reads_as_asked(attempts):
    assert [r.group for r in attempts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for r in attempts:
        assert r.example is EXAMPLES[r.group] and r.source == STUDENT
        assert r.contexts == {"student": r.example.prompt}
        assert Verdict(r.reward, r.feedback) == verify(r.example, r.text)
        assert r.text == tokenizer().decode(r.tokens, skip_special_tokens=True)
        assert 0 < len(r.tokens) == len(r.logprobs) <= SHAPES.completion
        assert r.finished == (r.tokens[-1] in policy().stop)
    assert len({r.tokens for r in attempts}) > 3


def test_what_a_verifier_measures_is_logged(attempts):
    def verify(example, text):
        return Verdict(0.5, example.id, {"late": float(example.id == "e1"), "none": 0.0})

    judged = rollouts.judge(ENVIRONMENT._replace(verify=verify), attempts)
    assert [r.feedback for r in judged] == [r.example.id for r in attempts]
    assert records.measured(judged) == {"late": 1 / 3, "none": 0.0}
    other = dataclasses.replace(judged[3], source=TEACHER)
    assert records.measured([judged[0], other]) == {"late": 0.0, "none": 0.0} and records.measured([]) == {}


def test_recorded_logprobs_are_those_of_a_plain_forward_pass(attempts):
    model, params = network("mixed")
    for r in attempts:
        logits = jnp.asarray(full_logits(model, params, render(tokenizer(), question(r.example)), r.tokens))
        np.testing.assert_allclose(r.logprobs, logprob(normalise(logits), jnp.asarray(r.tokens)), atol=1e-5)


def test_a_sample_depends_on_its_place_in_the_list_only():
    """Neither on how many rows are written at a time nor on what comes after it."""
    chats = [question(e) for e in EXAMPLES]
    together = policies.sample(policy(), chats, KEY, n=2)
    apart = policies.sample(policy(rows=2), chats, KEY, n=2)
    tokens = lambda samples: [[s.tokens for s in row] for row in samples]
    assert tokens(apart) == tokens(together)
    assert tokens(policies.sample(policy(rows=2), chats[:1], KEY, n=2)) == tokens(together[:1])
    assert [len(row) for row in together] == [2, 2, 2]


def test_another_context_and_another_limit_can_be_written_from():
    told = lambda e: with_solution(question(e), e.solution, header="w20", instruction="w21")
    found = rollouts.sample(policy(), EXAMPLES, KEY, n=3, context=told, sampling=GREEDY, source=TEACHER, limit=2)
    model, params = network("mixed")
    for r in found:
        assert r.source == TEACHER and len(r.tokens) <= 2 and not r.contexts
        logits = full_logits(model, params, render(tokenizer(), told(r.example)), r.tokens)
        assert list(r.tokens) == logits.argmax(-1).tolist()


def test_policies_can_write_together():
    chats = [question(e) for e in EXAMPLES]
    both = policies.sample((policy(), policy("plain")), (chats, chats[::-1]), KEY, n=3, choose=mixture(0.0))
    alone = policies.sample(policy(), chats, KEY, n=3)
    assert [[s.tokens for s in row] for row in both] == [[s.tokens for s in row] for row in alone]


# ---- peers and written rows ---------------------------------------------------------------------------------------


def row(group, reward, text=""):
    return Rollout(EXAMPLES[0], (1,), (0.0,), text, group, reward=reward)


def test_a_solved_peer_is_the_first_other_success_of_the_group():
    rows = [row(0, 0.0), row(1, 1.0), row(0, 0.5), row(0, 1.0), row(2, 0.4)]
    peers = [rollouts.solved_peer(r, rows) for r in rows]
    assert [None if p is None else rows.index(p) for p in peers] == [2, None, 3, 2, None]
    assert rollouts.solved_peer(rows[0], rows, success=0.9) is rows[3]


def test_a_peer_has_solved_it_from_half_a_reward_on_and_has_something_to_show():
    first = tiny.row("x", 0.0)
    for text, reward, shown in (("y", 0.5, True), ("y", 0.49, False), ("<think>y", 1.0, False), ("", 1.0, True)):
        other = tiny.row(text, reward)
        assert rollouts.solved_peer(first, [first, other]) is (other if shown else None)
    assert rollouts.solved_peer(first, [tiny.row("y", 1.0, group=1)]) is None


def test_twins_with_equal_text_are_each_others_peers():
    rows = [row(0, 1.0, "same"), row(0, 1.0, "same")]
    assert rollouts.solved_peer(rows[0], rows) is rows[1] and rollouts.solved_peer(rows[1], rows) is rows[0]


def test_a_written_row_ends_with_the_end_token_and_has_no_logprobs():
    found = rollouts.written(EXAMPLES[0], "w1 w2", policy(), group=4, source=REFERENCE)
    assert tokenizer().convert_ids_to_tokens(found.tokens) == ["w1", "w2", "<|im_end|>"]
    assert found.logprobs == (0.0, 0.0, 0.0) and (found.group, found.source) == (4, REFERENCE)
    assert found.finished and found.text == "w1 w2"


def test_a_written_row_that_is_cut_is_not_finished():
    found = rollouts.written(EXAMPLES[0], "w1 w2 w3 w4 w5 w6", policy(), group=0, source=REFERENCE)
    assert len(found.tokens) == len(found.logprobs) == 6 and not found.finished
    open_end = rollouts.written(EXAMPLES[0], "w1 w2", policy(), group=0, source=REFERENCE, finished=False)
    assert tokenizer().convert_ids_to_tokens(open_end.tokens) == ["w1", "w2"] and not open_end.finished


# ---- files --------------------------------------------------------------------------------------------------------


def test_rollouts_in_a_file_are_read_as_examples(tmp_path):
    rows = [
        Rollout(EXAMPLES[0], (1,), (0.0,), "größer\n\nw1", 0, reward=1.0),
        Rollout(EXAMPLES[1], (1,), (0.0,), "w2", 1),
        Rollout(EXAMPLES[0], (1,), (0.0,), "", 0),
        Rollout(EXAMPLES[0], (1,), (0.0,), "w3", 0),
    ]
    told = with_solution(question(EXAMPLES[1]), "w90")
    rows[1] = dataclasses.replace(rows[1], example=dataclasses.replace(EXAMPLES[1], prompt=told))
    path = tmp_path / "rows.jsonl"
    rollouts.to_file(path, rows)
    examples = problems(path).examples
    assert [e.id for e in examples] == ["e0", "e1", "e0#2", "e0#3"]
    assert [e.solution for e in examples] == ["größer\n\nw1", "w2", None, "w3"]
    assert [e.answer for e in examples] == ["a0", "a1", "a0", "a0"]
    assert examples[0].prompt == EXAMPLES[0].prompt
    assert examples[1].prompt == ({"role": "user", "content": told[-1]["content"]},)
    assert [line["reward"] for line in read_lines(path)] == [1.0, 0.0, 0.0, 0.0]


# ---- scores -------------------------------------------------------------------------------------------------------

VIEWS = {"student": View(trainable=True), "told": View("teacher", per_rollout=True)}


def signals(dist, token):
    return {name: logprob(value, token) for name, value in dist.items()}


def told(r):
    return with_solution(question(r.example), f"w{len(r.tokens)}", header="w20", instruction="w21")


def test_scores_come_back_to_their_own_rollouts(attempts):
    """Groups of three, one and two rows, interleaved, each row cut to a length of its own."""
    order = [(0, 2), (6, 5), (1, 6), (3, 1), (7, 4), (2, 3)]
    rows = [
        dataclasses.replace(attempts[i], tokens=attempts[i].tokens[:n], logprobs=attempts[i].logprobs[:n])
        for i, n in order
    ]
    rows = [r.read_by(told=told(r)).with_extras(kept=1.0) for r in rows]
    found = policies.score(ENVIRONMENT, rows, VIEWS, signals)
    model, params = network("plain")
    assert [len(r.tokens) for r in found] == [len(r.tokens) for r in rows]
    for before, after in zip(rows, found, strict=True):
        assert after.tokens == before.tokens and after.extras["kept"] == 1.0
        np.testing.assert_allclose(after.extras["student"], before.logprobs, atol=2e-5)
        logits = jnp.asarray(full_logits(model, params, render(tokenizer(), told(before)), before.tokens))
        wanted = logprob(normalise(logits), jnp.asarray(before.tokens))
        np.testing.assert_allclose(after.extras["told"], wanted, atol=2e-5)
    assert "student" not in rows[0].extras


def test_scoring_compiles_once(attempts):
    rows = [r.read_by(told=told(r)) for r in attempts[:6]]
    policies.score(ENVIRONMENT, rows, VIEWS, signals)
    before = tiny.programs("compiled_score")
    policies.score(ENVIRONMENT, rows[::-1], VIEWS, signals)
    assert tiny.programs("compiled_score") == before > 0


def test_two_networks_are_used():
    """What the scores above rely on."""
    assert config("mixed") != config("plain")


# ---- snapshots ----------------------------------------------------------------------------------------------------

LIVE = {"a": jnp.asarray([3.0, -1.0, 0.1]), "b": {"c": jnp.asarray(7.3)}}
OLD = {"a": jnp.asarray([1.0, 5.0, 0.3]), "b": {"c": jnp.asarray(-2.7)}}


def equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_moving_average_takes_a_twentieth_of_the_way():
    np.testing.assert_allclose(ema(0.05)(LIVE, OLD, 0)["a"][0], 1.1, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_a_moving_average_after_n_steps_is_geometric(rate):
    """`live + (1 - rate)^n (old - live)` for a student that stays."""
    found = OLD
    for step in range(1, 41):
        found = ema(rate)(LIVE, found, step)
        wanted = jax.tree.map(lambda a, b, n=step: a + (1 - rate) ** n * (b - a), LIVE, OLD)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_rates_0_and_1_are_frozen_and_live_to_the_bit():
    equal(ema(0.0)(LIVE, OLD, 1), OLD)
    equal(ema(1.0)(LIVE, OLD, 1), LIVE)
    equal(frozen()(LIVE, OLD, 10), OLD)


def test_a_refreshed_snapshot_changes_after_every_nth_batch():
    steps = [step for step in range(1, 13) if float(refresh(5)(LIVE, OLD, step)["b"]["c"]) == float(LIVE["b"]["c"])]
    assert steps == [5, 10]
    equal(refresh(5)(LIVE, OLD, jnp.asarray(5)), LIVE)
    equal(refresh(5)(LIVE, OLD, jnp.asarray(4)), OLD)
    equal(refresh(1)(LIVE, OLD, 7), LIVE)


# ---- groups again ---------------------------------------------------------------------------------------------------


def resampled(wanted, offered, *, rounds=3, more=True):
    """Texts and groups of what is kept of offered rewards, `[round][group][row]`; what was asked for; and by which key."""
    asked = []

    def attempt(examples, key):
        asked.append(([e.id for e in examples], str(jax.random.key_data(key))))
        groups = offered[len(asked) - 1]
        return [
            tiny.row(f"{len(asked)}.{g}.{i}", r, group=g) for g, some in enumerate(groups) for i, r in enumerate(some)
        ]

    environment = tiny.environment(more=tiny.endless(2, start=5) if more else None)
    mixed = lambda rows: len({r.reward for r in rows}) > 1
    examples = list(tiny.TASK.train[:wanted])
    found = rollouts.resample(environment, examples, jax.random.key(0), attempt, mixed, rounds=rounds)
    return [(r.text, r.group) for r in found], asked


MIXED, ALIKE = (0.0, 1.0), (1.0, 1.0)


def test_enough_groups_at_once_are_not_asked_for_again():
    found, asked = resampled(2, [[MIXED, MIXED]])
    assert found == [("1.0.0", 0), ("1.0.1", 0), ("1.1.0", 1), ("1.1.1", 1)]
    assert [ids for ids, _ in asked] == [[e.id for e in tiny.TASK.train[:2]]]
    assert resampled(2, [[MIXED, MIXED]], more=False)[0] == found


def test_missing_groups_come_from_further_examples_under_other_keys_and_the_surplus_is_cut_off():
    found, asked = resampled(2, [[ALIKE, MIXED], [ALIKE, ALIKE], [MIXED, MIXED]])
    assert found == [("1.1.0", 0), ("1.1.1", 0), ("3.0.0", 1), ("3.0.1", 1)]
    further = [e.id for e in tiny.TASK.train[5:9]]
    assert [ids for ids, _ in asked[1:]] == [further[:2], further[2:]] and len({key for _, key in asked}) == 3


def test_too_few_groups_are_an_error():
    with pytest.raises(rollouts.RolloutError, match="only 1 of 2 groups were kept in 2 rounds"):
        resampled(2, [[ALIKE, MIXED], [ALIKE, ALIKE]], rounds=2)
    with pytest.raises(rollouts.RolloutError, match="no further examples"):
        resampled(2, [[ALIKE, MIXED]], more=False)


def test_attempts_are_written_as_they_are_asked_for_and_shaped_where_a_control_says_so():
    seen = []

    def writer(policy, encoded, key, *, n, sampling, limit):
        seen.append((len(encoded), n, sampling))
        return [[policies.Sample((1,) * (j + 1), (0.0,) * (j + 1), "x", True) for j in range(n)] for _ in encoded]

    environment = tiny.environment()
    live = dataclasses.replace(environment.live, writer=writer)
    environment = environment._replace(policies={**environment.policies, "live": live})
    how, examples = Sampling(0.3), tiny.TASK.train[:2]
    rows = rollouts.attempts(environment, examples, jax.random.key(0), n=3, sampling=how)
    assert seen == [(2, 3, how)] and all(r.returns == r.reward for r in rows)
    shaped = rollouts.judge(environment._replace(shape=lambda r: -0.5 * len(r.tokens)), rows)
    assert [r.returns - r.reward for r in shaped] == [-0.5, -1.0, -1.5] * 2
