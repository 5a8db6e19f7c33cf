"""Read a clock that may fail, and go on with the system's own from its last good reading."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from numbers import Real


class TrustedClock:
    """Returns the seconds of a clock while these can be true: a finite number that never falls.

    A clock that raises, returns something else or goes back is replaced for good, with one warning, by
    `time.perf_counter`, which goes on from the last good reading.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s: float | None = None
        self._read_at_s = time.perf_counter()
        self._offset_s: float | None = None
        """What to add to the system's clock; `None` while the clock is trusted."""

    def __call__(self) -> float:
        """Return the seconds. Never raises, and never returns less than before."""
        now_s = time.perf_counter()
        if self._offset_s is None:
            fault, found_s = self._ask()
            if fault is None:
                self._last_s, self._read_at_s = found_s, now_s
                return found_s
            self._offset_s = (self._last_s or 0.0) - self._read_at_s
            warnings.warn(f"clock {fault}; from now on seconds are the system's", RuntimeWarning, stacklevel=2)
        return now_s + self._offset_s

    def _ask(self) -> tuple[str | None, float]:
        """Return what is wrong with the clock, if anything is, and its seconds."""
        try:
            found = self._clock()
            found_s = float(found) if isinstance(found, Real) else math.nan
        except (Exception, SystemExit) as error:  # whatever a clock does, the run goes on
            return f"raised {type(error).__name__}: {error}", 0.0
        if not math.isfinite(found_s):
            return f"must return a finite number of seconds, got {found!r}", 0.0
        if self._last_s is not None and found_s < self._last_s:
            return f"went back from {self._last_s:g} s to {found_s:g} s", 0.0
        return None, found_s


def trusted_clock(clock: Callable[[], float]) -> TrustedClock:
    """Return the clock as a trusted one; one that is already stays as it is."""
    return clock if isinstance(clock, TrustedClock) else TrustedClock(clock)
