"""The study of degradation: its base model, its arms, and that every experiment's quick form runs."""

import dataclasses
import functools
import inspect
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import study_files
import tiny
from quick import slow_but

from sdjax.cli.options import Choice
from sdjax.engine.policies import Environment, Policy
from sdjax.engine.policies import sample as write
from sdjax.engine.train import Experiment
from sdjax.kernels.divergences import clip_entries, jsd_entries
from sdjax.methods.grpo import grpo
from sdjax.methods.sdpo import sdpo
from sdjax.methods.sft import sft
from sdjax.models import pretrained
from sdjax.models.transformer import Transformer
from sdjax.report.runs import read_run
from sdjax.run.prompts import Prompts
from sdjax.study import arms, bases, tables, testbed
from sdjax.study.pretrain import batches, padded, pretrain, rows
from sdjax.tasks import scratchpad
from sdjax.tasks.words import word_tokenizer
from sdjax.types import STUDENT, Verdict

SMALL = {"width": 32, "layers": 1, "steps": 1, "tokens": 256}


load = functools.partial(study_files.load, "degrade")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Base models of these tests are kept by no one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDJAX_TESTBED", str(tmp_path_factory.mktemp("testbed")))
        yield


# ---- pre-training -------------------------------------------------------------------------------------------------


def test_rows_are_batched_by_length_and_chats_are_not_trained():
    examples = iter([([1] * n, 2) for n in (10, 30, 12, 9, 31, 14, 11)])
    found = list(batches(examples, tokens=64, most=48))
    assert [b["tokens"].shape for b in found] == [(2, 32), (4, 16)]
    batch = padded([([5, 6, 7], 2), ([8], 0)], 4)
    np.testing.assert_array_equal(batch["tokens"], [[5, 6, 7, 0], [8, 0, 0, 0]])
    np.testing.assert_array_equal(batch["present"], [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["trained"], [[0, 0, 1, 0], [1, 0, 0, 0]])


def test_texts_that_are_too_long_are_left_out():
    tokenizer, chat = word_tokenizer(["a", "b"]), ({"role": "user", "content": "a"},)
    found = list(rows(tokenizer, iter([(chat, "b b b"), (chat, "b")]), most=6))
    assert found == [(tokenizer.encode("user: a assistant: b") + [tokenizer.eos_token_id], 3)]


def test_pre_training_learns_to_copy_from_a_chat():
    tokenizer = word_tokenizer([str(d) for d in range(8)])
    config = testbed.shape(len(tokenizer), width=32, layers=1)
    rng = np.random.default_rng(0)

    def texts():
        while True:
            digit = str(rng.integers(8))
            yield ({"role": "user", "content": digit},), digit

    losses = {}
    data = batches(rows(tokenizer, texts(), 16), 512, 16)
    pretrain(config, data, steps=101, lr=1e-2, report=lambda step, loss: losses.update({step: loss}))
    assert losses[0] > 2.0 and losses[100] < 0.1


def test_a_base_model_is_made_once_and_is_reproducible_from_its_seed(tmp_path):
    said = []
    made = lambda cache, **more: testbed.base(
        **SMALL, cache=str(tmp_path / cache), report=lambda *_: said.append(1), **more
    )
    first = made("one")
    count = len(said)
    assert count and made("one") == first and len(said) == count
    weights = lambda folder: (folder / "model.safetensors").read_bytes()
    again = made("two")
    assert again.name == first.name and weights(again) == weights(first)
    other = made("one", seed=1)
    assert other.name != first.name and weights(other) != weights(first)
    assert not list((tmp_path / "one").glob("*.unfinished"))
    assert json.loads((first / "testbed.json").read_text()) == {**SMALL, "lr": 2e-2, "seed": 0}
    loaded = pretrained.load(first)
    assert loaded.tokenizer.encode("3 7 * 4 =") == word_tokenizer(testbed.words()).encode("3 7 * 4 =")


def test_another_grammar_is_another_base_model(monkeypatch):
    known = lambda: bases.fingerprint({"seed": 0}, testbed.words(), testbed.texts(0))
    before = known()
    monkeypatch.setitem(scratchpad.SLIP, "*", 0.5)
    assert known() != before


def test_contexts_are_written_as_the_methods_write_them():
    seen = {chat[-1]["content"].split("=", 1)[1].strip()[:13] for chat, _ in itertools.islice(testbed.texts(0), 400)}
    assert seen == {"", "Correct solut", "Here is a ref", "This is an ex", "The following", "A plan for th"}


# ---- arms ---------------------------------------------------------------------------------------------------------


def test_an_arm_is_run_once_for_the_same_arguments(tmp_path):
    ran = []

    def run(folder):
        ran.append(folder)
        return {"score": len(ran)}

    assert arms.arm(tmp_path, "a", {"x": 1, "y": 2}, run) == {"score": 1}
    assert arms.arm(tmp_path, "a", {"y": 2, "x": 1}, run) == {"score": 1}
    assert arms.arm(tmp_path, "a", {"x": 1, "y": 3}, run) == {"score": 2}
    assert arms.arm(tmp_path, "b", {"x": 1, "y": 2}, run) == {"score": 3}
    assert len(ran) == 3 and all(folder.parent == tmp_path for folder in ran)
    kept = json.loads(next(tmp_path.glob("b-*.json")).read_text())
    assert kept.pop("seconds") >= 0
    assert kept == {"name": "b", "arguments": {"x": 1, "y": 2}, "result": {"score": 3}}


def test_all_arms_of_a_seed_come_before_the_next_seed(tmp_path):
    ran = []

    def prepared(name, seed):
        return {"arm": name, "seed": seed}, lambda _: ran.append((name, seed)) or {"score": 10 * seed + len(name)}

    found = arms.every_seed(tmp_path, "some", ("a", "bb"), 2, prepared)
    assert ran == [("a", 0), ("bb", 0), ("a", 1), ("bb", 1)]
    assert found == {"a": [{"score": 1}, {"score": 11}], "bb": [{"score": 2}, {"score": 12}]}
    more = arms.every_seed(tmp_path, "some", ("a", "bb"), 3, prepared)
    assert ran[4:] == [("a", 2), ("bb", 2)] and more["bb"] == [*found["bb"], {"score": 22}]
    assert tables.across(found["a"], "score", digits=0) == "6 +- 64"  # 12.706 * 7.07 / sqrt(2)
    assert tables.table([{"arm": "a", "score": "6"}]) == "| arm | score |\n| --- | --- |\n| a | 6 |"


def test_an_arm_that_fails_leaves_no_result(tmp_path):
    def fails(folder):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        arms.arm(tmp_path, "a", {}, fails)
    assert arms.arm(tmp_path, "a", {}, lambda _: {"ok": 1}) == {"ok": 1}


def sft_run(steps=2):
    return Experiment(
        method=sft(),
        task=tiny.TASK,
        student=tiny.pretrained(),
        optimizer=optax.adam(1e-2),
        shapes=tiny.SHAPES,
        steps=steps,
        prompts=2,
        evaluation=0,
        save_every=1,
        export=False,
    )


def weight(policy):
    return {"weight": float(np.asarray(jax.tree.leaves(policy.params)[0]).sum())}


def test_a_run_is_probed_before_every_few_steps_and_after_and_goes_on_where_it_was_interrupted(tmp_path):
    whole = arms.trained(sft_run(), tmp_path / "whole", weight, every=1, arguments={"experiment": "try", "arm": "a"})
    assert [row["step"] for row in whole] == [0, 1, 2]
    run = read_run(tmp_path / "whole")
    assert run.arguments["arm"] == "a"
    assert run.evaluations == {"weight": {row["step"]: row["weight"] for row in whole}}
    assert len({row["weight"] for row in whole}) == 3

    def dies(policy):
        if dies.calls == 1:
            raise OSError("out of luck")
        dies.calls += 1
        return weight(policy)

    dies.calls = 0
    with pytest.raises(OSError, match="luck"):
        arms.trained(sft_run(), tmp_path / "cut", dies, every=1)
    probed = []
    again = arms.trained(sft_run(), tmp_path / "cut", lambda p: probed.append(1) or weight(p), every=1)
    assert again == whole and len(probed) == 2


def test_intervals_of_independent_runs():
    mean, low, high = tables.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert low == pytest.approx(4.0 - high)
    assert tables.interval([5.0])[1:] == (-math.inf, math.inf)
    assert tables.shown([0.5, 0.5, 0.5], 100) == "50.0 +- 0.0" and tables.shown([0.25], 100) == "25.0"


# ---- what a policy does -------------------------------------------------------------------------------------------


def test_forbidden_tokens_are_never_drawn():
    policy = tiny.policy()
    chats = [e.prompt for e in tiny.TASK.test]
    free = write(policy, chats, jax.random.key(0), n=4)
    seen = {t for some in free for s in some for t in s.tokens}
    half = sorted(seen)[::2]
    bound = write(policy, chats, jax.random.key(0), n=4, choose=arms.forbidding(half))
    assert half and not {t for some in bound for s in some for t in s.tokens} & set(half)


def test_behaviour_is_what_the_texts_say():
    base, _ = testbed.student(smoke=True)
    policy = Policy(Transformer(base.config), base.params, base.tokenizer, testbed.SHAPES)
    examples = scratchpad.scratchpad(train_size=1, test_size=3).test
    found = arms.behaviour(policy, examples, scratchpad.verify, jax.random.key(0), n=2)
    texts = [s for some in write(policy, [e.prompt for e in examples], jax.random.key(0), n=2) for s in some]
    tokens, hedges = sum(len(s.tokens) for s in texts), sum(s.text.count(h) for s in texts for h in scratchpad.HEDGES)
    assert hedges > 0
    assert found["length"] == pytest.approx(tokens / 6) and found["epistemic"] == pytest.approx(hedges / 6)
    assert found["density"] == pytest.approx(1000 * hedges / tokens)


# ---- experiments --------------------------------------------------------------------------------------------------


EXPERIMENTS = ("testbed", "richness", "hedging", "on_policy", "off_policy", "coverage", "remedies", "real_model")


@pytest.mark.parametrize("name", slow_but(("hedging", "on_policy"), EXPERIMENTS))
def test_the_quick_form_of_every_experiment_runs_once(name, tmp_path, monkeypatch):
    module = load(name)
    standard = inspect.signature(module.study).parameters["settings"].default
    quick = dataclasses.replace(standard, out=str(tmp_path), smoke=True)
    said = module.study(settings=quick)
    first, *others = said.split("\n\n")
    assert len(first.splitlines()) >= 5
    for shown in (first, *others):
        head, _, *lines = shown.splitlines()
        assert lines and all(line.count("|") == head.count("|") for line in lines)
    monkeypatch.setattr(arms, "fit", None)
    monkeypatch.setattr(arms, "replace_text", None)
    assert module.study(settings=quick) == said


@pytest.mark.parametrize("factory", [grpo, sdpo])
def test_on_policy_arms_are_experiments_for_the_command_line_too(factory):
    module = load("on_policy")
    experiment = module.experiment(
        method=Choice(factory, module.OPTIONS[factory.__name__]),
        settings=dataclasses.replace(module.SETTINGS, smoke=True),
    )
    assert experiment.steps == 2 and experiment.task.name == "scratchpad-in_domain"


def test_every_arm_has_its_method():
    module = load("on_policy")
    teachers = {name: module.ARMS[name](group_size=2).objectives[0].views.get("teacher") for name in module.ARMS}
    assert teachers.pop("GRPO") is None
    assert {name.rsplit(", ", 1)[1]: view.policy for name, view in teachers.items()} == {
        "frozen": "teacher",
        "EMA": "teacher",
        "live": "live",
    }


def test_few_problems_are_repeated_within_a_batch():
    """Coverage: the batch stays as large, and every problem is in it equally often, or nearly."""
    batches = [Prompts(["a", "b", "c"][:size], 8, seed=0).take() for size in (1, 3)]
    assert batches[0] == ["a"] * 8
    assert sorted(batches[1].count(name) for name in "abc") == [2, 3, 3]


def test_remedies_write_the_same_rollouts_and_differ_in_what_is_done_with_them():
    module = load("remedies")
    base, _ = testbed.student(smoke=True)
    policy = Policy(
        Transformer(base.config), base.params, base.tokenizer, dataclasses.replace(testbed.SHAPES, completion=8)
    )
    # A verdict that this model sometimes earns: then there are peers to read.
    environment = Environment({"live": policy}, lambda example, text: Verdict(float(len(text) % 2)))
    examples = list(scratchpad.scratchpad(train_size=2, test_size=1).train)
    written, told = {}, {}
    for name in (*module.ARMS, *module.CONTROLS):
        method = module.method_of(name, 4)
        rollouts, _ = method.collect(environment, examples, jax.random.key(0), method.memory)
        written[name] = [r.tokens for r in rollouts if r.source == STUDENT]
        told[name] = [r.contexts.get("teacher") for r in rollouts if r.source == STUDENT]
    assert len(written["GRPO"]) == 8 and all(some == written["GRPO"] for some in written.values())
    assert {name for name, chats in told.items() if not any(chats)} == {"GRPO", "no teacher (OPSA)"}
    assert told["SDPO"] == told["RLRT"] == told["AntiSD"] and told["OPSD"] == told["vOPD"] == told["DASD"]
    assert told["SDPO"] != told["SDPO, mismatched"] != told["SDPO, reference only"]
    assert set(map(str, told["SDPO, no lesson"])) <= {str(e.prompt) for e in examples} | {"None"}


def test_the_clip_of_opsd_turns_the_pull_on_hedges_round():
    """A teacher who hedges in 2.5 % of cases and a student who does in 60 %: the addend of going on is clipped away."""
    student, teacher = jnp.log(jnp.array([0.4, 0.6])), jnp.log(jnp.array([0.975, 0.025]))  # go on, hedge
    entries = lambda logits: jsd_entries(jax.nn.log_softmax(logits), teacher, 0.0)
    plain = jax.grad(lambda logits: entries(logits).sum())(student)
    clipped = jax.grad(lambda logits: clip_entries(entries(logits), 0.05))(student)
    np.testing.assert_allclose(plain, [0.4 - 0.975, 0.6 - 0.025], atol=1e-6)  # p - q: fewer hedges
    np.testing.assert_allclose(clipped, [0.025 * 0.4, -0.025 * 0.4], atol=1e-6)  # more of them


def test_intervals_of_many_seeds_are_students_too():
    """t(10) is 2.228: a normal quantile would be too narrow by an eighth."""
    values = np.arange(11.0)
    _, low, high = tables.interval(values)
    assert (high - low) / 2 == pytest.approx(2.228 * values.std(ddof=1) / math.sqrt(11), rel=1e-3)


def runs_of(*accuracies, answers=96):
    return [{"in_domain": {"accuracy": a, "answers": answers, "length": 10 * a}} for a in accuracies]


def test_a_share_is_never_surer_than_its_answers():
    """Three seeds that agree exactly say 11.5 % of 288 answers, not 11.5 % for certain."""
    assert tables.shares(runs_of(11 / 96, 11 / 96, 11 / 96), "in_domain") == "11.5 +- 3.7"
    assert tables.shares(runs_of(0.0, 0.0, 0.0), "in_domain") == "0.0 +- 0.7"  # Wilson's interval is [0, 1.3]
    wide = tables.shares(runs_of(0.2, 0.5, 0.8), "in_domain")
    assert wide == "50.0 +- 74.5"  # 4.303 * 0.3 / sqrt(3)
    assert tables.shares(runs_of(0.5), "in_domain") == "50.0 +- 9.8"  # one seed: its answers


def test_gains_are_paired_by_seed_and_never_surer_than_the_answers():
    before, after = runs_of(0.1, 0.4, 0.7), runs_of(0.2, 0.5, 0.8)
    binomial = tables.gains(after, before, "in_domain")
    assert binomial.startswith("+10.0 +- ") and float(binomial.split()[-1]) == pytest.approx(8.0, abs=0.2)
    spread = runs_of(0.2, 0.5, 0.95)
    assert float(tables.gains(spread, before, "in_domain").split()[-1]) == pytest.approx(21.5, abs=0.1)
    assert tables.changes(after, before, "in_domain", "length") == "+1.0 +- 0.0"
