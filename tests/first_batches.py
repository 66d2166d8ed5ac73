"""The first batch that every method trains on: rows that it collected from the tiny model, for updates on any devices."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import tiny
from methods import test_base as base
from methods import test_host as host
from methods import test_pairs as pairs

from sdjax.cli.options import method_factory
from sdjax.collect.contexts import question, with_solution
from sdjax.engine import train
from sdjax.engine.tokens import collate


def recorded():
    """An optimizer that changes nothing and keeps the gradient as its state."""
    update = lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads)
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def told(rollout, rollouts):
    return with_solution(question(rollout.example), rollout.example.solution)


@functools.cache
def material(name):
    """A method, the rows that it collected on one device, and its other policies' parameters and networks."""
    if name in host.OPTIONS:
        method, rows = host.made(name), host.written(name)
    elif (factory := method_factory(name)) in pairs.OPTIONS:
        method, rows = pairs.made(factory), pairs.written(factory)[0][0]
    elif factory in base.FACTORIES:
        method, rows = base.made(factory), base.written(factory)
    else:
        known = inspect.signature(factory).parameters
        # With more than an eighth of the vocabulary, the devices' candidates would be the vocabulary.
        options = {"group_size": 4, "lesson": told, "top_k": 4}
        method = factory(**{k: v for k, v in options.items() if k in known})
        rows, _ = method.collect(tiny.environment(method), tiny.TASK.train[:2], jax.random.key(0), method.memory)
    others, networks = tiny.others(tiny.environment(method))
    # Another teacher than the student: else some methods have nothing to learn from the first batch.
    others = {policy: tiny.pretrained(1).params for policy in others}
    batch = collate(rows, train.all_views(method), tiny.tokenizer(), tiny.SHAPES, multiple=8)
    return method, batch, others, networks
