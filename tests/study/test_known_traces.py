"""What the study's scripts read off answers, on traces written by hand whose numbers are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study_files
import tiny

from sdjax.collect import rollouts
from sdjax.collect.contexts import question, with_solution
from sdjax.engine.generate import GREEDY, first
from sdjax.engine.policies import Sample
from sdjax.study import arms, testbed
from sdjax.tasks import scratchpad
from sdjax.tasks.words import word_tokenizer
from sdjax.types import Rollout, Verdict

PROBLEM = scratchpad.example(scratchpad.Problem(37, (("*", 4), ("+", 58)), 2), "in_domain")
CARE = "7 * 4 = 2 8 , 3 * 4 = 1 2 + 2 = 1 4 , so"
REPAIRED = f"<think> 3 7 ; a * 4 = 5 8 wait {CARE} 4 8 ; b + 5 8 = 0 6 ; </think> a 4 8 ; answer 0 6"
UNNOTICED = "<think> 3 7 ; a * 4 = 5 8 ; b + 5 8 = 1 6 ; </think> a 5 8 ; answer 1 6"
DOUBTED = f"<think> 3 7 ; a * 4 = 4 8 hmm {CARE} 4 8 ; b + 5 8 = 0 7 ; </think> a 4 8 ; answer 0 7"


load = functools.partial(study_files.load, "degrade")


def sample(text, tokens=1, finished=True):
    return Sample((1,) * tokens, (0.0,) * tokens, text, finished)


# ---- hedging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPAIRED, [(10, False), (41, True)]),
        (UNNOTICED, [(10, False), (18, True)]),  # the second step is right about a wrong first
        (DOUBTED, [(10, True), (41, False)]),
        (scratchpad.solution(scratchpad.Problem(37, (("*", 4), ("+", 58)), 2)), [(10, True), (18, True)]),
        ("<think> 3 7 ; a * 4 = 4 8", []),  # nothing follows the result
        ("<think> 3 7 ; a * 4 = 4 ; b + 5 8 = 0 6 ;", []),  # not two digits
        ("<think> 3 7 ; a * wait = 4 8 ;", []),
        ("<think> 3 7 ; </think> a * 4 = 4 8 ;", []),  # the answer is not thinking
        ("<think> 3 7 ; a * 4 = 5 8 wait 7 * 4", [(10, False)]),
    ],
)
def test_first_results_of_a_trace(text, expected):
    """What stands after each step's first result, and whether this is right about what came before."""
    assert load("hedging").first_results(text.split(), 37, 2) == expected


def test_chances_of_hedges_by_the_result_before_them():
    hedging, tokenizer = load("hedging"), word_tokenizer(testbed.words())
    rows = []
    for text, factor in ((REPAIRED, 0.01), (UNNOTICED, 0.02)):
        tokens = tuple(tokenizer.convert_tokens_to_ids(text.split()))
        row = Rollout(PROBLEM, tokens, (0.0,) * len(tokens), text, 0)
        rows.append(row.with_extras(hedge=factor * np.arange(len(tokens))))
    found = hedging.by_result(rows, tokenizer)
    assert found == pytest.approx({"right": (0.41 + 0.36) / 2, "wrong": (0.10 + 0.20) / 2, "share wrong": 0.5})
    assert hedging.by_result(rows[1:], tokenizer) == pytest.approx({"right": 0.36, "wrong": 0.2, "share wrong": 0.5})
    begun = Rollout(PROBLEM, rows[0].tokens[:20], (0.0,) * 20, "", 0).with_extras(hedge=np.full(20, 0.5))
    found = hedging.by_result([*rows, begun], tokenizer)
    assert found == pytest.approx({"right": 0.385, "wrong": 0.8 / 3, "share wrong": 0.6})
    assert hedging.by_result([], tokenizer) == {"right": 0.0, "wrong": 0.0, "share wrong": 0.0}


# ---- answers ------------------------------------------------------------------------------------------------------------


def test_behaviour_of_given_answers(monkeypatch):
    """Four answers of 2, 4, 6 and 8 tokens, of which the first and the third are right."""
    texts = [("wait , maybe", 2, True), ("no", 4, True), ("check", 6, False), ("so", 8, True)]
    written = [sample(*some) for some in texts]
    monkeypatch.setattr(arms.policies, "sample", lambda *_, **__: [written[:2], written[2:]])
    rewards = dict(zip((text for text, *_ in texts), (1.0, 0.4, 0.5, 0.0), strict=True))
    verify = lambda example, text: Verdict(rewards[text])
    found = arms.behaviour(tiny.policy(), tiny.TASK.test[:2], verify, jax.random.key(0), n=2)
    caps = {f"accuracy@{n}": share for n, share in enumerate([0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5], 1)}
    counts = {"accuracy": 0.5, "length": 5.0, "epistemic": 0.75, "density": 150.0, "finished": 0.75, "answers": 4}
    assert found == {**counts, **caps}
    assert arms.flat({"step": 3, "in_domain": {"length": 9}, "moved": 0.5}) == {"length_in_domain": 9, "moved": 0.5}


def test_the_first_correct_answer(monkeypatch):
    written = [[UNNOTICED, REPAIRED, PROBLEM.solution], [UNNOTICED, DOUBTED, UNNOTICED]]
    monkeypatch.setattr(testbed, "sample", lambda *_, n: [[sample(text) for text in some[:n]] for some in written])
    assert testbed.first_correct(None, [PROBLEM] * 2, None, 3) == [(2, REPAIRED), (0, UNNOTICED)]
    assert testbed.first_correct(None, [PROBLEM] * 2, None, 1) == [(0, UNNOTICED)] * 2


def given(monkeypatch, module, calls):
    """What `first_correct` says, call by call; returns what was asked: the examples' ids and contexts."""
    asked, calls = [], iter(calls)

    def first_correct(policy, examples, key, n, context=question):
        asked.append(([e.id for e in examples], [context(e)[-1]["content"] for e in examples]))
        return next(calls)

    monkeypatch.setattr(module.testbed, "first_correct", first_correct)
    return asked


def test_richness_is_of_problems_that_are_solved_sometimes(monkeypatch):
    """Of eight samples one to six are right; every level says what its name says."""
    richness, read = load("richness"), {}
    again = "<think> 3 7 ; </think> again"
    first_try = [(good, f"<think> thought {good} </think> steps {good}") for good in (0, 1, 6, 7, 8)]
    asked = given(monkeypatch, richness, [first_try, [(1, again), (0, again)]])
    examples = []

    def behaviour(policy, some, verify, key, *, n, context):
        examples[:] = some
        contents = [context(e)[-1]["content"] for e in some]
        read[len(read)] = contents
        return {"level": len(read)}

    monkeypatch.setattr(richness, "behaviour", behaviour)
    found = richness.sweep(None, problems=5, samples=8, seed=0)
    assert found == {"kept": 2, **{level: {"level": i} for i, level in enumerate(richness.LEVELS, 1)}}
    (ids, _), (kept, told) = asked
    assert kept == [ids[1], ids[2]] == [e.id for e in examples]
    plain = [question(e)[-1]["content"] for e in examples]
    shown = lambda texts: [with_solution(question(e), t)[-1]["content"] for e, t in zip(examples, texts, strict=True)]
    assert read[0] == plain
    assert read[1] == shown([testbed.answer_only(e) for e in examples])
    assert read[2] == shown(["steps 1", "steps 6"])
    assert read[3] == shown([again] * 2)
    assert read[4] == told == shown([first_try[1][1], first_try[2][1]])


def test_traces_of_both_kinds_are_of_the_same_problems(monkeypatch):
    off_policy = load("off_policy")
    monkeypatch.setattr(off_policy.testbed, "policy_of", lambda base: base)
    asked = given(monkeypatch, off_policy, [[(1, "u0"), (0, "bad"), (2, "u2")], [(1, "g0"), (0, "bad")]])
    found = off_policy.traces(None, train_size=3, samples=2, seed=0, only_correct=True)
    (ids, alone), (guided, told) = asked
    assert guided == [ids[0], ids[2]]
    assert found == {"unguided": {ids[0]: "u0"}, "guided": {ids[0]: "g0"}}
    assert "u0" in told[0] and "u2" in told[1] and told[0].startswith(alone[0])


def test_every_way_of_decoding_is_what_it_is_called(monkeypatch):
    module = load("testbed")
    asked = []

    def behaviour(policy, examples, verify, key, *, context=question, choose=first, sampling=None):
        asked.append((examples[0], context(examples[0])[-1]["content"], choose, sampling))
        return len(asked)

    monkeypatch.setattr(module, "behaviour", behaviour)
    tokenizer = word_tokenizer(testbed.words())
    policy = module.Policy(tiny.model(), tiny.pretrained().params, tokenizer, tiny.SHAPES)
    found = module.facts(policy, 1, 0, scratchpad.FAMILIES[:2])
    ways = ("none", "answer", "steps", "full solution", "none, hedges forbidden", "none, greedy")
    names = [family.name for family in scratchpad.FAMILIES[:2]]
    assert found == {way: {name: 6 * j + i + 1 for j, name in enumerate(names)} for i, way in enumerate(ways)}
    (example, *_), *_ = asked
    plain, answer, steps, full, forbidden, greedy = (text for _, text, *_ in asked[:6])
    assert plain == forbidden == greedy == question(example)[-1]["content"]
    assert example.solution in full and "<think>" not in steps and example.answer in answer
    assert len(plain) < len(answer) < len(steps) < len(full)
    assert [how for *_, how in asked[:6]] == [None] * 5 + [GREEDY]
    logits = asked[4][2]([jnp.zeros((1, len(tokenizer)))], None)[0]
    hedges = tokenizer.convert_tokens_to_ids(list(scratchpad.HEDGES))
    assert sorted(np.flatnonzero(np.asarray(logits) < 0).tolist()) == sorted(hedges)


def test_how_far_a_model_moved_is_a_mean_over_tokens():
    """Rows of other lengths whose samplers said `a` and `b` nats more of every token than the policy does."""
    module, policy = load("real_model"), tiny.policy()
    written = rollouts.sample(policy, list(tiny.TASK.train[:4]), jax.random.key(0))
    read = [r.read_by(student=question(r.example)) for r in written]
    assert module.moved(policy, read) == pytest.approx(0.0, abs=1e-5)
    sizes, far = np.asarray([len(r.tokens) for r in read]), np.asarray([0.5, 0.25, -1.0, 2.0])
    assert len(set(sizes)) > 1
    other = [
        module.dataclasses.replace(r, logprobs=tuple(x + more for x in r.logprobs))
        for r, more in zip(read, far, strict=True)
    ]
    assert module.moved(policy, other) == pytest.approx((sizes * far).sum() / sizes.sum(), abs=1e-5)


# ---- cells of tables ------------------------------------------------------------------------------------------------------


def of(accuracy, length, epistemic, density=0.0):
    return {"accuracy": accuracy, "answers": 96, "length": length, "epistemic": epistemic, "density": density}


BEFORE = [{"step": 0, "in_domain": of(0.25, 30.0, 1.0), "more_steps": of(0.125, 50.0, 3.0)}]
AFTER = [{"step": 9, "in_domain": of(0.5, 40.5, 1.5, 7.0), "more_steps": of(0.0, 60.0, 2.5)}]


def means(cells):
    """Cells without their intervals."""
    return {column: cell.split(" +- ")[0] for column, cell in cells.items()}


def test_cells_say_what_their_columns_are_called():
    fares = {"in domain, %": "50.0", "more steps, %": "0.0", "length": "40.5", "E(y)": "1.5", "E(y), more steps": "2.5"}
    assert means(testbed.fares(AFTER)) == fares
    without = [{"step": 9, "in_domain": AFTER[0]["in_domain"]}]
    assert "E(y), more steps" not in testbed.fares(without)
    behaves = {"accuracy, %": "50.0", "length": "40.5", "E(y)": "1.5", "E(y) per 1,000 tokens": "7.0"}
    assert means(testbed.behaves(AFTER, "in_domain")) == behaves
    differs = {"in domain, points": "+25.0", "more steps, points": "-12.5", "length": "+10.5"}
    assert means(testbed.differs(AFTER, BEFORE)) == differs


def test_cells_of_the_remedies(monkeypatch):
    """Sixteen answers to one problem are one answer of an interval."""
    remedies = load("remedies")
    before, after = ([{**some[0], "pass@1": p, "pass@4": 0.75}] for some, p in ((BEFORE, 0.25), (AFTER, 0.5)))
    found = remedies.cells(after, repeated=48)
    assert found["pass@1, %"] == "50.0 +- 13.6"  # Wilson's of 24 of 48
    assert means(found) == {"seeds": "1", **means(testbed.fares(AFTER)), "pass@1, %": "50.0", "pass@4, %": "75.0"}
    moved = {**means(testbed.differs(AFTER, BEFORE)), "pass@1, points": "+25.0"}
    assert means(remedies.against(after, before)) == moved
    tried = []

    def pass_at_k(policy, problems, verify, key, *, n, ks):
        tried.append((list(problems), n, ks))
        return {1: 0.5, 4: 0.75}

    monkeypatch.setattr(remedies, "pass_at_k", pass_at_k)
    monkeypatch.setattr(remedies.testbed, "everywhere", lambda policy, problems, key: dict(AFTER[0]))
    problems = {"in_domain": "abcd", "more_steps": "wxyz"}
    found = remedies.probed(None, problems, samples=16, some=3, key=jax.random.key(0))
    assert found == {**AFTER[0], "pass@1": 0.5, "pass@4": 0.75} and tried == [(["a", "b", "c"], 16, (1, 2, 4, 8, 16))]


def test_cells_of_the_real_model():
    module = load("real_model")
    result = lambda sums, words, far: [{"step": 9, "sums": of(*sums, 0), "words": of(*words, 0), "moved": far}]
    before, after = result((0.25, 20.0), (0.5, 80.0), 0.0), result((0.75, 12.0), (0.375, 90.0), 0.1234)
    cells = {"sums, %": "75.0", "words, %": "37.5", "length, sums": "12.0", "length, words": "90.0"}
    assert means(module.cells(after)) == {**cells, "KL(base, student)": "0.123"}
    moves = {"sums, points": "+50.0", "words, points": "-12.5", "length, sums": "-8.0", "length, words": "+10.0"}
    assert means(module.against(after, before)) == moves
