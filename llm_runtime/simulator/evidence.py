"""Hold measured training runs as arrays that physics can be fitted to.

`Evidence` has one row per run: its controls by interval, the losses that were measured between intervals, and how
exactly a fit should meet each of them. `of_live_runs` makes it from live runs, `of_curves` from whole loss curves,
`sweeps.of_final_losses` from the final losses of a sweep; `Evidence.joined` puts several kinds together. This module
does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

import numpy as np

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.json_records import Float, JsonForm, JsonRecord
from trainpilot.llm_runtime.schedules import Cooldown, Schedule, neutral_factor
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, Rows
from trainpilot.llm_runtime.telemetry import Telemetry

Role = Literal["fit", "held-out"]


def _finite_pair(pair: tuple[float, float]) -> list[float] | None:
    return list(pair) if all(map(math.isfinite, pair)) else None


Probe = Annotated[tuple[float, float], JsonForm(write=_finite_pair)]
"""Linear and quadratic part of a curvature probe, in nats/token; `null` in JSON if one of them is not finite."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRun(JsonRecord):
    """Measurements of one live run, by interval."""

    config: RunConfig
    """Configuration of the run."""
    telemetry: tuple[Telemetry, ...]
    """Telemetry of each interval, including its controls; `diverged` of the last one is set if the run diverged."""
    validation: tuple[tuple[int, Float], ...]
    """Pairs of decisions so far (from 0) and validation loss in nats/token; NaN if the loss was not finite."""
    wide_probe: tuple[Probe | None, ...]
    """Linear and quadratic part of a curvature probe on more sequences than the telemetry's, after each interval."""
    n_parameters: int
    """Weights of the model at the start."""
    role: Role
    """Whether the run is for fitting, or held out for testing."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if len(self.wide_probe) != len(self.telemetry):
            raise ValueError(
                f"wide_probe must have one entry for each of the {len(self.telemetry)} intervals in telemetry, "
                f"got {len(self.wide_probe)}; use None where there was no probe"
            )

    @property
    def diverged(self) -> bool:
        """Whether the final training loss is not finite."""
        return bool(self.telemetry) and self.telemetry[-1].diverged

    @property
    def final_loss(self) -> float:
        """Validation loss at the end, in nats/token; NaN for a run that diverged."""
        return math.nan if self.diverged or not self.validation else self.validation[-1][1]


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """One run whose loss was measured along the way."""

    step: Floats
    """Steps of the points, ascending, of shape (n_points,)."""
    learning_rate: Floats
    """Learning rate at the points, interpolated linearly between them; it rises linearly from 0 to the first point."""
    loss: Floats
    """Loss at the points, in nats/token; NaN where it was not measured."""
    batch: float
    """Sequences per step."""
    warmup_steps: float
    """Steps of the warm-up before the first point, at most its step."""


@dataclass(kw_only=True)
class Evidence(Rows):
    """Controls of runs by interval, and their losses; shorter runs are padded with empty intervals."""

    model: Ints
    """Index of the run's model, of shape (n_runs,): runs of one model on one text share their physics."""
    cell: Ints
    """Runs of one cell compete with one another: they have the same model and the same budget. Shape (n_runs,)."""
    steps: Floats
    """Optimiser steps of each interval, of shape (n_runs, n_intervals)."""
    learning_rate: Floats
    """Mean learning rate over the interval, of the same shape."""
    last_rate: Floats
    """Learning rate of the interval's last step, of the same shape."""
    batch: Floats
    """Sequences per step, of the same shape."""
    losses: Floats
    """Loss before the first interval and after each, in nats/token, of shape (n_runs, n_intervals + 1); NaN if not
    measured."""
    tolerance: Floats
    """Expected error of a prediction of each loss, in nats/token, of the same shape."""
    log_updates: Floats
    """Logarithm of the relative update at the end of each interval, of shape (n_runs, n_intervals); NaN if unknown."""
    bound: Bools
    """Whether `losses` are lower bounds that a prediction may not fall below, instead of measurements."""

    def __len__(self) -> int:
        return len(self.model)

    @property
    def final(self) -> Floats:
        """Last measured loss of each run, in nats/token; NaN if there is none."""
        return self.at_end(self.losses)

    def at_end(self, losses: Floats) -> Floats:
        """Return each run's loss at its end, of an array of the shape of `losses`."""
        last = np.where(self.steps > 0, np.arange(1, self.steps.shape[1] + 1), 0).max(axis=1)
        ends: Floats = losses[np.arange(len(self)), last]
        return ends

    def best_of_cell(self) -> Floats:
        """Return the lowest final loss in each run's cell, in nats/token; bounds do not count."""
        final = np.where(self.bound | np.isnan(self.final), np.inf, self.final)
        return np.array([final[self.cell == cell].min() for cell in self.cell])

    @classmethod
    def joined(cls, parts: Sequence[Evidence]) -> Evidence:
        """Return the runs of several records as one; models keep their index, cells stay apart."""
        width = max(part.steps.shape[1] for part in parts)
        columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(cls)}
        cells = 0
        for part in parts:
            for name, values in vars(part).items():
                columns[name].append(_padded(name, values, width))
            columns["cell"][-1] = part.cell + cells
            cells += int(part.cell.max(initial=-1)) + 1
        return cls(**{name: np.concatenate(values) for name, values in columns.items()})


_FILLERS = {
    "steps": 0.0, "learning_rate": 0.0, "last_rate": 1.0, "batch": 1.0,
    "losses": np.nan, "tolerance": 1.0, "log_updates": np.nan,
}  # fmt: skip
"""Values of the intervals behind a run's end."""


def _padded(name: str, values: np.ndarray, intervals: int) -> np.ndarray:
    """Return the array with fillers behind each row; losses have one column more than there are intervals."""
    if name not in _FILLERS:
        return values
    width = intervals + (name in ("losses", "tolerance"))
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=_FILLERS[name])


LIVE_TOLERANCE = 0.03
"""Tolerance of a live run's validation losses, in nats/token: about the spread between seeds."""
FINAL_WEIGHT = 3.0
"""The last loss of a live run is to be met this many times as exactly as the others."""
GOOD_WITHIN = 0.15
"""Live runs within this distance of the best one of their budget, in nats/token, are met up to 1 + `GOOD_WEIGHT` times
as exactly."""
GOOD_WEIGHT = 2.0


def of_live_runs(runs: Sequence[CalibrationRun]) -> Evidence:
    """Return the validation losses and relative updates of live runs of one model on one text."""
    shape = (len(runs), max(len(run.telemetry) for run in runs))
    found = no_steps(shape)
    for row, run in enumerate(runs):
        used = slice(0, len(run.telemetry))
        found.steps[row, used] = [each.steps for each in run.telemetry]
        found.learning_rate[row, used] = mean_rates(run.config, run.telemetry)
        found.last_rate[row, used] = [each.learning_rate for each in run.telemetry]
        found.batch[row, used] = [each.batch_size for each in run.telemetry]
        found.log_updates[row, used] = np.log([each.relative_update or np.nan for each in run.telemetry])
        for decision, value in run.validation:
            found.losses[row, decision] = value
    final = np.array([_last_known(losses) for losses in found.losses])
    budgets = np.array([run.config.tokens for run in runs])
    best = np.array([np.nanmin(final[budgets == budget], initial=np.inf) for budget in budgets])
    weights = 1.0 + GOOD_WEIGHT * np.exp(-(final - best) / GOOD_WITHIN)
    found.tolerance[:] = LIVE_TOLERANCE / np.where(np.isnan(weights), 1.0, weights)[:, None]
    for row, losses in enumerate(found.losses):
        found.tolerance[row, np.flatnonzero(np.isfinite(losses))[-1:]] /= FINAL_WEIGHT
    return found


def _last_known(losses: Floats) -> float:
    known = losses[np.isfinite(losses)]
    return float(known[-1]) if known.size else math.nan


def no_steps(shape: tuple[int, int]) -> Evidence:
    """Return runs of one model and one cell without any step."""
    after = (shape[0], shape[1] + 1)
    columns = {name: np.full(after if name in ("losses", "tolerance") else shape, x) for name, x in _FILLERS.items()}
    index = np.zeros(shape[0], dtype=np.int64)
    return Evidence(model=index, cell=index.copy(), bound=np.zeros(shape[0], dtype=np.bool_), **columns)


def mean_rates(config: RunConfig, telemetry: Sequence[Telemetry]) -> list[float]:
    """Return the mean learning rate of each interval of a live run, including warm-up and decay within it."""
    schedule, cooldown, tokens, rates = config.base_schedule(), None, 0, []
    for each in telemetry:
        step_tokens = each.interval_tokens / each.steps
        if each.finishing and cooldown is None:
            cooldown = Cooldown.begin(schedule, tokens, int(step_tokens))
        begins = (int(tokens + i * step_tokens) for i in range(each.steps))
        factors = [_factor(schedule, cooldown, at, int(step_tokens)) for at in begins]
        scale = each.requested.learning_rate_scale * neutral_factor(each.requested.batch_size, config.batch_size)
        rates.append(config.base_learning_rate * scale * math.fsum(factors) / each.steps)
        tokens += each.interval_tokens
    return rates


def _factor(schedule: Schedule, cooldown: Cooldown | None, tokens: int, step_tokens: int) -> float:
    return schedule.factor(tokens, step_tokens) if cooldown is None else cooldown.factor(tokens)


CURVE_TOLERANCE = 0.004
"""Tolerance of a loss curve's points, in nats/token."""
CURVE_WORTH = 15.0
"""A curve counts as this many independent losses, as neighbouring points err together."""
MAX_POINTS = 100
"""Longer curves are thinned out to about this many points."""


def of_curves(curves: Sequence[LossCurve], model: int = 0) -> Evidence:
    """Return whole loss curves of one model as evidence; each is a cell of its own."""
    rows = [_curve_row(curve) for curve in curves]
    found = no_steps((len(rows), max(len(steps) for steps, _, _ in rows)))
    found.model[:], found.cell[:] = model, np.arange(len(rows))
    for row, (steps, rates, losses) in enumerate(rows):
        used = slice(0, len(steps))
        found.steps[row, used], found.learning_rate[row, used] = steps, rates
        found.batch[row] = curves[row].batch
        found.losses[row, : len(losses)] = losses
        count = np.isfinite(losses).sum()
        found.tolerance[row] = CURVE_TOLERANCE * max(np.sqrt(count / CURVE_WORTH), 1.0)
    return found


def _curve_row(curve: LossCurve) -> tuple[Floats, Floats, Floats]:
    """Return steps, mean rates, and losses before and after each interval, of a thinned-out curve.

    Where points are far apart, intervals end between them too, as an interval's gradients are those of its beginning.
    """
    first, end = curve.step[0], curve.step[-1]
    between = np.concatenate([np.geomspace(max(first, 1.0), end, 20), np.linspace(first, end, 20)])
    step = np.unique(np.concatenate([curve.step, between]))
    rate = np.interp(step, curve.step, curve.learning_rate)
    loss = np.full(len(step), np.nan)
    loss[np.searchsorted(step, curve.step)] = curve.loss
    warm = min(curve.warmup_steps, first)
    picked = _thinned(step, rate)
    before = np.unique(np.concatenate([np.linspace(0, warm, 6), np.linspace(warm, step[0], 4)]))
    knots = np.concatenate([before[before < step[0]], step[picked]])
    steps, rates = intervals(lambda at: _along(at, step, rate, warm), knots)
    losses = np.full(len(knots), np.nan)
    losses[-len(picked) :] = loss[picked]
    return steps, rates, losses


def _thinned(step: Floats, rate: Floats) -> Ints:
    """Return indices of at most about `MAX_POINTS` points, evenly spread over steps, their logarithm, and the rate.

    Where the learning rate changes, points are dense, as the loss then changes quickly.
    """
    lengths = (
        np.diff(step) / np.ptp(step),
        np.diff(np.log(np.maximum(step, 1.0))) / np.ptp(np.log(np.maximum(step, 1.0))),
        np.abs(np.diff(rate)) / rate.max(),
    )
    travelled = np.concatenate([[0.0], np.cumsum(sum(lengths))])
    picked = np.searchsorted(travelled, np.linspace(0.0, travelled[-1], MAX_POINTS)).clip(max=len(step) - 1)
    jumps = np.flatnonzero(np.abs(np.diff(rate)) > 0.05 * rate.max())
    kinks = np.flatnonzero(np.abs(np.diff(rate, 2)) > 0.005 * rate.max()) + 1
    return np.unique(np.concatenate([picked, jumps, jumps + 1, kinks[:MAX_POINTS]]))


def _along(at: Floats, step: Floats, rate: Floats, warm: float) -> Floats:
    rising = rate[0] * np.minimum(at / max(warm, 1.0), 1.0)
    return np.where(at < step[0], rising, np.interp(at, step, rate))


def intervals(rate: Callable[[Floats], Floats], knots: Floats, points: int = 24) -> tuple[Floats, Floats]:
    """Return the lengths in steps and the mean learning rates of the intervals between knots."""
    steps = np.diff(knots)
    inside = (np.arange(points) + 0.5) / points
    mean: Floats = rate(knots[:-1, None] + steps[:, None] * inside).mean(axis=1)
    return steps, mean
