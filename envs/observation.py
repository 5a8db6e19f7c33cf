"""Turn the telemetry so far into observations. One table of fields: name, unit, range, meaning, how to compute it.

Ratios and logarithms only, so that a value means the same on every model: no raw loss, norm or parameter count, and
nothing that needs a reference run. Every value is an array with one number per run, be it one run or thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.run_history import RunHistory
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.simulator.records import ControlBatch, Floats, Ints, LimitBatch

UPHILL = 5.0
"""Curvature that is told where the loss rises along the last update."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that the observations of some runs may depend on."""

    history: RunHistory
    limits: LimitBatch
    controls: ControlBatch
    """Controls in force."""
    precision_switches: Ints
    last_action: Floats
    """Last choice of each action field over its number of choices less one, in [0, 1], shape (n_runs, n_actions)."""
    preference: Floats
    """Weights of quality, energy and time, which sum to 1, shape (n_runs, 3)."""


@dataclass(frozen=True)
class ObservationField:
    """One number of the observation: `value` clipped to [low, high] and scaled linearly to [-1, 1]."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str
    value: Callable[[RunView], Floats]
    """Raw values, shape (n_runs,), NaN while unknown; an unknown value is encoded as 0, the middle of the range."""

    def scale(self, raw: ArrayLike) -> Floats:
        """Return the scaled values."""
        return _scale(np.asarray(raw, dtype=np.float64), self.low, self.high)


def encode(view: RunView) -> Floats:
    """Return the observations, float64 of shape (n_runs, n_fields), in [-1, 1]."""
    raw = np.empty((len(OBSERVATION_FIELDS), len(view.precision_switches)))
    with np.errstate(all="ignore"):  # what comes out infinite is clipped, what is not a number is unknown
        for row, field in zip(raw, OBSERVATION_FIELDS, strict=True):
            row[:] = field.value(view)
        return _scale(raw, _LOW, _HIGH).T


def _scale(raw: Floats, low: float | Floats, high: float | Floats) -> Floats:
    scaled: Floats = 2 * (np.minimum(np.maximum(raw, low), high) - low) / (high - low) - 1
    return np.where(np.isnan(scaled), 0.0, scaled)


def _newest(name: str) -> Callable[[RunView], Floats]:
    return lambda view: view.history.newest(name)


def _log2(values: Floats) -> Floats:
    return np.log2(np.maximum(values, 1e-30))


def _log10(values: Floats) -> Floats:
    return np.log10(np.maximum(values, 1e-30))


def _ratio(values: Floats, over: Floats) -> Floats:
    return np.where(over > 0, values / over, np.nan)


def _budget_used(view: RunView) -> Floats:
    return np.where(view.history.started, view.history.newest("budget_used"), 0.0)


def _slope(view: RunView, old: Callable[[str], Floats]) -> Floats:
    """Relative fall of the loss per e-fold of tokens, since the interval that `old` looks up."""
    loss, tokens = view.history.newest("train_loss"), view.history.newest("tokens")
    growth = tokens / old("tokens")
    return np.where(growth > 1, _ratio(old("train_loss") - loss, loss) / np.log(growth), np.nan)


def _slope_signal(view: RunView) -> Floats:
    """Fall of the loss since the last interval, in standard errors."""
    new, old = view.history.newest, view.history.before
    variance = new("train_loss_std") ** 2 / new("steps") + old("train_loss_std") ** 2 / old("steps")
    return _ratio(old("train_loss") - new("train_loss"), np.sqrt(variance))


def _spread(view: RunView) -> Floats:
    return _log10(_ratio(view.history.newest("train_loss_std"), view.history.newest("train_loss")))


def _spike(view: RunView) -> Floats:
    last = view.history.newest
    return _ratio(last("train_loss_max") - last("train_loss"), last("train_loss_std"))


def _validation_gap(view: RunView) -> Floats:
    """Relative gap of the latest validation loss to the training loss of the interval before it was measured."""
    latest, train_loss = view.history.newest("validation_loss"), view.history.train_loss_before_validation
    return _ratio(latest - train_loss, train_loss)


def _curvature(view: RunView) -> Floats:
    """Log of curvature over slope along the last update: 0 where a step twice as long would gain nothing."""
    linear, quadratic = view.history.newest("probe_linear"), view.history.newest("probe_quadratic")
    return np.where(linear >= 0, UPHILL, np.log(np.maximum(np.maximum(quadratic, 1e-12) / -linear, 1e-30)))


def _over_best(view: RunView, name: str) -> Floats:
    newest = view.history.newest(name)
    return np.where(newest != 0, newest / view.history.best(name), np.nan)


def _noise_ratio(view: RunView) -> Floats:
    return _log10(_ratio(view.history.newest("noise_scale"), view.history.newest("batch_size")))


def _precision(index: int) -> Callable[[RunView], Floats]:
    return lambda view: np.asarray(view.controls.precision == index, dtype=np.float64)


def _last_action(index: int) -> Callable[[RunView], Floats]:
    return lambda view: view.last_action[:, index]


def _preference(index: int) -> Callable[[RunView], Floats]:
    return lambda view: view.preference[:, index]


_F = ObservationField
OBSERVATION_FIELDS: tuple[ObservationField, ...] = (
    _F("budget_used", "share", 0, 1, "share of the token budget used", _budget_used),
    _F("loss_slope_fast", "1/e-fold of tokens", -1, 1, "relative fall of the training loss since the last interval",
       lambda v: _slope(v, v.history.before)),
    _F("loss_slope_slow", "1/e-fold of tokens", -1, 1, "the same over the last six intervals",
       lambda v: _slope(v, v.history.oldest)),
    _F("loss_slope_signal", "standard errors", -10, 10, "fall since the last interval over its standard error",
       _slope_signal),
    _F("loss_spread", "log10 ratio", -4, 0, "per-step spread of the loss around its trend, over the loss", _spread),
    _F("loss_spike", "standard deviations", 0, 10, "largest step loss above the mean", _spike),
    _F("validation_gap", "ratio", -0.5, 0.5, "validation less training loss, over the latter, when last measured",
       _validation_gap),
    _F("learning_rate_scale", "log2 ratio", -6, 6, "factor on the base schedule",
       lambda v: _log2(v.controls.learning_rate_scale)),
    _F("learning_rate_height", "log2 ratio", -10, 0, "learning rate now over the largest so far",
       lambda v: _log2(_over_best(v, "learning_rate"))),
    _F("relative_update", "log10 ratio", -6, 0, "norm of the last update over the norm of the weights",
       lambda v: _log10(v.history.newest("relative_update"))),
    _F("curvature", "log ratio", -5, 5, "curvature over slope along the last update, from the probe; 5 means uphill",
       _curvature),
    _F("noise_scale", "log10 ratio", -2, 3, "gradient noise scale over the batch", _noise_ratio),
    _F("clipped_share", "share", 0, 1, "share of steps whose gradient was clipped", _newest("clipped_share")),
    _F("batch_scale", "log2 ratio", -4, 4, "batch over the starting batch",
       lambda v: _log2(v.controls.batch_size / v.limits.start.batch_size)),
    _F("throughput", "ratio", 0, 1, "tokens/s over the best so far", lambda v: _over_best(v, "tokens_per_s")),
    _F("energy_per_token", "log2 ratio", 0, 2, "joules per token over the best so far",
       lambda v: _log2(_over_best(v, "energy_per_token_j"))),
    _F("power", "ratio", 0, 1, "watts over the highest so far", lambda v: _over_best(v, "power_w")),
    _F("memory", "share", 0, 1, "peak memory over the device's memory", _newest("memory_share")),
    *(_F(f"precision_{name}", "0 or 1", 0, 1, f"{name} is in force", _precision(i))
      for i, name in enumerate(PRECISIONS)),
    _F("precision_switches", "count", 0, 2, "switches of precision made",
       lambda v: v.precision_switches.astype(np.float64)),
    _F("sparsity", "share", 0, 1, "zero weights or removed channels, counted", _newest("sparsity")),
    _F("finishing", "0 or 1", 0, 1, "the cool-down has begun", lambda v: v.controls.finish.astype(np.float64)),
    _F("epochs_seen", "log10(1 + epochs)", 0, 1.5, "passes over the training split",
       lambda v: np.log10(1 + v.history.newest("epochs_seen"))),
    *(_F(f"last_{field.name}", "share of the choices", 0, 1, f"last choice of {field.name}", _last_action(i))
      for i, field in enumerate(ACTION_FIELDS)),
    *(_F(f"prefers_{name}", "weight", 0, 1, f"weight on {name} in the preference", _preference(i))
      for i, name in enumerate(("quality", "energy", "time"))),
)  # fmt: skip
"""Frozen surface: a bundle stores names and ranges and refuses to load when they differ."""

_LOW = np.array([[field.low] for field in OBSERVATION_FIELDS], dtype=np.float64)
_HIGH = np.array([[field.high] for field in OBSERVATION_FIELDS], dtype=np.float64)
