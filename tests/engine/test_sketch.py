"""Batches without a model worth the name: what its random words look like, and shapes of batches made from a small one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import unoptimised

from sdjax.collect.contexts import question, with_solution
from sdjax.engine import sketch
from sdjax.engine.sketch import SHAPES, SketchError, coin, random_words, rows_per_prompt, sized, sketched
from sdjax.engine.tokens import Shapes, decode_text
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.tasks.completions import CLOSING
from sdjax.types import Context, Scores

quick_compiles = pytest.fixture(scope="module", autouse=True)(unoptimised)


# ---- who writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_random_words_are_words_thinking_where_there_is_room_and_an_end(limit):
    policy = sketch.policy()
    end, (closing,) = policy.tokenizer.eos_token_id, policy.tokenizer.encode(CLOSING[0], add_special_tokens=False)
    found = random_words(policy, [[1], [2], [3]], jax.random.key(0), n=40, limit=limit, sampling=None)
    assert [len(some) for some in found] == [40] * 3
    samples, words = [s for some in found for s in some], []
    for s in samples:
        own = [t for t in s.tokens if t not in (end, closing)]
        words.append(len(own))
        assert 1 <= len(s.tokens) <= limit
        assert all(len(policy.tokenizer) // 2 <= t < len(policy.tokenizer) for t in own)
        assert s.finished == (s.tokens[-1] == end) and s.tokens.count(end) == s.finished
        # Thinking, its end, one word of an answer, the end of the text; a text without room for all has no thinking.
        room = len(own) + 1 < limit
        assert s.tokens.count(closing) == room and (not room or s.tokens[-3] == closing)
        assert s.logprobs == (-1.0,) * len(s.tokens) and s.text == decode_text(policy.tokenizer, s.tokens)
    assert {*words} == {*range(1, max(2, limit))}
    again = random_words(policy, [[1]], jax.random.key(0), n=40, limit=limit)[0]
    other = random_words(policy, [[1]], jax.random.key(1), n=40, limit=limit)[0]
    assert again == found[0] != other


def test_a_little_policy_has_room_for_every_text():
    for context, positions in ((32, 512), (600, 608)):
        policy = sketch.little(tiny.tokenizer(), Shapes(context=context, completion=8))
        assert policy.model.config.max_context == positions
        assert policy.model.config.vocab_size == len(tiny.tokenizer()) and policy.writer is random_words
        assert policy.tokenizer is tiny.tokenizer() and policy.shapes.context == context


def test_a_coin_has_two_sides():
    assert [coin(None, text).reward for text in ("a", "b", "ab", "")] == [1.0, 0.0, 1.0, 0.0]


# ---- batches --------------------------------------------------------------------------------------------------------


def lesson(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


def test_batches_of_a_method_are_sized_by_what_it_collects():
    batch = sketched(sdpo(group_size=4, lesson=lesson))
    rows = rows_per_prompt(batch)
    found = sized(batch, 3, rows, 100, {"student": 10, "teacher": 20})
    assert rows == 4
    assert found.completion.shape == found.mask.shape == found.behavior_logprobs.shape == (12, 100)
    assert found.contexts["student"].tokens.shape == (3, 10)  # a group shares its question
    assert found.contexts["teacher"].tokens.shape == (3, 20)  # and here the lesson
    own = sized(batch, 3, rows, 100, {"student": 10, "teacher": 20}, own={"teacher"})
    assert own.contexts["teacher"].tokens.shape == own.contexts["teacher"].mask.shape == (12, 20)  # or has one each
    assert own.contexts["student"].tokens.shape == (3, 10) and own.contexts["student"].mask.dtype == jnp.bool_
    assert found.reward.shape == (12,)
    assert found.completion.dtype == jnp.int32 and found.mask.dtype == jnp.bool_


def test_axes_of_tokens_grow_and_others_do_not():
    """Extras per token, per row, and with an axis of another size; scores and the choice of a policy beside a context."""
    scores = Scores(jnp.zeros((4, 6, 5), jnp.int32), jnp.zeros((4, 6, 5)))
    batch = tiny.batch(jnp.zeros((4, 6)), each=jnp.zeros((4, 6)), row=jnp.zeros(4), three=jnp.zeros((4, 3, 6)))
    one = jnp.ones((2, 7), jnp.int32)
    told = Context(one, one > 0, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), scores)
    batch = batch.replace(contexts={**batch.contexts, "teacher": told})
    found = sized(batch, 5, 2, 9, {"student": 11, "teacher": 13})
    shapes = {name: x.shape for name, x in found.extras.items()}
    assert shapes == {"each": (10, 9), "row": (10,), "three": (10, 3, 6)}
    read = found.contexts["teacher"]
    assert read.tokens.shape == (5, 13) and found.contexts["student"].tokens.shape == (10, 11)
    assert read.scores.tokens.shape == read.scores.logprobs.shape == (10, 9, 5)
    assert read.valid.shape == read.member.shape == (10,)
    assert sized(batch, 1, 1, 9, {"student": 1, "teacher": 1}).contexts["teacher"].tokens.shape == (1, 1)


def test_rows_of_each_prompt_are_at_least_one():
    count = lambda rows: rows_per_prompt(tiny.batch(np.zeros((rows, 1))))
    assert [count(rows) for rows in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert rows_per_prompt(tiny.batch(np.zeros((8, 1))), 8) == 1


def test_a_method_that_keeps_nothing_is_asked_ten_times():
    """Each time about two new prompts, from another key, with its own memory."""
    asked = []

    def collect(environment, examples, key, memory):
        asked.append((len(examples), examples[0].id, str(jax.random.key_data(key)), memory, {*environment.policies}))
        return [], memory + 1

    with pytest.raises(SketchError, match="no rollout in ten batches"):
        sketched(sdpo()._replace(collect=collect, memory=3))
    assert len(asked) == 10 == len({(example, key) for _, example, key, *_ in asked})
    assert [memory for *_, memory, _ in asked] == [*range(3, 13)]
    assert {count for count, *_ in asked} == {2} and {*asked[0][-1]} == {"live", "teacher"}
    later = lambda *given: ([], 4) if given[-1] == 3 else grpo(group_size=2).collect(*given)
    batch = sketched(grpo()._replace(collect=later, memory=3))
    assert batch.completion.shape == (4, SHAPES.completion) and batch.mask.any()
