"""MOPD (peers): SDPO whose teacher reads two successes and a failure of the same group."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from sdjax.contexts import question, rewrite_last, without_thinking
from sdjax.kernels.reductions import Reducer, token_mean
from sdjax.methods.sdpo import sdpo
from sdjax.types import Card, Messages, Method, Rollout

CARD = Card(
    paper="Yu et al. 2026, Multi-Rollout On-Policy Distillation via Peer Successes and Failures",
    arxiv="2605.12652",
    equation="w * JSD_alpha(student || teacher), alpha 0: KL(teacher||student), 1: KL(student||teacher)",
    student="question",
    teacher="question + two peers' successes + a peer's failure; parameters: EMA of the student",
    reduction="token mean over rows with a lesson",
    differences=(
        "the paper's and the README's context is 2 successes and 1 failure always (default)",
        "the code's default condition shows a failure only without a success (failure='without_success')",
        "reverse KL (alpha=1) for mathematics, Jensen-Shannon (default) for all else",
        "success is 0.5 in the configuration (default) and 1.0 in the README",
        "the random failure is drawn from a seed made of the attempt, so that replays agree",
    ),
)


def peers(
    *,
    success: float = 0.5,
    another: bool = True,
    failure: Literal["always", "without_success", "never"] = "always",
    use_feedback: bool = True,
    thinking: bool = False,
) -> Callable[[Rollout, list[Rollout]], Messages | None]:
    """MOPD's lesson: the first success and the next one, a random failure; feedback only where there is no success.

    An attempt is never shown itself.  Without any of them: `None`.
    """
    said = lambda r: r.text if thinking else without_thinking(r.text)

    def lesson(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
        others = [r for r in rollouts if r.group == rollout.group and r is not rollout]
        right = [r for r in others if r.reward >= success][: 2 if another else 1]
        wrong = [r for r in others if r.reward < success]
        if failure == "never" or (failure == "without_success" and right):
            wrong = []
        titles = ("Correct solution:", "Another correct solution:")
        blocks = [f"{title}\n\n{said(r)}" for title, r in zip(titles, right, strict=False)]
        if wrong:
            chosen = random.Random(f"{rollout.example.id} {rollout.tokens}").choice(wrong)
            blocks.append(f"Known failed solution, do not repeat its mistake:\n\n{said(chosen)}")
        if not right and use_feedback and rollout.reward < success and rollout.feedback:
            blocks.append(f"Feedback on your unsuccessful earlier attempt:\n\n{rollout.feedback}")
        if not blocks:
            return None
        messages, told = question(rollout.example), "\n\n".join(blocks)
        content = f"{messages[-1]['content']}\n\n{told}\n\nCorrectly solve the original question."
        return rewrite_last(messages, content, told)

    return lesson


def mopd(
    *,
    group_size: int = 8,
    another: bool = True,
    failure: Literal["always", "without_success", "never"] = "always",
    use_feedback: bool = True,
    thinking: bool = False,
    success: float = 0.5,
    alpha: float = 0.5,
    top_k: int | None = 100,
    rest: bool = True,
    ema_rate: float = 0.05,
    is_cap: float | None = 2.0,
    temperature: float = 1.0,
    reduce: Reducer = token_mean,
) -> Method:
    """Multi-rollout on-policy distillation (Yu et al. 2026, arXiv:2605.12652, Eq. 5-7): `sdpo` with `peers` as lesson.

    Not multi-teacher OPD, which goes by the same letters.  Token mean over rows with a lesson.

    Args:
      group_size: rollouts per prompt.
      another: show a second success.
      failure: when a failure is shown; "never" is the paper's positive variant.
      use_feedback: show feedback on the attempt where there is no success to show.
      thinking: show peers with their thinking.
      success: the least reward of a success.
      alpha: 0 KL(teacher||student), 1 KL(student||teacher), between: Jensen-Shannon.
      top_k: entries of the student's distribution that are kept; `None`: all.
      rest: the others in one bucket; without, they are dropped and the kept ones renormalised.
      ema_rate: the teacher's parameters follow the student's: 0 is frozen, 1 is live.
      is_cap: cap of the importance weight; `None`: no weight.
      temperature: of sampling.
      reduce: how tokens are averaged.
    """
    told = {"success": success, "another": another, "failure": failure, "use_feedback": use_feedback}
    how = {"group_size": group_size, "alpha": alpha, "top_k": top_k, "rest": rest, "ema_rate": ema_rate}
    lesson = peers(**told, thinking=thinking)
    return sdpo(**how, is_cap=is_cap, temperature=temperature, lesson=lesson, reduce=reduce)
