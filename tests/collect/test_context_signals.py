"""How well a teacher ranks attempts under each context, and analyses that a teacher writes before it grades."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from networks import unoptimised
from scipy import stats

from sdjax.collect import context_signals
from sdjax.collect.analyses import REQUEST, TRANSITION, analysed
from sdjax.collect.contexts import question, with_reference
from sdjax.engine.policies import Sample
from sdjax.methods.mopd import mopd
from sdjax.methods.opsd import opsd
from sdjax.types import Rollout, Verdict


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


def third(example, text):
    """A verdict by which random texts differ."""
    return Verdict(float(len(text) % 3 == 0))


def attempt(number, reward, group=0):
    return Rollout(tiny.TASK.train[group], (number,), (0.0,), f"answer {number}", group, reward=reward)


# ---- signals --------------------------------------------------------------------------------------------------------


def test_ranking():
    found = context_signals.ranking(np.asarray([-0.5, -1.0, -0.8]), np.asarray([True, False, False]))
    assert found["auc"] == 1.0 == found["pairwise"]
    assert found["spearman"] == pytest.approx(stats.spearmanr([3, 1, 2], [1, 0, 0]).statistic)
    ties = context_signals.ranking(np.zeros(4), np.asarray([True, False, True, False]))
    assert ties == {"spearman": 0.0, "pairwise": 0.0, "auc": 0.5}


def test_what_each_context_shows():
    rows = [attempt(i, reward) for i, reward in enumerate([1.0, 0.0, 1.0, 0.0, 1.0])]
    shown = {}
    for name, lesson in context_signals.peer_contexts().items():
        text = lesson(rows[0], rows)[-1]["content"]
        assert "answer 0" not in text  # never itself
        shown[name] = [r.reward for r in rows if r.text in text]
    kinds = {name: (rewards.count(1.0), rewards.count(0.0)) for name, rewards in shown.items()}
    assert kinds == {"none": (0, 0), "1F": (0, 1), "1S": (1, 0), "2S": (2, 0), "1S+1F": (1, 1), "2S+1F": (2, 1)}


def test_averages_are_over_prompts_that_all_contexts_speak_about(monkeypatch):
    """One prompt of both outcomes; one all wrong; one whose attempts have no lesson in the other context."""
    rows = [
        attempt(i, r, g) for g, rewards in enumerate([(1, 0, 0), (0, 0, 0), (1, 0, 0)]) for i, r in enumerate(rewards)
    ]
    given = {"good": [3, 1, 2, 1, 1, 1, 0, 5, 5], "bad": [1, 2, 3, 1, 1, 1, np.nan, np.nan, np.nan]}
    monkeypatch.setattr(context_signals, "scores", lambda e, r, lesson, p: np.asarray(given[lesson], float))
    found, prompts = context_signals.context_signals(None, rows, {"good": "good", "bad": "bad"})
    assert prompts == 1
    assert (found["good"]["auc"], found["bad"]["auc"]) == (1.0, 0.0)


def test_no_prompt_is_no_number(monkeypatch):
    rows = [attempt(i, 0.0) for i in range(3)]
    monkeypatch.setattr(context_signals, "scores", lambda *_: np.asarray([1.0, 2.0, 3.0]))
    found, prompts = context_signals.context_signals(None, rows, {"none": None})
    assert prompts == 0 and np.isnan(list(found["none"].values())).all()


def test_what_an_uninformed_teacher_has_is_logged_where_no_prompt_can_be_compared_on(monkeypatch):
    monkeypatch.setattr(context_signals, "scores", lambda *_: np.asarray([1.0, 2.0]))
    (logged, _) = [r.extras for r in context_signals.with_signals(None, [attempt(i, 0.0) for i in range(2)])]
    assert logged["signal/prompts"] == 0.0
    for measure, value in {"spearman": 0.0, "pairwise": 0.5, "auc": 0.5}.items():
        assert {logged[f"signal/{context}/{measure}"] for context in context_signals.peer_contexts()} == {value}


def test_half_a_reward_is_a_success():
    rows = [attempt(0, 0.5), attempt(1, 0.4), attempt(2, 0.4), attempt(3, 0.5)]
    shown = {name: lesson(rows[0], rows)[-1]["content"] for name, lesson in context_signals.peer_contexts().items()}
    assert "answer 3" in shown["1S"] and "answer 3" not in shown["1F"]
    assert any(text in shown["1F"] for text in ("answer 1", "answer 2"))


def test_mopd_logs_what_the_live_model_says():
    """Scores are means of log-probabilities after each context; what is logged is their ranking."""
    method = mopd(group_size=4, diagnose_contexts=True, top_k=None)
    environment = tiny.environment(method, verify=third)
    rollouts, _ = method.collect(environment, list(tiny.TASK.train[:3]), jax.random.key(0), None)
    plain = context_signals.scores(environment, rollouts, lambda r, rows: question(r.example), "live")
    own = [np.mean(r.logprobs) for r in rollouts]
    np.testing.assert_allclose(plain, own, atol=1e-5)  # sampled at temperature 1 after the question
    silent = lambda r, rows: None if r is rollouts[1] else question(r.example)
    some = context_signals.scores(environment, rollouts, silent, "live")
    assert np.isnan(some[1]) and np.array_equal(np.delete(some, 1), np.delete(plain, 1))
    assert np.isnan(context_signals.scores(environment, rollouts[:2], lambda *_: None, "live")).all()
    contexts = context_signals.peer_contexts()
    found, prompts = context_signals.context_signals(environment, rollouts, contexts)
    assert prompts > 0
    logged = {name for name in rollouts[0].extras if name.startswith("signal/")}
    assert logged == {"signal/prompts"} | {f"signal/{c}/{m}" for c in contexts for m in context_signals.MEASURES}
    assert rollouts[0].extras["signal/prompts"] == prompts
    assert rollouts[-1].extras["signal/2S+1F/auc"] == found["2S+1F"]["auc"]
    batch = tiny.collected(method, rollouts)
    sig = {
        "divergence": batch.behavior_logprobs,
        "logprobs": batch.behavior_logprobs,
        "entropy": batch.behavior_logprobs,
    }
    terms = tiny.reduced(method.objectives[0], batch, sig)[1]
    assert float(terms["signal/1F/spearman"]) == pytest.approx(found["1F"]["spearman"], abs=1e-6)
    assert "signal/prompts" not in mopd().objectives[0].terms(batch, sig, 0)


# ---- analyses -------------------------------------------------------------------------------------------------------


def test_the_teacher_reads_its_analysis_after_its_lesson():
    method = opsd(group_size=2, reason_first=4)
    environment = tiny.environment(method)
    asked = []
    teacher = environment.policies["teacher"]

    def writer(policy, encoded, key, *, n, sampling, limit):
        assert (n, limit, sampling.temperature) == (1, 4, 0.0)
        asked.extend(encoded)
        return [[tiny_sample(i)] for i, _ in enumerate(encoded)]

    policies = {**environment.policies, "teacher": dataclasses.replace(teacher, writer=writer)}
    examples = list(tiny.TASK.train[:2])
    found, _ = method.collect(environment._replace(policies=policies), examples, jax.random.key(0), None)
    assert len(asked) == 2  # one per problem, not per attempt
    for r in found:
        text = r.contexts["teacher"][-1]["content"]
        before = with_reference(question(r.example), r.example.solution)[-1]["content"]
        assert text.startswith(before) and text.endswith(TRANSITION) and f"analysis {r.group}" in text
        assert r.contexts["student"] == question(r.example)
    plain = opsd(group_size=2).collect(environment, examples, jax.random.key(0), None)[0]
    assert [r.tokens for r in plain] == [r.tokens for r in found]


def tiny_sample(number):
    return Sample((1,), (0.0,), f"analysis {number}", True)


def test_an_analysis_is_privileged_like_the_solution():
    chat = with_reference(({"role": "user", "content": "1+1?"},), "It is 2.")
    read = analysed(chat, "Simple.")
    told = read[-1]["privileged"]
    assert told.startswith("It is 2.") and told.endswith("Simple.") and told in read[-1]["content"]
    assert read[-1]["question"] == "1+1?" and REQUEST not in read[-1]["content"]


def test_a_row_without_a_lesson_has_no_analysis():
    method = opsd(group_size=1, reason_first=4, lesson=lambda r, rows: None)
    found, _ = method.collect(tiny.environment(method), list(tiny.TASK.train[:2]), jax.random.key(0), None)
    assert [r.contexts["teacher"] for r in found] == [None, None]
