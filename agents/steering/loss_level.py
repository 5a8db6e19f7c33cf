"""Keep the recent level of a noisy loss, and where it last reached a new low."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

SMOOTHING = 3
"""Intervals in a smoothed loss."""
LEVEL = 5
"""Intervals whose median loss is the recent level."""
WINDOW = 13
"""Intervals that tell how much losses swing."""
UNJUDGED = 0.5
"""A rise by this share of the level is one even where nothing is known of how losses swing."""
MARGIN = 0.5
"""A new low lies so many spreads below the lowest, or chance would set one now and then."""


@dataclass(kw_only=True)
class LossLevel:
    """The training losses of the newest intervals, and what they say."""

    losses: list[float] = field(default_factory=list)
    """Means of the intervals, in nats/token, newest last."""
    errors: list[float] = field(default_factory=list)
    """Their standard errors."""
    lowest: float | None = None
    """Lowest smoothed loss so far."""
    paid_scale: float = 1.0
    """Learning-rate scale under which it was reached."""

    def take(self, loss: float, error: float, scale: float) -> None:
        """Take in an interval, its loss and standard error, and the learning-rate scale that held."""
        self.losses = [*self.losses, loss][-WINDOW:]
        self.errors = [*self.errors, error if math.isfinite(error) else 0.0][-WINDOW:]
        newest = self.losses[-SMOOTHING:]
        smoothed = sum(newest) / len(newest)
        if self.lowest is None or smoothed < self.lowest - MARGIN * self.spread():
            self.lowest, self.paid_scale = smoothed, scale

    def level(self) -> float | None:
        """Return the recent level; `None` before the first interval."""
        return median(self.losses[-LEVEL:]) if self.losses else None

    def spread(self) -> float:
        """Return by how much losses differ by chance: what they say of themselves, or how they swing, if more."""
        return max(median(self.errors), self._swing())

    def _swing(self) -> float:
        """Return the standard deviation that neighbouring losses show; 0 for fewer than four."""
        swings = [abs(after - before) for before, after in pairwise(self.losses)]
        return fmean(swings) * math.sqrt(math.pi) / 2 if len(swings) >= 3 else 0.0

    def rise(self, loss: float, spreads: float, share: float) -> float:
        """Return how far a loss lies above the level, in units of so many spreads and at least this share of it."""
        level = self.level()
        if level is None:
            return 0.0
        if median(self.errors) > 0:
            least = max(spreads * self.spread(), share * abs(level))
        elif swing := self._swing():
            least = max(student(spreads, 0.7 * (len(self.losses) - 1)) * swing, share * abs(level))
        else:
            least = UNJUDGED * abs(level)
        return (loss - level) / max(least, 1e-12)


def student(spreads: float, degrees: float) -> float:
    """Return what so many standard deviations become where the deviation itself comes from few values.

    Student's t at the normal quantile's probability, by the first terms of its expansion (Abramowitz and Stegun 1964,
    26.7.5).
    """
    z = spreads
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
