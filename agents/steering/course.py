"""Rules against slow damage: what a run's own losses say about the learning rates that a policy chooses.

A learning rate that is too high or too low may lower the loss for long, so these rules do not wait for a spike. Up to
`SEARCH` of the budget a policy may look for its learning rate within bounds. From there on a change is on trial: where
the losses fall behind the forecast through those before it, the run goes back to the learning rate before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from trainpilot.agents.steering.power_law import PowerLaw

SEARCH = 0.2
"""Share of the budget in which a policy looks for its learning rate, and no change is on trial."""
LATE, LATER = 0.85, 0.125
"""Share of the budget from which a lower learning rate is not on trial, and the factor on the lowest one from there:
base schedules fall there too."""
LEAST = 0.5
"""Learning-rate scale below which a policy that begins at 1 may not go before the loss has stalled. For one that begins
below it is lower by the square of where it begins: it looks for its learning rate from below."""
MOST = 1.5
"""Factor on the larger of the starting scale and 1 above which a learning rate may not go before `PROBED` intervals,
nor where its curvature would be too much."""
PROBED, PROBES = 4, 3
"""Intervals after which probes are believed, and the number of the newest ones that are averaged."""
BEND = 0.01
"""Share of the loss that the curvature along a step may add to it above `MOST`. Where a policy that is trained raises
the learning rate, it is a twentieth of that; a tuned rate is at half of it where runs are short and steps are long."""
STALL = 8
"""Intervals without a new low of the smoothed loss that count as a stall."""
RISEN, RUNNING = 2.0, 3
"""Spreads above its lowest, in so many intervals running: then the smoothed loss has risen."""
RETREAT = 4.0
"""Divisor of a scale above the starting one under which the loss has risen."""
GRACE = 6
"""Intervals after a correction in which nothing is judged."""
TRIAL = 6
"""Intervals of a trial."""
NEWEST = 4
"""Newest losses that are held against the forecast."""
OCTAVES = 0.4
"""Change of the scale, in octaves, that is on trial."""
FITTED = 5
"""Fewer losses than these are not extrapolated."""
ERRORS = 1.5
"""Standard errors above the forecast with which a trial is lost. A trial that was lost by chance costs little: the
learning rate that it goes back to is one that the policy had chosen."""
ENDING = 0.75
"""Share of the budget from which an early end is no great loss."""
STOPPED = 0.01
"""Share of the loss by which it may still fall within a third of the run so far, and counts as having stopped."""


@dataclass(kw_only=True)
class Course:
    """How a run has learnt, and under which learning rates. A rollback restores it with the run."""

    start_scale: float | None = None
    """Learning-rate scale in force before the first decision; `None` before it."""
    tokens: list[float] = field(default_factory=list)
    """Tokens at the middle of each interval."""
    losses: list[float] = field(default_factory=list)
    """Mean losses of the intervals, in nats/token."""
    errors: list[float] = field(default_factory=list)
    """Their standard errors, or more if the losses swing."""
    scales: list[float] = field(default_factory=list)
    """Learning-rate scales in force."""
    settled: int = 0
    """Intervals before the end of the warm-up."""
    used: float = 0.0
    """Share of the budget used."""
    rate_before: float = 0.0
    """Learning rate of the newest interval, over scale and batch factor."""
    since_low: int = 0
    """Intervals since the smoothed loss reached a new low."""
    risen: int = 0
    """Intervals running in which the smoothed loss lay above its lowest by more than chance."""
    grace: int = 0
    """Intervals for which nothing is judged."""
    floor: float | None = None
    """Lowest learning-rate scale allowed, once the loss has stalled; half the starting scale before."""
    bends: list[float] = field(default_factory=list)
    """What curvature adds to the loss along a step by the newest probes, as a share of it, over the rate squared."""
    peak: float = 0.0
    """Highest learning rate so far, over scale and batch factor."""
    trusted: float | None = None
    """Scale that the policy settled on, from which changes are on trial; `None` before the end of the search."""
    trusted_until: int = 0
    """Intervals whose losses the forecast goes through."""

    def take(
        self, *, loss: float, error: float, tokens: float, scale: float, rate: float, used: float, new_low: bool,
        excess: float, bend: float | None,
    ) -> None:  # fmt: skip
        """Add an interval.

        Args:
            loss: Mean training loss, in nats/token.
            error: Its standard error, or more if the losses swing.
            tokens: Tokens at its middle.
            scale: Learning-rate scale in force.
            rate: Learning rate of its last step, over scale and batch factor.
            used: Share of the budget used at its end.
            new_low: Whether the smoothed loss reached a new low.
            excess: Smoothed loss above its lowest, in spreads.
            bend: What curvature adds to the loss along a step, as a share of it, over the learning rate squared.
        """
        if bend is not None and self.losses:  # the first step of all is of another kind
            self.bends = [*self.bends, bend][-PROBES:]
        self.peak = max(self.peak, rate)
        if rate > 1.01 * self.rate_before and len(self.losses) == self.settled:
            self.settled += 1
        self.rate_before = rate
        self.tokens.append(tokens)
        self.losses.append(loss)
        self.errors.append(error)
        self.scales.append(scale)
        self.used = used
        self.since_low = 0 if new_low else self.since_low + 1
        self.risen = self.risen + 1 if excess > RISEN and not self.grace else 0
        self.grace = max(self.grace - 1, 0)
        if self.since_low >= STALL:
            self.floor, self.since_low = LEAST * min(scale, self.floor or scale), 0

    def least(self) -> float:
        """Return the lowest learning-rate scale that is allowed now."""
        least = self.floor if self.floor is not None else LEAST * min(self.start_scale or 1.0, 1.0) ** 2
        return least * LATER if self.used >= LATE else least

    def too_high(self, scale: float, batch_size: int, start_batch_size: int) -> str | None:
        """Return why the learning rate may not rise to a scale; `None` where it may.

        The curvature is that of a step of the geometric mean of the two batches: that of one step grows with the batch
        under the neutral factor, and that of all steps of an interval does not depend on it.
        """
        most = MOST * max(self.start_scale or 1.0, 1.0)
        if scale <= most:
            return None
        if len(self.losses) < PROBED:
            return f"more than x{most:g} in the first {PROBED} decisions"
        square = (self.peak * scale) ** 2 * math.sqrt(batch_size * start_batch_size)
        if self.bends and (bend := fmean(self.bends) * square) > BEND:
            return f"above x{most:g} curvature may add {BEND:.0%} to the loss in a step, and would add {bend:.1%}"
        return None

    def correction(self, scale: float) -> tuple[float, str] | None:
        """Return the learning-rate scale to go back to from `scale`, and why; `None` where the run may go on."""
        start = max(self.start_scale or 1.0, 1.0)
        if self.risen >= RUNNING and scale > start:
            return max(scale / RETREAT, start), "the loss has risen under a higher learning rate"
        if self.used <= SEARCH or self.grace or not self.scales:
            return None
        if self.trusted is None:
            self.trusted, self.trusted_until = _middle(self.scales[-3:]), len(self.scales)
        return self._on_trial(self.trusted)

    def _on_trial(self, trusted: float) -> tuple[float, str] | None:
        """Return the trusted scale, and why, where the scales since lost their trial; trust those that stood it."""
        away = _middle(self.scales[-TRIAL:])
        octaves = math.log2(away / trusted)
        if abs(octaves) < OCTAVES:
            if abs(math.log2(self.scales[-1] / trusted)) < OCTAVES:
                self.trusted_until = len(self.scales)
            return None
        behind = None if octaves < 0 and self.used >= LATE else self._behind()
        if behind is None:
            return None
        if behind > ERRORS:
            return trusted, "the loss has fallen behind the forecast from before the learning rate was changed"
        if len(self.scales) - self.trusted_until >= 2 * TRIAL:
            self.trusted, self.trusted_until = away, len(self.scales)
        return None

    def _behind(self) -> float | None:
        """Return by how many standard errors the newest losses lie above the forecast from the trusted ones."""
        until, count = self.trusted_until, len(self.losses)
        if until - self.settled < FITTED or count - until < TRIAL:
            return None
        fitted, new = slice(self.settled, until), slice(max(until, count - NEWEST), None)
        law = PowerLaw.fit(*(np.array(column[fitted]) for column in (self.tokens, self.losses, self.errors)))
        forecasts = [law.at(tokens) for tokens in self.tokens[new]]
        excess = fmean(loss - mean for loss, (mean, _) in zip(self.losses[new], forecasts, strict=True))
        noise = law.excess * sum(error**2 for error in self.errors[new]) / len(forecasts) ** 2
        return excess / math.sqrt(noise + max(error for _, error in forecasts) ** 2)

    def corrected(self, scale: float) -> None:
        """Record that the run was brought to a learning-rate scale."""
        self.grace, self.risen = GRACE, 0
        if self.trusted is not None:
            self.trusted = scale

    def may_learn(self) -> bool:
        """Return whether the loss may still fall by much: not late in the budget, nor where it clearly has stopped."""
        if self.used >= ENDING:
            return False
        third = len(self.losses) // 3
        if third < FITTED:
            return True
        new, before = slice(-third, None), slice(-2 * third, -third)
        fall = fmean(self.losses[before]) - fmean(self.losses[new])
        error = math.sqrt(sum(error**2 for error in self.errors[-2 * third :])) / third
        return fall + error > STOPPED * fmean(self.losses[new])


def _middle(scales: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(fmean(map(math.log, scales)))
