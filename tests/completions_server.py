"""A small OpenAI-compatible completions server on loopback, which serves a policy through the project's own sampler.

It answers like vLLM where the project asks: prompts are token ids, `n`, `seed`, `temperature`, `top_p`, `top_k`,
`min_p`, `max_tokens`, `stop_token_ids`; the answer has `token_ids` and `logprobs`.  `POST /update_weights_from_disk`
loads a folder, as SGLang does.  As vLLM does, `POST /collective_rpc` reads the folder that it was started with again, and
prompts that it has read before stay as the old weights have read them until `POST /reset_prefix_cache`.  Prompts are
scored in the ways of both (see `scoring.py`).
"""

import contextlib
import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import json_server
import numpy as np
from scoring import generated, with_prompt_logprobs

from sdjax.engine.generate import Sampling, generate
from sdjax.engine.policies import row_keys
from sdjax.engine.tokens import left_pad
from sdjax.models import pretrained


def completions(policy, body):
    """The answer to one request."""
    prompt, n = body["prompt"], body["n"]
    sampling = Sampling(body["temperature"], body["top_p"], max(body["top_k"], 0), body["min_p"])
    keys = row_keys(jax.random.key(body["seed"]), jnp.arange(1), n)
    stop, limit = jnp.asarray(body["stop_token_ids"], jnp.int32), body["max_tokens"]
    context, length = left_pad([prompt], policy.shapes.context), policy.shapes.completion
    done = generate((policy.model,), (policy.params,), (context,), keys, sampling, stop, limit, length=length)
    done = jax.tree.map(np.asarray, done)
    return {"model": body["model"], "choices": [choice(policy, done, row) for row in range(n)]}


def choice(policy, done, row):
    """One completion, as in the protocol."""
    count = int(done.present[row].sum())
    tokens = [int(t) for t in done.tokens[row, :count]]
    logprobs = [float(x) for x in done.logprobs[row, :count]]
    names = [f"token_id:{t}" for t in tokens]
    return {
        "index": row,
        "text": policy.tokenizer.decode(tokens, skip_special_tokens=True),
        "token_ids": tokens,
        "finish_reason": "stop" if done.finished[row] else "length",
        "logprobs": {"tokens": names, "token_logprobs": logprobs},
    }


class Served:
    """A policy being served: the requests it has seen, and what it shall do wrong next."""

    def __init__(self, policy):
        self.policy, self.requests, self.wrong, self.lock = policy, [], [], threading.Lock()
        self.change = lambda answer: answer
        self.folder = None  # that vLLM was started with
        self.read = {}  # the policy that has read a prompt, by the prompt
        self.url = ""

    def answer(self, path, body):
        """Status and JSON of the answer to one POST."""
        self.requests.append((path, body))
        if self.wrong:
            wrong = self.wrong.pop(0)
            if wrong == "slow":
                time.sleep(3)
            return (500, {}) if wrong == "slow" else (wrong, {"error": f"made to answer {wrong}"})
        with self.lock:
            if path == "/v1/completions":
                reader = self.read.setdefault(tuple(body["prompt"]), self.policy) if self.folder else self.policy
                return 200, self.change(with_prompt_logprobs(self.policy, body, completions(reader, body)))
            if path == "/collective_rpc" and body["method"] == "reload_weights":
                self.policy = dataclasses.replace(self.policy, params=pretrained.load(self.folder).params)
                return 200, {"results": [None]}
            if path == "/reset_prefix_cache":
                self.read = {}
                return 200, b""
            if path == "/generate":
                return 200, self.change(generated(self.policy, body, completions))
            if path == "/update_weights_from_disk":
                loaded = pretrained.load(body["model_path"])
                self.policy = dataclasses.replace(self.policy, params=loaded.params)
                return 200, {"success": True}
        return 404, {"error": "no such path"}


@contextlib.contextmanager
def serving(policy):
    """While entered, the policy is served at `.url`."""
    served = Served(policy)
    answer = lambda path, body, authorization: served.answer(path, {**body, "authorization": authorization})
    with json_server.serving(answer) as served.url:
        yield served
