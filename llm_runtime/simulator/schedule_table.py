"""Tabulate a base schedule by decision: mean and last factor of each interval, cool-downs included, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainpilot.llm_runtime.schedules import COOLDOWN_SHARE, Schedule, ScheduleName
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints

_TOKENS = 1_000_000  # of a nominal budget: factors depend on shares only
_POINTS = 16


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """Factors of the learning rate, of shape (decisions,)."""

    mean: Floats
    last: Floats
    start: Floats
    """At the interval's beginning."""

    @classmethod
    def of(cls, name: ScheduleName, warmup_share: float, decisions: int) -> ScheduleTable:
        """Return the table of a schedule over `decisions` equal intervals."""
        schedule = Schedule(name=name, budget_tokens=_TOKENS, warmup_tokens=round(warmup_share * _TOKENS))
        points = (np.arange(decisions * _POINTS) + 0.5) / (decisions * _POINTS) * _TOKENS
        factors = np.array([schedule.factor(int(at), 0) for at in points]).reshape(decisions, _POINTS)
        start = np.array([schedule.factor(int(at), 0) for at in np.arange(decisions) / decisions * _TOKENS])
        return cls(mean=factors.mean(axis=1), last=factors[:, -1], start=start)


@dataclass(kw_only=True)
class Progress:
    """Where many runs stand in their schedules; positions are counted in intervals. Arrays of shape (n_runs,)."""

    position: Floats
    end: Floats
    """Where the run ends: the number of decisions, or the end of its cool-down."""
    cooldown_start: Floats
    """NaN while the base schedule holds."""
    cooldown_factor: Floats

    @classmethod
    def fresh(cls, n_runs: int, decisions: int) -> Progress:
        """Return the state before the first interval."""
        unknown = np.full(n_runs, np.nan)
        return cls(
            position=np.zeros(n_runs),
            end=np.full(n_runs, float(decisions)),
            cooldown_start=unknown,
            cooldown_factor=unknown.copy(),
        )

    @property
    def finishing(self) -> Bools:
        """Whether the cool-down has begun."""
        return ~np.isnan(self.cooldown_start)

    def restart(self, rows: Ints, decisions: int) -> None:
        """Put some runs back to the beginning."""
        self.position[rows] = 0.0
        self.end[rows] = float(decisions)
        self.cooldown_start[rows] = np.nan
        self.cooldown_factor[rows] = np.nan

    def begin_cooldown(self, wanted: Bools, table: ScheduleTable) -> None:
        """Begin the cool-down where it is wanted and has not begun: a fall to zero over a fifth of what was trained."""
        rows = np.flatnonzero(wanted & ~self.finishing)
        if not rows.size:
            return
        at = self.position[rows]
        least = 1.0 / 8  # about one step
        self.cooldown_start[rows] = at
        self.cooldown_factor[rows] = table.start[np.minimum(at.astype(np.int64), len(table.start) - 1)]
        self.end[rows] = np.minimum(at + np.maximum(COOLDOWN_SHARE * at, least), self.end[rows])

    def next_interval(self, table: ScheduleTable) -> tuple[Floats, Floats, Floats]:
        """Return the next interval's length (in intervals), and the schedule's mean and last factor in it."""
        length = np.clip(self.end - self.position, 0.0, 1.0)
        index = np.minimum(self.position.astype(np.int64), len(table.mean) - 1)
        mean, last = table.mean[index], table.last[index]
        if (cooling := self.finishing).any():
            span = np.maximum(self.end - self.cooldown_start, 1e-9)
            left = np.maximum(self.end - self.position, 0.0)
            middle = self.cooldown_factor * (left - length / 2) / span
            final = self.cooldown_factor * (left - 0.95 * length) / span
            mean, last = np.where(cooling, middle, mean), np.where(cooling, final, last)
        return length, mean, last
