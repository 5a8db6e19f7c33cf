"""Observations: the table of fields, and their encoding as the input of a policy.

`OBSERVATION_FIELDS` holds name, unit, range, meaning and formula of each field. There are ratios and logarithms only,
so that a value means the same on every model: no raw loss, norm or parameter count, and nothing that needs a reference
run. A policy sees the fields of its own `ObservationTable`, which encodes them. The formulas use the statistics that
`history.RunHistory` keeps. Every value is an array with one number per run, for one run as for thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.history import EXTREMES, Extreme, RunHistory
from trainpilot.envs.prices import QUANTITIES, PriceBook
from trainpilot.llm_runtime.budget import CURRENCIES, Currency
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.schedules import learning_rate
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Floats, Ints, LimitBatch

UPHILL = 5.0
"""Value reported for the curvature when the loss rises along the last update: none can be fitted then."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Everything that observations may depend on."""

    history: RunHistory
    prices: PriceBook | None
    """Price list of the runs; `None` where no field asks for it."""
    limits: LimitBatch
    controls: ControlBatch
    """Controls in force."""
    precision_switches: Ints
    last_action: Floats
    """Last choice of each action field over its number of choices less one, in [0, 1], shape (n_runs, n_actions)."""
    preference: Floats
    """Weights of quality, energy and time, which sum to 1, shape (n_runs, 3)."""


FieldGroup = Literal["basic", "law", "history", "prices", "currency"]
GROUPS: tuple[FieldGroup, ...] = get_args(FieldGroup)
"""Groups of fields. The basic ones belong to every table."""
BASIC: tuple[FieldGroup, ...] = ("basic",)
"""The group that versions up to 0.2 had alone."""


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
    group: FieldGroup = "basic"
    metered: bool = False
    """Whether it depends on a clock, an energy meter or the memory in use, which never repeat exactly."""

    def scale(self, raw: ArrayLike) -> Floats:
        """Return the scaled values."""
        return _scale(np.array(raw, dtype=np.float64), self.low, self.high)


class ObservationTable:
    """The fields that a policy sees, in its order, and their encoding."""

    def __init__(self, fields: Sequence[ObservationField]) -> None:
        self.fields = tuple(fields)
        self.names = tuple(field.name for field in fields)
        self._low = np.array([[field.low] for field in fields], dtype=np.float64)
        self._high = np.array([[field.high] for field in fields], dtype=np.float64)
        self._metered = np.array([field.metered for field in fields], dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.fields)

    def encode(self, view: RunView) -> Floats:
        """Return the observations, float64 of shape (n_runs, n_fields), in [-1, 1]."""
        with np.errstate(all="ignore"):  # infinite values are clipped, NaN is unknown
            raw = np.array([field.value(view) for field in self.fields], dtype=np.float64)
            return _scale(raw, self._low, self._high).T

    def blinded(self, observations: Floats, blind: Bools) -> Floats:
        """Encode the metered fields of the runs in `blind` as unknown, in place, and return the observations."""
        if blind.any():
            observations[np.ix_(blind, self._metered)] = 0.0
        return observations


def _scale(raw: Floats, low: float | Floats, high: float | Floats) -> Floats:
    """Clip and scale values, which are overwritten; unknown ones become 0."""
    np.maximum(raw, low, out=raw)
    np.minimum(raw, high, out=raw)
    raw -= low
    raw *= 2
    raw /= high - low
    raw -= 1
    return np.where(np.isnan(raw), 0.0, raw)


def _newest(name: str) -> Callable[[RunView], Floats]:
    return lambda view: view.history.newest(name)


def _log2(values: Floats) -> Floats:
    return np.log2(np.maximum(values, 1e-30))


def _log10(values: Floats) -> Floats:
    return np.log10(np.maximum(values, 1e-30))


def _ratio(values: Floats, over: Floats) -> Floats:
    return np.where(over > 0, values / over, np.nan)


def _budget_used(view: RunView) -> Floats:
    return view.history.budget_used


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


def _epochs(view: RunView) -> Floats:
    """Passes over the data; a run that does not say counts as one in its first pass, which most training is."""
    newest = view.history.newest("epochs_seen")
    seen = np.where(np.isnan(newest), 0.0, newest)
    return np.where(view.history.started, np.log10(1 + seen), np.nan)


def _over_best(view: RunView, name: str) -> Floats:
    newest = view.history.newest(name)
    return np.where(newest != 0, newest / view.history.best(name), np.nan)


def _noise_ratio(view: RunView) -> Floats:
    return _log10(_ratio(view.history.newest("noise_scale"), view.history.newest("batch_size")))


def _rate_over_law(view: RunView) -> Floats:
    """Learning rate at the peak of the schedule, under the present controls, over the advised one."""
    controls, limits = view.controls, view.limits
    start = limits.start.batch_size
    over, scale = limits.learning_rate_over_law, controls.learning_rate_scale
    return learning_rate(over, scale, 1.0, controls.batch_size.astype(np.float64), start)


def _batch_over_law(view: RunView) -> Floats:
    return view.limits.batch_over_law * view.controls.batch_size / view.limits.start.batch_size


def _since_best(view: RunView) -> Floats:
    return view.history.newest("budget_used") - view.history.summary.best_at


def _over_present(name: Extreme) -> Callable[[RunView], Floats]:
    """Log2 of an extreme of a control over its present value."""
    present = _PRESENT[EXTREMES[name][0]]
    return lambda view: view.history.summary.extreme(name) - np.log2(present(view))


_PRESENT: dict[str, Callable[[RunView], Floats]] = {
    "learning_rate_scale": lambda view: view.controls.learning_rate_scale,
    "batch_size": lambda view: view.controls.batch_size.astype(np.float64),
}


def _price(quantity: int, place: int) -> Callable[[RunView], Floats]:
    def value(view: RunView) -> Floats:
        assert view.prices is not None
        compared: Floats = view.prices.over_present[quantity, place]
        return compared

    return value


def _slope_at(name: Extreme) -> Callable[[RunView], Floats]:
    return lambda view: view.history.summary.slope_at(name)


_UNITS: dict[str, Currency] = {"seconds": "time_s", "joules": "energy_j"}


def _currency(currency: Currency) -> Callable[[RunView], Floats]:
    return lambda view: np.asarray(view.limits.currency == CURRENCIES.index(currency), dtype=np.float64)


def _precision(index: int) -> Callable[[RunView], Floats]:
    return lambda view: np.asarray(view.controls.precision == index, dtype=np.float64)


def _last_action(index: int) -> Callable[[RunView], Floats]:
    return lambda view: view.last_action[:, index]


def _preference(index: int) -> Callable[[RunView], Floats]:
    return lambda view: view.preference[:, index]


_F = ObservationField
OBSERVATION_FIELDS: tuple[ObservationField, ...] = (
    _F("budget_used", "share", 0, 1, "share of the budget used, in its currency", _budget_used),
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
    _F("throughput", "ratio", 0, 1, "tokens/s over the best so far", lambda v: _over_best(v, "tokens_per_s"),
       metered=True),
    _F("energy_per_token", "log2 ratio", 0, 2, "joules per token over the best so far",
       lambda v: _log2(_over_best(v, "energy_per_token_j")), metered=True),
    _F("power", "ratio", 0, 1, "watts over the highest so far", lambda v: _over_best(v, "power_w"), metered=True),
    _F("memory", "share", 0, 1, "peak memory over the device's memory", _newest("memory_share"), metered=True),
    *(_F(f"precision_{name}", "0 or 1", 0, 1, f"{name} is in force", _precision(i))
      for i, name in enumerate(PRECISIONS)),
    _F("precision_switches", "count", 0, 2, "switches of precision made",
       lambda v: v.precision_switches.astype(np.float64)),
    _F("sparsity", "share", 0, 1, "zero weights or removed channels, counted", _newest("sparsity")),
    _F("finishing", "0 or 1", 0, 1, "the cool-down has begun", lambda v: v.controls.finish.astype(np.float64)),
    _F("epochs_seen", "log10(1 + epochs)", 0, 1.5, "passes over the training split; 0 where a run does not say",
       _epochs),
    *(_F(f"last_{field.name}", "share of the choices", 0, 1, f"last choice of {field.name}", _last_action(i))
      for i, field in enumerate(ACTION_FIELDS)),
    *(_F(f"prefers_{name}", "weight", 0, 1, f"weight on {name} in the preference", _preference(i))
      for i, name in enumerate(("quality", "energy", "time"))),
    _F("learning_rate_over_law", "log2 ratio", -8, 8, "learning rate at the schedule's peak over what a scaling law "
       "advises", lambda v: np.log2(_rate_over_law(v)), group="law"),
    _F("batch_over_law", "log2 ratio", -8, 8, "batch in tokens over what a scaling law advises",
       lambda v: np.log2(_batch_over_law(v)), group="law"),
    _F("loss_above_best", "log ratio", 0, 0.5, "training loss over the lowest of an interval so far",
       lambda v: np.log(v.history.newest("train_loss") / v.history.summary.best_loss), group="history"),
    _F("since_best", "share", 0, 1, "share of the budget since that lowest loss", _since_best, group="history"),
    _F("loss_slope_quarter", "1/e-fold of tokens", -1, 1, "fall of the logarithm of the training loss, where older "
       "intervals fade over a quarter of the budget", lambda v: v.history.summary.slope, group="history"),
    _F("spikes", "log2(1 + intervals)", 0, 5, "intervals so far with a spike: a step loss far above the mean",
       lambda v: np.log2(1 + v.history.summary.spikes), group="history"),
    *(field for name, (control, sign) in EXTREMES.items() for field in (
        _F(name, "log2 ratio", min(6 * sign, 0), max(6 * sign, 0),
           f"{name.partition('_')[0]} {control.replace('_', ' ')} so far over the present one", _over_present(name),
           group="history"),
        _F(f"slope_at_{name}", "1/e-fold of tokens", -1, 1,
           f"fall of the logarithm of the training loss while the {name.replace('_', ' ')} was in force",
           _slope_at(name), group="history"),
    )),
    *(_F(f"{quantity}_{name}", "log2 ratio", -2, 2, f"{quantity} of a token {where} over those of one now",
         _price(index, place), group="prices", metered=True)
      for index, quantity in enumerate(QUANTITIES)
      for place, (name, where) in enumerate([
          ("half", "at half the batch"), ("double", "at double the batch"),
          *((precision, f"in {precision}") for precision in PRECISIONS),
      ])),
    *(_F(f"budget_in_{unit}", "0 or 1", 0, 1, f"the budget is in {unit}, and not in tokens", _currency(currency),
         group="currency")
      for unit, currency in _UNITS.items()),
)  # fmt: skip
"""Frozen surface: a bundle stores the names and ranges of its fields, and is refused where they are not found here.
New fields go to the end."""


def fields_of(groups: Sequence[str] = GROUPS) -> tuple[ObservationField, ...]:
    """Return the basic fields and those of some groups, in the order of the table.

    Raises:
        ValueError: there is no such group.
    """
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise ValueError(f"observe must name groups of observation fields ({', '.join(GROUPS)}), got {unknown[0]!r}")
    return tuple(field for field in OBSERVATION_FIELDS if field.group == "basic" or field.group in groups)
