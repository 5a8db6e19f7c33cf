"""Turn the telemetry so far into an observation. One table of fields: name, unit, range, meaning, how to compute it.

Ratios and logarithms only, so that a value means the same on every model: no raw loss, norm or parameter count, and
nothing that needs a reference run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.llm_runtime.controls import PRECISIONS, Controls
from trainpilot.llm_runtime.plant import ControlLimits
from trainpilot.llm_runtime.telemetry import Telemetry

SLOW_INTERVALS = 6
"""The slow slope looks back over this many intervals."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that an observation may depend on."""

    telemetry: Sequence[Telemetry]
    """Intervals so far, the newest last; empty at the start."""
    limits: ControlLimits
    controls: Controls
    precision_switches: int
    last_action: Mapping[str, float]
    """Last choice of each action field over its number of choices less one, in [0, 1]."""
    preference: Mapping[str, float]
    """Weights of quality, energy and time, which sum to 1."""

    @property
    def last(self) -> Telemetry | None:
        """The newest interval."""
        return self.telemetry[-1] if self.telemetry else None


@dataclass(frozen=True)
class ObservationField:
    """One number of the observation: `value` clipped to [low, high] and scaled linearly to [-1, 1]."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str
    value: Callable[[RunView], float | None]
    """Raw value, or `None` while unknown; an unknown value is encoded as 0, the middle of the range."""

    def scale(self, raw: float | None) -> float:
        """Return the scaled value."""
        if raw is None or math.isnan(raw):
            return 0.0
        return 2 * (min(max(raw, self.low), self.high) - self.low) / (self.high - self.low) - 1


def encode(view: RunView) -> np.ndarray:
    """Return the observation, float64 of shape (n_fields,), in [-1, 1]."""
    return np.array([field.scale(field.value(view)) for field in OBSERVATION_FIELDS])


def _of_last(value: Callable[[Telemetry], float | None]) -> Callable[[RunView], float | None]:
    return lambda view: value(view.last) if view.last is not None else None


def _log(value: float | None, base: float) -> float | None:
    if value is None or math.isnan(value):
        return None
    return math.log(max(value, 1e-30), base)


def _ratio(value: float, over: float) -> float | None:
    return value / over if over > 0 else None


def _slope(view: RunView, intervals: int) -> float | None:
    """Relative fall of the loss per e-fold of tokens, over the last `intervals`."""
    if len(view.telemetry) < 2:
        return None
    new, old = view.telemetry[-1], view.telemetry[max(-1 - intervals, -len(view.telemetry))]
    fall = _ratio(old.train_loss - new.train_loss, new.train_loss)
    return None if fall is None or new.tokens <= old.tokens else fall / math.log(new.tokens / old.tokens)


def _slope_signal(view: RunView) -> float | None:
    """Fall of the loss since the last interval, in standard errors."""
    if len(view.telemetry) < 2:
        return None
    old, new = view.telemetry[-2:]
    variance = new.train_loss_std**2 / new.steps + old.train_loss_std**2 / old.steps
    return _ratio(old.train_loss - new.train_loss, math.sqrt(variance))


def _spike(last: Telemetry) -> float | None:
    return _ratio(last.train_loss_max - last.train_loss, last.train_loss_std)


def _validation_gap(view: RunView) -> float | None:
    """Relative gap of the latest validation loss to the training loss of the interval before it was measured."""
    latest = view.last.validation_loss if view.last is not None else None
    if latest is None or math.isnan(latest):
        return None
    since = next(i for i, t in enumerate(view.telemetry) if t.validation_loss == latest)
    if since == 0:
        return None  # measured before training
    train_loss = view.telemetry[since - 1].train_loss
    return _ratio(latest - train_loss, train_loss)


def _curvature(last: Telemetry) -> float | None:
    """Log of curvature over slope along the last update: 0 where a step twice as long would gain nothing."""
    if last.probe_linear is None or last.probe_quadratic is None:
        return None
    if last.probe_linear >= 0:
        return 5.0  # uphill already
    return _log(max(last.probe_quadratic, 1e-12) / -last.probe_linear, math.e)


def _over_best(
    view: RunView, value: Callable[[Telemetry], float | None], *, best: Callable[..., float]
) -> float | None:
    known = [v for v in map(value, view.telemetry) if v is not None and v > 0]
    newest = value(view.telemetry[-1]) if view.telemetry else None
    return newest / best(known) if known and newest else None


def _noise_ratio(last: Telemetry) -> float | None:
    return None if last.noise_scale is None else _log(_ratio(last.noise_scale, last.batch_size), 10)


def _precision(name: str) -> Callable[[RunView], float]:
    return lambda view: float(view.controls.precision == name)


def _last_action(name: str) -> Callable[[RunView], float]:
    return lambda view: view.last_action[name]


def _preference(name: str) -> Callable[[RunView], float]:
    return lambda view: view.preference[name]


_F = ObservationField
OBSERVATION_FIELDS: tuple[ObservationField, ...] = (
    _F("budget_used", "share", 0, 1, "share of the token budget used", lambda v: v.last.budget_used if v.last else 0.0),
    _F("loss_slope_fast", "1/e-fold of tokens", -1, 1, "relative fall of the training loss since the last interval",
       lambda v: _slope(v, 1)),
    _F("loss_slope_slow", "1/e-fold of tokens", -1, 1, "the same over the last six intervals",
       lambda v: _slope(v, SLOW_INTERVALS)),
    _F("loss_slope_signal", "standard errors", -10, 10, "fall since the last interval over its standard error",
       _slope_signal),
    _F("loss_spread", "log10 ratio", -4, 0, "per-step spread of the loss around its trend, over the loss",
       _of_last(lambda t: _log(_ratio(t.train_loss_std, t.train_loss), 10))),
    _F("loss_spike", "standard deviations", 0, 10, "largest step loss above the mean", _of_last(_spike)),
    _F("validation_gap", "ratio", -0.5, 0.5, "validation less training loss, over the latter, when last measured",
       _validation_gap),
    _F("learning_rate_scale", "log2 ratio", -6, 6, "factor on the base schedule",
       lambda v: _log(v.controls.learning_rate_scale, 2)),
    _F("learning_rate_height", "log2 ratio", -10, 0, "learning rate now over the largest so far",
       lambda v: _log(_over_best(v, lambda t: t.learning_rate, best=max), 2)),
    _F("relative_update", "log10 ratio", -6, 0, "norm of the last update over the norm of the weights",
       _of_last(lambda t: _log(t.relative_update, 10))),
    _F("curvature", "log ratio", -5, 5, "curvature over slope along the last update, from the probe; 5 means uphill",
       _of_last(_curvature)),
    _F("noise_scale", "log10 ratio", -2, 3, "gradient noise scale over the batch", _of_last(_noise_ratio)),
    _F("clipped_share", "share", 0, 1, "share of steps whose gradient was clipped",
       _of_last(lambda t: t.clipped_share)),
    _F("batch_scale", "log2 ratio", -4, 4, "batch over the starting batch",
       lambda v: _log(v.controls.batch_size / v.limits.start.batch_size, 2)),
    _F("throughput", "ratio", 0, 1, "tokens/s over the best so far",
       lambda v: _over_best(v, lambda t: t.tokens_per_s, best=max)),
    _F("energy_per_token", "log2 ratio", 0, 2, "joules per token over the best so far",
       lambda v: _log(_over_best(v, lambda t: t.energy_per_token_j, best=min), 2)),
    _F("power", "ratio", 0, 1, "watts over the highest so far", lambda v: _over_best(v, lambda t: t.power_w, best=max)),
    _F("memory", "share", 0, 1, "peak memory over the device's memory", _of_last(lambda t: t.memory_share)),
    *(_F(f"precision_{name}", "0 or 1", 0, 1, f"{name} is in force", _precision(name)) for name in PRECISIONS),
    _F("precision_switches", "count", 0, 2, "switches of precision made", lambda v: float(v.precision_switches)),
    _F("sparsity", "share", 0, 1, "zero weights or removed channels, counted", _of_last(lambda t: t.sparsity)),
    _F("finishing", "0 or 1", 0, 1, "the cool-down has begun", lambda v: float(v.controls.finish)),
    _F("epochs_seen", "log10(1 + epochs)", 0, 1.5, "passes over the training split",
       _of_last(lambda t: math.log10(1 + t.epochs_seen))),
    *(_F(f"last_{name}", "share of the choices", 0, 1, f"last choice of {name}", _last_action(name))
      for name in ("learning_rate", "batch_size", "precision", "pruning", "finish")),
    *(_F(f"prefers_{name}", "weight", 0, 1, f"weight on {name} in the preference", _preference(name))
      for name in ("quality", "energy", "time")),
)  # fmt: skip
"""Frozen surface: a bundle stores names and ranges and refuses to load when they differ."""
