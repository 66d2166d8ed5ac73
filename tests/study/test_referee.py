"""The referee: its base models' texts, runs that share programs, what is measured, and that its commands run."""

import dataclasses
import functools
import itertools
import random
import re

import jax
import numpy as np
import optax
import pytest
import study_files
import tiny

from sdjax.collect.contexts import question
from sdjax.engine.policies import Policy
from sdjax.engine.train import Experiment
from sdjax.methods.sdpo import sdpo
from sdjax.models import pretrained
from sdjax.models.transformer import Transformer
from sdjax.run.fit import fit
from sdjax.study import blocks, referee, searchers
from sdjax.study.claims import read_claims
from sdjax.study.short_runs import ShortRuns
from sdjax.tasks import search
from sdjax.tasks.search import BARE, FILLER, GRAMMARS, MARKED, SILENT

FOLDER = study_files.EXPERIMENTS / "referee"
PROBLEM = search.Problem(4, 9, (("+1", "*2"), ("*3", "+5"), ("+2", "*7"), ("*2", "*2"), ("*7", "+1")))
SMALL = {"width": 16, "layers": 1, "steps": 1, "tokens": 128}


load = functools.partial(study_files.load, "referee")


# ---- base models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_authors_search_as_their_context_lets_them(grammar):
    rows = {}
    for chat, text in itertools.islice(searchers.texts(grammar, 0), 3000):
        asked, _, said = chat[-1]["content"].partition("\n")
        (start, _, goal), listed = asked.split(" : ")[0].split(), re.split(" ?[A-J] ", asked.split(" : ")[1])[1:]
        problem = search.Problem(int(start), int(goal), tuple(tuple(program.split()) for program in listed))
        assert not search.held_out(problem)
        kind = " ".join(said.split()[:2]) if said else "none"
        rows.setdefault(kind, []).append((search.example(problem, ""), text))
    right = {kind: np.mean([search.verify(e, t).reward for e, t in some]) for kind, some in rows.items()}
    misses = {kind: np.mean([search.counts(e, t)["misses"] for e, t in some]) for kind, some in rows.items()}
    assert rows.keys() == {"none", "one of", "keep 0", "keep 0.1", "keep 0.3", "keep 0.6"}
    assert right["none"] < right["one of"] < min(right[k] for k in rows if "keep" in k) == 1.0
    if grammar is not BARE:
        assert misses["keep 0.6"] > misses["keep 0.3"] > misses["keep 0.1"]
    assert misses["keep 0"] == 0


def test_half_of_the_options_hold_the_solution():
    for seed in range(50):
        problem = search.draw(search.MORE_OPTIONS, random.Random(seed))
        half = searchers.half(problem, random.Random(seed))
        assert len(half) == 4 and search.solution_of(problem) in half
        assert half == [x for x in problem.letters if x in half]


def test_a_teacher_is_told_the_same_whenever_it_is_asked():
    example = search.search(train_size=1, test_size=1).train[0]
    for context in searchers.CONTEXTS:
        assert searchers.told(example, context, MARKED) == searchers.told(example, context, MARKED)
    chat = searchers.told(example, searchers.ANSWERS[2], MARKED)
    assert chat[-1]["content"].split("\n\n")[-2] == f"keep 0.3 : answer {example.answer}" == chat[-1]["privileged"]
    assert searchers.told(example, searchers.NONE, MARKED) == question(example)


def test_every_word_that_is_read_or_written_is_known():
    known = {*searchers.words()}
    for grammar in GRAMMARS:
        for chat, text in itertools.islice(searchers.texts(grammar, 1), 300):
            assert {*chat[-1]["content"].split(), *text.split()} <= known


# ---- runs that share programs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_run_is_the_run_that_fit_makes(tmp_path):
    """Two of them, the second with the programs of the first, end at the same bits as runs of their own."""
    made = Experiment(
        method=sdpo(group_size=2, ema_rate=0.05),
        task=tiny.TASK,
        student=tiny.pretrained(),
        optimizer=optax.adam(1e-2),
        shapes=tiny.SHAPES,
        steps=3,
        prompts=2,
        evaluation=0,
        save_every=0,
        export=False,
        log=(),
        memory="off",
    )
    weights = lambda params: np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(params))])
    runs = ShortRuns(made)
    for seed in (0, 1):
        rows = runs.measured(made.student, made.task, seed, lambda p: {"weights": weights(p.params)}, (0, 2, 3))
        whole = fit(dataclasses.replace(made, seed=seed), tmp_path / str(seed))
        assert [r["step"] for r in rows] == [0, 2, 3]
        np.testing.assert_array_equal(rows[-1]["weights"], weights(whole.state.params))
    compiled = tiny.programs("update")
    runs.measured(made.student, made.task, 0, lambda p: {}, (3,))
    assert tiny.programs("update") == compiled > 0


# ---- what is measured ---------------------------------------------------------------------------------------------


def policy():
    loaded = pretrained.load(searchers.base(MARKED, seed=0, **SMALL))
    return Policy(Transformer(loaded.config), loaded.params, loaded.tokenizer, referee.SHAPES, origin=loaded.origin)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Base models of these tests are kept by no one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDJAX_TESTBED", str(tmp_path_factory.mktemp("testbed")))
        yield


def test_summaries_are_of_misses_trials_and_answers():
    examples = [search.example(PROBLEM, "")] * 2
    found = referee.summary(examples, ["A +1 5 *2 10 wait D *2 8 *2 5 answer E", "C +2 6 *7 9 answer C"], [8, 6])
    assert found == {
        "accuracy": 0.5, "length": 7.0, "trials": 1.5, "misses": 1.0, "words": 0.5, "goes_on": 0.5, "honest": 1.0,
        "confirmed": 0.5, "first_right": 0.5, "answers": 2,
    }  # fmt: skip


def test_where_a_search_stops_though_options_are_left():
    example = search.example(PROBLEM, "")
    a, b, c, d, e = "A +1 5 *2 10", "B *3 1 +5 6", "C +2 6 *7 9", "D *2 8 *2 5", "E *7 6 +1 7"
    cut = {
        f"{a} answer B": a,
        f"{a} wait {b} answer D": f"{a} wait {b}",
        f"{a} wait": a,
        f"{a} wait {c} answer C": None,
        "answer A": None,
        f"{a} {b} C +2 6 *7 8 {d} {e} answer A": None,  # all were tried
    }
    assert {text: referee.stopped(example, text) for text in cut} == cut


@pytest.mark.slow
def test_no_search_stops_after_a_miss_where_words_are_forced():
    examples = search.search(train_size=1, test_size=4).test
    writer = policy()
    texts = referee.with_forced_words(writer, examples, "wait", jax.random.key(0), most=30)
    assert len(texts) == 4
    for example, text in zip(examples, texts, strict=True):
        assert referee.stopped(example, text) is None or len(text.split()) > 30


def test_a_teacher_that_reads_the_question_alone_is_the_student():
    found = referee.read_by_teacher(policy(), MARKED, (searchers.NONE, searchers.ANSWERS[0]), 4, 0)
    assert found.keys() == {"none 0", "answer 0"}
    for numbers in found.values():
        assert all(0.0 <= x <= 1.0 for x in numbers.values())


# ---- arms, claims and commands ------------------------------------------------------------------------------------


def test_every_claim_is_about_arms_and_measures_that_there_are():
    measures = referee.summary([search.search().test[0]], ["answer A"], [2]).keys()
    for claim in read_claims(FOLDER / "claims.toml"):
        own = blocks.ARMS[claim.grammar]
        assert claim.arm.removesuffix(", words forced") in own and claim.against in (*own, "itself")
        assert claim.problems in {f.name for f in search.FAMILIES} and claim.measure in measures
        assert claim.step in blocks.PROBES
        if "forced" in claim.arm:
            assert (claim.step, claim.problems) == (blocks.FORCED_AT, "more_options")


def test_every_arm_is_a_method_and_only_its_teacher_is_told():
    for grammar in GRAMMARS:
        for name, made in blocks.ARMS[grammar.name].items():
            method = made(grammar)
            told = [v for o in method.objectives for v in o.views.values() if v.told] + [*method.early.values()]
            assert bool(told) == (name != "GRPO" and not name.startswith("MixSD")), name


@pytest.mark.slow
def test_the_commands_run_once_and_print_tables(tmp_path, monkeypatch):
    """With base models that know nothing, two bases, two seeds and one batch."""
    base = searchers.base
    monkeypatch.setattr(searchers, "base", lambda grammar, **how: base(grammar, **{**how, **SMALL}))
    monkeypatch.setattr(search, "GRAMMARS", (MARKED, SILENT, FILLER, BARE))
    for name, value in {"BASES": (0, 1), "SEEDS": (0, 1), "PROBES": (0, 1)}.items():
        monkeypatch.setattr(blocks, name, value)
    out = {"out": str(tmp_path)}
    load("arms").study(**out, grammars=("marked", "bare"), arms=("GRPO", "SDPO, answer, keep 0"))
    module = load("verdicts")
    module.CLAIMS = tmp_path / "claims.toml"
    module.CLAIMS.write_text(re.sub(r"\nstep = \d+", "\nstep = 1", (FOLDER / "claims.toml").read_text()))
    said = module.study(**out)
    judged, courses, cost = said.split("\n\n")
    assert len(judged.splitlines()) == 2 + len(read_claims(FOLDER / "claims.toml"))
    assert "not run" in judged and courses.count("| GRPO |") == 2 and cost.startswith("16 runs")
