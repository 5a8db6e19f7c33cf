"""End a command on a signal as on Ctrl-C: one line, a last checkpoint where there are any, and exit code 128 + signal.

The first SIGINT, SIGTERM or SIGHUP raises `Stopped`; inside `postponed` only once the step under way has ended, though
not later than `PATIENCE_S`. A later signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
PATIENCE_S = 5.0
"""Seconds that a signal waits for a step to end; containers are killed ten seconds after it."""
BURST_S = 0.5
"""Seconds in which signals count as one: `timeout`, for one, sends its signal to the process and to its group."""


class Stopped(KeyboardInterrupt):
    """A signal has asked this process to end.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Stop:
    """The signals of this process so far."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = 0.0
        """When the first signal came, in seconds of the monotonic clock."""
        self.timer: Timer | None = None
        self.postpones = False
        self.raised = False

    def forget(self) -> None:
        """Begin anew, as if there had been no signal."""
        if self.timer is not None:
            self.timer.cancel()
        self.number, self.raised, self.postpones, self.timer = None, False, False, None

    def answer(self, number: int, _: FrameType | None) -> None:
        """Answer a signal; the handler of all of them."""
        now = time.monotonic()
        if self.number is None:
            self.number, self.at = number, now
            if not self.postpones:
                self.raise_if_asked()
            self.timer = Timer(PATIENCE_S, signal.raise_signal, (number,))
            self.timer.daemon = True
            self.timer.start()
        elif not self.raised and now - self.at >= PATIENCE_S:
            self.raise_if_asked()
        elif now - self.at >= BURST_S:
            os._exit(128 + number)

    def raise_if_asked(self) -> None:
        """Raise `Stopped` once, if there was a signal."""
        if self.timer is not None:
            self.timer.cancel()
        if self.number is not None and not self.raised:
            self.raised = True
            raise Stopped(self.number)


_stop = _Stop()


@contextmanager
def answered() -> Iterator[None]:
    """Answer signals in a `with` block. One that is ignored, as SIGHUP is under nohup, stays ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS if current_thread() is main_thread()}
    ours = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    _stop.forget()
    for number in ours:
        signal.signal(number, _stop.answer)
    try:
        yield
    finally:
        _stop.forget()
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """Let a signal wait in a `with` block until `raise_if_asked` is called, or the block ends."""
    _stop.postpones = True
    try:
        yield
        _stop.raise_if_asked()
    finally:
        _stop.postpones = False


def asked() -> bool:
    """Return whether a signal waits."""
    return _stop.number is not None


def raise_if_asked() -> None:
    """Raise `Stopped` if a signal waits."""
    _stop.raise_if_asked()
