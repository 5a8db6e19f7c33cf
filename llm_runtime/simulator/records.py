"""Controls, limits and telemetry of many runs at once: the records of `config` and `telemetry`, as arrays.

Every array has one row per run, and shape (n_runs,) unless said otherwise. What was not measured is NaN. `Rows` is the
base class of all records of arrays, here and in the rest of the simulator: it takes rows out of them and puts rows in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.budget import CURRENCIES
from trainpilot.llm_runtime.config import PRECISIONS, ControlLimits, Controls
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.telemetry import Telemetry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Rows:
    """Base class of records whose attributes are arrays with one row per run, dictionaries of such, or such records."""

    def take(self, rows: Ints) -> Self:
        """Return copies of some runs' rows."""
        return self._each(lambda values: values[rows])

    def put(self, rows: Ints, other: Self) -> None:
        """Replace some runs' rows, in place, by those of `other`, which has one for each of them."""
        for name, values in vars(self).items():
            _put(values, rows, getattr(other, name))

    def copy(self) -> Self:
        """Return a record of copied arrays."""
        return self._each(np.copy)

    def _each(self, change: Callable[[Any], Any]) -> Self:
        changed = copy(self)
        vars(changed).update({name: _changed(values, change) for name, values in vars(self).items()})
        return changed


def _changed(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, Rows):
        return values._each(change)
    return {name: change(each) for name, each in values.items()} if isinstance(values, dict) else change(values)


def _put(values: Any, rows: Ints, others: Any) -> None:
    if isinstance(values, Rows):
        values.put(rows, others)
    elif isinstance(values, dict):
        for name, each in values.items():
            each[rows] = others[name]
    else:
        values[rows] = others


@dataclass(kw_only=True)
class ControlBatch(Rows):
    """Controls of one interval of each run; the fields are those of `Controls`."""

    learning_rate_scale: Floats
    batch_size: Ints
    precision: Ints
    """Index into `PRECISIONS`."""
    sparsity: Floats
    finish: Bools

    @classmethod
    def of(cls, controls: Sequence[Controls]) -> ControlBatch:
        """Return the controls of several runs as arrays."""
        return cls(
            learning_rate_scale=np.array([c.learning_rate_scale for c in controls], dtype=np.float64),
            batch_size=np.array([c.batch_size for c in controls], dtype=np.int64),
            precision=np.array([PRECISIONS.index(c.precision) for c in controls], dtype=np.int64),
            sparsity=np.array([c.sparsity for c in controls], dtype=np.float64),
            finish=np.array([c.finish for c in controls], dtype=np.bool_),
        )

    @classmethod
    def at_start(cls, batch_size: Ints) -> ControlBatch:
        """Return the controls of untouched base schedules in fp32, at these batches."""
        each = cls.of([Controls(batch_size=1)]).take(np.zeros(len(batch_size), dtype=np.int64))
        return replace(each, batch_size=batch_size.copy())

    def row(self, index: int) -> Controls:
        """Return the controls of one run."""
        return Controls(
            learning_rate_scale=float(self.learning_rate_scale[index]),
            batch_size=int(self.batch_size[index]),
            precision=PRECISIONS[int(self.precision[index])],
            sparsity=float(self.sparsity[index]),
            finish=bool(self.finish[index]),
        )


@dataclass(kw_only=True)
class LimitBatch(Rows):
    """Control limits of each run; the fields are those of `ControlLimits`, without the reasons."""

    start: ControlBatch
    """Controls of the untouched base schedule."""
    min_batch_size: Ints
    max_batch_size: Ints
    masked_precisions: Bools
    """True for precisions that are not available, shape (n_runs, number of precisions)."""
    timed_precisions: Bools
    """True for precisions that are offered or not because of measured seconds, of the same shape."""
    currency: Ints
    """What the budget is counted in, as an index into `CURRENCIES`."""
    learning_rate_over_law: Floats
    """Peak learning rate at the start over the advised one; NaN where no law applies."""
    batch_over_law: Floats
    """Batch at the start over the advised one, in tokens."""
    prices: Floats
    """Seconds and joules per sequence measured before the start, at each precision, at each of `PRICED_BATCHES`; shape
    (n_runs, 2, number of precisions, 3), NaN where unknown."""
    prunes: Bools
    """Whether the pruning control does anything."""
    decisions: Ints
    """Decisions in the whole run."""

    @classmethod
    def of(cls, limits: Sequence[ControlLimits]) -> LimitBatch:
        """Return the limits of several runs as arrays."""
        return cls(
            start=ControlBatch.of([each.start for each in limits]),
            min_batch_size=np.array([each.min_batch_size for each in limits], dtype=np.int64),
            max_batch_size=np.array([each.max_batch_size for each in limits], dtype=np.int64),
            masked_precisions=np.array([[name in each.masked_precisions for name in PRECISIONS] for each in limits]),
            timed_precisions=np.array([[name in each.timed_precisions for name in PRECISIONS] for each in limits]),
            currency=np.array([CURRENCIES.index(each.currency) for each in limits], dtype=np.int64),
            learning_rate_over_law=np.array([_number(each.learning_rate_over_law) for each in limits]),
            batch_over_law=np.array([_number(each.batch_over_law) for each in limits]),
            prices=np.array([_prices(each) for each in limits]),
            prunes=np.array([each.pruning != "none" for each in limits], dtype=np.bool_),
            decisions=np.array([each.decisions for each in limits], dtype=np.int64),
        )

    @property
    def measured_budget(self) -> Bools:
        """Whether the budget is in seconds or joules and not in tokens."""
        return np.asarray(self.currency != CURRENCIES.index("tokens"))

    def untimed(self, rows: Bools) -> LimitBatch:
        """Return the limits with no timed precision on offer in these rows, as `ControlLimits.untimed`."""
        return replace(self, masked_precisions=self.masked_precisions | (self.timed_precisions & rows[:, None]))


PRICED_BATCHES = (0.5, 1.0, 2.0)
"""Batches over the starting one whose price may be known at the start."""


def _prices(limits: ControlLimits) -> Floats:
    prices = np.full((2, len(PRECISIONS), len(PRICED_BATCHES)), np.nan)
    for each in limits.prices:
        factor = each.batch_size / limits.start.batch_size
        if factor in PRICED_BATCHES:
            place = PRECISIONS.index(each.precision), PRICED_BATCHES.index(factor)
            prices[:, *place] = np.array([each.time_s, _number(each.energy_j)]) / each.batch_size
    return prices


@dataclass(kw_only=True)
class TelemetryBatch(Rows):
    """One interval of each run; names, units and meanings as in `Telemetry`. Unknown is NaN."""

    decision: Ints
    budget_used: Floats
    tokens: Floats
    interval_tokens: Floats
    steps: Floats
    epochs_seen: Floats
    train_loss: Floats
    train_loss_std: Floats
    train_loss_max: Floats
    validation_loss: Floats
    gradient_norm: Floats
    clipped_share: Floats
    noise_scale: Floats
    relative_update: Floats
    probe_linear: Floats
    probe_quadratic: Floats
    learning_rate: Floats
    batch_size: Floats
    micro_batch_size: Floats
    precision: Ints
    sparsity: Floats
    finishing: Bools
    finished: Bools
    diverged: Bools
    time_s: Floats
    probe_time_s: Floats
    switch_time_s: Floats
    evaluation_time_s: Floats
    energy_j: Floats
    power_w: Floats
    memory_share: Floats

    @classmethod
    def of(cls, telemetry: Sequence[Telemetry]) -> TelemetryBatch:
        """Return the newest interval of several runs as arrays; `None` becomes NaN."""
        numbers = np.array([[_number(getattr(t, name)) for t in telemetry] for name in _FLOATS])
        columns: dict[str, Any] = dict(zip(_FLOATS, numbers, strict=True))
        columns |= {name: np.array([getattr(t, name) for t in telemetry], dtype=np.bool_) for name in _FLAGS}
        columns["decision"] = np.array([t.decision for t in telemetry], dtype=np.int64)
        columns["precision"] = np.array([PRECISIONS.index(t.precision) for t in telemetry], dtype=np.int64)
        return cls(**columns)

    def row(self, index: int, requested: Controls, source: EnergySource | None = "estimated") -> Telemetry:
        """Return one run's interval; NaN becomes `None` where the record allows it."""
        values: dict[str, object] = {name: getattr(self, name).item(index) for name in _FLOATS}
        for name in _OPTIONAL:
            values[name] = None if math.isnan(values[name]) else values[name]  # type: ignore[arg-type]
        for name in _COUNTS:
            values[name] = round(values[name])  # type: ignore[call-overload]
        values |= {name: bool(getattr(self, name)[index]) for name in _FLAGS}
        values |= {"decision": int(self.decision[index]), "precision": PRECISIONS[int(self.precision[index])]}
        known = values["energy_j"] is not None
        return Telemetry(**values, requested=requested, energy_source=source if known else None)  # type: ignore[arg-type]


_FLAGS = ("finishing", "finished", "diverged")
_OPTIONAL = (
    "epochs_seen", "validation_loss", "noise_scale", "relative_update", "probe_linear", "probe_quadratic",
    "energy_j", "power_w", "memory_share",
)  # fmt: skip
_COUNTS = ("tokens", "interval_tokens", "steps", "micro_batch_size")
_FLOATS = tuple(field.name for field in fields(TelemetryBatch) if field.name not in (*_FLAGS, "decision", "precision"))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


class PlantBatch(Protocol):
    """Many plants as one batch. A run that has finished or diverged is idle until `begin` replaces it."""

    @property
    def n_runs(self) -> int:
        """Number of runs in the batch."""

    def limits(self) -> LimitBatch:
        """Return the control limits of each run; after `begin`, of the new ones."""

    def begin(self, rows: Ints) -> None:
        """Start new runs in these rows; the others continue."""

    def advance(self, controls: ControlBatch) -> TelemetryBatch:
        """Train every run for one interval."""

    def evaluate(self, rows: Ints | None = None) -> Floats:
        """Return the validation loss of these rows (of all by default), in nats/token.

        It enters the telemetry of these runs from the next interval on.
        """
