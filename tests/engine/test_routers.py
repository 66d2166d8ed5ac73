"""Losses of routers in an update: of all tokens that were read, whatever the chunks, beside any objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_models import Golden
from networks import batch, context, unoptimised
from quick import slow_but

from sdjax.engine.routers import Router, check, chosen, router_terms
from sdjax.engine.score import ROUTERS, token_signals
from sdjax.engine.sensible import ExperimentError
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import make_update
from sdjax.kernels.distributions import logprob
from sdjax.kernels.reductions import reduce_terms
from sdjax.kernels.routers import load_balance
from sdjax.models import transformer
from sdjax.models.transformer import Transformer
from sdjax.types import Objective, Term, View

ROWS, LENGTHS = 4, (6, 3, 1, 5)
VIEWS = {"student": View(trainable=True)}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@functools.cache
def moe():
    return Golden("qwen3_moe")


def rows_of(before=0, after=0, fill=0):
    """Two prompts of two rows each, the last row not valid; more padding on request."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 127, n).astype(np.int32) for n in (7, 4)]
    found = batch({"student": context(prompts, 7 + before, ROWS, fill)}, LENGTHS, 6 + after, fill=fill)
    return prompts, found.replace(completion=found.completion % 127, valid=jnp.asarray([True, True, True, False]))


def logprobs(dist, token):
    return {"logprobs": logprob(dist["student"], token)}


@functools.partial(jax.jit, static_argnames=("rows", "remat", "lengths"))
def losses(params, some, rows=None, remat=False, lengths=1):
    """Both losses of a batch, by the engine."""
    models = {"live": Transformer(moe().config, remat=remat)}
    sig = token_signals(VIEWS, logprobs, models, {"live": params}, some, rows=rows, lengths=lengths, routers=True)
    terms = router_terms(sig[ROUTERS], Router(1.0, 0.1))
    return reduce_terms(terms, some.mask & some.valid[:, None])


def by_hand(params, prompts, completion):
    """The same by runs without padding: each prompt once where all its rows are valid, else for the share that is."""
    model, total = moe().model, None
    for row in range(ROWS - 1):
        prompt, length = prompts[row // 2], LENGTHS[row]
        run = jnp.asarray([*prompt, *completion[row, : length - 1]], jnp.int32)[None]
        read = lambda tokens: transformer.watched(
            model, params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, bool)
        )[2]
        whole, first = read(run), read(run[:, : len(prompt)])
        own = jax.tree.map(lambda x, y: x - y / 2, whole, first)  # two rows share a prompt
        total = own if total is None else jax.tree.map(jnp.add, total, own)
    chosen, probability, log_partition, _, tokens = jax.tree.map(lambda x: x[0], total)
    return load_balance(chosen, probability) + 0.1 * (log_partition / tokens).sum()


@pytest.mark.parametrize("remat", slow_but({True}, [False, True]))
def test_every_token_that_is_read_counts_once(remat):
    prompts, some = rows_of()
    value, found = jax.value_and_grad(lambda p: losses(p, some, remat=remat)[0])(moe().params)
    wanted, gradient = jax.jit(jax.value_and_grad(lambda p: by_hand(p, prompts, np.asarray(some.completion))))(
        moe().params
    )
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    size = lambda tree: float(optax.tree.norm(tree))
    assert size(jax.tree.map(jnp.subtract, found, gradient)) < 1e-4 * size(gradient)
    assert np.any(found["layers_0"]["mlp"]["router"]) and not np.any(found["layers_2"]["mlp"]["down"])


def test_neither_chunks_nor_padding_change_them():
    _, some = rows_of()
    plain = losses(moe().params, some)[1]
    assert set(plain) == {"router_aux", "router_z", "router_entropy", "router_load"}
    padded = rows_of(before=3, after=2, fill=5)[1]
    chunked = losses(moe().params, some, rows=1)[1], losses(moe().params, some, lengths=2)[1]
    for other in (*chunked, losses(moe().params, padded)[1]):
        for name, value in plain.items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-5), name


def updated(router):
    """One update of an objective that learns nothing by itself."""
    terms = lambda batch, sig, step: {"nothing": Term(0.0 * sig["logprobs"])}
    objective = Objective(VIEWS, logprobs, terms)
    update = make_update(objective, {"live": moe().model}, optax.sgd(1e-3), Shapes(), router=router)
    params = jax.tree.map(jnp.array, moe().params)
    return update(params, optax.sgd(1e-3).init(params), {}, rows_of()[1], jnp.int32(0))


def test_an_update_makes_them_smaller_and_tells_them():
    params, _, outcome = updated(Router(1.0, 0.1))
    assert float(outcome.loss) == pytest.approx(float(outcome.terms["router_aux"] + 0.1 * outcome.terms["router_z"]))
    assert bool(outcome.useful) and float(losses(params, rows_of()[1])[0]) < float(outcome.loss)


def test_without_coefficients_nothing_is_computed():
    assert chosen(0.0, 0.0) is None and chosen(0.0, 1e-3) == Router(z=1e-3)
    params, _, outcome = updated(None)
    assert set(outcome.terms) == {"nothing"} and not bool(outcome.useful)
    jax.tree.map(np.testing.assert_array_equal, params, moe().params)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ExperimentError, match=r"router_aux=0\.01 and router_z=0 .* a llama model has no mixture"):
        check(Router(aux=0.01), Golden("llama").config)
    check(None, Golden("llama").config)
    check(Router(aux=0.01), moe().config)
