"""What each view reads before the completion: chats made from an example and from privileged text.

The student reads `question(example)`.  A teacher reads a chat whose last turn says more.  All functions are pure; the
privileged part of a turn is also kept under its key `privileged`, so that a chat that is too long loses that first.
"""

from __future__ import annotations

from sdjax.tasks.completions import split
from sdjax.types import Example, Messages


def question(example: Example) -> Messages:
    """The plain prompt: what the student reads, and nothing privileged."""
    return example.prompt


def rewrite_last(messages: Messages, content: str, privileged: str = "") -> Messages:
    """The chat with another last turn, whose `privileged` text may be cut when the chat is too long.

    Where `content` begins with the old last turn, that is kept under `question`: no cut ever touches it.
    """
    last, asked = {"role": messages[-1]["role"], "content": content}, messages[-1]["content"]
    if privileged:
        last |= {"privileged": privileged} | ({"question": asked} if content.startswith(asked) else {})
    return (*messages[:-1], last)


def with_solution(
    messages: Messages,
    solution: str,
    *,
    header: str = "Correct solution:",
    instruction: str = "Correctly solve the original question.",
) -> Messages:
    """The question, then a solution under a header, then what to do: SDPO's self-teacher prompt without feedback."""
    content = f"{messages[-1]['content']}\n\n{header}\n\n{solution}\n\n{instruction}"
    return rewrite_last(messages, content, solution)


def with_feedback(
    messages: Messages,
    *,
    solution: str | None = None,
    feedback: str | None = None,
    instruction: str = "Correctly solve the original question.",
) -> Messages:
    """The question, a solution if there is one, feedback on an earlier attempt if there is any, then what to do.

    Source: the self-teacher's prompt of Hübotter et al. 2026, arXiv:2601.20802, Table 2: the attempt itself is not
    shown (it biases the teacher, their Table 6).
    """
    blocks = [messages[-1]["content"]]
    if solution is not None:
        blocks.append(f"Correct solution:\n\n{solution}")
    if feedback is not None:
        blocks.append(f"The following is feedback from your unsuccessful earlier attempt:\n\n{feedback}")
    privileged = solution if solution is not None else feedback
    return rewrite_last(messages, "\n\n".join([*blocks, instruction]), privileged or "")


def with_reference(messages: Messages, solution: str) -> Messages:
    """The question, a fenced reference solution, and the request to derive the same answer in one's own words.

    Source: the teacher's prompt of Zhao et al. 2026 (OPSD), arXiv:2601.18734, section 3, paraphrased.
    """
    content = (
        f"{messages[-1]['content']}\n\nHere is a reference solution to this problem:\n"
        f"=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n\n"
        "After understanding the reference solution, do not copy or paraphrase it: derive the same final answer in your "
        "own words. You may explore and backtrack where needed."
    )
    return rewrite_last(messages, content, solution)


def with_demonstration(messages: Messages, demonstration: str) -> Messages:
    """The question, an example response, and the request to answer in one's own words.

    Source: the teacher's prompt of Shenfeld et al. 2026 (SDFT), arXiv:2601.19897, section 3, paraphrased.
    """
    content = (
        f"{messages[-1]['content']}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
        "Now answer with a response of your own, including the thinking process."
    )
    return rewrite_last(messages, content, demonstration)


def after_demonstrations(messages: Messages, demonstrations: Messages) -> Messages:
    """The chat preceded by worked demonstrations (user and assistant turns), after the system turn if there is one."""
    start = 1 if messages[0]["role"] == "system" else 0
    return (*messages[:start], *demonstrations, *messages[start:])


def with_suffix(messages: Messages, suffix: str) -> Messages:
    """The chat with `suffix` after its last turn, such as Qwen3's "/think" and "/no_think" switches."""
    last = messages[-1]
    content = f"{last['content']}{suffix}"
    return (*messages[:-1], {**last, "content": content})


def without_thinking(text: str) -> str:
    """A response without its thinking, by `sdjax.tasks.completions.split`; empty where the thinking does not end."""
    return split(text).answer


def attempt_text(text: str) -> str:
    """An attempt as others are shown it: without its thinking, and saying so where no answer was reached."""
    return without_thinking(text) or "(no answer was reached)"
