"""The first answer of an engine that was just sent the weights: are its log-probabilities theirs, and its samples apart?"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np
from jax import Array

from sdjax.devices.http_json import EngineError
from sdjax.devices.sharding import DATA, axis_size, place_rows, to_host
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Policy, Sample, compiled_score
from sdjax.engine.tokens import left_pad
from sdjax.kernels.distributions import logprob, normalise
from sdjax.samplers.servers import Writer
from sdjax.types import Batch, Context, View

APART = 0.25
"""The mean difference per token, in nats, up to which two engines compute the same: bfloat16 makes less than 0.05."""

NOISE = 0.02
"""A difference that bfloat16 may make."""

CHANCE = 1e-3
"""Identical samples less probable than this are no chance."""


def checked(writer: Writer, name: str) -> Writer:
    """A writer whose first answer at each temperature is compared with what the policy itself says of it.

    For an engine that has the policy's weights at that time.  Warns of a group whose samples are all the same though
    that is next to impossible: seeds are then alike.

    Raises: EngineError for log-probabilities at another temperature, or of other weights.
    """
    seen: set[float] = set()

    def write(policy: Policy, contexts: Sequence[Sequence[int]], key: Array, *, n: int, sampling: Sampling, limit: int):
        found = writer(policy, contexts, key, n=n, sampling=sampling, limit=limit)
        temperature = float(sampling.temperature)
        if temperature not in seen and found:
            seen.add(temperature)
            check_logprobs(name, policy, contexts, found, temperature)
            check_variety(name, policy, contexts, found, temperature)
        return found

    return write


def check_logprobs(
    name: str,
    policy: Policy,
    contexts: Sequence[Sequence[int]],
    found: Sequence[Sequence[Sample]],
    temperature: float,
) -> None:
    """Raises `EngineError` unless the longest completion's log-probabilities are the policy's at temperature 1."""
    context, sample = max(
        ((c, s) for c, some in zip(contexts, found, strict=True) for s in some), key=lambda pair: len(pair[1].tokens)
    )
    own = own_logprobs(policy, context, sample.tokens, temperature if temperature > 0 else 1.0)
    apart = {kind: float(np.abs(own[kind] - np.asarray(sample.logprobs)).mean()) for kind in own}
    if temperature > 0 and apart["plain"] > NOISE and apart["tempered"] < apart["plain"] / 5:
        raise EngineError(
            f"{name} returns log-probabilities at the sampling temperature {temperature:g}, where those at temperature 1 "
            "are needed: let it return those before temperature and filters (vLLM: --logprobs-mode raw_logprobs; SGLang: "
            "SGLANG_RETURN_ORIGINAL_LOGPROB=1), or sample at temperature 1"
        )
    if apart["plain"] > APART:
        raise EngineError(
            f"{name} returns log-probabilities that are {apart['plain']:.2f} nats per token from those of the weights it was "
            "sent: does it serve the folder of --sampler.weights, and has it read it again?"
        )


def own_logprobs(
    policy: Policy, context: Sequence[int], tokens: Sequence[int], temperature: float
) -> dict[str, np.ndarray]:
    """What the policy says of a completion: log-probabilities at temperature 1, "plain", and at this one, "tempered"."""
    rows, length = axis_size(DATA), policy.shapes.completion
    padded, mask = left_pad([context] * rows, policy.shapes.context)
    row = lambda values, kind: np.stack([np.asarray([*values, *[0] * (length - len(values))], kind)] * rows)
    present, yes = row([True] * len(tokens), bool), np.ones(rows, bool)
    batch = Batch(
        completion=row(tokens, np.int32),
        present=present,
        mask=present,
        behavior_logprobs=np.zeros((rows, length), np.float32),
        contexts={"live": Context(padded, mask, yes)},
        reward=np.zeros(rows, np.float32),
        group=np.arange(rows, dtype=np.int32),
        source=np.zeros(rows, np.int32),
        finished=yes,
        valid=yes,
        extras={},
    )
    views, models = (("live", View()),), (("live", policy.model),)
    found = compiled_score(views, tempered(temperature), models, {"live": policy.params}, place_rows(batch), None, 512)
    return {kind: x[0, : len(tokens)] for kind, x in to_host(found).items()}


@functools.cache
def tempered(temperature: float):
    """Signals: the token's log-probability as it is, and at a temperature."""

    def signals(dist: dict[str, Array], token: Array) -> dict[str, Array]:
        other = normalise(dist["live"] / temperature)
        return {"plain": logprob(dist["live"], token), "tempered": logprob(other, token)}

    return signals


def check_variety(
    name: str,
    policy: Policy,
    contexts: Sequence[Sequence[int]],
    found: Sequence[Sequence[Sample]],
    temperature: float,
) -> None:
    """Warns where all samples of a prompt are the same, and by the policy's own word that is no chance."""
    for context, some in zip(contexts, found, strict=True):
        if temperature <= 0 or len(some) < 2 or len({s.tokens for s in some}) > 1:
            continue
        own = own_logprobs(policy, context, some[0].tokens, temperature)["tempered"]
        chance = math.exp((len(some) - 1) * float(own.sum()))
        if chance < CHANCE:
            warnings.warn(
                f"{name} wrote {len(some)} identical completions of one prompt at temperature {temperature:g}, which has a "
                f"probability of {chance:.0e}: does it give every completion of a request the same seed?  Rows of a "
                "group that are all equal teach nothing",
                stacklevel=2,
            )
            return
