"""Conversations: what is scored is what was sampled, observations are masked, waves compile little, one turn changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import talks
import tiny

from sdjax.collect.rollouts import judge, sample
from sdjax.engine import train
from sdjax.engine.bridges import bridge
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Environment, score
from sdjax.engine.tokens import collate, encode_context
from sdjax.kernels.distributions import logprob
from sdjax.methods.grpo import grpo
from sdjax.run.logs import records
from sdjax.samplers.refill import refilled
from sdjax.tasks.judging import CUT_OFF
from sdjax.types import Step, Verdict, View, World

optimised_little = pytest.fixture(scope="module", autouse=True)(networks.unoptimised)


def conversations(n=4, turns=3, seed=0, **changes):
    return sample(talks.policy(world=talks.echo(turns), **changes), talks.EXAMPLES, talks.key(seed), n=n)


def said(dist, token):
    return {"said": logprob(dist["student"], token)}


def refusing(example, text):
    raise AssertionError("the world judges conversations")


def scored(rows, policy):
    rows = [r.read_by(student=r.example.prompt) for r in rows]
    return score(Environment({"live": policy}, refusing), rows, {"student": View(template=policy.template)}, said)


@pytest.mark.parametrize("template", [{}, {"enable_thinking": False}])
def test_what_is_scored_is_what_was_sampled(template):
    policy = talks.policy(world=talks.echo(), template=template)
    rows = scored(sample(policy, talks.EXAMPLES, talks.key(), n=4), policy)
    assert sum(len(r.turns) == 3 for r in rows) > 2
    for r in rows:
        own = np.asarray(r.trained or (True,) * len(r.tokens))
        np.testing.assert_allclose(np.asarray(r.extras["said"])[own], np.asarray(r.logprobs)[own], atol=2e-4)
        assert not own.all() or len(r.turns) == 1


def test_a_stream_is_turns_and_bridges():
    """Each turn was sampled after exactly the ids before it; thinking in it stays, whatever the template leaves out."""
    policy = talks.policy(world=talks.echo())
    for r in sample(policy, talks.EXAMPLES, talks.key(), n=4):
        place = 0
        for number, turn in enumerate(r.turns):
            assert turn.start == place and all((r.trained or [True] * 96)[turn.start : turn.end])
            place = turn.end
            if number + 1 < len(r.turns):
                ids = bridge(policy.tokenizer, turn.observations, policy.stop, policy.template)
                assert list(r.tokens[place : place + len(ids)]) == ids
                assert not any(r.trained[place : place + len(ids)]) and not any(r.logprobs[place : place + len(ids)])
                assert r.tokens[turn.end - 1] in policy.stop
                place += len(ids)
        assert place == len(r.tokens) <= talks.SHAPES.completion
        assert len(r.logprobs) == len(r.tokens)


def test_a_later_turn_is_what_the_sampler_writes_after_these_ids_alone():
    policy = talks.policy(world=talks.echo())
    greedy = sample(policy, talks.EXAMPLES, talks.key(), n=1, sampling=Sampling(temperature=0.0))
    row = next(r for r in greedy if len(r.turns) > 1)
    turn = row.turns[1]
    prefix = [*encode_context(policy.tokenizer, row.example.prompt, talks.SHAPES), *row.tokens[: turn.start]]
    from sdjax.engine.waves import continued

    again = continued(
        policy, [prefix], jnp.stack([talks.key(9)]), sampling=Sampling(temperature=0.0), limit=96 - turn.start
    )
    assert again[0].tokens == row.tokens[turn.start : turn.end]


def test_thinking_stays_in_the_stream_though_the_template_strips_it():
    """A writer that thinks: the ids of its thinking are scored in later turns, which a chat rendered anew would lack."""
    tokenizer = talks.tokenizer()
    words = tokenizer.encode("<think>hm</think>ok<|im_end|>", add_special_tokens=False)

    def thinks(policy, contexts, key, *, n, sampling, limit):
        from sdjax.engine.policies import Sample

        seen.append([list(c) for c in contexts])
        return [[Sample(tuple(words), (-1.0,) * len(words), "<think>hm</think>ok", True)] * n for _ in contexts]

    seen = []
    policy = talks.forgetful(talks.policy(world=talks.echo(2)), writer=thinks)
    (row,) = sample(policy, talks.EXAMPLES[:1], talks.key(), n=1)
    assert seen[1][0][len(seen[0][0]) :][: len(words)] == words
    assert list(row.tokens[: len(words)]) == words == list(row.tokens[-len(words) :])
    history = [
        *row.example.prompt,
        {"role": "assistant", "content": "<think>hm</think>ok"},
        {"role": "user", "content": "?"},
    ]
    assert "hm" not in tokenizer.apply_chat_template(history, tokenize=False)


def test_a_world_of_one_turn_changes_nothing():
    policy = talks.policy()
    one = World(lambda e: e.prompt, lambda e, messages: Step((), float(len(messages[-1]["content"])), True))
    plain = sample(policy, talks.EXAMPLES, talks.key(), n=4)
    rows = sample(talks.forgetful(policy, world=one), talks.EXAMPLES, talks.key(), n=4)
    assert len(rows) == 12
    for r, p in zip(rows, plain, strict=True):
        assert (r.tokens, r.logprobs, r.text, r.finished, r.trained) == (p.tokens, p.logprobs, p.text, p.finished, None)
        assert r.reward == (len(p.text) if p.finished else 0.0)


def test_rewards_add_up_and_what_is_cut_off_is_said():
    rows = conversations(n=4, turns=4)
    assert {r.finished for r in rows} == {True, False}
    for r in rows:
        answered = sum(bool(t.observations) for t in r.turns)
        assert r.reward == 0.5 * answered == sum(t.reward for t in r.turns)
        assert r.measures["turns"] == len(r.turns) and r.measures.get("heard", 0) == answered
        assert r.finished == (answered == 4)
        assert r.feedback == (f"heard {answered}" if answered else CUT_OFF)


def test_neighbours_change_nothing():
    """Fewer rows in a wave, other sizes: the same conversations."""
    alone = sample(talks.policy(world=talks.echo()), talks.EXAMPLES[:1], talks.key(), n=4)
    assert [r.tokens for r in conversations()[:4]] == [r.tokens for r in alone]


def test_conversations_that_were_lost_are_held_again():
    """The world fails in a second turn: asked once more with the same key, all is said again, first turns included."""
    echo, lost = talks.echo(), []

    def failing(example, messages):
        if len(messages) > 3 and not lost:
            lost.append(example.id)
            raise ConnectionError(example.id)
        return echo.step(example, messages)

    policy = talks.policy(world=echo._replace(step=failing))
    with pytest.raises(ConnectionError):
        sample(policy, talks.EXAMPLES, talks.key(), n=4)
    assert sample(policy, talks.EXAMPLES, talks.key(), n=4) == conversations()


@pytest.mark.slow
def test_other_samplers_write_the_same_conversations():
    policy = talks.forgetful(talks.policy(world=talks.echo()), writer=refilled(slots=8))
    rows = sample(policy, talks.EXAMPLES, talks.key(), n=4)
    assert [(r.tokens, r.trained, r.reward) for r in rows] == [(r.tokens, r.trained, r.reward) for r in conversations()]


def test_waves_of_all_sizes_compile_few_programs():
    jax.clear_caches()
    before, ever = tiny.programs("generate"), set()
    for seed in range(3):
        ever |= {len(r.turns) for r in conversations(turns=4, seed=seed)}
    assert len(ever) > 2
    # One first wave of each size; later ones have 8 or 2 rows, in widths of 32, 64 and 128.
    assert tiny.programs("generate") - before <= 2 + 2 * 3


def test_the_most_turns_end_a_conversation():
    rows = conversations(turns=9)
    world = talks.echo(9)._replace(turns=2)
    short = sample(talks.policy(world=world), talks.EXAMPLES, talks.key(), n=4)
    assert max(len(r.turns) for r in short) == 2 < max(len(r.turns) for r in rows)
    assert all(r.finished for r in short if len(r.turns) == 2 and r.turns[-1].observations)


def test_a_conversation_is_judged_by_its_world():
    policy = talks.policy(world=talks.echo())
    rows = judge(Environment({"live": policy}, refusing), sample(policy, talks.EXAMPLES, talks.key(), n=2))
    assert sum(r.reward for r in rows) > 0
    plain = sample(talks.policy(), talks.EXAMPLES, talks.key(), n=2)
    both = judge(Environment({"live": policy}, lambda e, text: Verdict(7.0)), [rows[0], plain[0], rows[1]])
    assert [r.reward for r in both] == [rows[0].reward, 7.0, rows[1].reward]


def test_batches_and_records_hold_the_mask():
    rows = [r.read_by(student=r.example.prompt) for r in conversations()]
    batch = collate(rows, {"student": View()}, talks.tokenizer(), talks.SHAPES)
    order = [r for group in range(3) for r in rows if r.group == group]
    for row, r in enumerate(order):
        own = np.asarray(r.trained or (True,) * len(r.tokens))
        np.testing.assert_array_equal(batch.mask[row, : len(own)], own)
        assert batch.present[row, : len(own)].all() and not batch.present[row, len(own) :].any()
    line = records.described(rows[0], talks.tokenizer())
    assert line["turns"][0]["observations"] == [dict(m) for m in rows[0].turns[0].observations]
    assert [t["end"] for t in line["turns"]] == [t.end for t in rows[0].turns]


def test_observed_tokens_are_not_trained():
    """The gradient is the same whatever stands for the log-probabilities of what was observed; and it is not nothing."""
    method = grpo(group_size=4)
    policy = talks.policy(world=talks.echo())
    rows, _ = method.collect(Environment({"live": policy}, refusing), talks.EXAMPLES, talks.key(), None)
    rows = [dataclasses.replace(r, reward=float(i % 4)) for i, r in enumerate(rows)]
    wild = lambda r: tuple(
        x if t else 40.0 for x, t in zip(r.logprobs, r.trained or (True,) * len(r.tokens), strict=True)
    )
    changed = [dataclasses.replace(r, logprobs=wild(r)) for r in rows]
    assert any(r.logprobs != c.logprobs for r, c in zip(rows, changed, strict=True))
    batches = [collate(some, train.all_views(method), policy.tokenizer, policy.shapes) for some in (rows, changed)]
    objective = method.objectives[0]

    def gradient(batch):
        def loss(params):
            from sdjax.engine.score import token_signals
            from sdjax.kernels.reductions import reduce_terms, token_mean

            sig = token_signals(objective.views, objective.signals, {"live": policy.model}, {"live": params}, batch)
            return reduce_terms(objective.terms(batch, sig, 0), batch.mask & batch.valid[:, None], token_mean)[0]

        return jax.tree.leaves(jax.jit(jax.grad(loss))(policy.params))

    one, other = map(gradient, (jax.tree.map(jnp.asarray, b) for b in batches))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(float(jnp.abs(a).max()) for a in one) > 0
