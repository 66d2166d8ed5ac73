"""The report: what it reads, what it computes, and the page in a real browser."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import browser
import jax
import matplotlib.image
import numpy as np
import pytest
import tiny
import whole_runs

from sdjax.__main__ import main
from sdjax.engine.chats import render
from sdjax.models import pretrained, transformer
from sdjax.report import figures, page, report, rollouts
from sdjax.report.groups import Group, Interval, accuracy_at, band, closing, grouped_runs, last_values, over_seeds
from sdjax.report.microscope import Scored, fitting, method_signals, open_run, rollout_of, score_rollouts
from sdjax.report.runs import ReportError, Run, read_run
from sdjax.run.logs import records
from sdjax.run.logs.log import drop_metrics_after
from sdjax.types import Example, Objective, Rollout, Term, View

NASTY = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
ARABIC, HINDI = "مرحبا بالعالم", "क्षि नमस्ते"


# ---- run folders without a run ---------------------------------------------------------------------------------------


def metrics(steps, seed=0, gain=0.4, words=3.0):
    """Lines of a run that learns."""
    noise = np.random.default_rng(seed)
    lines = [{"step": 0, "evaluation": {"accuracy": 0.4, "low": 0.3, "high": 0.5, "pass@1": 0.4, "pass@8": 0.7}}]
    for step in range(1, steps + 1):
        done = step / steps
        numbers = {
            "reward": 0.4 + gain * done,
            "length": 90 - 100 * gain * done,
            "epistemic_per_thousand": words * (1 - done),
        }
        numbers |= {f"term_{i}": 1 - done for i in range(3)}
        lines.append({"step": step, **{name: x * (1 + 0.1 * noise.normal()) for name, x in numbers.items()}})
        if step % max(steps // 8, 1) == 0:
            values = {"accuracy": 0.4 + gain * done, "low": 0.3 + gain * done, "high": 0.5 + gain * done}
            more = {"pass@1": 0.3 + gain, "pass@8": 0.5 + gain, "accuracy@32": 0.5, "accuracy@64": 0.8}
            lines.append({"step": step, "evaluation": values | more})
    return lines


def line(step, pieces, *, reward=1.0, trained=None, extras=None, contexts=None, logprobs=None):
    """A line of `rollouts.jsonl`."""
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    told = [{"role": "user", "content": "What is 3 + 4?\n\nCorrect solution:\n\n7\n\nSolve it.", "privileged": "7"}]
    return {
        "step": step,
        "id": f"sum-{step}",
        "group": 0,
        "source": 0,
        "reward": reward,
        "finished": True,
        "feedback": None,
        "text": "".join(pieces),
        "tokens": list(range(len(pieces))),
        "pieces": list(pieces),
        "logprobs": [-0.5] * len(pieces) if logprobs is None else logprobs,
        "trained": trained,
        "contexts": contexts or {"student": asked, "teacher": told},
        "extras": extras or {},
        "rewards": [0.0, 1.0],
        "policies": {"student": "live", "teacher": "teacher"},
    }


def folder_of(folder, steps=8, seed=0, lines=(), method="sdpo", **arguments):
    """A run folder with made-up numbers."""
    folder.mkdir(parents=True)
    arguments = {"experiment": "sums.py", "method": method, "steps": steps, "seed": seed, **arguments}
    (folder / "arguments.json").write_text(json.dumps(arguments))
    write_lines(folder / "metrics.jsonl", metrics(steps, seed, gain=0.4 if method == "sdpo" else 0.1))
    if lines:
        write_lines(folder / records.ROLLOUTS, lines)
    return folder


def write_lines(file, lines):
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))


def scored(length, seed=0, entries=5):
    """Made-up scores of a rollout."""
    noise = np.random.default_rng(seed)
    names = ("student", "teacher", "log_ratio", "forward_kl", "jsd", "student_entropy", "credit")
    signals = {name: list(noise.normal(size=length)) for name in names}
    signals |= {name: [-abs(x) for x in signals[name]] for name in ("student", "teacher")}
    return Scored(signals, [[(i, -1.0 - i, -2.0 - i) for i in range(entries)] for _ in range(length)])


class Words:
    """A vocabulary."""

    def decode(self, ids, **_):
        return NASTY if ids == [0] else f" word{ids[0]}"


# ---- what a run records ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def test_pieces_join_to_the_text_and_a_character_stands_at_its_last_byte(bytewise):
    text = f"né 😀 {ARABIC} {HINDI}\n"
    pieces = records.pieces(bytewise, bytewise.encode(text))
    assert "".join(pieces) == text
    assert pieces[:4] == ["n", "", "é", " "] and pieces[4:8] == ["", "", "", "😀"]


def test_pieces_of_words_and_of_bytes_that_are_no_text(bytewise):
    assert records.pieces(tiny.tokenizer(), tiny.tokenizer().encode("ask key 5 ->")) == ["ask", " key", " 5", " ->"]
    broken = [bytewise.encode("é")[0]] * 6
    pieces = records.pieces(bytewise, [*broken, *bytewise.encode("a")])
    assert len(pieces) == 7 and pieces[-1].endswith("a") and "\ufffd" in "".join(pieces)
    assert records.pieces(bytewise, []) == []


def test_a_rollout_comes_back_from_its_line(tmp_path):
    chat = ({"role": "user", "content": "ask key 5 ->"},)
    tokens = tuple(tiny.tokenizer().encode("5 -> red"))
    extras = {"ratio": np.array([1.0, float("nan"), 3.0]), "span": np.array([True, False, True]), "pair": 2}
    made = Rollout(Example("x", chat), tokens, (-1.0, -2.0, -3.0), "5 -> red", 0, reward=1.0, finished=False)
    made = made.read_by(student=chat, teacher=None).with_extras(**extras)
    rest = [Rollout(Example("y", chat), tokens, (0.0,) * 3, "", g, reward=0.0) for g in (0, 1, 1, 2)]
    file = tmp_path / records.ROLLOUTS
    records.append_rollouts(file, 3, [made, *rest], tiny.tokenizer(), {"student": View(), "teacher": View("ema")})
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    assert [x["group"] for x in lines] == [0, 0, 1, 1], "whole groups"
    assert lines[0]["rewards"] == [1.0, 0.0] and lines[0]["policies"] == {"student": "live", "teacher": "ema"}
    back = rollout_of(lines[0])
    assert (back.tokens, back.logprobs, back.reward, back.finished) == (tokens, (-1.0, -2.0, -3.0), 1.0, False)
    assert back.contexts == {"student": chat, "teacher": None}
    assert back.extras == {"ratio": [1.0, 0.0, 3.0], "span": [True, False, True], "pair": 2}


def test_hedging_counts_the_students_own_words():
    own = Rollout(Example("x", ()), (1,) * 8, (0.0,) * 8, "Wait, maybe 4. wait", 0)
    other = Rollout(Example("x", ()), (1,) * 8, (0.0,) * 8, "wait wait wait", 0, source=2)
    assert records.hedging([own, other]) == {"epistemic": 3.0, "epistemic_per_thousand": 375.0}
    assert records.hedging([other]) == {}


# ---- what the report refuses -----------------------------------------------------------------------------------------


def damaged(folder, name, number, text):
    """Puts a text in place of a line."""
    lines = (folder / name).read_text().split("\n")
    lines[number - 1] = text
    (folder / name).write_text("\n".join(lines))


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"step": 3, "reward": 0.', "line 3 is damaged"),
        ('{"reward": 1}', "line 3 is damaged .*`step`"),
        ('{"step": 2, "reward": "much"}', "line 3 is damaged .*reward is not a number"),
        ('{"step": 2, "evaluation": 4}', "line 3 is damaged .*`evaluation`"),
        ("[" * 100_000, "line 3 is damaged"),
        ("[1]", "line 3 is damaged"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, text, said):
    folder = folder_of(tmp_path / "run")
    damaged(folder, "metrics.jsonl", 3, text)
    with pytest.raises(ReportError, match=rf"metrics\.jsonl, {said}"):
        read_run(folder)


@pytest.mark.parametrize(
    "change",
    [{"tokens": [1]}, {"pieces": 4}, {"contexts": {"student": ["x"]}}, {"contexts": {"student": "x"}}, {"step": "1"}]
    + [{"rewards": ["1"]}, {"tokens": ["a", "b"]}, {"policies": {"student": 3}}, {"extras": {"a": ["x", "y"]}}],
)
def test_a_damaged_rollout_is_named(tmp_path, change):
    folder = folder_of(tmp_path / "run", lines=[line(1, ["a", "b"]), line(2, ["a", "b"]) | change])
    with pytest.raises(ReportError, match=r"rollouts\.jsonl, line 2 is damaged"):
        read_run(folder)


def test_a_line_that_is_being_written_counts_for_nothing(tmp_path):
    folder = folder_of(tmp_path / "run", steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    assert read_run(folder).last == 3


@pytest.mark.parametrize("known", [None, "not JSON", "[]"])
def test_the_command_says_in_one_sentence_what_is_no_run(tmp_path, capsys, known):
    if known is not None:
        (tmp_path / "arguments.json").write_text(known)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name at least one run folder" in capsys.readouterr().err


def test_a_run_without_a_finished_step_is_refused(tmp_path):
    folder = folder_of(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", metrics(1)[:1])
    with pytest.raises(ReportError, match="no finished step"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ReportError, match="no finished step"):
        read_run(folder)


def test_a_microscope_needs_rollouts_and_a_page_a_place(tmp_path, capsys):
    folder = folder_of(tmp_path / "run")
    assert main(["report", str(folder), "--microscope", "--out", str(tmp_path / "a.html")]) == 2
    assert "recorded rollouts" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--out", str(tmp_path / "file" / "a.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- numbers ---------------------------------------------------------------------------------------------------------


def run_with(seed=0, method="sdpo", steps=(), evaluations=(), **arguments):
    arguments = {"experiment": "sums.py", "method": method, "seed": seed, **arguments}
    return Run(Path("runs"), arguments, dict(steps), dict(evaluations), [])


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    runs = [run_with(0), run_with(1), run_with(0, "grpo"), run_with(0, lr=0.1), run_with(2), run_with(0, lr=0.2)]
    groups = grouped_runs(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [
        ("sdpo", 3),
        ("grpo", 1),
        ("sdpo lr=0.1", 1),
        ("sdpo lr=0.2", 1),
    ]


def test_a_run_without_arguments_goes_by_its_folder(tmp_path):
    for name in ("first", "second"):
        (folder_of(tmp_path / name) / "arguments.json").write_text("{}")
    assert [g.label for g in grouped_runs([read_run(tmp_path / n) for n in ("first", "second")])] == ["first", "second"]


def test_a_band_is_mean_lowest_and_highest_within_windows():
    curves = [{1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0}, {1: 3.0, 2: 5.0, 3: 7.0}]
    found = band(curves, most=2)
    np.testing.assert_array_equal(found.step, [1.5, 3.5])
    np.testing.assert_array_equal(found.mean, [3.0, 6.5])
    np.testing.assert_array_equal((found.low, found.high), ([2.0, 6.0], [4.0, 7.0]))
    assert found.window == 2 and band([{}]) is None


def test_intervals_over_seeds_are_students():
    found = over_seeds([10.0, 12.0, 17.0])
    half = 4.302653 * np.std([10, 12, 17], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found, (13.0, 13.0 - half, 13.0 + half), rtol=1e-6)
    assert over_seeds([2.0]) == Interval(2.0) and over_seeds([]) is None
    assert over_seeds([0.0, 1.0]) == Interval(0.5, 0.0, 1.0), "shares stay shares"


def test_accuracys_interval_is_never_narrower_than_that_over_problems():
    own = lambda accuracy: {"accuracy": {0: 0.2, 9: accuracy}, "low": {9: accuracy - 0.1}, "high": {9: accuracy + 0.1}}
    same = Group("a", tuple(run_with(s, evaluations=own(0.6)) for s in range(3)))
    np.testing.assert_allclose(accuracy_at(same, max), (0.6, 0.5, 0.7))
    apart = Group("b", tuple(run_with(s, evaluations=own(0.2 + 0.3 * s)) for s in range(3)))
    assert accuracy_at(apart, max) == Interval(pytest.approx(0.5), 0.0, 1.0)
    assert accuracy_at(Group("c", (run_with(),)), max) is None


def test_the_band_of_a_single_seeds_accuracy_is_its_interval_over_problems():
    own = {"accuracy": {0: 0.2, 9: 0.6}, "low": {0: 0.1, 9: 0.5}, "high": {0: 0.3, 9: 0.7}}
    one, two = (Group("a", tuple(run_with(s, evaluations=own) for s in range(n))) for n in (1, 2))
    np.testing.assert_array_equal(report.accuracy_band(one).high, [0.3, 0.7])
    np.testing.assert_array_equal(report.accuracy_band(two).high, [0.2, 0.6])
    assert report.accuracy_plot([Group("b", (run_with(),))]) is None


def test_closing_numbers_and_last_evaluations():
    steps = {"length": {step: float(step) for step in range(1, 21)}}
    group = Group("a", (run_with(steps=steps, evaluations={"pass@4": {0: 0.1, 5: 0.5}, "pass@all": {5: 1.0}}),))
    assert closing(group, "length") == Interval(19.5) and closing(group, "nothing") is None
    assert last_values(group, "pass@") == {4: Interval(0.5)}


def test_every_set_that_was_evaluated_gets_its_own_figures():
    values = {"accuracy@8": 0.25, "accuracy@16": 0.5, "accuracy@8_far_off": 0.0, "accuracy@16_far_off": 0.125}
    rest = {"accuracy_far_off": 0.125, "length_far_off": 9.0, "low": 0.1, "pass@all": 1.0}
    run = run_with(steps={"reward": {1: 0.5}}, evaluations={n: {0: 0.0, 5: v} for n, v in (values | rest).items()})
    plots = {plot.name: plot for plot in report.plots([Group("a", (run,))])}
    names = {"accuracy-by-cap", "accuracy-by-cap_far_off", "evaluated-accuracy_far_off", "evaluated-length_far_off"}
    assert plots.keys() == names | {"reward"}
    far = plots["accuracy-by-cap_far_off"]
    assert far.title == "Accuracy by generation cap, far off" and not far.doubling
    np.testing.assert_array_equal(far.bands["a"].step, [8, 16])
    np.testing.assert_array_equal(far.bands["a"].mean, [0.0, 0.125])
    np.testing.assert_array_equal(plots["evaluated-length_far_off"].bands["a"].mean, [0.0, 9.0])
    assert [name for name, plot in plots.items() if not report.is_main(plot)] == ["evaluated-length_far_off"]


def test_hedges_are_found_across_tokens_whatever_the_case():
    assert rollouts.hedges(["So ", "Wa", "it", ", ", "un", "like", "ly", " İ", "", "maybe"]) == [1, 2, 5, 6, 9]


def test_whole_steps_are_chosen_with_the_first_and_the_last():
    lines = [{"step": step, "row": row} for step in range(1, 101) for row in range(4)]
    kept = rollouts.chosen(lines, 20)
    assert sorted({x["step"] for x in kept}) == [1, 26, 51, 75, 100] and len(kept) == 20
    assert rollouts.chosen(lines[:8], 20) == lines[:8]


# ---- figures and the page's text -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plot():
    groups = grouped_runs([run_with(s, steps={"reward": {1: 0.1 + s / 10, 2: 0.5}}) for s in range(2)])
    return report.curve_plot(groups, "reward", "Reward $<b>$")


def test_a_figure_for_the_page_takes_its_colours_from_the_page(plot):
    svg = figures.for_page(figures.drawn(plot, ["sdpo"]), "reward")
    assert not re.findall(r"#[0-9a-f]{6}\b", svg) and "var(--series-0)" in svg and "<metadata" not in svg
    assert all(name.startswith("reward-") for name in re.findall(r'\bid="([^"]*)"', svg))
    ids = set(re.findall(r'\bid="([^"]*)"', svg))
    assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)) and all(
        a or b in ids for a, b in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
    )
    assert "Reward $&lt;b&gt;$" in svg, "no markup and no formula"
    assert svg == figures.for_page(figures.drawn(plot, ["sdpo"]), "reward")


def test_a_page_without_rollouts_has_no_script(tmp_path):
    report.report((str(folder_of(tmp_path / "run")),), out=str(tmp_path / "a.html"))
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text and "microscope" not in text.split("</style>")[1] and "<svg" in text


def test_figures_for_papers_show_the_curve(plot, tmp_path):
    figures.write_figure(tmp_path, plot, figures.drawn(plot, ["sdpo"]))
    image = matplotlib.image.imread(tmp_path / "reward.png")[..., :3]
    blue = np.array([0, 0x72, 0xB2]) / 255
    assert np.sum(np.abs(image - blue).max(-1) < 0.02) > 300
    assert "<svg" in (tmp_path / "reward.svg").read_text()


def test_data_cannot_leave_its_element():
    text = page.as_data({"a": [NASTY, "<!--", "\u2028", "\ud800", "&lt;"]})
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text)["a"][0] == NASTY


def test_only_the_pages_own_script_may_run():
    text = page.page("a < b", "<p>", {"x": 1})
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"sha256-{digest}" in policy and "default-src &#x27;none&#x27;" in policy
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval|srcdoc", script)
    assert not re.search(r'(src|href)="(?!#|data:,)', text) and "<title>a &lt; b</title>" in text


# ---- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders by method: a real run, and the same one as if its method had no teacher."""
    base = tmp_path_factory.mktemp("runs")
    command = ("train", whole_runs.FILE, "--steps", 3, "--evaluation", 0, "--export", "--evaluate-every", 0)
    with whole_runs.compiled_into(base / "programs"):
        assert whole_runs.run_here(*command, "--save-every", 0, "--out", base / "sdpo") == 0
        shutil.copytree(base / "sdpo", base / "grpo")
        arguments = json.loads((base / "grpo" / "arguments.json").read_text())
        other = {"method": "grpo", "method.normalised": False}
        (base / "grpo" / "arguments.json").write_text(json.dumps(arguments | other))
        lines = whole_runs.lines(base / "sdpo", records.ROLLOUTS)
        write_lines(base / "grpo" / records.ROLLOUTS, [x | {"policies": {"student": "live"}} for x in lines])
        yield base


def dense(model, params, context, completion):
    """Log-probabilities `[T, V]` of a completion after a context by one plain forward pass, in float64."""
    ids = np.array([[*context, *completion]], np.int32)
    places = np.arange(ids.shape[1], dtype=np.int32)[None]
    hidden, _ = transformer.hidden(model, params, ids, places, np.ones_like(ids, bool))
    logits = np.asarray(transformer.logits(model, params, hidden)[0, len(context) - 1 : -1], np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.slow
def test_the_microscope_shows_what_a_plain_forward_pass_gives(trained):
    run = read_run(trained / "sdpo")
    reader = open_run(run)
    assert set(reader.params) == {"live", "teacher"} and reader.step == 3
    found = score_rollouts(reader, run.rollouts)
    for line, one in list(zip(run.rollouts, found, strict=True))[-2:]:
        student, teacher = (
            dense(reader.model, reader.params[policy], render(reader.tokenizer, line["contexts"][view]), line["tokens"])
            for view, policy in (("student", "live"), ("teacher", "teacher"))
        )
        at = lambda dist, line=line: dist[np.arange(len(line["tokens"])), line["tokens"]]
        close = lambda name, expected, one=one: np.testing.assert_allclose(one.signals[name], expected, atol=2e-5)
        close("student", at(student))
        close("teacher", at(teacher))
        close("log_ratio", at(teacher) - at(student))
        close("forward_kl", (np.exp(teacher) * (teacher - student)).sum(-1))
        close("reverse_kl", (np.exp(student) * (student - teacher)).sum(-1))
        close("teacher_entropy", -(np.exp(teacher) * teacher).sum(-1))
        for place, shown in enumerate(one.alternatives):
            likely = {*np.argsort(-student[place])[:4], *np.argsort(-teacher[place])[:4]}
            assert {token for token, *_ in shown} == likely
            np.testing.assert_allclose([p for _, p, _ in shown], [student[place, t] for t, *_ in shown], atol=2e-5)
            np.testing.assert_allclose([q for *_, q in shown], [teacher[place, t] for t, *_ in shown], atol=2e-5)


def test_a_teacher_that_is_the_student_differs_nowhere(trained):
    run = read_run(trained / "sdpo")
    asked = lambda x: {**x["contexts"], "teacher": x["contexts"]["student"]}
    lines = [x | {"policies": {"student": "live", "teacher": "live"}, "contexts": asked(x)} for x in run.rollouts]
    for one in score_rollouts(open_run(run), lines):
        for name in ("log_ratio", "forward_kl", "jsd"):
            np.testing.assert_array_equal(one.signals[name], 0.0)


def test_credit_of_a_policy_gradient_is_its_advantage(trained):
    run = read_run(trained / "grpo")
    found = score_rollouts(open_run(run), run.rollouts)
    unequal = 0
    for line, one in zip(run.rollouts, found, strict=True):
        advantage = line["reward"] - np.mean(line["rewards"])
        if "credit" in one.signals:
            unequal += advantage != 0
            np.testing.assert_allclose(one.signals["credit"], advantage, atol=1e-6)
        assert "teacher" not in one.signals and all(theirs is None for *_, theirs in one.alternatives[0])
    assert unequal


def test_weights_and_credit_are_the_terms_own():
    """A weighted policy gradient and a term on the whole row, of which half the rows are spared."""
    tokens = [[1, 2, 3], [4, 5, 6]]
    batch = tiny.batch(tokens, behavior=[[-1.0] * 3] * 2, reward=[1.0, 0.0])
    weight, rows = np.array([[1.0, 2.0, 3.0]] * 2), np.array([True, False])

    def terms(batch, sig, step):
        per_row = Term(sig["logprobs"].sum(-1), over=rows, coef=-10.0)
        return {"pg": Term(-sig["logprobs"] * batch.reward[:, None], weight, coef=2.0), "row": per_row}

    found = {"own/logprobs": np.full((2, 3), -1.5, np.float32)}
    made = method_signals(Objective({"student": View(trainable=True)}, None, terms), batch, found, 1)
    np.testing.assert_allclose(made["credit"], [[12.0, 14.0, 16.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(made["weight of pg"], weight)
    np.testing.assert_allclose(made["value of pg"], [[1.0] * 3, [0.0] * 3], err_msg="of what was recorded")
    assert made.keys() == {"credit", "value of pg", "weight of pg"}


def test_rows_without_a_teachers_context_and_policies_that_were_not_saved(trained):
    run = read_run(trained / "sdpo")
    lines = [x for x in run.rollouts if x["step"] == 3]
    silent = [x | {"contexts": {**x["contexts"], "teacher": None}} if i == 1 else x for i, x in enumerate(lines)]
    found = score_rollouts(open_run(run), silent)
    assert "log_ratio" in found[0].signals and "log_ratio" not in found[1].signals
    assert "student" in found[1].signals and found[1].alternatives[0][0][2] is None
    external = [x | {"policies": {"student": "live", "teacher": "elsewhere"}} for x in lines]
    reader = open_run(run)
    assert all("teacher" not in one.signals for one in score_rollouts(reader, external))
    told = open_run(run._replace(rollouts=external), teacher=str(trained / "grpo" / "model"))
    assert all("teacher" in one.signals for one in score_rollouts(told, external))
    with pytest.raises(ReportError, match="token 999 is not one of the model's"):
        score_rollouts(reader, [lines[0] | {"tokens": [999], "pieces": ["x"], "logprobs": [0.0]}])


def test_parameters_of_another_model_and_adapters_alone_are_not_read(trained, tmp_path):
    whole, adapters = {"a": np.zeros((2, 3))}, {"lora": {"a": np.zeros(2)}}
    assert fitting({"live": whole, "wide": {"a": np.zeros((2, 4))}, "teacher": adapters}, whole) == {"live": whole}
    config = dataclasses.replace(tiny.config(), width=16)
    params = transformer.initialise(transformer.Transformer(config), jax.random.key(0))
    pretrained.save(tmp_path / "small", config, params, tiny.tokenizer())
    with pytest.raises(ReportError, match="other parameters than .*small"):
        open_run(read_run(trained / "sdpo"), str(tmp_path / "small"))


def test_a_resumed_run_records_no_rollout_twice(trained):
    steps = [x["step"] for x in whole_runs.lines(trained / "sdpo", records.ROLLOUTS)]
    assert sorted(set(steps)) == [1, 3] and steps == sorted(steps)
    copy = trained / "copy.jsonl"
    copy.write_text((trained / "sdpo" / records.ROLLOUTS).read_text())
    drop_metrics_after(copy, 2)
    assert {json.loads(x)["step"] for x in copy.read_text().splitlines()} == {1}


def test_the_command_writes_a_page_and_figures_of_real_runs(trained, tmp_path, capsys):
    out = tmp_path / "a.html"
    assert main(["report", *(str(trained / m) for m in ("sdpo", "grpo")), "--microscope", "--out", str(out)]) == 0
    assert "a.html" in capsys.readouterr().out
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text())[1])
    assert {"log_ratio", "credit", "student_entropy", "advantage", "value of divergence"} <= data["signals"].keys()
    assert {p.suffix for p in (tmp_path / "a-figures").iterdir()} == {".svg", ".png"}


# ---- in a browser ----------------------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(browser.program() is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def page_of(folder, lines, **arguments):
    """A page about two groups; the rollouts, with made-up scores, are the first one's."""
    runs = [folder_of(folder / f"sdpo-{s}", seed=s, lines=lines if s == 0 else (), **arguments) for s in range(3)]
    runs += [folder_of(folder / f"grpo-{s}", seed=s, method="grpo", **arguments) for s in range(3)]
    groups = grouped_runs([read_run(run) for run in runs])
    marks = [scored(len(x["tokens"]), i) for i, x in enumerate(lines)]
    data = rollouts.page_data({"sdpo, seed 0": (lines, marks, Words())}, {"sdpo, seed 0": 8})
    report.written(folder / "report.html", groups, report.plots(groups), data)
    return folder / "report.html"


def nasty_lines():
    said = [{"role": f"user{NASTY}", "content": NASTY, "privileged": NASTY}]
    first = line(1, ["<b>", NASTY, " wait", ",", "\n", "7", "\u202e", "</b>"], contexts={"student": said, NASTY: said})
    first |= {"id": NASTY, "feedback": NASTY, "extras": {NASTY: [0.5] * 8, "span": [True] * 2 + [False] * 6}}
    long = [" first", " we", " add", ";", " maybe", " 7", ".", "\n"] * 6
    arabic = ["مر", "حبا", " بال", "عالم", "", "", "", "😀", " क", "्", "षि"]
    return [first, line(4, long, trained=[False] * 4 + [True] * 44, reward=0.0), line(8, arabic)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("page"), nasty_lines(), note=NASTY)


@in_browser
def test_the_page_opens_without_a_complaint_or_a_request_and_markup_stays_text(chromium, shown):
    tab = chromium.open(shown.as_uri())
    assert tab.complaints() == [] and tab.requests() == []
    for number in range(3):
        tab.js(f"choose({number})")
        assert tab.js("window.hacked") is None
    assert tab.js("document.querySelectorAll('#microscope img, #microscope b b, #microscope script').length") == 0
    assert tab.js("document.querySelectorAll('main img, main script').length") == 0
    tab.js("choose(0)")
    assert tab.js("document.querySelector('#tokens').children[1].textContent") == NASTY
    assert NASTY in tab.js("document.querySelector('#prompts').textContent")
    assert tab.js("document.querySelector('#tokens').children[6].textContent") == "‹U+202E›"
    tab.close()


@in_browser
def test_scripts_and_requests_that_slip_in_are_stopped(chromium, shown, tmp_path):
    """The negative control: the same page with markup that was not escaped."""
    hole = tmp_path / "hole.html"
    markup = "<script>window.hacked=1</script><img src='http://localhost:9/x.png' onerror='window.hacked=2'>"
    hole.write_text(shown.read_text().replace("<main>", f"<main>{markup}"))
    tab = chromium.open(hole.as_uri())
    assert tab.js("window.hacked") is None and len(tab.complaints()) >= 2
    assert tab.js("document.querySelector('main img').naturalWidth") == 0
    tab.close()


def details(tab):
    return tab.js("document.querySelector('#details').innerText")


@in_browser
def test_pointing_and_keys_show_a_token(chromium, shown):
    tab = chromium.open(shown.as_uri())
    tab.js("choose(1)")
    tab.point("#tokens .t:nth-child(3)")
    assert "“ add”" in details(tab) and "token 3 of 48" in details(tab)
    for word in ("student", "teacher", "when sampled", "60.7 %", "36.8 %", "log-ratio, teacher − student"):
        assert word in details(tab), word
    assert tab.js("document.querySelectorAll('#details .alternatives tbody tr').length") == 5
    assert tab.js("document.querySelectorAll('#details .taken').length") == 1
    tab.js("document.querySelector('#tokens [tabindex=\"0\"]').focus()")
    for key, place in (("ArrowRight", 4), ("ArrowRight", 5), ("ArrowLeft", 4), ("End", 48), ("Home", 1)):
        tab.press(key)
        assert f"token {place} of 48" in details(tab), key
        assert tab.js("document.activeElement.dataset.i") == str(place - 1)
    tab.press("ArrowDown")
    assert "token 9 of 48" in details(tab), "the next line's first"
    assert "kept out of the loss" not in details(tab)
    tab.press("ArrowUp")
    assert "kept out of the loss" in details(tab)
    tab.press("n")
    assert tab.js("document.querySelector('#rollout').value") == "2" and "token 1 of 11" in details(tab)
    tab.close()


@in_browser
def test_everything_is_reached_by_the_tab_key(chromium, shown):
    tab = chromium.open(shown.as_uri())
    reached = set()
    for _ in range(60):
        tab.press("Tab")
        reached.add(
            tab.js("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
    assert {"rollout", "previous", "next", "signal", "which", "values", "SUMMARY", "A"} <= reached
    assert any("t " in f"{name} " for name in reached), "a token"
    tab.close()


@in_browser
def test_colours_marks_and_choices(chromium, shown):
    tab = chromium.open(shown.as_uri())
    tab.js("choose(1)")
    names = tab.js("[...document.querySelector('#signal').options].map(o => o.value)")
    assert names[0] == "log_ratio" and {"credit", "forward_kl", "student_entropy", "advantage", "recorded"} <= set(
        names
    )
    signs = tab.js("[...document.querySelectorAll('#tokens .t')].map(t => t.className)")
    values = json.loads(json.dumps(tab.js("rollout.signals.log_ratio")))
    assert all(
        ("pos" in c.split()) == (v > 0) and ("neg" in c.split()) == (v < 0) for c, v in zip(signs, values, strict=True)
    )
    assert [("hedge" in c.split()) for c in signs[:8]] == [False] * 4 + [True] + [False] * 3
    assert sum("skipped" in c.split() for c in signs) == 4
    colour = "getComputedStyle(document.querySelectorAll('#tokens .t')[0]).backgroundColor"
    before = tab.js(colour)
    tab.js("const s = document.querySelector('#signal'); s.value = 'credit'; s.dispatchEvent(new Event('change'))")
    assert tab.js(colour) != before
    tab.js("const w = document.querySelector('#which'); w.value = 'unsolved'; w.dispatchEvent(new Event('change'))")
    assert tab.js("document.querySelectorAll('#rollout option').length") == 1
    tab.js("document.querySelector('#values').click()")
    shown_value = tab.js("getComputedStyle(document.querySelectorAll('#tokens .t')[0], '::after').content")
    assert re.search(r"\d\.\d", shown_value)
    prompts = tab.js(
        "[...document.querySelectorAll('#prompts section')].map(s => [s.getBoundingClientRect().top, s.innerText])"
    )
    assert prompts[0][0] == prompts[1][0], "side by side"
    assert "student" in prompts[0][1] and "teacher" in prompts[1][1]
    assert tab.js("document.querySelector('#prompts mark').textContent") == "7"
    tab.close()


@in_browser
def test_scripts_from_right_to_left_and_joined_letters(chromium, shown):
    tab = chromium.open(shown.as_uri())
    tab.js("choose(2)")
    assert tab.js("getComputedStyle(document.querySelector('#tokens')).direction") == "rtl"
    left = tab.js("[...document.querySelectorAll('#tokens .t')].slice(0, 4).map(t => t.getBoundingClientRect().left)")
    assert left == sorted(left, reverse=True), "tokens run from right to left"
    # Letters join across tokens: two tokens are as wide as the same letters in one.
    width = "(t => {const s = document.createElement('span'); s.textContent = t; document.querySelector('#tokens')"
    width += ".replaceChildren(s); return s.getBoundingClientRect().width})"
    joined = tab.js("[0, 1].map(i => document.querySelectorAll('#tokens .t')[i].getBoundingClientRect().width)")
    whole = tab.js(f"{width}('مرحبا')")
    assert sum(joined) == pytest.approx(whole, abs=0.1)
    tab.js("choose(2); document.querySelector('#tokens .t').focus()")
    tab.press("ArrowLeft")
    assert "token 2 of 11" in details(tab), "forward is left"
    parts = tab.js("[...document.querySelectorAll('#tokens .t')].slice(4, 8).map(t => t.textContent)")
    assert parts == ["⋯", "⋯", "⋯", "😀"]
    tab.close()


def pixels(png, colour):
    """How many pixels have a colour, about."""
    image = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int(np.sum(np.abs(image - wanted).max(-1) < 0.15))


@in_browser
@pytest.mark.parametrize("shape", [{}, {"dark": True}, {"width": 390, "height": 844}, {"media": "print", "width": 760}])
def test_curves_are_seen_everywhere_and_nothing_is_cut_off(chromium, shown, shape):
    tab = chromium.open(shown.as_uri(), **shape)
    picture = tab.screenshot("#curves")
    first, second = ("#4aa8e0", "#f0833a") if shape.get("dark") else ("#0072b2", "#d55e00")
    assert pixels(picture, first) > 250 and pixels(picture, second) > 250
    assert pixels(picture, "#00ff00") == 0
    assert tab.js("document.documentElement.scrollWidth <= innerWidth")
    assert tab.complaints() == []
    tab.close()


@in_browser
@pytest.mark.parametrize("deficiency", ["protanopia", "deuteranopia", "tritanopia", "achromatopsia"])
def test_signs_and_curves_are_told_apart_by_colour_blind_readers(chromium, shown, deficiency):
    """By hue where there is one; in greys by the bar, above or below, and by dashes and marks."""
    tab = chromium.open(shown.as_uri())
    tab.call("Emulation.setEmulatedVisionDeficiency", type=deficiency)
    pictures = [matplotlib.image.imread(io.BytesIO(tab.screenshot(f".key.{sign}"))) for sign in ("pos", "neg")]
    middles = [p[p.shape[0] // 2, 2, :3] for p in pictures]
    if deficiency != "achromatopsia":
        assert np.abs(middles[0] - middles[1]).max() > 0.15
    for picture, middle, above in zip(pictures, middles, (True, False), strict=True):
        edges = [np.abs(picture[row, 2, :3] - middle).max() for row in (1, -2)]
        assert bool(edges[0] > edges[1] + 0.05) is above, edges
    tab.close()


@in_browser
def test_without_scripts_there_are_still_curves_and_tables(chromium, shown):
    tab = chromium.open(shown.as_uri(), scripts=False)
    assert pixels(tab.screenshot("#curves"), "#0072b2") > 400
    assert tab.js("document.querySelector('#microscope').hidden") is True
    assert "needs JavaScript" in tab.js("document.querySelector('#tokens-part').innerText")
    tab.close()


@in_browser
def test_a_long_run_makes_a_page_that_is_small_and_opens_at_once(chromium, tmp_path):
    words = [" the", " sum", " is", " wait", " 12", ",", " so", " we", " add", "\n"]
    lines = [line(5 * i + 1, [words[(i + j) % 10] for j in range(128)], reward=float(i % 2)) for i in range(200)]
    file = page_of(tmp_path, lines, steps=1000)
    assert file.stat().st_size < 5e6
    tab = chromium.open(file.as_uri())
    assert tab.loading < 2.0
    assert tab.js("document.querySelectorAll('#tokens .t').length") == 128
    assert "mean of 7 steps" in tab.js("document.querySelector('#curves').textContent")
    tab.close()
