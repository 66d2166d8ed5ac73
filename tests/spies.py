"""Environments in which no two policies are the same, and a record of who samples and scores, after what, and how."""

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tiny

from sdjax.engine import policies


class Sampled(NamedTuple):
    """One call of `policies.sample`: by whom, after which chats, from which key, how often and how."""

    who: Any
    chats: tuple
    key: tuple
    n: int
    sampling: Any


class Scored(NamedTuple):
    """One call of `policies.score`: which policy each view read, and the policies whose parameters were given."""

    views: dict
    who: frozenset


def distinct(method, *, verify=tiny.parity, shapes=tiny.SHAPES, also=(), **rest):
    """An environment whose live policy, snapshots, external teacher and `also` all have parameters of their own."""
    names = ["live", "teacher", *(n for n in method.snapshots if n != "teacher"), *also]
    own = {name: tiny.policy(tiny.pretrained(10 + i).params, shapes) for i, name in enumerate(dict.fromkeys(names))}
    return policies.Environment(own, verify, rest.get("more"))


def watch(monkeypatch, environment):
    """Lists that fill with what policies of an environment sample and score from now on."""
    names = {id(jax.tree.leaves(p.params)[0]): name for name, p in environment.policies.items()}
    name_of = lambda params: names[id(jax.tree.leaves(params)[0])]
    sampled, scored = [], []
    sample, compiled_score = policies.sample, policies.compiled_score

    def watched_sample(some, contexts, key, *, n=1, sampling=None, **how):
        alone = isinstance(some, policies.Policy)
        who = name_of(some.params) if alone else tuple(name_of(p.params) for p in some)
        chats = tuple(contexts) if alone else tuple(map(tuple, contexts))
        sampled.append(Sampled(who, chats, key_of(key), n, sampling))
        return sample(some, contexts, key, n=n, sampling=sampling, **how)

    def watched_score(views, signals, models, params, *rest):
        scored.append(Scored({n: v.policy for n, v in views}, frozenset(map(name_of, params.values()))))
        return compiled_score(views, signals, models, params, *rest)

    monkeypatch.setattr(policies, "sample", watched_sample)
    monkeypatch.setattr(policies, "compiled_score", watched_score)
    return sampled, scored


class Asked(Exception):
    """What ends a collection where it would write."""


def first_sampled(monkeypatch, environment, method, examples):
    """The first call with which a method's collection samples; nothing is written."""
    sampled, _ = watch(monkeypatch, environment)

    def ended(*call, **how):
        raise Asked

    monkeypatch.setattr(policies, "generate", ended)
    with contextlib.suppress(Asked):
        method.collect(environment, examples, jax.random.key(0), method.memory)
    return sampled[0]


def key_of(key):
    """What can be compared of a random key."""
    return tuple(np.asarray(jax.random.key_data(key)).tolist())
