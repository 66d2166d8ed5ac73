"""Padded embeddings: ids without a token are never sampled and count in no signal; teachers of another padding teach."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from networks import unoptimised

from sdjax.collect.contexts import question
from sdjax.devices.http_json import EngineError
from sdjax.engine import policies, train, vocabulary
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import Policy
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.train import Experiment
from sdjax.kernels.distributions import entropy, top_k_renormalised, top_k_with_rest
from sdjax.kernels.divergences import forward_kl, jsd, reverse_kl
from sdjax.methods.gkd import gkd
from sdjax.models import transformer
from sdjax.models.transformer import Transformer
from sdjax.samplers import servers
from sdjax.samplers.refill import refilled
from sdjax.tasks.words import word_tokenizer
from sdjax.types import View

CHATS = [question(e) for e in tiny.TASK.train[:2]]
TOKENS = len(tiny.tokenizer())


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@functools.cache
def padded(more, seed=0):
    """The tiny model with more embedding rows, which everything in it speaks for."""
    own = tiny.pretrained(seed)
    loud = 100 * np.random.default_rng(seed).normal(size=(more, own.config.width)).astype(np.float32)
    rows = {name: np.concatenate([np.asarray(own.params[name]), loud]) for name in ("embed", "head")}
    config = dataclasses.replace(own.config, vocab_size=TOKENS + more)
    return own._replace(config=config, params={**own.params, **rows})


def policy(model, **changes):
    return dataclasses.replace(Policy(Transformer(model.config), model.params, model.tokenizer, tiny.SHAPES), **changes)


# ---- which ids ------------------------------------------------------------------------------------------------------


class Holes:
    def get_vocab(self):
        return {"a": 1, "b": 2, "c": 5, "d": 6}


def test_unused_ids_are_the_padding_and_the_holes():
    assert vocabulary.unused_ids(Holes(), 4, 9) == ((0, 1), (3, 5), (7, 9))
    assert vocabulary.unused_ids(Holes(), 4, 7) == ((0, 1), (3, 5))
    assert vocabulary.unused_ids(tiny.tokenizer(), TOKENS, TOKENS) == ()
    model = tiny.model().clone(unused=((0, 1), (3, 5)))
    assert [vocabulary.is_token(model, i) for i in (0, 1, 2, 3, 4, 5, TOKENS - 1)] == [
        False,
        *[True] * 2,
        False,
        False,
        *[True] * 2,
    ]
    assert not any(vocabulary.is_token(model, wrong) for wrong in (-1, TOKENS, 1.0, "1", None))


class Other:
    def get_vocab(self):
        return {"a": 1, "b": 2, "c": 6, "e": 8}


def test_vocabularies_differ_at_the_first_id_that_has_another_token():
    assert vocabulary.difference(Holes(), Other()) == "4 and 4 tokens; id 5 is 'c' and nothing"
    assert vocabulary.difference(Other(), Holes()) == "4 and 4 tokens; id 5 is nothing and 'c'"
    assert vocabulary.same_vocabulary(Holes(), Holes()) and not vocabulary.same_vocabulary(Holes(), Other())


def test_without_padding_the_network_and_its_programs_are_the_same():
    model = tiny.model()
    assert vocabulary.limited(model, tiny.tokenizer()) is model
    assert tiny.policy().model.unused == ()
    head, states = jnp.ones((TOKENS, 4)), jnp.ones((2, 4))
    text = lambda *unused: str(jax.make_jaxpr(lambda h: transformer.scores(head, h, *unused))(states))
    assert text(()) == text() and "select" not in text() and "select" in text(((3, 5),))


# ---- who writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [Sampling(), GREEDY, Sampling(1.5, top_p=0.9, top_k=7)], ids=["plain", "greedy", "filtered"]
)
@pytest.mark.parametrize("writer", [None, refilled(slots=3)], ids=["sampler", "refilled"])
def test_a_padded_model_writes_what_the_same_model_without_padding_writes(sampling, writer):
    told = {"n": 3, "sampling": sampling}
    wanted = policies.sample(tiny.policy(), CHATS, jax.random.key(3), **told)
    found = policies.sample(policy(padded(40), writer=writer), CHATS, jax.random.key(3), **told)
    for a, b in zip((s for some in found for s in some), (s for some in wanted for s in some), strict=True):
        assert a.tokens == b.tokens and max(a.tokens) < TOKENS
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_the_padding_would_be_sampled_if_nothing_stopped_it():
    """Else the test above tests nothing."""
    loud = policy(padded(40))
    object.__setattr__(loud, "model", loud.model.clone(unused=()))
    found = policies.sample(loud, CHATS, jax.random.key(3), n=3)
    assert max(t for some in found for s in some for t in s.tokens) >= TOKENS


def test_a_server_may_not_answer_with_an_id_without_a_token():
    answer = {"token_ids": [5, TOKENS + 3], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "length"}
    with pytest.raises(EngineError, match=f"returned the token id {TOKENS + 3}, which the tokenizer does not have"):
        servers.read("url", answer, policy(padded(40)), 4)


# ---- who reads ------------------------------------------------------------------------------------------------------


def signals(dist, token):
    student, teacher = dist["student"], dist["teacher"]
    rest = top_k_with_rest(student, teacher, by=student, k=TOKENS - 1)
    few = top_k_renormalised(student, teacher, by=teacher, k=TOKENS + 3)
    return {
        "entropy": entropy(student),
        "forward": forward_kl(student, teacher),
        "reverse": reverse_kl(student, teacher),
        "jsd": jsd(student, teacher, 0.5),
        "rest": forward_kl(*rest),
        "few": reverse_kl(*few),
    }


@functools.cache
def samples():
    return policies.sample(tiny.policy(), CHATS, jax.random.key(3), n=2)


def scored(student, teacher, signals=signals):
    """Signals of a few completions, and the gradient of their sum with respect to the student's parameters."""
    views = {"student": View(trainable=True), "teacher": View("teacher")}
    rollouts = [
        policies.Rollout(e, s.tokens, s.logprobs, s.text, g, contexts={"student": c, "teacher": c})
        for g, (e, c, some) in enumerate(zip(tiny.TASK.train[:2], CHATS, samples(), strict=True))
        for s in some
    ]
    batch = jax.tree.map(jnp.asarray, policies.collate(rollouts, views, tiny.tokenizer(), tiny.SHAPES))
    models = {"live": student.model, "teacher": teacher.model}

    @jax.jit
    def of(params):
        found = policies.token_signals(
            views, signals, models, {"live": params, "teacher": teacher.params}, batch, tokens=16
        )
        return sum(x.sum() for x in found.values()), found

    (_, found), gradient = jax.value_and_grad(of, has_aux=True)(student.params)
    return jax.device_get(found), jax.device_get(gradient)


def test_no_signal_and_no_gradient_sees_the_padding():
    own, teacher = policy(padded(40)), policy(padded(40, 1))
    wanted, expected = scored(tiny.policy(), tiny.policy(tiny.pretrained(1).params))
    found, gradient = scored(own, teacher)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5, err_msg=name)
    assert not gradient["head"][TOKENS:].any()
    np.testing.assert_allclose(gradient["head"][:TOKENS], expected["head"], atol=1e-4)


# ---- teachers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [(8, 40), (40, 0)])
def test_a_teacher_whose_embedding_is_padded_to_another_size_teaches(student, teacher):
    student, other = padded(student), padded(teacher, 1)
    experiment = Experiment(gkd(), tiny.TASK, student, optax.sgd(0.1), teachers={"teacher": other}, shapes=tiny.SHAPES)
    found = experiment.teachers["teacher"]
    assert found.config.vocab_size == found.params["head"].shape[0] == student.config.vocab_size
    for name in ("embed", "head"):
        np.testing.assert_array_equal(found.params[name][:TOKENS], other.params[name][:TOKENS])
    networks = train.models(experiment)
    assert networks["teacher"] == networks["live"]
    assert networks["live"].unused == (
        ((TOKENS, student.config.vocab_size),) if student.config.vocab_size > TOKENS else ()
    )


def test_a_teacher_over_other_tokens_is_refused_by_what_differs():
    other = word_tokenizer([*list(tiny.tokenizer().get_vocab())[8:], "strange"])
    teacher = tiny.pretrained(1)._replace(tokenizer=other)
    with pytest.raises(
        ExperimentError, match=r"different vocabularies \(\d+ and \d+ tokens; id \d+ is '.*' and '.*'\)"
    ):
        Experiment(gkd(), tiny.TASK, tiny.pretrained(), optax.sgd(0.1), teachers={"teacher": teacher})
