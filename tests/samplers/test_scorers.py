"""Teachers behind servers, against a real one on loopback: what they say, whom they can teach, what they may not answer."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
from completions_server import serving
from networks import unoptimised

from sdjax.cli.options import Choice
from sdjax.devices.http_json import EngineError
from sdjax.engine import train
from sdjax.engine.policies import Environment, score
from sdjax.engine.train import Experiment
from sdjax.kernels.distributions import logprob
from sdjax.methods.brts import brts
from sdjax.methods.gkd import gkd
from sdjax.methods.opd import opd
from sdjax.methods.stable_opd import stable_opd
from sdjax.methods.vopd import vopd
from sdjax.run.fit import fit
from sdjax.run.settings import Settings
from sdjax.run.teachers import TeacherError
from sdjax.samplers.scorers import scored_by, scoring_server
from sdjax.types import UNUSED, Task, View

KEY = jax.random.key(5)
CONTEXTS = [(7, 8, 9, 10), (11, 12)]
ROWS = [(CONTEXTS[0], (13, 14, 6)), (CONTEXTS[1], (15,)), (CONTEXTS[1], (9, 9, 9, 9, 9, 1))]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


@pytest.fixture(scope="module")
def teacher():
    return tiny.policy(tiny.pretrained(1).params)


@pytest.fixture(scope="module")
def served(teacher):
    with serving(teacher) as found:
        yield found


@pytest.fixture(autouse=True)
def as_new(request, teacher):
    yield
    if "served" in request.fixturenames:
        server = request.getfixturevalue("served")
        server.wrong, server.change, server.policy = [], lambda answer: answer, teacher


def scorer(served, engine="vllm", **options):
    return scoring_server(f"{served.url}/v1", "tiny", engine, **options)


# ---- what it says -------------------------------------------------------------------------------------------------------


def whole(dist, token):
    return {"dist": dist["teacher"], "own": logprob(dist["teacher"], token)}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_says_what_its_network_says(served, teacher, engine):
    """Of the sampled tokens and of the likeliest ones, for rows of any length."""
    likeliest = int(np.argmax(distribution(teacher, CONTEXTS[1], (9,))[0]))
    rows = [*ROWS, (CONTEXTS[1], (likeliest, 3))]  # a token that is one of the likeliest itself
    found = scorer(served, engine)(rows, 3, tiny.tokenizer())
    for (context, completion), scores in zip(rows, found, strict=True):
        dist = np.asarray(distribution(teacher, context, completion))
        assert scores.tokens.shape == scores.logprobs.shape == (len(completion), 4)
        np.testing.assert_array_equal(scores.tokens[:, 0], completion)
        for place, tokens, logprobs in zip(dist, *scores, strict=True):
            said = {int(t): x for t, x in zip(tokens, logprobs, strict=True) if t != UNUSED}
            assert len(said) == np.sum(tokens != UNUSED)  # none twice: its mass would count twice
            assert {*said} == {int(tokens[0]), *map(int, np.argsort(-place)[:3])}
            np.testing.assert_allclose([place[t] for t in said], list(said.values()), atol=1e-5)


def distribution(policy, context, completion):
    """`[T, V]`, by one plain forward pass."""
    from scoring import everything

    run = np.zeros(128, np.int32)
    run[: len(context) + len(completion)] = (*context, *completion)
    return everything(policy.model, policy.params, run)[len(context) - 1 : len(context) + len(completion) - 1]


def test_what_is_asked(served):
    before = len(served.requests)
    scorer(served, api_key="a key")(ROWS, 0, tiny.tokenizer())
    bodies = [body for _, body in served.requests[before:]]
    assert len(bodies) == len(ROWS) + 1  # the first row is asked about once more, to check it
    assert {b["temperature"] for b in bodies[:1] + bodies[2:]} == {1.0} and bodies[1]["temperature"] == 0.5
    assert {path for path, _ in served.requests[before:]} == {"/v1/completions"}
    bare = scoring_server(served.url, "tiny")(ROWS[:1], 0, tiny.tokenizer())  # the version may be left out
    assert bare[0].tokens.tolist() == [[t] for t in ROWS[0][1]]
    assert all(b["prompt_logprobs"] == 0 and b["max_tokens"] == 1 for b in bodies)
    assert bodies[0]["authorization"] == "Bearer a key" and bodies[0]["prompt"] == [*ROWS[0][0], *ROWS[0][1]]


# ---- the same as a network ----------------------------------------------------------------------------------------------

METHODS = {
    "opd": functools.partial(opd, group_size=2),
    "gkd top 4": functools.partial(gkd, lmbda=1.0, top_k=4),
    "stable_opd": functools.partial(stable_opd, group_size=2, gold_coef=0.0),
}


def update(method, environment):
    """The loss of a batch that the method collects, and the student after an update."""
    rollouts, _ = method.collect(environment, list(tiny.TASK.train[:2]), KEY, method.memory)
    experiment = Experiment(
        method=method,
        task=Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity),
        student=tiny.pretrained(),
        optimizer=Settings(lr=1e-2).chosen_optimizer(),
        shapes=tiny.SHAPES,
        teachers={"teacher": tiny.pretrained(1)},
    )
    (objective,), state = method.objectives, train.initial_state(experiment, tiny.pretrained().params)
    step = train.make_update(objective, train.models(experiment), experiment.optimizer, tiny.SHAPES)
    others = {name: p.params for name, p in environment.policies.items() if name != "live"}
    params, _, outcome = step(state.params, state.opt_state, others, tiny.collected(method, rollouts), state.step)
    return float(outcome.loss), float(outcome.grad_norm), params


@pytest.mark.parametrize("name", METHODS)
def test_a_server_teaches_what_its_network_would_teach(served, name):
    local = METHODS[name](teacher="teacher")
    environment = tiny.environment(local)
    remote = scored_by(local, "teacher", {"teacher": scorer(served)})
    without = Environment({n: p for n, p in environment.policies.items() if n != "teacher"}, environment.verify)
    loss, norm, params = update(remote, without)
    wanted, wanted_norm, wanted_params = update(local, environment)
    assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-3)
    close = functools.partial(np.testing.assert_allclose, atol=2e-4)
    jax.tree.map(close, params, wanted_params)


def test_of_several_servers_that_of_the_example_scores(served, teacher):
    field = lambda e, name: dataclasses.replace(e, meta={"domain": name})
    with serving(tiny.policy(tiny.pretrained(2).params)) as other:
        servers = {"maths": scorer(served), "code": scorer(other)}
        method = scored_by(opd(group_size=1), "teacher", servers, "domain")
        examples = [field(e, n) for e, n in zip(tiny.TASK.train, ("code", "maths"), strict=False)]
        rollouts, _ = method.collect(tiny.environment(), examples, KEY, None)
    policies = {"live": tiny.policy(), "maths": teacher, "code": tiny.policy(tiny.pretrained(2).params)}
    asked = [r.read_by(maths=r.example.prompt, code=r.example.prompt) for r in rollouts]
    likely = score(Environment(policies, tiny.parity), asked, {n: View(n) for n in ("maths", "code")}, own)
    for r in likely:
        np.testing.assert_allclose(r.scores["teacher"].logprobs[:, 0], r.extras[r.example.meta["domain"]], atol=1e-5)


def own(dist, token):
    return {name: logprob(x, token) for name, x in dist.items()}


def test_a_run_is_taught_by_a_server_in_one_program(served, tmp_path):
    settings = Settings(teacher=f"{served.url}/v1", teacher_engine="sglang", steps=3, prompts=2, lr=1e-2, context=48)
    settings = dataclasses.replace(settings, completion=8, rows=8, tokens_per_chunk=None, evaluation=0)
    method = settings.method(Choice(opd, {"group_size": 2}))
    task = Task("recall", tiny.TASK.train, tiny.TASK.test, tiny.parity)
    before = tiny.programs("update")
    fit(settings.experiment(method=method, task=task, student=tiny.pretrained(), export=False), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["trained"] for row in rows] == [1.0] * 3 and tiny.programs("update") == before + 1
    recorded = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])
    assert recorded["policies"] == {"student": "live", "teacher": "teacher"}


# ---- whom it cannot teach -----------------------------------------------------------------------------------------------

TOO_LITTLE = {
    "gkd": (gkd, {}, "gkd reads whole distributions of its teacher.*: take --method.top-k 20$"),
    "gkd that it writes for": (
        gkd,
        {"seq_kd": True, "top_k": 5},
        "gkd writes with its teacher.*--method.seq-kd False$",
    ),
    "opd": (opd, {"full_vocabulary": True}, "opd reads whole .*: take --method.full-vocabulary False$"),
    "vopd": (vopd, {}, "vopd reads whole .*: take --method.baseline none$"),
    "brts": (brts, {}, "brts writes with its teacher.*: name a model as its teacher$"),
}


@pytest.mark.parametrize("name", TOO_LITTLE)
def test_methods_that_need_more_are_refused_by_name(name):
    factory, given, message = TOO_LITTLE[name]
    with pytest.raises(TeacherError, match=message):
        Settings(teacher="http://localhost:1/v1").method(Choice(factory, {"teacher": None, **given}))
    with pytest.raises(EngineError, match="policy 'teacher' cannot be a server"):
        scored_by(factory(**given), "teacher", {})


@pytest.mark.parametrize("factory, given", [(gkd, {"top_k": 20}), (vopd, {"baseline": "none"}), (opd, {})])
def test_methods_that_need_no_more_are_not(factory, given):
    method = Settings(teacher="http://localhost:1/v1").method(Choice(factory, {"teacher": None, **given}))
    assert method.objectives[0].views["teacher"].policy.server == "teacher"


def test_a_server_and_a_model_do_not_teach_together():
    with pytest.raises(TeacherError, match="a/b is a model and others are servers"):
        Settings(teachers="maths=a/b,code=http://localhost:1/v1", teacher_field="domain")
    with pytest.raises(EngineError, match="expected one like"):
        Settings(teacher="http://")


# ---- what it may not answer ---------------------------------------------------------------------------------------------


def scaled(served, served_at=2.0):
    """From the second answer on, log-probabilities of prompts are multiplied: another temperature."""
    seen = []

    def change(answer):
        seen.append(answer)
        if len(seen) == 1:
            return answer
        lower = lambda place: place and {t: {**x, "logprob": served_at * x["logprob"]} for t, x in place.items()}
        return changed(lambda c: {"prompt_logprobs": [lower(p) for p in c["prompt_logprobs"]]})(answer)

    served.change = change


def changed(fields):
    return lambda answer: {**answer, "choices": [{**c, **fields(c)} for c in answer["choices"]]}


def test_log_probabilities_that_follow_the_temperature_are_noticed_at_the_first_answer(served):
    scaled(served)
    with pytest.raises(EngineError, match="another sampling temperature .1 and 0.5: by .* raw_logprobs"):
        scorer(served)(ROWS, 0, tiny.tokenizer())


def test_a_written_token_that_reads_otherwise_is_noticed(served):
    served.change = changed(lambda c: {"logprobs": {**c["logprobs"], "token_logprobs": [-0.001]}})
    with pytest.raises(EngineError, match="gave a token that it wrote the log-probability -0.001, and -"):
        scorer(served)(ROWS, 0, tiny.tokenizer())


places = lambda change: changed(lambda c: {"prompt_logprobs": [p and change(p) for p in c["prompt_logprobs"]]})
value = lambda x: places(lambda p: {t: {**about, "logprob": x} for t, about in p.items()})
ANSWERS = {
    "no such field": (changed(lambda c: {"prompt_logprobs": None}), "returned no prompt_logprobs: is it a vLLM server"),
    "too few": (changed(lambda c: {"prompt_logprobs": c["prompt_logprobs"][:2]}), "returned no prompt_logprobs"),
    "other tokens": (places(lambda p: {str(int(t) + 1): x for t, x in p.items()}), "scored other tokens than"),
    "nothing": (lambda answer: {"choices": []}, "returned no prompt_logprobs"),
    "above 1": (value(0.5), "not a finite number up to 0"),
    "not a number": (value(float("nan")), "not a finite number up to 0"),
    "no distribution": (value(-0.1), "of one position that add up to"),
    "other texts": (
        places(lambda p: {t: {**x, "decoded_token": "foreign"} for t, x in p.items()}),
        "another vocabulary than the student: token 13 is 'foreign' there",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_does_not_fit_is_refused(served, name):
    served.change, message = ANSWERS[name]
    with pytest.raises(EngineError, match=message):
        scorer(served)(ROWS, 2, tiny.tokenizer())


def test_the_other_engine_is_named(served):
    served.change = lambda answer: {"text": "x"}
    with pytest.raises(EngineError, match="is it an SGLang server. .--teacher-engine vllm"):
        scorer(served, "sglang")(ROWS, 2, tiny.tokenizer())
