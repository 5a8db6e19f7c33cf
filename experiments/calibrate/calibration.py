"""Define the record of a calibration (fitted physics, cost table, errors), compute the errors, and load calibrations.

The errors compare predicted with measured losses, on the fitted runs and on held-out runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from trainpilot.experiments.costs.table import CostTable
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.json_records import JsonForm, JsonRecord
from trainpilot.llm_runtime.plain_values import one_line, read_json
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun


class CalibratedPhysics(Protocol):
    """Result of a fit; implemented by `FittedPhysics` of `llm_runtime.simulator.fitting`."""

    @property
    def values(self) -> Mapping[str, float]:
        """The fitted values by name."""

    @property
    def uncertainty(self) -> Mapping[str, float]:
        """Standard errors of their natural logarithms by name."""

    def predict(self, run: CalibrationRun) -> NDArray[np.float64]:
        """Return the training loss of every interval without noise, in nats/token."""

    def predict_final(self, run: CalibrationRun) -> float:
        """Return the validation loss at the end, in nats/token."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class FitError(JsonRecord):
    """Errors of predictions, in nats/token. Runs that diverged are counted but not part of the errors."""

    n_runs: int
    """Number of runs, including diverged ones."""
    n_diverged: int
    """Number of runs without a final loss."""
    final_loss: float | None
    """Mean absolute error of the final validation loss; `None` if no run has one."""
    final_loss_worst: float | None
    """Largest of these errors."""
    trajectory: float | None
    """Mean absolute error of the training loss over the intervals of a run, mean over the runs."""
    final_loss_range: float | None
    """Largest minus smallest measured final loss, as a scale for the errors."""


@dataclass(frozen=True, kw_only=True)
class BestRate(JsonRecord):
    """The best learning rate of the grid at one batch."""

    batch_size: int
    fitted: float | None
    """Best rate predicted by the fit, interpolated between grid points; `None` if all are predicted to diverge."""
    measured: float | None
    """Best measured rate of the grid."""
    at_edge: bool
    """Whether the predicted rate lies on the edge of the grid, so that the best may lie beyond."""


def fit_error(physics: CalibratedPhysics, runs: Sequence[CalibrationRun]) -> FitError:
    """Compare predictions with `runs`."""
    usable = [run for run in runs if math.isfinite(run.final_loss)]
    measured = [run.final_loss for run in usable]
    final = [abs(physics.predict_final(run) - run.final_loss) for run in usable]
    return FitError(
        n_runs=len(runs),
        n_diverged=len(runs) - len(usable),
        final_loss=_number(final, np.mean),
        final_loss_worst=_number(final, np.max),
        trajectory=_number([_trajectory_error(physics, run) for run in usable], np.mean),
        final_loss_range=_number(measured, np.ptp),
    )


def _trajectory_error(physics: CalibratedPhysics, run: CalibrationRun) -> float:
    measured = np.array([each.train_loss for each in run.telemetry])
    return float(np.nanmean(np.abs(np.asarray(physics.predict(run), dtype=float) - measured)))


def _number(values: Sequence[float], reduce: Any) -> float | None:
    """Return `reduce` of the values; `None` if there are none, or if the result is not finite."""
    result = float(reduce(values)) if values else math.nan
    return result if math.isfinite(result) else None


def rank_correlation(physics: CalibratedPhysics, grid: Sequence[CalibrationRun]) -> float | None:
    """Return Spearman's rank correlation of predicted and measured final losses; diverged runs count as the worst."""
    measured = [_or_worst(run.final_loss) for run in grid]
    predicted = [_or_worst(physics.predict_final(run)) for run in grid]
    if len(set(measured)) < 2 or len(set(predicted)) < 2:
        return None
    return float(spearmanr(measured, predicted).statistic)


def best_rates(physics: CalibratedPhysics, grid: Sequence[CalibrationRun]) -> tuple[BestRate, ...]:
    """Return the best learning rate at every batch of the grid, smallest batch first."""
    ordered = sorted(grid, key=lambda run: (run.config.batch_size, run.config.base_learning_rate))
    groups = groupby(ordered, key=lambda run: run.config.batch_size)
    return tuple(_best_rate(physics, batch, list(runs)) for batch, runs in groups)


def _best_rate(physics: CalibratedPhysics, batch_size: int, runs: Sequence[CalibrationRun]) -> BestRate:
    rates = [run.config.base_learning_rate for run in runs]
    predicted = [_or_worst(physics.predict_final(run)) for run in runs]
    measured = [_or_worst(run.final_loss) for run in runs]
    lowest = int(np.argmin(predicted))
    fitted = _valley(rates, predicted, lowest) if math.isfinite(predicted[lowest]) else None
    return BestRate(
        batch_size=batch_size,
        fitted=fitted,
        measured=rates[int(np.argmin(measured))] if math.isfinite(min(measured)) else None,
        at_edge=fitted is not None and lowest in (0, len(rates) - 1),
    )


def _valley(rates: Sequence[float], losses: Sequence[float], lowest: int) -> float:
    """Return the vertex of the parabola through the lowest loss and its neighbours, in log learning rate."""
    near = slice(lowest - 1, lowest + 2)
    if not 0 < lowest < len(rates) - 1 or not all(map(math.isfinite, losses[near])):
        return rates[lowest]
    (a, b, c), (u, v, w) = np.log(rates[near]), losses[near]
    before, after = (v - u) / (b - a), (w - v) / (c - b)
    bend = (after - before) / (c - a)
    return float(np.exp((a + b) / 2 - before / (2 * bend))) if bend > 0 else rates[lowest]


def _or_worst(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


FILE_NAME = "calibration.json"
SHIPPED = "shipped"
SHIPPED_LONGER = "shipped-longer"
"""Names of calibrations that come with trainpilot: those of the default policy, and those with longer runs."""


def _physics(content: Mapping[str, Any]) -> CalibratedPhysics:
    from trainpilot.llm_runtime.simulator.fitting import FittedPhysics

    return FittedPhysics.from_json(content)


@dataclass(frozen=True, kw_only=True)
class CalibrationCost(JsonRecord):
    """Time and energy of a calibration."""

    n_runs: int
    run_time_s: float
    """Seconds of all runs, one after the other."""
    fit_time_s: float
    energy_j: float | None
    """Joules of the runs; `None` if those of one run are unknown."""
    energy_source: EnergySource | None


@dataclass(frozen=True, kw_only=True)
class Calibration(JsonRecord):
    """Fitted physics and cost table of one model on one text and one device, as used by the simulator."""

    config: RunConfig
    """Base run that all settings vary."""
    effort: str
    n_parameters: int
    physics: Annotated[
        CalibratedPhysics, JsonForm(write=lambda physics: physics.to_json(), read=_physics, checked=False)
    ]
    """A `FittedPhysics`."""
    cost_table: CostTable
    held_out: FitError
    """Errors on runs that were held out of the fit."""
    fitted: FitError
    """Errors on the other runs. The fit itself excludes those that were pruned or diverged."""
    grid_rank_correlation: float | None
    """Spearman's correlation of predicted and measured final losses over the grid of learning rates and batches."""
    best_rates: tuple[BestRate, ...]
    cost: CalibrationCost
    device: str
    versions: Mapping[str, str]
    command: str
    date: str


def fit(runs: Sequence[CalibrationRun]) -> CalibratedPhysics:
    """Fit the physics to the runs whose role is `fit`."""
    from trainpilot.llm_runtime.simulator.fitting import fit_physics

    return fit_physics([run for run in runs if run.role == "fit"])


def load_calibrations(sources: str | Path | Sequence[str | Path] = SHIPPED) -> tuple[Calibration, ...]:
    """Load the calibrations in `sources`: `shipped` or `shipped-longer` come with trainpilot; else files or folders.

    Raises:
        ValueError: one of the sources has no calibration.
    """
    chosen = [sources] if isinstance(sources, str | Path) else sources
    return tuple(_read(file) for source in chosen for file in _files(source))


def _files(source: str | Path) -> list[Traversable]:
    if str(source) in (SHIPPED, SHIPPED_LONGER):
        shipped = files("trainpilot.llm_runtime.simulator.shipped")
        inside = (shipped if str(source) == SHIPPED else shipped / "longer").iterdir()
        return sorted((file for file in inside if file.name.endswith(".json")), key=lambda file: file.name)
    path = Path(source)
    return [path / FILE_NAME if path.is_dir() else path]


def _read(file: Traversable) -> Calibration:
    rule = "calibrations must be 'shipped', 'shipped-longer', or files or folders that trainpilot calibrate wrote"
    try:
        return Calibration.from_json(read_json(file))
    except OSError:
        raise ValueError(f"{rule}, got {file}, which is not there or cannot be read") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{rule}, got {file}: {type(error).__name__}: {one_line(error)}") from error
