"""Writers: who samples for a policy in place of the compiled sampler; one for completions servers (vLLM, SGLang).

A writer is any callable

    writer(policy, contexts, key, *, n, sampling, limit) -> [len(contexts)][n] samples

`contexts` are lists of token ids, `key` is one key or one per context; a `sdjax.engine.policies.Sample` holds the tokens (the stop token last where there was one),
as many log-probabilities at temperature 1 before any filter, the text, and whether it ended by itself.  A method is
given one by `written_by(writer, method)`; evaluation and teachers keep the compiled sampler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.devices import processes
from sdjax.devices.http_json import EngineError, ask, check_url
from sdjax.engine.generate import Sampling
from sdjax.engine.policies import Policy, Sample
from sdjax.engine.tokens import decode_text, thinking_opened
from sdjax.engine.vocabulary import is_token
from sdjax.models import pretrained
from sdjax.types import Method

Writer = Callable[..., list[list[Sample]]]


def written_by(writer: Writer, method: Method) -> Method:
    """The method whose live policy is sampled by `writer`; what it scores and trains is as before.

    A writer that the environment's policy already has stays: a sketch of the method (`sdjax.engine.sketch`) asks no
    server.
    """

    def collect(environment, examples, key, memory):
        live = dataclasses.replace(environment.live, writer=environment.live.writer or writer)
        policies = {**environment.policies, "live": live}
        return method.collect(environment._replace(policies=policies), examples, key, memory)

    return method._replace(collect=collect)


# ---- weights to the engine ------------------------------------------------------------------------------------------


def synchronised(writer: Writer, push: Callable[[Policy], None], *, every: int = 1) -> Writer:
    """A writer that is sent new weights by `push(policy)` before it writes, after every `every`-th change of them.

    The first call always pushes; samples record how many changes old the engine's weights are (`Sample.staleness`,
    0 to `every - 1`; see `sdjax.samplers.staleness`).  The count is not part of a checkpoint: a resumed run pushes first.
    """
    if every < 1:
        raise EngineError(f"synchronised(every={every}): expected at least 1")
    seen: list[Any] = []  # the newest weights' leaves: held, so that their identities are not given to others
    age = every

    def write(policy: Policy, contexts, key, **how) -> list[list[Sample]]:
        nonlocal age
        leaves = jax.tree.leaves(policy.params)
        if len(seen) != len(leaves) or any(a is not b for a, b in zip(seen, leaves, strict=True)):
            seen[:] = leaves
            age += 1
            if age >= every:
                push(policy)
                age = 0
        return [[s._replace(staleness=age) for s in some] for some in writer(policy, contexts, key, **how)]

    return write


def reloaded(
    folder: str | Path, url: str, body: Mapping[str, Any], *, then: str | None = None, timeout: float = 600.0
) -> Callable:
    """A `push` for `synchronised`: writes the weights as a folder of the transformers library, then posts `body`.

    The folder must be one that the server can read.  SGLang: `url=".../update_weights_from_disk"`,
    `body={"model_path": folder}`.  vLLM, started with that folder and VLLM_SERVER_DEV_MODE=1:
    `url=".../collective_rpc"`, `body={"method": "reload_weights"}`, `then=".../reset_prefix_cache"`: it would go on from
    prefixes that the old weights have read.  (SGLang drops them by itself.)

    Raises: EngineError if the server does not answer 200.
    """

    def push(policy: Policy) -> None:
        pretrained.save(folder, policy.model.config, policy.params, policy.tokenizer, policy.origin)
        processes.by_first(lambda: ask(url, body, {}, timeout=timeout, retries=0))
        if then is not None:
            processes.by_first(lambda: ask(then, {}, {}, timeout=timeout, retries=0))

    return push


# ---- completions servers --------------------------------------------------------------------------------------------


def completions_server(
    url: str,
    model: str,
    *,
    api_key: str | None = None,
    timeout: float = 600.0,
    retries: int = 4,
    concurrency: int = 32,
) -> Writer:
    """A writer that asks an OpenAI-compatible server: `POST url/completions`, one request per context.

    Needs a server that takes prompts as token ids and returns the completion's (`return_token_ids`: vLLM from 0.10.2,
    SGLang; or vLLM's older `return_tokens_as_token_ids`).  Its log-probabilities must be those before temperature and
    filters (vLLM: `--logprobs-mode raw_logprobs`, its default); at temperature 1 without filters all servers agree.

    Args:
      url: with the version, "http://localhost:8000/v1"; model: the name it serves.
      timeout: seconds for one answer; a request is made `1 + retries` times where the server cannot be reached, is
        busy (429) or fails (5xx), after 0.5, 1, 2, ... seconds.
      concurrency: requests under way at once; the server batches them.

    Raises: EngineError, one sentence.
    """
    check_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    target = url.rstrip("/") + "/completions"

    def write(policy: Policy, contexts, key, *, n: int, sampling: Sampling, limit: int) -> list[list[Sample]]:
        seeds = seeds_of(key, len(contexts))
        bodies = [
            request(model, c, int(s), n, sampling, limit, policy.stop) for c, s in zip(contexts, seeds, strict=True)
        ]
        one = lambda body: choices(target, ask(target, body, headers, timeout=timeout, retries=retries), n)

        def together() -> list[Any]:
            with ThreadPoolExecutor(concurrency) as pool:
                return list(pool.map(one, bodies))

        answers = processes.by_first(together)  # all processes need the same rollouts
        openings = [thinking_opened(policy.tokenizer, c) for c in contexts]
        return [
            [read(target, choice, policy, limit, opening) for choice in some]
            for some, opening in zip(answers, openings, strict=True)
        ]

    return write


def seeds_of(key: jax.Array, count: int) -> np.ndarray:
    """One seed of 31 bits per context, from `fold_in(key, i)`, or from `key[i]` of an array of keys."""
    own = (lambda i: key[i]) if key.ndim else (lambda i: jax.random.fold_in(key, i))
    bits = lambda i: jax.random.bits(own(i), dtype=jnp.uint32)
    return np.asarray(jax.vmap(bits)(jnp.arange(count)) >> 1)


def request(
    model: str, context: Sequence[int], seed: int, n: int, sampling: Sampling, limit: int, stop: Sequence[int]
) -> dict[str, Any]:
    """The body of one request."""
    top_k = int(sampling.top_k)
    return {
        "model": model,
        "prompt": [int(token) for token in context],
        "n": n,
        "max_tokens": int(limit),
        "seed": seed,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": top_k if top_k > 0 else -1,
        "min_p": float(sampling.min_p),
        "stop_token_ids": [int(token) for token in stop],
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }


def choices(url: str, answer: Any, n: int) -> list[Mapping[str, Any]]:
    """The `n` completions of an answer, in order."""
    found = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != n:
        count = len(found) if isinstance(found, list) else "no"
        raise EngineError(f"{url} answered with {count} choices where {n} were asked for")
    return sorted(found, key=lambda choice: choice.get("index", 0))


def read(url: str, choice: Mapping[str, Any], policy: Policy, limit: int, opening: str = "") -> Sample:
    """One completion of an answer, checked: what does not fit would train the model on something it did not write."""
    about = choice.get("logprobs") or {}
    logprobs = about.get("token_logprobs")
    tokens = choice.get("token_ids") or from_names(about.get("tokens") or ())
    if not tokens:
        raise EngineError(
            f"{url} returned no token ids: it must know return_token_ids (vLLM from 0.10.2, a recent SGLang)"
        )
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        raise EngineError(f"{url} returned {count} log-probabilities for {len(tokens)} tokens")
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in logprobs):
        raise EngineError(f"{url} returned a log-probability that is not a finite number")
    if len(tokens) > limit:
        raise EngineError(f"{url} returned {len(tokens)} tokens where at most {limit} were asked for")
    wrong = next((t for t in tokens if not is_token(policy.model, t)), None)
    if wrong is not None:
        raise EngineError(
            f"{url} returned the token id {wrong!r}, which the tokenizer does not have: does it serve this model?"
        )
    stopped = choice.get("finish_reason") == "stop"
    if stopped and tokens[-1] not in policy.stop:
        raise EngineError(
            f"{url} ended a completion at token {tokens[-1]}, which is none of the tokenizer's stop tokens "
            f"{list(policy.stop)}: let it return the stop token and stop at these only"
        )
    return Sample(tuple(tokens), tuple(map(float, logprobs)), decode_text(policy.tokenizer, tokens, opening), stopped)


def from_names(names: Sequence[str]) -> list[int]:
    """Token ids from names like "token_id:17"; empty if they are not all of that form."""
    numbers = [str(name).removeprefix("token_id:") for name in names]
    good = all(
        str(name).startswith("token_id:") and number.isdigit() for name, number in zip(names, numbers, strict=True)
    )
    return [int(number) for number in numbers] if good else []
