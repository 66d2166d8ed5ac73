"""SIGINT and SIGTERM: at once where nothing is lost, after the step where something would be."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from sdjax.devices.processes import everyone


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; `number` is which."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


class Interrupts:
    """While entered, SIGINT and SIGTERM raise `Interrupted`: at once, or inside `held()` only when `check()` is called.

    Inside `held()` a second SIGINT raises at once all the same.  An exception raised where Python cannot pass it on (a
    callback of the garbage collector) is lost, without the traceback that Python prints of such: `check()` raises it again.
    """

    asked: signal.Signals | None = None
    since: float | None = None
    waiting: bool = False

    def __enter__(self) -> Self:
        self.old: dict[int, Any] = {}
        self.hook, sys.unraisablehook = sys.unraisablehook, self.lost
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self.note)
        except ValueError:  # not the main thread: signals are somebody else's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler or signal.SIG_DFL)
        sys.unraisablehook = self.hook

    def lost(self, exception: Any) -> None:
        """What Python cannot pass on, handed to whom it was handed before, but for `Interrupted`."""
        if not issubclass(exception.exc_type, Interrupted):
            self.hook(exception)

    def note(self, number: int, _: Any) -> None:
        """The signals' handler."""
        again, self.asked = self.asked is not None, signal.Signals(number)
        self.since = self.since or time.monotonic()
        if not self.waiting or (again and number == signal.SIGINT):
            raise Interrupted(self.asked)
        if not again:
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{self.asked.name}: finishing this step, then saving; Ctrl-C again ends at once\n".encode())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal waits."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def check(self) -> None:
        """Raises `Interrupted` if a signal has been waiting."""
        if self.asked is not None:
            raise Interrupted(self.asked)

    def left(self, grace: float) -> float | None:
        """Seconds until `grace` seconds after the first signal to any process; `None` without a limit (0)."""
        if not grace:
            return None
        passed = 0.0 if self.since is None else time.monotonic() - self.since
        return max(0.0, grace - max(everyone(passed)))

    def noticed_by(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which checks first: for signals whose exception was lost in a callback of the collector's."""

        @functools.wraps(function)  # its attributes, too
        def checked(*arguments: Any) -> Any:
            self.check()
            return function(*arguments)

        return checked

    def agree(self) -> None:
        """A place where all processes of a run are; with one there is nothing to agree on."""


class SharedInterrupts(Interrupts):
    """The same among several processes: a signal to any of them is heard by all, at the next `agree()`, and only there.

    A process that stopped by itself would leave the others waiting for its part of a program.
    """

    heard: signal.Signals | None = None

    def note(self, number: int, _: Any) -> None:
        """The signals' handler."""
        again, self.heard = self.heard is not None, signal.Signals(number)
        self.since = self.since or time.monotonic()
        if again and number == signal.SIGINT:
            raise Interrupted(self.heard)
        if not again:
            os.write(2, f"\n{self.heard.name}: all processes finish this step, then save\n".encode())

    def agree(self) -> None:
        """Hears of signals to any process; every process must call it."""
        numbers = [int(n) for n in everyone(self.heard) if n is not None]
        if numbers and self.asked is None:
            self.asked = signal.Signals(numbers[0])
