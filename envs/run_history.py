"""Keep of many runs' telemetry what their observations need, as arrays with one number per run."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, TelemetryBatch

WINDOW = 7
"""Intervals kept of what has a slow slope: the newest, and the six before."""
SLOW = ("train_loss", "tokens")
"""Kept that long; of everything else, the newest interval and the one before."""
PROBED = ("relative_update", "probe_linear", "probe_quadratic")
"""Not measured in every interval: the latest that is known counts."""
BEST = {
    "learning_rate": np.fmax,
    "tokens_per_s": np.fmax,
    "energy_per_token_j": np.fmin,
    "power_w": np.fmax,
}
"""Kept at their best so far: the largest or the smallest; what is unknown or not above 0 does not count."""

_COLUMNS = tuple(field.name for field in fields(TelemetryBatch) if field.type == "Floats")
_NAMES = (*_COLUMNS, "tokens_per_s", "energy_per_token_j")
_INDEX = {name: index for index, name in enumerate(_NAMES)}


class RunHistory:
    """The intervals so far of `n_runs` runs. Runs need not be at the same decision; unknown is NaN."""

    def __init__(self, n_runs: int) -> None:
        self.intervals: Ints = np.zeros(n_runs, dtype=np.int64)
        """Intervals so far of each run."""
        self.validation_loss: Floats = np.full(n_runs, np.nan)
        """Latest validation loss, in nats/token."""
        self.train_loss_before_validation: Floats = np.full(n_runs, np.nan)
        """Training loss of the interval before it was measured; NaN where that was before the first."""
        self._newest = np.full((len(_NAMES), n_runs), np.nan)
        self._before = self._newest.copy()
        self._past = np.full((len(SLOW), WINDOW, n_runs), np.nan)
        self._best = {name: np.full(n_runs, np.nan) for name in BEST}

    @property
    def started(self) -> Bools:
        """Whether a run has had an interval."""
        return self.intervals > 0

    def newest(self, name: str) -> Floats:
        """Return what the newest interval brought: any number of `TelemetryBatch`, or one of `BEST`."""
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

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Take in the interval that has just ended, of every run."""
        self._note_validation(telemetry.validation_loss)
        self._before, self._newest = self._newest, _numbers(telemetry)
        for name in PROBED:
            now, before = self._newest[_INDEX[name]], self._before[_INDEX[name]]
            now[:] = np.where(np.isnan(now), before, now)
        for name, better in BEST.items():
            now = self.newest(name)
            self._best[name] = better(self._best[name], np.where(now > 0, now, np.nan))
        self._shift(np.stack([self.newest(name) for name in SLOW]))
        self.intervals = self.intervals + 1

    def reset(self, rows: Ints) -> None:
        """Forget the runs in these rows: new ones begin there."""
        self.intervals[rows] = 0
        for values in (self.validation_loss, self.train_loss_before_validation, *self._best.values()):
            values[rows] = np.nan
        self._newest[:, rows] = self._before[:, rows] = np.nan

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
