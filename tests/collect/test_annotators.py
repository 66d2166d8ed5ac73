"""Marked spans: what rules and replies name, which tokens touch them, and the controls of the same size."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from sdjax.collect import annotators
from sdjax.collect.annotators import Span
from sdjax.collect.rollouts import RolloutError
from sdjax.engine import policies
from sdjax.engine.policies import Sample
from sdjax.types import Rollout


def said(text, reward=1.0):
    tokens = tuple(tiny.tokenizer().encode(text, add_special_tokens=False))
    return Rollout(tiny.TASK.train[0], tokens, (0.0,) * len(tokens), text, 0, reward=reward)


def test_segments():
    text = "First we add. Then 3.5 is left!\n\n So: check it"
    assert [text[a:b] for a, b in annotators.segments(text)] == ["First we add.", "Then 3.5 is left!", "So: check it"]
    assert annotators.segments("  \n ") == []


def test_rule_marks_errors_and_key_steps():
    mark = lambda text, reward: [
        (text[s.start : s.end], s.kind) for s in annotators.by_rule(None, [said(text, reward)], None)[0]
    ]
    assert mark("2 + 3 = 5. Then 5 * 4 = 21, so 21.", 0.0) == [("5 * 4 = 21", "arithmetic slip")]
    assert mark("I think.\nIt is 4", 0.0) == [("It is 4", "premature conclusion")]
    assert mark("Case a holds. Hello. 2 + 2 = 4. Check it.", 1.0) == [
        ("Case a holds.", "case split"),
        ("2 + 2 = 4.", "key formula"),
        ("Check it.", "final verification"),
    ]
    assert mark("red", 1.0) == [("red", "conclusion")]
    assert mark("", 1.0) == []


def test_partial_credit_is_right_from_the_threshold_on():
    row = said("2 + 2 = 5", 0.7)
    kinds = lambda success: [s.kind for s in annotators.by_rule(None, [row], None, success)[0]]
    assert kinds(0.5) == ["key formula"] and kinds(0.9) == ["arithmetic slip"]
    told = lambda success: annotators.request(row, success)[-1]["content"]
    assert "known to be correct" in told(0.5) and "known to be wrong" in told(0.9)
    assert "root causes" in told(0.9) and "decisive steps" in told(0.5)


def test_policy_as_annotator(monkeypatch):
    text, asked = "a b. c d. e f.", []
    reply = 'Sure: [{"first": 0, "last": 1, "kind": "sign"}, {"first": 9, "last": 9, "kind": "x"}, {"first": 2}, 3]'

    def sample(policy, contexts, key, sampling):
        asked.extend(contexts[:2])  # the others are padding
        return [[Sample((), (), reply, True)] for _ in contexts]

    monkeypatch.setattr(policies, "sample", sample)
    rows = [dataclasses.replace(said("red"), text=text), dataclasses.replace(said("red", 0.0), text=text)]
    assert annotators.by_policy()(tiny.environment(), rows, None) == [[Span(0, 9, "sign")]] * 2
    assert (
        "[1] c d." in asked[0][-1]["content"]
        and "correct" in asked[0][-1]["content"]
        and "wrong" in asked[1][-1]["content"]
    )
    with pytest.raises(
        RolloutError, match="annotator=nobody: there is no policy of this name; there are live, teacher"
    ):
        annotators.by_policy("nobody")(tiny.environment(), rows, None)
    assert annotators.parse('[{"first": 0, "last": 0, "kind": " "}]', text) == []
    assert annotators.parse("no idea", text) == annotators.parse("[{]", text) == []
    assert annotators.parse('[{"first": 0, "last": 2, "kind": "x"}]', text) == [Span(0, 14, "x")]
    assert annotators.parse(json.dumps([{"first": 0, "last": 0, "kind": "x"}] * 5), text) == [Span(0, 4, "x")] * 3


def test_marked_tokens():
    row = said("red blue red gold")
    mark = lambda *spans: annotators.marked(row, spans, tiny.tokenizer()).tolist()
    assert mark(Span(9, 12, "x")) == [False, False, True, False]
    assert mark(Span(2, 5, "x")) == [True, True, False, False]
    assert mark() == [False] * 4
    ended = dataclasses.replace(row, tokens=(*row.tokens, tiny.tokenizer().eos_token_id))
    assert annotators.marked(ended, [Span(0, 99, "x")], tiny.tokenizer()).tolist() == [True] * 4 + [False]


class Pieces:
    """A tokenizer that decodes number `i` to the `i`-th piece; special ones are left out where that is asked for."""

    def __init__(self, *pieces, special=()):
        self.pieces, self.special = pieces, special

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(self.pieces[t] for t in tokens if not (skip_special_tokens and t in self.special))


def touched(text, pieces, *spans, special=()):
    row = dataclasses.replace(said(""), text=text, tokens=tuple(range(len(pieces))))
    return annotators.marked(row, spans, Pieces(*pieces, special=special)).tolist()


def test_a_token_touches_a_span_that_it_shares_a_character_with():
    pieces = ("ab", "cd", "ef")
    assert touched("abcdef", pieces, Span(2, 4, "x")) == [False, True, False]
    assert touched("abcdef", pieces, Span(1, 3, "x")) == [True, True, False]
    assert touched("abcdef", pieces, Span(0, 1, "x"), Span(5, 6, "y")) == [True, False, True]
    assert touched("abcdef", pieces, Span(2, 2, "x")) == [False] * 3


def test_pieces_are_found_from_left_to_right_and_not_far_ahead():
    """Eight characters may lie between; a special token, a blank one, and one that the text spells otherwise touch nothing."""
    all_of = Span(0, 99, "x")
    assert touched("a" + " " * 8 + "b", ("a", "b"), all_of) == [True, True]
    assert touched("a" + " " * 9 + "b", ("a", "b"), all_of) == [True, False]
    assert touched("a b a", ("a", "a"), Span(4, 5, "x")) == [False, True]
    assert touched("ab", ("a", "?", " ", "b"), all_of) == [True, False, False, True]
    assert touched("<e>", ("<e>",), all_of, special=(0,)) == [False] and touched("<e>", ("<e>",), all_of) == [True]


def test_spans_of_a_reply_are_within_the_text_and_short():
    """At most three segments in a span, and three spans."""
    text = "a. b. c. d. e."
    entry = lambda first, last, kind="x": {"first": first, "last": last, "kind": kind}
    read = lambda *entries: [(text[s.start : s.end], s.kind) for s in annotators.parse(json.dumps(entries), text)]
    assert read(entry(0, 0), entry(4, 4), entry(1, 3, " y ")) == [("a.", "x"), ("e.", "x"), ("b. c. d.", "y")]
    assert read(entry(0, 3), entry(-1, 0), entry(3, 5), entry(2, 1), entry(0, 0, " ")) == []
    assert read(*[entry(i, i) for i in range(4)]) == [("a.", "x"), ("b.", "x"), ("c.", "x")]


def test_controls_mark_as_many_tokens_elsewhere():
    marks = np.arange(20) % 4 == 0
    chance = lambda: np.random.default_rng(0)
    control = lambda mask, share=0.25, marks=marks: annotators.ablated(marks, mask, share, chance())
    assert control("annotated") is marks and control("all").all()
    assert control("random").sum() == 5 and (control("random") & marks).any() and (control("random") & ~marks).any()
    assert control("inverted").sum() == 5 and not (control("inverted") & marks).any()
    assert control("random", 0.29).sum() == 5 and control("inverted", 1.0).sum() == 15
    for mask in ("random", "inverted", "all"):
        assert not control(mask, marks=marks & False).any()


def test_blank_lines_end_steps():
    pieces = ("one ", "word", ".\n", "\n", "two\n\nand ", "three", "\n \n", "four")
    assert annotators.step_numbers(range(8), Pieces(*pieces)).tolist() == [0, 0, 0, 0, 1, 2, 2, 3]
    assert annotators.step_numbers((), Pieces()).tolist() == []
