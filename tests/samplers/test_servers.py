"""External engines, against a real server on loopback; weights sent to it; what it may not answer."""

import dataclasses
import json
import socket
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from completions_server import serving
from networks import unoptimised

from sdjax.collect.contexts import question
from sdjax.devices import http_json
from sdjax.devices.http_json import EngineError
from sdjax.engine import policies
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.policies import Sample, score
from sdjax.engine.tokens import Shapes
from sdjax.engine.train import Experiment
from sdjax.errors import InputError
from sdjax.kernels.distributions import logprob
from sdjax.methods.grpo import grpo
from sdjax.models.adapters import Lora
from sdjax.models.transformer import initialise
from sdjax.run.fit import fit
from sdjax.samplers.checks import checked
from sdjax.samplers.options import serving as serving_engine
from sdjax.samplers.servers import completions_server, reloaded, seeds_of, synchronised, written_by
from sdjax.samplers.staleness import bounded
from sdjax.types import Task, View

KEY = jax.random.key(11)
CHATS = [question(e) for e in tiny.TASK.train[:3]]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@pytest.fixture(scope="module")
def served():
    with serving(tiny.policy()) as found:
        yield found


@pytest.fixture(autouse=True)
def as_new(request):
    """The server behaves again, whatever a test made it do."""
    yield
    if "served" in request.fixturenames:
        server = request.getfixturevalue("served")
        server.wrong, server.change, server.policy = [], lambda answer: answer, tiny.policy()
        server.folder, server.read = None, {}


def asking(served, **options):
    return dataclasses.replace(tiny.policy(), writer=completions_server(f"{served.url}/v1", "tiny", **options))


# ---- the same as the sampler ----------------------------------------------------------------------------------------


def test_a_server_writes_what_the_sampler_writes_for_the_same_seeds(served):
    found = policies.sample(asking(served), CHATS, KEY, n=2)
    for chat, seed, some in zip(CHATS, seeds_of(KEY, 3), found, strict=True):
        (own,) = policies.sample(tiny.policy(), [chat], jax.random.key(int(seed)), n=2)
        assert [s[:1] + s[2:] for s in some] == [s[:1] + s[2:] for s in own]
        for a, b in zip(some, own, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len({s.tokens for some in found for s in some}) > 3


def test_greedy_filters_limits_and_stop_tokens_reach_the_server(served):
    asked = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.01)
    policies.sample(asking(served, api_key="a key"), CHATS[:1], KEY, n=3, sampling=asked, limit=4)
    _, body = served.requests[-1]
    wanted = {"n": 3, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "model": "tiny"}
    assert {name: body[name] for name in wanted} == wanted
    assert body["stop_token_ids"] == list(tiny.policy().stop) and body["authorization"] == "Bearer a key"
    greedy = policies.sample(asking(served), CHATS, KEY, sampling=GREEDY)
    assert [s[0].tokens for s in greedy] == [
        s[0].tokens for s in policies.sample(tiny.policy(), CHATS, KEY, sampling=GREEDY)
    ]
    assert served.requests[-1][1]["top_k"] == -1 and served.requests[-1][1]["temperature"] == 0.0


def test_seeds_differ_by_context_and_key():
    assert len({*map(int, seeds_of(KEY, 50)), *map(int, seeds_of(jax.random.key(0), 50))}) == 100
    assert int(seeds_of(KEY, 50).max()) < 2**31


def test_a_method_collects_from_a_server_and_scores_with_its_own_parameters(served):
    method = written_by(completions_server(f"{served.url}/v1", "tiny"), grpo(group_size=2))
    before = len(served.requests)
    environment = tiny.environment(method)
    rollouts, _ = method.collect(environment, list(tiny.TASK.train[:2]), KEY, method.memory)
    assert len(served.requests) == before + 2 and len(rollouts) == 4
    scored = score(environment, rollouts, {"student": View()}, own_logprob)
    for r in scored:
        np.testing.assert_allclose(r.logprobs, r.extras["own"], atol=1e-5)


def own_logprob(dist, token):
    return {"own": logprob(dist["student"], token)}


def test_any_callable_is_a_writer():
    def constant(policy, contexts, key, *, n, sampling, limit):
        return [[Sample((7,), (-1.0,), "seven", True)] * n for _ in contexts]

    method = written_by(constant, grpo(group_size=3))
    rollouts, _ = method.collect(tiny.environment(method), list(tiny.TASK.train[:2]), KEY, method.memory)
    assert [r.tokens for r in rollouts] == [(7,)] * 6 and "staleness" not in rollouts[0].extras


# ---- weights --------------------------------------------------------------------------------------------------------


def other_params(seed):
    return jax.jit(initialise, static_argnums=0)(tiny.model(), jax.random.key(seed))


def test_weights_reach_the_server_before_it_writes(served, tmp_path):
    push = reloaded(tmp_path / "now", f"{served.url}/update_weights_from_disk", {"model_path": str(tmp_path / "now")})
    writer = synchronised(completions_server(f"{served.url}/v1", "tiny"), push)
    for seed in (1, 2):
        policy = tiny.policy(other_params(seed))
        found = policies.sample(dataclasses.replace(policy, writer=writer), CHATS, KEY, sampling=GREEDY)
        own = policies.sample(policy, CHATS, KEY, sampling=GREEDY)
        assert [s[0].tokens for s in found] == [s[0].tokens for s in own]
        np.testing.assert_allclose(found[0][0].logprobs, own[0][0].logprobs, atol=1e-5)
        assert found[0][0].staleness == 0


def test_vllm_forgets_what_the_old_weights_have_read(served, tmp_path):
    """Weights arrive, then the prefix cache is dropped, then it writes: without the second it answers as before."""
    served.folder = tmp_path / "weights"
    writer = serving_engine(f"{served.url}/v1", "tiny", "vllm", str(served.folder), 1)
    for seed in (1, 2):
        before, policy = len(served.requests), tiny.policy(other_params(seed))
        found = policies.sample(dataclasses.replace(policy, writer=writer), CHATS, KEY, sampling=GREEDY)
        own = policies.sample(policy, CHATS, KEY, sampling=GREEDY)
        assert [s[0].tokens for s in found] == [s[0].tokens for s in own]
        np.testing.assert_allclose(found[0][0].logprobs, own[0][0].logprobs, atol=1e-5)
        paths = [path for path, _ in served.requests[before:]]
        assert paths == ["/collective_rpc", "/reset_prefix_cache", *["/v1/completions"] * len(CHATS)]


def test_log_probabilities_at_the_sampling_temperature_are_noticed_at_the_first_answer(served):
    params = {**tiny.pretrained().params, "head": 30 * tiny.pretrained().params["head"]}
    writer = checked(completions_server(f"{served.url}/v1", "tiny"), "the server")
    policy = dataclasses.replace(tiny.policy(params), writer=writer)
    served.policy = tiny.policy(params)
    ask = lambda temperature: policies.sample(policy, CHATS, KEY, sampling=Sampling(temperature=temperature))
    ask(1.0)
    ask(0.25)  # as they are before the temperature: right

    def tempered(answer):
        for choice, (_, body) in zip(answer["choices"], [served.requests[-1]], strict=True):
            whole = jnp.asarray([*body["prompt"], *choice["token_ids"]])[None]
            logits = tiny.model().apply({"params": params}, whole, method="everything")[0]
            after = jax.nn.log_softmax(logits[len(body["prompt"]) - 1 : -1] / body["temperature"])
            chosen = jnp.take_along_axis(after, jnp.asarray(choice["token_ids"])[:, None], -1)[:, 0]
            choice["logprobs"]["token_logprobs"] = [float(x) for x in chosen]
        return answer

    served.change, one = tempered, CHATS[:1]
    ask = lambda temperature: policies.sample(policy, one, KEY, sampling=Sampling(temperature=temperature))
    with pytest.raises(EngineError, match=r"at the sampling temperature 0\.2, where those at temperature 1"):
        ask(0.2)
    served.change = lambda answer: answer
    served.policy = tiny.policy(other_params(3))
    with pytest.raises(EngineError, match=r"nats per token from those of the weights it was sent: does it serve"):
        ask(0.3)


def test_identical_completions_of_one_prompt_are_noticed_at_the_first_answer(served):
    def alike(answer):
        first = answer["choices"][0]
        return {**answer, "choices": [{**first, "index": i} for i in range(len(answer["choices"]))]}

    def ask():
        writer = checked(completions_server(f"{served.url}/v1", "tiny"), "the server")
        return policies.sample(dataclasses.replace(tiny.policy(), writer=writer), CHATS, KEY, n=3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask()
    served.change = alike
    with pytest.warns(UserWarning, match="wrote 3 identical completions of one prompt at temperature 1, which has a"):
        ask()


def test_pushes_come_at_every_nth_change_and_samples_say_how_old_the_weights_are():
    pushed = []

    def writer(policy, contexts, key, *, n, sampling, limit):
        return [[Sample((7,), (-1.0,), "seven", True)] * n for _ in contexts]

    held = synchronised(writer, lambda policy: pushed.append(float(policy.params["x"][0])), every=3)
    ages = []
    for change in range(7):
        policy = tiny.policy({"x": jnp.asarray([float(change)])})
        for _ in range(2):  # twice with the same weights: no change
            ages.append(held(policy, [[1]], KEY, n=1, sampling=None, limit=1)[0][0].staleness)
    assert pushed == [0.0, 3.0, 6.0]
    assert ages == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0, 0]


def test_a_run_of_adapters_written_by_a_server_that_is_sent_weights_every_second_step(served, tmp_path):
    """Where the weights are fresh the server's log-probabilities are the student's: they arrived, adapters merged."""
    folder = tmp_path / "weights"
    push = reloaded(folder, f"{served.url}/update_weights_from_disk", {"model_path": str(folder)})
    writer = synchronised(completions_server(f"{served.url}/v1", "tiny"), push, every=2)
    experiment = Experiment(
        method=bounded(written_by(writer, grpo(group_size=4)), 1),
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=optax.adam(3e-2),
        shapes=Shapes(context=48, completion=8, rows=8, tokens_per_chunk=None),
        steps=4,
        prompts=2,
        evaluation=0,
        export=False,
        lora=Lora(rank=4),
    )
    before = len(served.requests)
    fit(experiment, tmp_path / "run")
    pushes = [path for path, _ in served.requests[before:] if path != "/v1/completions"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    age, importance = ([row[f"staleness/{name}"] for row in rows] for name in ("age", "importance"))
    assert len(pushes) == 2 and age == [0, 1, 0, 1]
    assert importance[0] == pytest.approx(1, abs=1e-5) and importance[2] == pytest.approx(1, abs=1e-5)
    # The mean ratio of exact samples is 1 whatever the weights; of a few, not quite.
    assert abs(importance[1] - 1) > 1e-4 and abs(importance[3] - 1) > 1e-4


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    waits = []
    monkeypatch.setattr(http_json.time, "sleep", waits.append)
    return waits


def test_a_busy_or_failing_server_is_asked_again(served, quickly):
    served.wrong = [503, 429]
    assert len(policies.sample(asking(served), CHATS[:1], KEY)[0][0].tokens) > 0
    assert quickly == [0.5, 1.0]


def test_refusals_and_servers_that_are_down_are_errors_of_one_sentence(served, quickly):
    served.wrong = [400]
    with pytest.raises(EngineError, match=r"/v1/completions refused a request \(status 400: .*made to answer 400"):
        policies.sample(asking(served), CHATS[:1], KEY)
    assert not quickly
    served.wrong = [500] * 9
    with pytest.raises(EngineError, match=r"did not answer \(3 attempts\), at last: status 500"):
        policies.sample(asking(served, retries=2), CHATS[:1], KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = completions_server(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "tiny", retries=1)
        with pytest.raises(EngineError, match=r"did not answer \(2 attempts\), at last: Connection.*is the server up"):
            policies.sample(dataclasses.replace(tiny.policy(), writer=nobody), CHATS[:1], KEY)
    assert issubclass(EngineError, InputError)


def test_a_server_that_does_not_answer_in_time_is_given_up(served):
    served.wrong = ["slow"]
    with pytest.raises(EngineError, match="no answer within 0.3 seconds"):
        policies.sample(asking(served, timeout=0.3, retries=0), CHATS[:1], KEY)


def changed(**fields):
    return lambda answer: {**answer, "choices": [{**c, **fields} for c in answer["choices"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_ids=None, logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}), "no token ids"),
        (changed(token_ids=[1, 2], logprobs={"token_logprobs": [-1.0]}), "1 log-probabilities for 2 tokens"),
        (changed(logprobs=None), "no log-probabilities for"),
        (changed(token_ids=[1], logprobs={"token_logprobs": [float("nan")]}), "not a finite number"),
        (changed(token_ids=[999], logprobs={"token_logprobs": [-1.0]}), "does it serve this model"),
        (
            changed(token_ids=[5], finish_reason="stop", logprobs={"token_logprobs": [-1.0]}),
            "none of the tokenizer's stop",
        ),
        (lambda answer: {"choices": []}, "0 choices where 1 were asked for"),
        (lambda answer: {}, "no choices where 1 were"),
        (lambda answer: b"<html>", "not JSON: '<html>'"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(served, change, message):
    served.change = change
    with pytest.raises(EngineError, match=message):
        policies.sample(asking(served), CHATS[:1], KEY)


def test_token_ids_by_name_are_enough(served):
    expected = policies.sample(asking(served), CHATS, KEY)
    served.change = changed(token_ids=None)
    assert policies.sample(asking(served), CHATS, KEY) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http://"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(EngineError, match="expected one like http://localhost:8000/v1"):
        completions_server(url, "tiny")
