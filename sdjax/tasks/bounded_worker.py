"""A program, not a module to import: judges answers that may take for ever; one JSON line in, one out.

It runs in a process of its own because neither a large power nor sympy can be interrupted from Python: only the process
can be ended.  It imports nothing of sdjax, so that it never touches an accelerator.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys


def limit_memory(size: int = 8 * 2**30) -> None:
    """Large powers fill the memory before they fill the time."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def end_with_parent() -> None:
    """Linux ends this process with the one that started it: a judge that never comes back would outlive it."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def same_maths(gold: str, answer: str) -> float:
    """1 if math-verify takes both for the same."""
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return float(all(parsed) and verify(*parsed, timeout_seconds=None))


def family_score(family: str, options: dict, answer: str, entry: dict) -> float:
    """What a family of reasoning-gym gives an answer."""
    return float(family_dataset(family, json.dumps(options)).score_answer(answer, entry))


@functools.cache
def family_dataset(family: str, options: str):
    """A family's scorer; options as JSON."""
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0, size=1, **json.loads(options))


JUDGES = {"same_maths": same_maths, "family_score": family_score}

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    limit_memory()
    end_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    name, warm_up = sys.argv[1], json.loads(sys.argv[2])
    JUDGES[name](*warm_up)  # the imports, before the caller starts its clock
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        score = 0.0
        with contextlib.suppress(Exception):  # what a judge trips over does not count as right
            score = JUDGES[name](*json.loads(line))
        print(json.dumps(score), file=replies, flush=True)
