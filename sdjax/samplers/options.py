"""Who samples for a method, how old the weights may be, and what is done about it: what the command line offers of it."""

from __future__ import annotations

import os
from typing import Literal

from sdjax.devices.http_json import KEY, EngineError, check_url
from sdjax.samplers.checks import checked
from sdjax.samplers.refill import refilled
from sdjax.samplers.servers import (
    Writer,
    completions_server,
    reloaded,
    synchronised,
    written_by,
)
from sdjax.samplers.staleness import bounded, lagged
from sdjax.types import Method

Engine = Literal["vllm", "sglang"]


def sampled(
    method: Method,
    *,
    slots: int = 0,
    server: str = "",
    model: str = "default",
    engine: Engine = "vllm",
    weights: str = "",
    every: int = 1,
    lag: int = 0,
    most: int | None = None,
    cap: float | None = None,
) -> Method:
    """A method whose rollouts another sampler writes, or the same one with older weights; as it is by default.

    Args:
      slots: rows decoded at once by a sampler in which finished rows make room for queued prompts; 0 is the plain one.
      server: an OpenAI-compatible completions server that writes, as http://localhost:8000/v1; needs `weights`.  The
        environment's SDJAX_API_KEY is its key, if it wants one.
      model: the name that it serves.
      engine: which server: how it is told to read new weights.
      weights: the folder that it was started with; new weights are written there.
      every: batches between two sendings of weights to the server.
      lag: without a server: the weights of 0 to so many batches ago write.
      most: rows of older weights than that, in batches, are dropped and counted.
      cap: every token's weight is multiplied by min(p/b, cap), p the student now and b the writer; for distillation
        (2, say), policy gradients have their own ratio.

    Raises: EngineError where options contradict one another.
    """
    check(slots=slots, server=server, weights=weights, every=every, lag=lag)
    if server:
        method = written_by(serving(server, model, engine, weights, every), method)
    method = written_by(refilled(slots=slots), method) if slots else method
    method = lagged(method, lag) if lag else method
    if most is None and cap is None and every == 1 and not lag:
        return method
    return bounded(method, max(every - 1, lag) if most is None else most, cap=cap)


def check(*, slots: int, server: str, weights: str, every: int, lag: int, **_) -> None:
    """Raises `EngineError` where options of `sampled` contradict one another, before anything is loaded."""
    if server:
        check_url(server)
    wrong = {
        "slots is about the sampler here, which server replaces: give one of them": server and slots,
        "lag makes weights old without a server; with one, every does": server and lag,
        "server needs weights, the folder that it was started with and reads new weights from": server and not weights,
        "every and weights are about a server: name it with server": not server and (every != 1 or weights),
        f"every={every}: expected at least 1": every < 1,
    }
    for why in (why for why, given in wrong.items() if given):
        raise EngineError(f"sampler: {why}")


def serving(server: str, model: str, engine: Engine, weights: str, every: int) -> Writer:
    """A server that is sent new weights after every `every`-th change."""
    write, root = completions_server(server, model, api_key=os.environ.get(KEY)), server.rstrip("/").removesuffix("/v1")
    reload = {
        "vllm": ("collective_rpc", {"method": "reload_weights"}, f"{root}/reset_prefix_cache"),
        "sglang": ("update_weights_from_disk", {"model_path": weights}, None),
    }
    path, body, then = reload[engine]
    push = reloaded(weights, f"{root}/{path}", body, then=then)
    return synchronised(checked(write, f"{server} ({engine})"), push, every=every)
