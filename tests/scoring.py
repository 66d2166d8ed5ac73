"""What a server says of a prompt's tokens, by a policy's own network: the part of vLLM and SGLang that teachers need."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.kernels.distributions import normalise
from sdjax.models import transformer


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, tokens):
    """Log-probabilities `[S, V]` after every token of a run `[S]`."""
    positions = jnp.arange(len(tokens))[None]
    hidden, _ = transformer.hidden(model, params, tokens[None], positions, jnp.ones((1, len(tokens)), bool))
    return normalise(transformer.logits(model, params, hidden)[0])


def scored(policy, prompt, entries):
    """`(logprob, [(id, logprob), ...])` of every token of a prompt but the first, and its likeliest `entries`."""
    run = np.zeros(128, np.int32)  # later tokens are never read; one length compiles once
    run[: len(prompt)] = prompt
    found = np.asarray(everything(policy.model, policy.params, jnp.asarray(run)))[: len(prompt) - 1]
    best = np.argsort(-found, axis=-1)[:, :entries]
    top = [[(int(t), float(dist[t])) for t in row] for dist, row in zip(found, best, strict=True)]
    return [(float(dist[t]), some) for dist, t, some in zip(found, prompt[1:], top, strict=True)]


def with_prompt_logprobs(policy, body, answer):
    """A completion's answer as vLLM gives it where `prompt_logprobs` is asked for."""
    if body.get("prompt_logprobs") is None:
        return answer
    about = lambda token, logprob: {"logprob": logprob, "rank": 1, "decoded_token": policy.tokenizer.decode([token])}
    place = lambda own, logprob, top: {str(t): about(t, x) for t, x in [(own, logprob), *top]}
    rest = scored(policy, body["prompt"], body["prompt_logprobs"])
    places = [None, *(place(t, *some) for t, some in zip(body["prompt"][1:], rest, strict=True))]
    return {**answer, "choices": [{**c, "prompt_logprobs": places} for c in answer["choices"]]}


def generated(policy, body, complete):
    """SGLang's answer to `POST /generate`; `complete` writes the completion."""
    how, start = body["sampling_params"], body["logprob_start_len"]
    same = {"n": 1, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": 0, "stop_token_ids": [], "model": "default"}
    asked = {
        **same,
        "prompt": body["input_ids"],
        "max_tokens": how["max_new_tokens"],
        "temperature": how["temperature"],
    }
    (choice,) = complete(policy, asked)["choices"]
    ids, rest = body["input_ids"], scored(policy, body["input_ids"], body["top_logprobs_num"])
    own = [[None, ids[start], None], *([x, t, None] for t, (x, _) in zip(ids[start + 1 :], rest[start:], strict=True))]
    top = [None, *([[x, t, None] for t, x in some] for _, some in rest[start:])]
    new = zip(choice["logprobs"]["token_logprobs"], choice["token_ids"], strict=True)
    said = {
        "input_token_logprobs": own,
        "input_top_logprobs": top,
        "output_token_logprobs": [[x, t, None] for x, t in new],
    }
    return {"text": choice["text"], "meta_info": said}
