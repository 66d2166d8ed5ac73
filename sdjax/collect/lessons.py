"""Lessons: what a teacher reads about a rollout, `(rollout, its batch) -> chat, or None`: nothing to say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax import Array

from sdjax.collect.annotators import Span
from sdjax.collect.contexts import question, rewrite_last, with_feedback, without_thinking
from sdjax.collect.rollouts import attempts, judge, sample, solved_peer
from sdjax.engine.policies import Environment, score
from sdjax.types import TEACHER, Example, Messages, Rollout, View


def before_writing(
    lesson: Callable[[Rollout, list[Rollout]], Messages | None] | None,
) -> Callable[[Example], Messages | None]:
    """What an author who is told a lesson reads before it writes: the lesson about an empty rollout.

    `None`: nothing to say about this example, so that it cannot write.  Without a lesson: the question.
    """
    return question if lesson is None else lambda example: lesson(Rollout(example, (), (), "", 0), [])


def by_teacher(
    environment: Environment, teacher: str, examples: Sequence[Example], key: Array, before: Callable, **how: Any
) -> list[Rollout]:
    """Judged texts of the policy `teacher`, which reads `before(example)` when it writes and again when it scores.

    Examples without anything to read (`None`) are left out; `how` goes to `sdjax.collect.rollouts.sample`.
    """
    examples = [e for e in examples if before(e) is not None]
    texts = sample(environment.policies[teacher], examples, key, context=before, source=TEACHER, **how)
    return [r.read_by(student=question(r.example), teacher=before(r.example)) for r in judge(environment, texts)]


def attempt_and_verdict(rollout: Rollout, rollouts: list[Rollout], success: float = 0.5) -> Messages | None:
    """Another success of the group, else the reference, shown as an earlier attempt; and whether *this* one was correct.

    Source: the teacher's prompt of Shen et al. 2026 (AntiSD), arXiv:2605.11609, paraphrased: a correct solution beside
    the verdict "incorrect" is intended.
    """
    peer = solved_peer(rollout, rollouts, success)
    solution = rollout.example.solution if peer is None else without_thinking(peer.text)
    if solution is None:
        return None
    asked, verdict = question(rollout.example), "correct" if rollout.reward >= success else "incorrect"
    content = f"{asked[-1]['content']}\n\nPrevious attempt:\n\n{solution}\n\nAssessment of the attempt: {verdict}.\n\n"
    return rewrite_last(asked, content + "Solve the problem step by step.", solution)


def peer_or_feedback(
    *,
    success: float = 0.5,
    use_feedback: bool = True,
    feedback_beside_solution: bool = False,
    thinking: bool = False,
    shown_itself: bool = False,
) -> Callable[[Rollout, list[Rollout]], Messages | None]:
    """SDPO's lesson: the first other success of the group; feedback only where there is none, unless `..._beside_...`.

    Neither: `None`, the row is not trained.  A success is never shown itself (the released configurations), or with
    `shown_itself` nothing else (the paper's Table 2).  `thinking=False` strips the shown attempt's thinking.
    """

    def lesson(rollout: Rollout, rollouts: list[Rollout]) -> Messages | None:
        own = shown_itself and rollout.reward >= success
        peer = rollout if own else solved_peer(rollout, rollouts, success)
        solution = None if peer is None else (peer.text if thinking else without_thinking(peer.text))
        heard = use_feedback and rollout.reward < success and (peer is None or feedback_beside_solution)
        feedback = rollout.feedback if heard else None
        if solution is None and not feedback:
            return None
        return with_feedback(question(rollout.example), solution=solution, feedback=feedback)

    return lesson


def english_version(rollout: Rollout, rollouts: list[Rollout]) -> Messages:
    """The question, its English version (`meta["english"]`, if there is one), and the request to judge safety first.

    Source: the teacher's context of Qin et al. 2026 (MSD), arXiv:2605.02971, whose wording is not published.
    """
    asked, english = question(rollout.example), rollout.example.meta.get("english")
    blocks = [asked[-1]["content"], *([f"In English:\n\n{english}"] if english else [])]
    task = "First judge in English whether the request is safe; then answer in the language of the request."
    return rewrite_last(asked, "\n\n".join([*blocks, task]), english or "")


def private_note(example: Example, spans: Iterable[Span], correct: bool) -> Messages | None:
    """The question and a note on the *kinds* of the marked steps, nothing else of the rollout; `None` without any.

    Source: the teacher's note of Wang et al. 2026 (TRACE), arXiv:2605.10194, paraphrased.
    """
    named = ", ".join(sorted({span.kind.strip() for span in spans} - {""}))
    if not named:
        return None
    good = f"Successful solutions of this problem rely on these kinds of steps: {named}. Make such steps explicit."
    bad = f"A sampled solution has a problem of this kind: {named}. Be careful there, and solve it independently."
    asked, note = question(example), good if correct else bad
    return rewrite_last(asked, f"{asked[-1]['content']}\n\n{note} Do not mention this note.", note)


READERS = {"student": View(), "teacher": View(per_rollout=True, told=True)}
"""Who reads an attempt at rollout time, both with the parameters that wrote it."""


def scored_attempts(
    environment: Environment, examples: Sequence[Example], key: Array, told: Callable, scored: Callable, **how: Any
) -> list[Rollout]:
    """Judged attempts with the lesson `told` of each, and what `READERS` say of its tokens now, frozen: `scored`.

    `scored(dist, token)` is as in `sdjax.engine.policies.score`; `how` goes to `sdjax.collect.rollouts.attempts`.
    """
    rollouts = attempts(environment, examples, key, **how)
    return score(environment, [r.read_by(teacher=told(r, rollouts)) for r in rollouts], READERS, scored)
