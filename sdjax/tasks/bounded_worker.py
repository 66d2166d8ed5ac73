"""A program, not a module to import: judges answers that may take for ever; one JSON line in, one out.

It runs in processes of its own because neither a large power nor sympy can be interrupted from Python: only a process can
be ended.  It imports nothing of sdjax, so that it never touches an accelerator.  The process that is started imports the
libraries once and then only forks: one judging process for each socket that it is sent, which takes milliseconds.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import sys


def limit_memory(size: int = 8 * 2**30) -> None:
    """Large powers fill the memory before they fill the time."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def end_with_parent() -> None:
    """Linux ends this process with the one that forked it: a judge that never comes back would outlive it.

    Only where the parent has one thread: the signal follows the *thread* that forked.
    """
    with contextlib.suppress(OSError, AttributeError):  # not on every system
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# ---- judges ---------------------------------------------------------------------------------------------------------


def same_maths(gold: str, answer: str) -> float:
    """1 if both are the same mathematics: numbers and expressions exactly, all else as math-verify compares it."""
    from math_verify import parse, verify
    from sympy import Expr

    found = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    if not all(found):
        return 0.0
    one, other = (exact(parsed[0]) for parsed in found)
    if isinstance(one, Expr) and isinstance(other, Expr):
        return float(same_expression(one, other))
    how = {"timeout_seconds": None, "allow_set_relation_comp": True, "float_rounding": 12}
    return float(verify(one, other, **how) or verify(other, one, **how))


def exact(expression):
    """A sympy expression with its decimals as fractions: a rounded decimal is not the number that was rounded."""
    from sympy import Basic, Float, Rational

    if not isinstance(expression, Basic):
        return expression
    return expression.xreplace({each: Rational(str(each)) for each in expression.atoms(Float)})


def same_expression(one, other) -> bool:
    """Whether two expressions are equal for all values of their symbols; numbers to 60 digits of the larger one."""
    from sympy import E, I, Symbol, simplify

    one, other = (each.doit() for each in (one, other))
    # e and i are letters in some answers and constants in others.
    letters = {Symbol("e"): E, Symbol("i"): I}
    one, other = (each.subs({s: v for s, v in letters.items() if s in each.free_symbols}) for each in (one, other))
    if one == other:
        return True
    if one.free_symbols != other.free_symbols and not (one - other).free_symbols:
        return False
    difference = one - other
    if difference.is_Rational:
        return bool(difference == 0)
    if difference.is_number:
        size = max(abs(one.evalf(20)), abs(other.evalf(20)))
        return bool(abs(difference.evalf(60, maxn=400)) < size * 10**-50)
    return bool(simplify(difference) == 0)


def family_score(family: str, options: dict, answer: str, entry: dict) -> float:
    """What a family of reasoning-gym gives an answer."""
    return float(family_dataset(family, json.dumps(options)).score_answer(answer, entry))


@functools.cache
def family_dataset(family: str, options: str):
    """A family's scorer; options as JSON."""
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0, size=1, **json.loads(options))


JUDGES = {"same_maths": same_maths, "family_score": family_score}


# ---- processes ------------------------------------------------------------------------------------------------------


def serve(name: str, channel: socket.socket) -> None:
    """Answers requests `[seconds, arguments]`, one a line; a request that needs more processor time ends the process."""
    limit_memory()
    end_with_parent()
    requests, replies = channel.makefile("r"), channel.makefile("w")
    for line in requests:
        seconds, arguments = json.loads(line)
        score = 0.0
        # The signal's default is to end the process, whatever it is in the middle of.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        with contextlib.suppress(Exception):  # what a judge trips over does not count as right
            score = JUDGES[name](*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(score), file=replies, flush=True)


def main(name: str, warm_up: list) -> None:
    """Imports what the judge needs, says so, and forks a judging process for every socket received; ends with them."""
    logging.disable(logging.CRITICAL)
    control = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)  # whatever a library prints goes where nobody listens
    JUDGES[name](*warm_up)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    control.sendall(b"ready\n")
    while True:
        _, received, _, _ = socket.recv_fds(control, 1, 1)
        if not received:
            return
        if os.fork() == 0:
            control.close()
            serve(name, socket.socket(fileno=received[0]))
            os._exit(0)
        os.close(received[0])


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
