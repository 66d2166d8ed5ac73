"""Who writes, who reads and who is asked, with which context, key and sampling: policies that all differ, and a spy."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
import spies
import tiny
from networks import unoptimised

from sdjax.cli import options
from sdjax.collect.annotators import Span, request
from sdjax.collect.contexts import question, with_solution
from sdjax.collect.critiques import critique_request
from sdjax.collect.lessons import before_writing
from sdjax.engine.generate import GREEDY, Sampling
from sdjax.engine.score import token_signals
from sdjax.engine.tokens import Shapes
from sdjax.kernels.reductions import reduce_terms
from sdjax.methods import tessy as tessy_module
from sdjax.methods.antisd import antisd
from sdjax.methods.brts import brts
from sdjax.methods.gkd import gkd
from sdjax.methods.minillm import minillm
from sdjax.methods.mixsd import mixsd
from sdjax.methods.op2sd import op2sd
from sdjax.methods.pbsd import pbsd
from sdjax.methods.rlrt import rlrt
from sdjax.methods.sdft import sdft
from sdjax.methods.trace import trace
from sdjax.methods.vpd import vpd
from sdjax.types import STUDENT, TEACHER, Verdict, View

EXAMPLES = tiny.TASK.train[:2]
ROOMY = Shapes(context=512, completion=8, rows=16, tokens_per_chunk=None)
FOUR = {"n": 4, "sampling": Sampling(temperature=1.0)}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    yield from unoptimised()


# ---- every method -----------------------------------------------------------------------------------------------------


def having(*names):
    """The methods that have all these options, by name."""
    factories = {name: options.method_factory(name) for name in options.method_names()}
    return {n: f for n, f in factories.items() if {*names} <= inspect.signature(f).parameters.keys()}


DRAWN = {"temperature": 0.8, "top_p": 0.9, "top_k": 7}
FILTERED = ("dash", "egrsd", "mixsd", "op2sd", "opsd", "pw_opsd", "tessy")
"""Methods whose `top_k` is that of sampling; elsewhere it is a divergence's."""
COUNTED = ("group_size", "pairs", "tagger_rollouts")
BY = {"minillm": ("live", "teacher"), "mixsd": ("initial", "initial"), "pbsd": "teacher", "tessy": "initial"}
"""Who writes first, where it is not the student."""


@pytest.mark.parametrize("name", having("temperature"))
def test_texts_are_drawn_as_told(name, monkeypatch):
    """By whom, after which chats, how many and with which filters."""
    factory = options.method_factory(name)
    there = inspect.signature(factory).parameters.keys()
    filters = {o: v for o, v in DRAWN.items() if o in there and (o != "top_k" or name in FILTERED)}
    counted = dict.fromkeys({*COUNTED} & there, 3)
    method = factory(**filters, **counted, **({"lmbda": 1.0} if name == "gkd" else {}))
    first = spies.first_sampled(monkeypatch, spies.distinct(method), method, EXAMPLES)
    assert first.who == BY.get(name, "live") and first.sampling == Sampling(**filters)
    assert first.n == (3 if counted else 1)
    if name not in ("mixsd", "pbsd"):
        assert first.chats == tuple(map(question, EXAMPLES))


def alone(rollout, rollouts):
    """A lesson made of the attempt and of how many there are; none for the second prompt."""
    if rollout.group:
        return None
    asked = question(rollout.example)
    return with_solution(asked, f"{rollout.text} {len(rollouts)}")


BEFORE = ("minillm", "mixsd", "pbsd", "tessy")
"""Their lesson is asked for before anything is written: below."""
STUDENTS = {"gkd": {"lmbda": 1.0}, "vpd": {"every": 0}, "brts": {"coef": 0.0}, "stable_opd": {"gold_coef": 0.0}}
PLAINLY = {"temperature": 1.0, "top_p": 1.0, "group_size": 2}


@pytest.mark.parametrize("name", [n for n in having("lesson") if n not in BEFORE])
def test_a_teacher_reads_the_lesson_it_was_given(name):
    """Of the very attempt and of its whole batch; each attempt its own."""
    factory = options.method_factory(name)
    there = inspect.signature(factory).parameters.keys()
    plainly = {o: v for o, v in PLAINLY.items() if o in there} | ({"top_k": 0} if name in FILTERED else {})
    method = factory(lesson=alone, **plainly, **STUDENTS.get(name, {}))
    rows, _ = method.collect(spies.distinct(method), EXAMPLES, jax.random.key(0), method.memory)
    view = {"purified_opsd": "informed"}.get(name, "teacher")
    assert [r.contexts[view] for r in rows] == [alone(r, rows) for r in rows]
    assert [r.contexts[view] is None for r in rows] == [r.group == 1 for r in rows]
    readers = [o.views[view] for o in method.objectives if view in o.views]
    # BRTS has one attempt per prompt, and what scores before the update is no view of it.
    assert all(v.told and (v.per_rollout or name == "brts") for v in readers)
    assert readers or method.early[view] == View(per_rollout=True, told=True)


def test_what_is_scored_before_the_update():
    """The text's own log-probabilities, the informed ones, and their difference: another method's on the same texts."""
    found = {}
    for factory, how in ((rlrt, {"success": 1.0}), (antisd, {"warmup": 0})):
        method = factory(lesson=alone, group_size=2, **how)
        right = spies.distinct(method, verify=lambda example, text: Verdict(1.0))
        found[factory], _ = method.collect(right, EXAMPLES, jax.random.key(0), method.memory)
    for one, other in zip(found[rlrt], found[antisd], strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.extras["old_logprobs"], one.logprobs, atol=1e-4)
        heard = one.contexts["teacher"] is not None
        assert other.extras["gate"] == float(heard) and one.extras["credited"] == heard
        if heard:
            gap = one.extras["old_teacher"] - one.extras["old_logprobs"]
            assert np.abs(gap).max() > 1e-3
            np.testing.assert_allclose(other.extras["log_ratio"], gap, atol=1e-4)


@pytest.mark.parametrize("name", having("teacher"))
def test_who_teaches(name):
    """The policy that is named; else the initial one if it is told a lesson, else the external one; and no other snapshot."""
    factory = options.method_factory(name)
    cases = [
        ({}, "teacher"),
        ({"lesson": alone}, "initial"),
        ({"teacher": "live"}, "live"),
        ({"teacher": "other"}, "other"),
    ]
    for how, who in [*cases, ({"teacher": "other", "lesson": alone}, "other")]:
        method = factory(**how)
        views = method.objectives[-1].views
        if "teacher" in views:
            assert views["teacher"].policy == who and views["teacher"].told is ("lesson" in how)
        else:
            assert method.writers == (who,)
        kept = {"initial"} if name in ("stable_opd", "tessy") or who == "initial" else set()
        assert set(method.snapshots) == kept


# ---- before anything is written ---------------------------------------------------------------------------------------


def told(rollout, rollouts):
    """A lesson before anything is written; of a text that is written, another one: nobody may mistake them."""
    solution = rollout.example.solution
    if solution is None:
        return None
    return with_solution(question(rollout.example), f"{solution} {solution}" if rollout.tokens else solution)


def before(example):
    return with_solution(question(example), example.solution)


def test_a_lesson_before_anything_is_written():
    assert before_writing(None)(EXAMPLES[0]) == question(EXAMPLES[0])
    assert before_writing(told)(EXAMPLES[0]) == before(EXAMPLES[0]) != question(EXAMPLES[0])
    assert before_writing(told)(dataclasses.replace(EXAMPLES[0], solution=None)) is None


WRITERS = {
    "sdft": (lambda **how: sdft(from_teacher=True, group_size=4, **how), "teacher"),
    "sdft live": (lambda **how: sdft(from_teacher=True, group_size=4, ema_rate=1.0, **how), "live"),
    "gkd": (lambda **how: gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0, **how), "initial"),
    "gkd live": (
        lambda **how: gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0, teacher="live", **how),
        "live",
    ),
    "pbsd": (lambda **how: pbsd(pairs=4, **how), "teacher"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_teacher_that_writes_has_read_its_lesson(name, monkeypatch):
    """The lesson comes before the text, and the same chat is read again when the text is scored."""
    factory, who = WRITERS[name]
    method = factory(lesson=told)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    silent = dataclasses.replace(EXAMPLES[1], solution=None)
    rows, _ = method.collect(environment, [*EXAMPLES, silent], jax.random.key(0), None)
    chats = tuple(before(e) for e in EXAMPLES)
    assert (sampled[0].who, sampled[0].chats, sampled[0].n, sampled[0].sampling) == (who, chats, *FOUR.values())
    assert all(r.contexts == {"student": question(r.example), "teacher": before(r.example)} for r in rows)
    assert {r.example.id for r in rows} == {e.id for e in EXAMPLES} and silent not in [r.example for r in rows]
    if name != "pbsd":
        assert len(sampled) == 1 and [r.source for r in rows] == [TEACHER] * 8
        return
    own = sampled[1]
    assert (own.who, own.chats, own.n, own.sampling) == ("live", tuple(map(question, EXAMPLES)), *FOUR.values())
    assert own.key != sampled[0].key
    assert [(r.source, r.extras["pair"]) for r in rows] == [(s, i) for s in (TEACHER, STUDENT) for i in range(8)]


def test_a_teacher_without_a_lesson_writes_after_the_question(monkeypatch):
    method = gkd(seq_kd=True, lmbda=0.0, group_size=4, temperature=1.0)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), None)
    assert [(s.who, s.chats) for s in sampled] == [("teacher", tuple(map(question, EXAMPLES)))]
    assert all(r.contexts["teacher"] == r.contexts["student"] == question(r.example) for r in rows)


def test_a_teacher_that_helps_to_write_has_read_its_lesson(monkeypatch):
    method = minillm(lesson=told, group_size=4)
    environment = spies.distinct(method)
    sampled, scored = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), None)
    ((who, chats, *_),) = sampled
    assert who == ("live", "initial") and chats == (tuple(map(question, EXAMPLES)), tuple(map(before, EXAMPLES)))
    assert [(s.views, s.who) for s in scored] == [({"student": "live", "teacher": "initial"}, {"live", "initial"})]
    assert all(r.contexts["teacher"] == before(r.example) for r in rows)

    method = mixsd(lesson=told)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    method.collect(environment, EXAMPLES, jax.random.key(0), {})
    assert {s.who for s in sampled} == {("initial", "initial")}
    assert sampled[0].chats == (tuple(map(question, EXAMPLES)), tuple(map(before, EXAMPLES)))


def drawn_from(call):
    """The keys of all texts that one call of `sample` writes, and of their groups."""
    key = jax.random.wrap_key_data(np.asarray(call.key, np.uint32))
    groups = [jax.random.fold_in(key, i) for i in range(len(call.chats))]
    return {spies.key_of(k) for g in groups for k in (g, *(jax.random.fold_in(g, j) for j in range(call.n)))}


def test_brts_who_writes_and_reads(monkeypatch):
    """The student once, the teacher its candidates, half of them perturbed, and once more with the answer."""
    method = brts(candidates=4, perturb=True, lesson=told)
    environment = spies.distinct(method, verify=lambda example, text: Verdict(0.0), shapes=ROOMY)
    sampled, scored = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), None)
    assert [(s.who, s.n, s.sampling.temperature) for s in sampled] == [
        ("live", 1, 1.0), ("initial", 2, 0.7), ("initial", 2, 0.7), ("initial", 1, 0.7)
    ]  # fmt: skip
    assert [(s.views, s.who) for s in scored] == [({"student": "live"}, {"live"})]
    own = [r for r in rows if r.source == STUDENT]
    lessons = [told(r, own) for r in own]
    assert sampled[0].chats == tuple(map(question, EXAMPLES)) and list(sampled[1].chats) == lessons
    for chats, said in ((sampled[2].chats, "rethink"), (sampled[3].chats[:2], EXAMPLES[0].answer)):
        assert all(chat != lesson for chat, lesson in zip(chats, lessons, strict=True)) and said in str(chats).lower()
    assert all(r.contexts["teacher"] == lessons[r.group] for r in rows) and len(rows) == 4
    keys = [drawn_from(call) for call in sampled]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_brts_keeps_no_text_of_the_teacher_for_a_prompt_without_a_lesson():
    half = lambda rollout, rollouts: told(rollout, rollouts) if rollout.group == 1 else None
    method = brts(candidates=2, lesson=half)
    rows, _ = method.collect(spies.distinct(method, shapes=ROOMY), EXAMPLES, jax.random.key(0), None)
    assert [(r.source, r.group) for r in rows] == [(STUDENT, 0), (STUDENT, 1), (TEACHER, 1)]
    assert [r.contexts["teacher"] is None for r in rows] == [True, False, False]


def test_op2sd_chooses_problems_by_a_key_of_its_own(monkeypatch):
    chosen, method = [], op2sd(group_size=4)
    environment = spies.distinct(method)
    sampled, _ = spies.watch(monkeypatch, environment)
    draw = jax.random.randint
    monkeypatch.setattr(jax.random, "randint", lambda key, *rest: chosen.append(spies.key_of(key)) or draw(key, *rest))
    method.collect(environment, EXAMPLES, jax.random.key(0), method.memory)
    assert chosen and not drawn_from(sampled[0]) & {*chosen}


# ---- TESSY ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "bodies"), [("teacher", ("initial", "teacher")), ("live", ("initial", "initial"))])
def test_tessys_taggers_begin_with_parameters_that_stay(teacher, bodies, monkeypatch):
    """The author's, a live teacher's with the initial ones; each is trained once for the same snippets."""
    trained = []
    monkeypatch.setattr(
        tessy_module, "fit_tagger", lambda policy, texts, marks: trained.append((policy, texts)) or policy
    )
    monkeypatch.setattr(tessy_module, "boundary", lambda tagger, other, **rules: (tagger, other, rules))
    policies = {name: f"the {name}" for name in ("live", "initial", "teacher")}
    environment, known = tiny.environment()._replace(policies=policies), {}
    marks = {"student": [["one", []]], "teacher": [["two", []]]}
    for _ in range(2):
        found = tessy_module.fitted(environment, teacher, marks, known, {"word": "drop"})
        own, other = (f"the {body}" for body in bodies)
        assert found == {"student": (own, 0, {"word": "drop"}), "teacher": (other, 1, {"word": "drop"})}
    assert trained == [(own, ["one"]), (other, ["two"])]


# ---- TRACE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotator", ["teacher", "live", "initial"])
def test_trace_asks_its_annotator_about_the_rows_it_can_distil(annotator, monkeypatch):
    """Those whose branch has a weight, with the verdict and never the log-probabilities; only while the schedule lasts."""
    method = trace(group_size=4, temperature=1.0, annotator=annotator)
    environment = spies.distinct(method)
    assert set(method.snapshots) == {"renewed", *({"initial"} & {annotator})} and method.writers == (annotator,)
    assert method.objectives[0].views["teacher"].policy == "renewed" and trace().writers == ()
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, memory = method.collect(environment, EXAMPLES, jax.random.key(0), 39)
    right = [r for r in rows if r.reward >= 0.5]
    assert 0 < len(right) < len(rows) and memory == 40
    attempts, asked = sampled
    assert (attempts.who, attempts.n, attempts.sampling) == ("live", *FOUR.values())
    assert asked.who == annotator and asked.sampling == GREEDY and asked.key != attempts.key
    requests = [request(r) for r in right]
    assert list(asked.chats[: len(right)]) == requests and all(chat in requests for chat in asked.chats)
    # No key of an attempt is drawn from again.
    assert asked.key not in {spies.key_of(jax.random.fold_in(jax.random.key(0), i)) for i in range(len(EXAMPLES))}
    method.collect(environment, EXAMPLES, jax.random.key(0), 40)
    assert len(sampled) == 3


@pytest.mark.parametrize("mask", ["random", "inverted", "all"])
def test_trace_marks_as_many_tokens_as_its_control_says(mask):
    """A quarter of every row that an annotator marked, its last half; or all of it."""

    def annotate(environment, rollouts, key):
        return [[Span(len(r.text) // 2, len(r.text), "step")] for r in rollouts]

    method = trace(group_size=4, temperature=1.0, annotate=annotate, mask=mask, active_only=False, most=0.25)
    rows, _ = method.collect(spies.distinct(method), EXAMPLES, jax.random.key(0), 0)
    marked = [int(r.extras["span"].sum()) for r in rows if r.text]
    lengths = [len(r.tokens) for r in rows if r.text]
    assert max(lengths) >= 4 and marked == [n if mask == "all" else int(0.25 * n) for n in lengths]


def test_trace_asks_about_wrong_rows_where_they_are_distilled(monkeypatch):
    seen = []

    def annotate(environment, rollouts, key):
        seen.append({r.reward >= 0.5 for r in rollouts})
        return [[Span(0, len(r.text), " "), Span(0, 1, "sign")][: 1 + i % 2] for i, r in enumerate(rollouts)]

    for chosen in ({"error_weight": 1.0}, {"error_weight": 1.0, "key_weight": 0.0}, {"active_only": False}, {}):
        method = trace(group_size=4, temperature=1.0, annotate=annotate, **chosen)
        rows, _ = method.collect(spies.distinct(method), EXAMPLES, jax.random.key(0), 0)
        # A span without a kind is none: nothing could be told about it.
        for r in rows:
            assert r.extras["span"].any() == (r.contexts["teacher"] is not None)
    assert seen == [{True, False}, {False}, {True, False}, {True}]


# ---- VPD ------------------------------------------------------------------------------------------------------------


def never(example, text):
    return Verdict(0.0)


def mostly(example, text):
    """Right, but for answers of an odd length to the first two examples."""
    return Verdict(float(example not in EXAMPLES or len(text) % 2 == 0))


def test_vpd_criticises_failures_of_groups_without_a_success(monkeypatch):
    """The groups in which nothing else says anything; a peer's success needs a success."""
    method = vpd(feedback="critique", group_size=4, every=0)
    environment = spies.distinct(method, verify=never, shapes=ROOMY)
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(0), method.memory)
    attempts, critiques = sampled
    assert (attempts.who, critiques.who) == ("live", "live")
    assert list(critiques.chats) == [critique_request(r) for r in rows]
    assert all(r.example.answer in chat[-1]["content"] for r, chat in zip(rows, critiques.chats, strict=True))
    heard = [r for r in rows if r.contexts["teacher"] is not None]
    assert len(heard) >= 6 and all(
        "feedback from your unsuccessful" in r.contexts["teacher"][-1]["content"] for r in heard
    )
    assert all(r.contexts["student"] == question(r.example) for r in rows)
    alone = vpd(feedback="sibling", group_size=4, every=0)
    rows, _ = alone.collect(environment, EXAMPLES, jax.random.key(0), alone.memory)
    assert [r.contexts["teacher"] for r in rows] == [None] * 8


def test_vpd_draws_critiques_from_keys_of_their_own(monkeypatch):
    """Critique `i` and attempt `(i, 0)` once drew the same uniforms; the attempts are still SDPO's."""
    method, plain = vpd(feedback="critique", group_size=4, every=0), vpd(group_size=4, every=0)
    environment = spies.distinct(method, verify=never, shapes=ROOMY)
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, EXAMPLES, jax.random.key(3), method.memory)
    drawn = [jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), j) for i in range(2) for j in range(4)]
    said = jax.random.wrap_key_data(np.asarray(sampled[1].key, np.uint32))
    critiques = [jax.random.fold_in(jax.random.fold_in(said, i), 0) for i in range(8)]
    assert not {*map(spies.key_of, drawn)} & {*map(spies.key_of, critiques)}
    again, _ = plain.collect(environment, EXAMPLES, jax.random.key(3), plain.memory)
    assert [r.tokens for r in again] == [r.tokens for r in rows]


def test_vpd_pays_for_few_critiques_where_few_attempts_fail(monkeypatch):
    method = vpd(feedback="critique", group_size=4, every=0)
    environment = spies.distinct(method, verify=mostly, shapes=ROOMY)
    sampled, _ = spies.watch(monkeypatch, environment)
    rows, _ = method.collect(environment, tiny.TASK.train[:4], jax.random.key(0), method.memory)
    wrong = [r for r in rows if r.reward < 0.5]
    assert 0 < len(wrong) <= 8 < len(rows) and len(sampled[1].chats) == 8
    assert list(sampled[1].chats[: len(wrong)]) == [critique_request(r) for r in wrong]


@pytest.mark.parametrize("prior", ["current", "initial"])
def test_vpd_scores_its_midpoint_by_the_present_parameters(prior, monkeypatch):
    """Only where an E-step is due; the implicit rewards are those that the E-step itself will see first."""
    method = vpd(group_size=4, every=2, prior=prior, beta=0.5, ema_rate=0.1)
    environment = spies.distinct(method)
    _, scored = spies.watch(monkeypatch, environment)
    rows, memory = method.collect(environment, EXAMPLES, jax.random.key(1), method.memory)
    readers = {"teacher": "live", **({"prior": "initial"} if prior == "initial" else {})}
    assert [(s.views, s.who) for s in scored] == [(readers, frozenset(readers.values()))]
    assert memory["batches"] == 1 and memory["midpoint"] == rows[0].extras["midpoint"] != 0.0
    batch = tiny.collected(method, rows)
    sig = token_signals(
        method.objectives[0].views, method.objectives[0].signals, *others_of(environment), batch, rows=None, tokens=None
    )
    # With midpoint and weights of this batch alone, all is as if they were taken from what the E-step sees.
    terms = method.objectives[0].terms(batch, sig, 0)
    reference = batch.behavior_logprobs if prior == "current" else sig["prior_logprobs"]
    over = batch.mask & (batch.valid & batch.contexts["teacher"].valid)[:, None]
    implicit = 0.5 * np.where(over, sig["teacher_logprobs"] - reference, 0.0).sum(-1)
    heard, right = np.asarray(over).any(-1), np.asarray(batch.reward) >= 0.5
    means = [implicit[heard & c].mean() for c in (right, ~right)]
    np.testing.assert_allclose(memory["midpoint"], np.mean(means), rtol=1e-4)
    margin = reduced(terms["margin"], batch)
    np.testing.assert_allclose(margin, means[0] - means[1], rtol=1e-4)
    later, memory = method.collect(environment, EXAMPLES, jax.random.key(1), memory)
    assert len(scored) == 1 and memory["batches"] == 2 and {r.extras["class_weight"] for r in later} == {0.0}


def others_of(environment):
    """Networks and parameters by policy name."""
    return (
        {n: p.model for n, p in environment.policies.items()},
        {n: p.params for n, p in environment.policies.items()},
    )


def reduced(term, batch):
    """A term's mean."""
    return float(reduce_terms({"x": term}, batch.mask & batch.valid[:, None])[1]["x"])
