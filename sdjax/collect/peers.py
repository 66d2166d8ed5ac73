"""What an attempt's teacher reads of its peers: successes, a failure, summaries, and controls of the same size (MOPD)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from sdjax.collect.contexts import question, rewrite_last, without_thinking
from sdjax.engine.policies import grouped
from sdjax.types import Messages, Rollout

SUCCESS, SECOND, FAILURE = (
    "Correct solution:",
    "Another correct solution:",
    "Known failed solution, do not repeat its mistake:",
)
"""The titles of what is shown."""

Failures = Literal["always", "without_success", "never"]
Shown = Literal["peers", "random", "unrelated", "successes"]
Summarised = Literal["successes", "failures", "all"]
Picks = list[tuple[str, Rollout]]


def by_outcome(others: Sequence[Rollout], chance: random.Random, success: float, most: int, failure: Failures) -> Picks:
    """The first `most` successes, and a random failure if `failure` asks for one: `(title, rollout)`."""
    right = [r for r in others if r.reward >= success][:most]
    wrong = [r for r in others if r.reward < success]
    if failure == "never" or (failure == "without_success" and right):
        wrong = []
    return [*zip((SUCCESS, SECOND), right, strict=False), *([(FAILURE, chance.choice(wrong))] if wrong else [])]


def of_equal_size(
    picks: Picks, others: Sequence[Rollout], chance: random.Random, shown: Shown, success: float
) -> Picks:
    """As many attempts, but any of the group, or only successes; fewer where there are not so many."""
    if shown == "random":
        return [("Another attempt:", r) for r in chance.sample(others, min(len(picks), len(others)))]
    right = [r for r in others if r.reward >= success][: len(picks)]
    return [(SECOND if i else SUCCESS, r) for i, r in enumerate(right)]


def last_paragraph(text: str) -> str:
    """The end of a solution, where it usually says what it comes to: MOPD's summaries, reconstructed."""
    return text.strip().rsplit("\n\n", 1)[-1]


def peers(
    *,
    success: float = 0.5,
    another: bool = True,
    failure: Failures = "always",
    use_feedback: bool = True,
    thinking: bool = False,
    shown: Shown = "peers",
    summaries: int = 0,
    summarised: Summarised = "all",
    summary: Callable[[str], str] = last_paragraph,
) -> Callable[[Rollout, list[Rollout]], Messages | None]:
    """MOPD's lesson: the first success and the next one, a random failure; feedback only where there is no success.

    An attempt is never shown itself.  Without any of them: `None`.  `shown` may be a control with as many attempts:
    random ones of the group, those of the batch's next group, or successes only.  With `summaries` it is at most so
    many peers' summaries instead.  Chance comes from the attempt itself, so that replays agree.
    """

    clean = lambda r: r.text if thinking and without_thinking(r.text) else without_thinking(r.text)

    def summed_up(others: Sequence[Rollout]) -> Picks:
        wanted = {"successes": (True,), "failures": (False,), "all": (True, False)}[summarised]
        some = [r for r in others if (r.reward >= success) in wanted][:summaries]
        return [
            ("Summary of a successful attempt:" if r.reward >= success else "Summary of a failed attempt:", r)
            for r in some
        ]

    def picked(rollout: Rollout, rollouts: list[Rollout]) -> Picks:
        chance = random.Random(f"{rollout.example.id} {rollout.tokens}")
        others = [r for r in rollouts if r.group == rollout.group and r is not rollout]
        if shown == "unrelated":
            groups = grouped(rollouts)
            following = [*groups, *groups][list(groups).index(rollout.group) + 1]
            others = groups[following] if following != rollout.group else []
        others = [r for r in others if clean(r)]  # what never reached an answer has nothing to show
        if summaries:
            return summed_up(others)
        picks = by_outcome(others, chance, success, 2 if another else 1, failure)
        return of_equal_size(picks, others, chance, shown, success) if shown in ("random", "successes") else picks

    def lesson(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
        picks = picked(rollout, rollouts)
        said = lambda r: summary(clean(r)) if summaries else clean(r)
        blocks = [f"{title}\n\n{said(r)}" for title, r in picks]
        heard = use_feedback and rollout.reward < success and rollout.feedback
        if heard and not any(r.reward >= success for _, r in picks):
            blocks.append(f"Feedback on your unsuccessful earlier attempt:\n\n{rollout.feedback}")
        if not blocks:
            return None
        messages, told = question(rollout.example), "\n\n".join(blocks)
        content = f"{messages[-1]['content']}\n\n{told}\n\nCorrectly solve the original question."
        return rewrite_last(messages, content, told)

    return lesson
