"""The history of runs that observations are computed from: the newest intervals, and summaries of the whole run.

`RunHistory` keeps both, as arrays with one number per run, for one run as for thousands. Unknown is NaN.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

import numpy as np

from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Floats, Ints, TelemetryBatch

WINDOW = 7
"""Intervals kept of the fields in `SLOW`: the newest, and the six before."""
SLOW = ("train_loss", "tokens")
"""Fields kept that long. Of all others, the newest interval and the one before are kept."""
PROBED = ("relative_update", "probe_linear", "probe_quadratic")
"""Fields not measured in every interval: the latest known value counts."""
BEST = {
    "learning_rate": np.fmax,
    "tokens_per_s": np.fmax,
    "energy_per_token_j": np.fmin,
    "power_w": np.fmax,
}
"""Fields kept at their best so far, and what is best. Values that are unknown or not above 0 do not count."""

_COLUMNS = tuple(field.name for field in fields(TelemetryBatch) if field.type == "Floats")
_NAMES = (*_COLUMNS, "tokens_per_s", "energy_per_token_j")
_INDEX = {name: index for index, name in enumerate(_NAMES)}
_SLOW_ROWS = [_INDEX[name] for name in SLOW]


class RunHistory:
    """Rolling per-run statistics of telemetry: newest, previous, oldest in the window, best so far.

    Runs need not be at the same decision. Unknown is NaN.

    Args:
        n_runs: Number of runs.
        summarised: Whether the summary of the whole runs is kept, too; else all of it stays unknown.
        begun_at: Share of the budget that was used before the first interval.
    """

    def __init__(self, n_runs: int, *, summarised: bool = True, begun_at: float = 0.0) -> None:
        self.begun_at = begun_at
        self.intervals: Ints = np.zeros(n_runs, dtype=np.int64)
        """Intervals so far of each run."""
        self.validation_loss: Floats = np.full(n_runs, np.nan)
        """Latest validation loss, in nats/token."""
        self.train_loss_before_validation: Floats = np.full(n_runs, np.nan)
        """Training loss of the interval before it was measured; NaN where that was before the first."""
        self._newest = np.full((len(_NAMES), n_runs), np.nan)
        self._before = self._newest.copy()
        self._past = np.full((len(SLOW), WINDOW, n_runs), np.nan)
        self.summary = RunSummary(n_runs)
        self.summarised = summarised
        self._best = {name: np.full(n_runs, np.nan) for name in BEST}

    @property
    def started(self) -> Bools:
        """Whether a run has had an interval."""
        return self.intervals > 0

    @property
    def budget_used(self) -> Floats:
        """Share of the budget that is used."""
        return np.where(self.started, self.newest("budget_used"), self.begun_at)

    def newest(self, name: str) -> Floats:
        """Return a value of the newest interval: any number of `TelemetryBatch`, or one of `BEST`."""
        values: Floats = self._newest[_INDEX[name]]
        return values

    def before(self, name: str) -> Floats:
        """Return the same of the interval before the newest."""
        values: Floats = self._before[_INDEX[name]]
        return values

    def oldest(self, name: str) -> Floats:
        """Return one of `SLOW` six intervals before the newest, or in the first interval of a younger run."""
        values: Floats = self._past[SLOW.index(name), 0]
        return values

    def best(self, name: str) -> Floats:
        """Return one of `BEST` at its best so far."""
        return self._best[name]

    def observe(self, telemetry: TelemetryBatch, controls: ControlBatch | None = None) -> None:
        """Add the interval that has just ended, of every run.

        Args:
            telemetry: What was measured.
            controls: Controls of the interval. Without them nothing is known of the extremes of the controls.
        """
        self._note_validation(telemetry.validation_loss)
        self._before, self._newest = self._newest, _numbers(telemetry)
        for name in PROBED:
            now, before = self._newest[_INDEX[name]], self._before[_INDEX[name]]
            now[:] = np.where(np.isnan(now), before, now)
        for name, better in BEST.items():
            now = self.newest(name)
            self._best[name] = better(self._best[name], np.where(now > 0, now, np.nan))
        self._shift(self._newest[_SLOW_ROWS])
        if self.summarised:
            self.summary.observe(self, controls)
        self.intervals = self.intervals + 1

    def reset(self, rows: Ints) -> None:
        """Forget the runs in these rows: new ones begin there."""
        self.intervals[rows] = 0
        for values in (self.validation_loss, self.train_loss_before_validation, *self._best.values()):
            values[rows] = np.nan
        self._newest[:, rows] = self._before[:, rows] = np.nan
        self.summary.reset(rows)

    def _note_validation(self, loss: Floats) -> None:
        new = ~np.isnan(loss) & (loss != self.validation_loss)
        self.validation_loss = np.where(new, loss, self.validation_loss)
        self.train_loss_before_validation = np.where(new, self.newest("train_loss"), self.train_loss_before_validation)

    def _shift(self, now: Floats) -> None:
        """Drop the oldest of the window; a run's first interval fills it."""
        self._past = np.concatenate([self._past[:, 1:], now[:, None]], axis=1)
        first = ~self.started
        if first.any():
            self._past[:, :, first] = now[:, None, first]


def _numbers(telemetry: TelemetryBatch) -> Floats:
    """Return the rows of `_NAMES`, shape (number of names, n_runs)."""
    rows = np.empty((len(_NAMES), len(telemetry.decision)))
    for index, name in enumerate(_COLUMNS):
        rows[index] = getattr(telemetry, name)
    with np.errstate(invalid="ignore", over="ignore"):
        rows[-2] = telemetry.interval_tokens / np.maximum(telemetry.time_s, 1e-9)
        rows[-1] = telemetry.energy_j / np.maximum(telemetry.interval_tokens, 1.0)
    return rows


FADING = 0.25
"""Share of the budget over which older intervals fade from the slope, by a factor of e."""
SPIKE = 5.0
"""Standard deviations by which a spike exceeds the mean of its interval and that of the one before."""
SAME = 0.07
"""Values of a control whose log2 differ by less count as one: steps up and down cancel within 1 %."""

Extreme = Literal["highest_rate", "lowest_rate", "largest_batch", "smallest_batch"]
EXTREMES: dict[Extreme, tuple[str, int]] = {
    "highest_rate": ("learning_rate_scale", 1),
    "lowest_rate": ("learning_rate_scale", -1),
    "largest_batch": ("batch_size", 1),
    "smallest_batch": ("batch_size", -1),
}
"""Name of each extreme: its control, and the sign of the direction."""
_ROW = {name: row for row, name in enumerate(EXTREMES)}
_SIGN = np.array([[sign] for _, sign in EXTREMES.values()])


class RunSummary:
    """What is remembered of whole runs: the best loss, a slope, spikes, and how far the controls have been.

    The slope of a stretch is the fall of the logarithm of the training loss over the growth of the logarithm of the
    tokens: about constant where the loss follows a power law, so that early and late stretches can be compared.
    """

    def __init__(self, n_runs: int) -> None:
        self.best_loss: Floats = np.full(n_runs, np.nan)
        """Lowest training loss of an interval."""
        self.best_at: Floats = np.full(n_runs, np.nan)
        """Share of the budget at the end of that interval."""
        self.spikes: Floats = np.full(n_runs, np.nan)
        """Intervals with a spike."""
        self._fall, self._growth, self._used = np.zeros((3, n_runs))
        self._furthest = np.full((len(EXTREMES), n_runs), np.nan)
        self._fall_there, self._growth_there = np.zeros((2, len(EXTREMES), n_runs))

    @property
    def slope(self) -> Floats:
        """The run's slope, where older intervals fade."""
        return _slope(self._fall, self._growth)

    def extreme(self, name: Extreme) -> Floats:
        """Return log2 of an extreme so far."""
        values: Floats = EXTREMES[name][1] * self._furthest[_ROW[name]]
        return values

    def slope_at(self, name: Extreme) -> Floats:
        """Return the slope while an extreme was in force."""
        return _slope(self._fall_there[_ROW[name]], self._growth_there[_ROW[name]])

    def observe(self, history: RunHistory, controls: ControlBatch | None) -> None:
        """Add the newest interval of a history."""
        loss, used = history.newest("train_loss"), history.newest("budget_used")
        with np.errstate(all="ignore"):
            better = np.isfinite(loss) & (loss > 0) & ~(loss >= self.best_loss)
            above = history.newest("train_loss_max") - np.maximum(loss, history.before("train_loss"))
            spike = above > SPIKE * history.newest("train_loss_std")
            fall = np.log(history.before("train_loss") / loss)
            growth = np.log(history.newest("tokens") / history.before("tokens"))
        known = np.isfinite(fall) & np.isfinite(growth) & (growth > 0)
        fall, growth = np.where(known, fall, 0.0), np.where(known, growth, 0.0)
        self.best_loss = np.where(better, loss, self.best_loss)
        self.best_at = np.where(better, used, self.best_at)
        self.spikes = np.where(np.isnan(self.spikes), 0.0, self.spikes) + spike
        kept = np.exp(-np.fmax(used - self._used, 0.0) / FADING)
        self._fall, self._growth, self._used = kept * self._fall + fall, kept * self._growth + growth, used
        if controls is not None:
            self._note_extremes(controls, fall, growth)

    def _note_extremes(self, controls: ControlBatch, fall: Floats, growth: Floats) -> None:
        scale, batch = np.log2(np.maximum(controls.learning_rate_scale, 1e-30)), np.log2(controls.batch_size)
        now = _SIGN * np.array([scale, scale, batch, batch])
        moved, here = ~(now <= self._furthest + SAME), np.abs(now - self._furthest) <= SAME
        self._furthest = np.where(moved, now, self._furthest)
        self._fall_there = np.where(moved, fall, self._fall_there + np.where(here, fall, 0.0))
        self._growth_there = np.where(moved, growth, self._growth_there + np.where(here, growth, 0.0))

    def reset(self, rows: Ints) -> None:
        """Forget the runs in these rows."""
        for values in (self.best_loss, self.best_at, self.spikes):
            values[rows] = np.nan
        for values in (self._fall, self._growth, self._used):
            values[rows] = 0.0
        self._furthest[:, rows] = np.nan
        self._fall_there[:, rows] = self._growth_there[:, rows] = 0.0


def _slope(fall: Floats, growth: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.where(growth > 0, fall / growth, np.nan)
