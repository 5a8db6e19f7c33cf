"""Call a method again and again on a daemon thread, for as long as its object lives."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class Ticker:
    """A daemon thread that calls a bound method every `interval_s` seconds until `stop`.

    It holds the method weakly, so an object that nobody uses any more takes its thread with it.
    """

    def __init__(self, method: Callable[[], None], interval_s: float) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s must be > 0 seconds, got {interval_s}")
        self._method = weakref.WeakMethod(method)
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainpilot-ticker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            method = self._method()
            if method is None:
                return
            method()
            del method

    def stop(self) -> None:
        """End the thread; wait for a call under way, but no longer than a second."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
