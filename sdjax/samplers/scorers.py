"""Teachers behind servers (vLLM, SGLang): what they say of the tokens of rollouts, in place of a network here.

A server gives the log-probability of every token of a prompt and of the likeliest tokens in its place.  That is enough
for signals that read no more of the teacher (`View.entries`): policy gradients of its log-probabilities, and divergences
on its likeliest tokens and the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from sdjax.devices import processes
from sdjax.devices.http_json import EngineError, ask, check_url
from sdjax.engine.policies import reading
from sdjax.engine.tokens import encode_context
from sdjax.engine.train import all_views
from sdjax.samplers.servers import from_names
from sdjax.types import UNUSED, Method, Rollout, Scored, Scores, View

Engine = Literal["vllm", "sglang"]

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of the completion after it."""

Scorer = Callable[[Sequence[Row], int, Any], list[Scores]]
"""`(rows, entries, tokenizer) -> scores`: of each completion's tokens, with so many of the likeliest besides."""


def scored_by(method: Method, policy: str, scorers: Mapping[str, Scorer], field: str = "") -> Method:
    """The method whose views of `policy` get their distributions from servers, after everything is collected.

    With one server it scores every rollout; of several, the one that the example's `field` names.

    Raises: EngineError if a view reads more of its distribution than a server gives, or `collect` writes with the policy.
    """
    views = {name: view for name, view in all_views(method).items() if view.policy == policy}
    whole = [name for name, view in views.items() if view.entries is None]
    if whole or policy in method.writers:
        why = f"view {whole[0]!r} reads its whole distribution" if whole else "the method writes with it"
        raise EngineError(f"policy {policy!r} cannot be a server: {why}")

    def collect(environment, examples, key, memory):
        rollouts, memory = method.collect(environment, examples, key, memory)
        for name, view in views.items():
            for server, scorer in scorers.items():
                mine = lambda r, server=server: not field or str(r.example.meta.get(field)) == server
                rollouts = with_scores(rollouts, name, view, scorer, mine, environment.live)
        return rollouts, memory

    return reading(method, policy, Scored(policy))._replace(collect=collect)


def with_scores(
    rollouts: Sequence[Rollout], name: str, view: View, scorer: Scorer, mine: Callable[[Rollout], bool], live: Any
) -> list[Rollout]:
    """The rollouts with what a server says of those that are its own and that the view has a context for."""
    told = [r for r in rollouts if r.tokens and r.contexts.get(name) is not None and mine(r)]
    rows = [(encode_context(live.tokenizer, r.contexts[name], live.shapes, view.template), r.tokens) for r in told]
    found = scorer(rows, view.entries, live.tokenizer) if rows else []
    scores = {id(r): s for r, s in zip(told, found, strict=True)}
    return [r.scored(**{name: scores[id(r)]}) if id(r) in scores else r for r in rollouts]


# ---- servers ----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a server says of a prompt's last tokens, and of the one token that it wrote after them, if it did."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[Mapping[int, float], ...]
    texts: tuple[str | None, ...]
    written: tuple[int, float] | None


def scoring_server(
    url: str,
    model: str = "default",
    engine: Engine = "vllm",
    *,
    api_key: str | None = None,
    timeout: float = 600.0,
    retries: int = 4,
    concurrency: int = 32,
) -> Scorer:
    """A scorer that asks a server, one request per completion, and checks its first answer.

    vLLM: `POST url/completions` with `prompt_logprobs`; at most 20 entries unless it was started with more
    (`--max-logprobs`).  SGLang: `POST .../generate`, beside `url` without its `/v1`, with `return_logprob`.
    Its log-probabilities must be those of the model itself, whatever the temperature of a request.

    Args:
      url: "http://localhost:8000/v1" (the version may be left out); model: the name it serves (vLLM).
      timeout: seconds for one answer; retries and concurrency are as in `sdjax.samplers.servers.completions_server`.

    Raises: EngineError, one sentence.
    """
    check_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    root = url.rstrip("/") if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"
    target = f"{root}/completions" if engine == "vllm" else f"{root.removesuffix('/v1')}/generate"
    request, read = (vllm_request, vllm_answer) if engine == "vllm" else (sglang_request, sglang_answer)
    checked: list[str] = []

    def answer(row: Row, entries: int, temperature: float = 1.0) -> Answer:
        prompt = [int(token) for token in (*row[0], *row[1])]
        body = request(model, prompt, len(row[1]), entries, temperature)
        found = read(target, ask(target, body, headers, timeout=timeout, retries=retries), tuple(map(int, row[1])))
        check_answer(target, found)
        return found

    def score(rows: Sequence[Row], entries: int, tokenizer: Any) -> list[Scores]:
        def together() -> list[Answer]:
            first = [answer(rows[0], entries)]
            if not checked:
                check_first(target, rows[0], first[0], lambda row: answer(row, entries, temperature=0.5), tokenizer)
                checked.append(target)
            with ThreadPoolExecutor(concurrency) as pool:
                return first + list(pool.map(lambda row: answer(row, entries), rows[1:]))

        return [scores_of(found, entries) for found in processes.by_first(together)]

    return score


def scores_of(found: Answer, entries: int) -> Scores:
    """An answer as arrays `[T, 1 + entries]`: the sampled token, then the likeliest others; unused where it is one of them."""
    tokens = np.full((len(found.tokens), 1 + entries), UNUSED, np.int32)
    logprobs = np.zeros(tokens.shape, np.float32)
    tokens[:, 0], logprobs[:, 0] = found.tokens, found.logprobs
    for row, (own, some) in enumerate(zip(found.tokens, found.likeliest, strict=True)):
        best = sorted(some.items(), key=lambda item: (-item[1], item[0]))[:entries]
        for column, (token, logprob) in enumerate(best, start=1):
            if token != own:
                tokens[row, column], logprobs[row, column] = token, logprob
    return Scores(tokens, logprobs)


def vllm_request(model: str, prompt: Sequence[int], count: int, entries: int, temperature: float) -> dict[str, Any]:
    """The body of one request: log-probabilities of the prompt's tokens, and one token more."""
    return {
        "model": model,
        "prompt": list(prompt),
        "n": 1,
        "max_tokens": 1,
        "seed": 0,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "stop_token_ids": [],
        "logprobs": 1,
        "prompt_logprobs": entries,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }


def vllm_answer(url: str, answer: Any, own: tuple[int, ...]) -> Answer:
    """A prompt's last tokens, `own`, from `prompt_logprobs`: per position `{id: {"logprob", "decoded_token"}}`."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice, count = choices[0] if choices else {}, len(own)
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list) or len(places) < count or not all(isinstance(p, dict) for p in places[-count:]):
        raise EngineError(
            f"{url} returned no prompt_logprobs: is it a vLLM server? (--teacher-engine sglang for SGLang)"
        )
    some = [{int(token): about for token, about in place.items()} for place in places[-count:]]
    if any(token not in place for token, place in zip(own, some, strict=True)):
        raise EngineError(f"{url} scored other tokens than it was asked about: does it take prompts as token ids?")
    texts = tuple(place[token].get("decoded_token") for token, place in zip(own, some, strict=True))
    likeliest = tuple({token: about["logprob"] for token, about in place.items()} for place in some)
    about = choice.get("logprobs") or {}
    tokens = choice.get("token_ids") or from_names(about.get("tokens") or ())
    new = (tokens[0], about["token_logprobs"][0]) if tokens and about.get("token_logprobs") else None
    return Answer(own, tuple(p[t] for t, p in zip(own, likeliest, strict=True)), likeliest, texts, new)


def sglang_request(model: str, prompt: Sequence[int], count: int, entries: int, temperature: float) -> dict[str, Any]:
    """The body of one request to SGLang's own interface; `input_token_logprobs` begin with the token before."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "top_p": 1.0, "top_k": -1},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - count - 1,
        "top_logprobs_num": entries,
        "stream": False,
    }


def sglang_answer(url: str, answer: Any, own: tuple[int, ...]) -> Answer:
    """A prompt's last tokens, `own`, from `input_token_logprobs` and `input_top_logprobs`: `[logprob, id, text]` each."""
    about = answer.get("meta_info") if isinstance(answer, dict) else None
    said, count = (about or {}).get("input_token_logprobs"), len(own)
    if not isinstance(said, list) or len(said) < count:
        raise EngineError(
            f"{url} returned no input_token_logprobs: is it an SGLang server? (--teacher-engine vllm for vLLM)"
        )
    said, top = said[-count:], about.get("input_top_logprobs") or [None] * count
    if tuple(int(token) for _, token, *_ in said) != own:
        raise EngineError(f"{url} scored other tokens than it was asked about: does it take prompts as token ids?")
    likeliest = tuple({int(token): logprob for logprob, token, *_ in place or ()} for place in top[-count:])
    logprobs, texts = tuple(x[0] for x in said), tuple(x[2] if len(x) > 2 else None for x in said)
    new = about.get("output_token_logprobs") or ()
    return Answer(own, logprobs, likeliest, texts, (new[0][1], new[0][0]) if new else None)


# ---- what an answer must be -------------------------------------------------------------------------------------------


def check_answer(url: str, found: Answer) -> None:
    """Raises `EngineError` for an answer whose numbers are no log-probabilities."""
    every = [*found.logprobs, *(x for place in found.likeliest for x in place.values())]
    if not all(isinstance(x, int | float) and math.isfinite(x) and x <= 1e-3 for x in every):
        raise EngineError(f"{url} returned a log-probability that is not a finite number up to 0")
    mass = max((sum(map(math.exp, place.values())) for place in found.likeliest), default=0.0)
    if mass > 1.01:
        raise EngineError(f"{url} returned log-probabilities of one position that add up to {mass:.3g}")


def check_first(url: str, row: Row, found: Answer, again: Callable[[Row], Answer], tokenizer: Any) -> None:
    """Raises `EngineError` unless a second answer, at temperature 0.5, agrees with the first one, at temperature 1.

    It is asked about the token, too, that the server wrote at first: what it says of a prompt's token must be what it
    says of one that it writes.  Where it returns texts, they must be the tokenizer's.
    """
    check_texts(url, found, tokenizer)
    context, completion = row
    new = () if found.written is None else found.written[:1]
    second = again((context, (*completion, *new)))
    gap = float(np.mean(np.abs(np.subtract(found.logprobs, second.logprobs[: len(completion)]))))
    if gap > 0.1:
        raise EngineError(
            f"{url} says something else of the same tokens at another sampling temperature (1 and 0.5: by {gap:.2g} on "
            "average): a teacher's log-probabilities must be the model's own (vLLM: --logprobs-mode raw_logprobs)"
        )
    if new and abs(found.written[1] - second.logprobs[-1]) > 0.25:
        raise EngineError(
            f"{url} gave a token that it wrote the log-probability {found.written[1]:.3g}, and {second.logprobs[-1]:.3g} "
            "when it read it: a teacher's log-probabilities must be the model's own, at temperature 1"
        )


def check_texts(url: str, found: Answer, tokenizer: Any) -> None:
    """Raises `EngineError` if most of the tokens' texts are not those of the student's tokenizer."""
    pairs = [(t, text) for t, text in zip(found.tokens, found.texts, strict=True) if text]
    wrong = [(t, text) for t, text in pairs if tokenizer.decode([t]).strip() != text.strip()]
    if 2 * len(wrong) > len(pairs):
        token, text = wrong[0]
        raise EngineError(
            f"{url} has another vocabulary than the student: token {token} is {text!r} there and "
            f"{tokenizer.decode([token])!r} here"
        )
