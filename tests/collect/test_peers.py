"""What an attempt's teacher is shown of its peers: whose, of which outcome, under which title, and never itself."""

import dataclasses
import random

import pytest
import tiny

from sdjax.collect.peers import FAILURE, SECOND, SUCCESS, by_outcome, last_paragraph, of_equal_size, peers

R1, W1, R2, W2, R3 = (
    tiny.row(text, reward, tokens=(i,), feedback=f"remark on {text}")
    for i, (text, reward) in enumerate(
        [("right one", 0.5), ("wrong one", 0.4), ("right two", 1.0), ("wrong two", 0.0), ("right three", 1.0)]
    )
)
GROUP = [R1, W1, R2, W2, R3]
NEXT = [dataclasses.replace(r, group=1, text=f"foreign {r.text}") for r in GROUP]


def shown(lesson, rollout, rollouts=GROUP):
    """What the last turn says besides the question and the request."""
    told = lesson(rollout, rollouts)
    if told is None:
        return None
    content, question = told[-1]["content"], rollout.example.prompt[-1]["content"]
    assert content.startswith(question) and content.endswith("\n\nCorrectly solve the original question.")
    inner = content.removeprefix(question + "\n\n").removesuffix("\n\nCorrectly solve the original question.")
    assert told[-1]["privileged"] == inner
    return inner


def test_outcomes_by_a_threshold_that_counts_as_reached():
    chance = lambda: random.Random(0)
    pick = lambda rows, most, failure: [(t, r.text) for t, r in by_outcome(rows, chance(), 0.5, most, failure)]
    assert pick([R1, R2, R3], 2, "always") == [(SUCCESS, "right one"), (SECOND, "right two")]
    assert pick([R1, W1], 1, "always") == [(SUCCESS, "right one"), (FAILURE, "wrong one")]
    assert pick([R1, W1], 1, "without_success") == [(SUCCESS, "right one")]
    assert pick([W1], 1, "without_success") == [(FAILURE, "wrong one")]
    assert pick([R1, W1], 1, "never") == [(SUCCESS, "right one")] and pick([W1], 1, "never") == []


def test_controls_show_as_many():
    picks = [(SUCCESS, R1), (FAILURE, W1)]
    same = of_equal_size(picks, GROUP, random.Random(0), "successes", 0.5)
    assert [(t, r.text) for t, r in same] == [(SUCCESS, "right one"), (SECOND, "right two")]
    some = of_equal_size(picks, GROUP, random.Random(0), "random", 0.5)
    assert len(some) == 2 and {t for t, _ in some} == {"Another attempt:"}
    assert len(of_equal_size(picks, GROUP[:1], random.Random(0), "random", 0.5)) == 1


def test_controls_in_a_lesson():
    """As many as the lesson would show, any of the group or the first successes; never the attempt itself."""
    titles = lambda **how: [block.split("\n\n") for block in shown(peers(**how), W1, GROUP).split("\n\n\n")]
    ((*blocks,),) = titles(shown="successes")
    assert blocks == [SUCCESS, "right one", SECOND, "right two", SECOND, "right three"]
    ((*blocks,),) = titles(shown="random")
    assert blocks[::2] == ["Another attempt:"] * 3
    assert len({*blocks[1::2]}) == 3 and {*blocks[1::2]} <= {r.text for r in GROUP if r is not W1}


def test_the_lesson_of_each_attempt():
    lesson = peers()
    assert shown(lesson, R1, [R1, W1, R2]) == f"{SUCCESS}\n\nright two\n\n{FAILURE}\n\nwrong one"
    assert shown(lesson, W1, [R1, W1, R2]) == f"{SUCCESS}\n\nright one\n\n{SECOND}\n\nright two"
    assert shown(peers(another=False), W1, [R1, W1, R2]) == f"{SUCCESS}\n\nright one"
    assert shown(peers(failure="never"), R1, [R1, W1, R2]) == f"{SUCCESS}\n\nright two"
    assert shown(lesson, R1, [R1]) is None


def test_feedback_is_for_failures_whose_peers_show_no_success():
    lesson, remark = peers(), "Feedback on your unsuccessful earlier attempt:\n\nremark on wrong one"
    assert shown(lesson, W1, [W1]) == remark
    assert shown(lesson, W1, [W1, W2]) == f"{FAILURE}\n\nwrong two\n\n{remark}"
    assert "remark" not in shown(lesson, W1, [W1, R1])
    assert shown(peers(use_feedback=False), W1, [W1]) is None
    assert shown(lesson, dataclasses.replace(R1, reward=0.5), [W1]) == f"{FAILURE}\n\nwrong one"  # a success has none


def test_other_groups_are_seen_by_the_control_only():
    assert "foreign" not in shown(peers(), W1, GROUP + NEXT)
    assert shown(peers(shown="unrelated", failure="never"), W1, GROUP + NEXT) == (
        f"{SUCCESS}\n\nforeign right one\n\n{SECOND}\n\nforeign right two"
    )
    # The last group sees the first.
    assert "foreign" not in shown(peers(shown="unrelated"), NEXT[1], GROUP + NEXT)
    assert shown(peers(shown="unrelated", use_feedback=False), W1, GROUP) is None


def test_thinking_is_shown_on_request_and_never_alone():
    thought, lost = tiny.row("<think>hm</think>yes", 1.0, tokens=(9,)), tiny.row("<think>hm", 1.0, tokens=(8,))
    assert shown(peers(), W1, [W1, lost, thought]) == f"{SUCCESS}\n\nyes"
    assert shown(peers(thinking=True), W1, [W1, lost, thought]) == f"{SUCCESS}\n\n<think>hm</think>yes"


RIGHT = "Summary of a successful attempt:"


@pytest.mark.parametrize(
    "summarised, wanted",
    [
        ("successes", [f"{RIGHT}\n\nright {number}" for number in ("one", "two", "three")]),
        ("failures", ["Summary of a failed attempt:\n\nwrong two"]),
        ("all", [f"{RIGHT}\n\nright one", f"{RIGHT}\n\nright two", "Summary of a failed attempt:\n\nwrong two"]),
    ],
)
def test_summaries(summarised, wanted):
    lesson = peers(summaries=3, summarised=summarised, use_feedback=False)
    long = [dataclasses.replace(r, text=f"first\n\n{r.text}") for r in GROUP]
    assert shown(lesson, long[1], long) == "\n\n".join(wanted)
    assert last_paragraph("a\n\nb\n\nc\n") == "c" and last_paragraph("a") == "a"


def test_chance_is_the_attempts_own():
    lesson, failures = peers(), [tiny.row(f"wrong {i}", 0.0, tokens=(10 + i,)) for i in range(20)]
    assert shown(lesson, R1, [R1, *failures]) == shown(lesson, R1, [R1, *failures])
    assert len({shown(lesson, dataclasses.replace(R1, tokens=(i,)), [R1, *failures]) for i in range(8)}) > 2
