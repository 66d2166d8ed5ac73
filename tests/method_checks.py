"""What tests of methods share: losses and gradients of whole objectives on given distributions, without a model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from sdjax.collect import remembered
from sdjax.kernels.distributions import logprob, normalise

close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-6)


def restored(memory):
    """What a run that goes on has of what a method remembered: everything comes out of a JSON file."""
    bare, found = remembered.apart(memory)
    read = {path: remembered.Remembered(json.loads(json.dumps(dict(part)))) for path, part in found.items()}
    return remembered.together(json.loads(json.dumps(bare)), read)


def token_gradients(method, student, teacher, *, behavior=None, **rest):
    """The logit gradients `[V, V]` of a one-position loss, for every token that may have been sampled."""

    def of_token(logits, token):
        dist = normalise(logits)
        said = jax.lax.stop_gradient(dist if behavior is None else behavior)[token]
        batch = tiny.batch(jnp.reshape(token, (1, 1)), behavior=said[None, None], **rest)
        views = {name: teacher[None, None] for name in method.objectives[0].views}
        return tiny.loss(method.objectives[0], batch, **{**views, "student": dist[None, None]})[0]

    return np.asarray(jax.vmap(jax.grad(of_token), (None, 0))(student, jnp.arange(student.size)))


def expected_gradient(method, student, teacher, **rest):
    """Their mean over tokens sampled from the student."""
    return np.exp(np.asarray(student, np.float64)) @ token_gradients(method, student, teacher, **rest)


def trace_variance(gradients, student):
    """Total variance of a one-sample gradient."""
    chances = np.exp(np.asarray(student, np.float64))
    gradients = np.asarray(gradients, np.float64)
    return chances @ (gradients**2).sum(-1) - ((chances @ gradients) ** 2).sum()


def fixture(*, on_policy=True, seed=0, taught=(True, True, False, True), **extras):
    """Four rows of two groups, five tokens of seven: a batch, the student's logits, the other views' distributions."""
    keys = jax.random.split(jax.random.key(seed), 4)
    logits = 1.5 * jax.random.normal(keys[0], (4, 5, 7))
    tokens = jax.random.randint(keys[1], (4, 5), 0, 7)
    behavior = logprob(normalise(logits), tokens)
    if not on_policy:
        behavior = behavior + 0.3 * jax.random.normal(keys[2], behavior.shape)
    mask = jnp.arange(5) < jnp.asarray([5, 3, 4, 5])[:, None]
    rest = {"reward": [1.0, 0.0, 0.0, 1.0], "group": [0, 0, 1, 1], "mask": mask, "behavior": behavior}
    batch = tiny.batch(tokens, taught=taught, views=("student", "teacher", "reference"), **rest, **extras)
    return batch, logits, normalise(1.5 * jax.random.normal(keys[3], (4, 5, 7)))


def loss_and_gradient(method, batch, logits, teacher, step=0, reference=None):
    """Loss and its gradient with respect to the student's logits `[B, T, V]`."""

    def loss(z):
        dists = {"student": normalise(z), "teacher": teacher, "reference": teacher if reference is None else reference}
        return tiny.loss(method.objectives[0], batch, step, **dists)[0]

    value, found = jax.value_and_grad(loss)(logits)
    return float(value), np.asarray(found)


def assert_same(first, second, *data, **how):
    """Two methods agree in loss and gradient, which are not nothing."""
    (one, found), (other, wanted) = (loss_and_gradient(m, *data, **how) for m in (first, second))
    close(one, other)
    close(found, wanted)
    assert np.abs(wanted).max() > 1e-4
    return found


def slopes(method, batch, step=0, **signals):
    """Minus the gradient `[B, T]` of the *sum* over the batch's tokens of a loss with respect to their log-probabilities.

    At the sampler's log-probabilities that is the advantage, if the loss is a token mean.
    """
    signals = {name: jnp.asarray(value, jnp.float32) for name, value in signals.items()}
    now = signals.pop("logprobs", batch.behavior_logprobs)
    signals = {"entropy": jnp.zeros_like(now), **signals}
    loss = lambda x: tiny.reduced(method.objectives[0], batch, {**signals, "logprobs": x}, step)[0]
    return -np.asarray(jax.grad(loss)(now)) * np.asarray(batch.mask).sum()
