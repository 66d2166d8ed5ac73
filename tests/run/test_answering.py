"""Answers survive any end: from every broken file the same ones come out; caps are judged as cut-off texts."""

import dataclasses
import json

import jax
import pytest
import tiny

from sdjax.engine.protocol import Protocol
from sdjax.engine.tokens import decode_text
from sdjax.run.folder import RunError
from sdjax.run.measuring import answering, measures
from sdjax.run.measuring.answering import Answer, all_answers, span
from sdjax.tasks import maths
from sdjax.tasks.judging import reads_answers
from sdjax.types import Example, Verdict

EXAMPLES = tiny.TASK.test[:5]
PROTOCOL = Protocol(samples=2, temperature=1.0)


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(shapes=dataclasses.replace(tiny.SHAPES, rows=4))


def answers(policy, folder, protocol=PROTOCOL, verify=tiny.parity, examples=EXAMPLES, about="x", block=2):
    said = []
    found = all_answers(policy, examples, verify, protocol, folder, about={"of": about}, block=block, say=said.append)
    return found, said


def test_what_was_written_is_not_written_again_and_every_end_leads_to_the_same_answers(policy, tmp_path):
    whole, said = answers(policy, tmp_path / "whole")
    content = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    assert [len(own) for own in whole] == [2] * 5 and said[-1].startswith("10 of 10 answers")
    assert "left" in said[0] and len({tuple(a.tokens) for own in whole for a in own}) > 5
    again, said = answers(policy, tmp_path / "whole", block=3)  # the blocks stay those of the first call
    assert said == ["10 of 10 answers were written before"]
    assert [[a.tokens for a in own] for own in again] == [[list(a.tokens) for a in own] for own in whole]
    lines = content.splitlines(keepends=True)
    for end in (0, 7, len(lines[0]), len(lines[0]) + 9, len(b"".join(lines[:3])), len(content) - 1):
        folder = tmp_path / f"cut-{end}"
        folder.mkdir()
        (folder / "evaluation.json").write_bytes((tmp_path / "whole" / "evaluation.json").read_bytes())
        (folder / "answers.jsonl").write_bytes(content[:end])
        found, _ = answers(policy, folder)
        assert [[(a.text, *a.tokens, a.reward) for a in own] for own in found] == [
            [(a.text, *a.tokens, a.reward) for a in own] for own in whole
        ]
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert {row["problem"] for row in rows} == {*range(5)}


def test_a_block_that_fails_leaves_those_before_it(policy, tmp_path):
    asked = []

    def failing(example, text):
        asked.append(example.id)
        if len(asked) > 5:
            raise KeyboardInterrupt
        return Verdict(0.0)

    with pytest.raises(KeyboardInterrupt):
        answers(policy, tmp_path, verify=failing)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    found, said = answers(policy, tmp_path)
    assert said[0] == "4 of 10 answers were written before" and len(found) == 5


def test_another_evaluation_or_a_damaged_file_is_refused(policy, tmp_path):
    answers(policy, tmp_path)
    with pytest.raises(RunError, match="holds another evaluation .of differ.: name another folder with --out"):
        answers(policy, tmp_path, about="y")
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace('"id"', '"di"'), *lines[2:]]) + "\n")
    with pytest.raises(RunError, match="answers.jsonl, line 2 is damaged"):
        answers(policy, tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match="evaluation.json is damaged"):
        answers(policy, tmp_path)


def test_times_are_for_people():
    assert [span(s) for s in (4.4, 200, 7500)] == ["4 s", "3 min", "2 h 5 min"]


# ---- measures -------------------------------------------------------------------------------------------------------


def ask(answer):
    return Example("q", ({"role": "user", "content": "w1 ?"},), answer)


def test_caps_judge_what_had_been_written_by_then():
    """A right answer that ends later is wrong unless it was marked before the cap; one that ends before is the same."""
    tokenizer = tiny.tokenizer()
    words = [t for t in tokenizer.get_vocab() if t.isalnum()][:6]
    ids = tokenizer.convert_tokens_to_ids(words)

    @reads_answers
    def verify(example, text):
        return Verdict(float(example.answer in text))

    text = decode_text(tokenizer, ids)
    own = [[Answer(text, ids, True, 1.0), Answer(text, ids[:2], True, 1.0)]]
    policy = tiny.policy()
    found = measures.capped(policy, [ask(words[0])], own, verify, 3)
    assert [a.reward for a in found[0]] == [0.0, 1.0] and len(found[0][0].tokens) == 3 and not found[0][0].finished
    plain = lambda example, text: Verdict(float(example.answer in text))  # does not read answers: asked all the same
    assert [measures.capped(policy, [ask(words[4])], own, plain, cap)[0][0].reward for cap in (3, 5, 6)] == [0, 1, 1]


def test_measures_of_known_answers():
    one = lambda text, reward, tokens=(1, 2): Answer(text, tokens, True, reward)
    own = [
        [one(r"\boxed{1/2}", 1.0), one(r"\boxed{0.5}", 1.0), one(r"\boxed{3}", 0.0), one("wait, hmm", 0.0, (1,) * 6)],
        [one(r"\boxed{8}", 0.0), one(r"\boxed{7}", 1.0), one(r"\boxed{8}", 0.0), one(r"\boxed{8.0}", 0.0)],
    ]
    found = measures.measures([ask("0.5"), ask("7")], own, same=maths.equal)
    assert (found.average.value, found.passed[4].value, found.majority[4].value) == (0.375, 1.0, 0.5)
    assert found.passed[2].value == pytest.approx(((1 - 1 / 6) + 3 / 6) / 2)
    assert found.shares == (0.5, 0.25) and found.length.value == 2.5 and found.hedges.value > 0
    named = found.as_json()["measures"]
    assert {"avg@4", "pass@2", "pass@4", "maj@4"} <= {*named} and json.dumps(found.as_json(), allow_nan=False)
    assert dict(measures.lines(found))["avg@4"].startswith("37.5 %")
    gap = measures.difference(found, measures.measures([ask("0.5"), ask("7")], own[::-1], same=None))
    assert gap.value == 0.0 and gap.low < 0 < gap.high


def test_progress_says_how_long_the_rest_takes(monkeypatch):
    said, clock = [], iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(answering.time, "monotonic", lambda: next(clock))
    progress = answering.Progress(4, 2, 1, said.append)
    progress.went_on(1, [[Answer("", (1,) * 50, True, 0.0)]])
    progress.went_on(2, [])
    assert said == [
        "2 of 8 answers were written before",
        "4 of 8 answers, 5 tokens/s, about 20 s left",
        "8 of 8 answers, 2 tokens/s in 20 s",
    ]


def test_a_run_measures_by_the_same_protocol(policy):
    found, more = measures.sampled_accuracy(policy, EXAMPLES, tiny.parity, PROTOCOL)
    own = answering.answered(policy, EXAMPLES, tiny.parity, PROTOCOL, jax.random.key(PROTOCOL.seed))
    right = [answer.right() for answers in own for answer in answers]
    assert found.right == tuple(right) and found.solved == pytest.approx(sum(right) / 10)
    assert found.examples == 5 and {*more} == {"pass@2"} and more["pass@2"] >= found.solved
