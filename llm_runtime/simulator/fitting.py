"""Fit the simulator's physics to live runs, by nonlinear least squares in the logarithms, with standard errors.

`CalibrationRun` is one live run that the physics is fitted to or tested on, `FittedPhysics` the result of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.json_records import Float, JsonForm, JsonRecord
from trainpilot.llm_runtime.schedules import Cooldown, Schedule, neutral_factor
from trainpilot.llm_runtime.simulator.physics import (
    NAMES,
    NOT_FITTED,
    PARAMETERS,
    RATE_UNIT,
    Physics,
    PhysicsState,
    advance,
    loss,
)
from trainpilot.llm_runtime.simulator.records import Floats
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


LOSS_SCALE = 0.03
"""Scale of the residuals of validation losses, in nats/token: about the spread between seeds."""
FINAL_WEIGHT = 3.0
"""Factor on the weight of a run's last loss."""
GOOD_WITHIN = 0.15
"""Runs within this distance of the best one, in nats/token, have up to `GOOD_WEIGHT` times the weight."""
GOOD_WEIGHT = 2.0
UPDATE_SCALE = 0.5
"""Scale of the residuals of the logarithm of a relative update."""
PRIOR_SCALE = 2.0
"""Width of the prior around typical values, in the logarithm; it only matters for values that the runs leave open."""


@dataclass(frozen=True, kw_only=True)
class FittedPhysics(JsonRecord):
    """Physics of one model on one text."""

    values: Mapping[str, float]
    """By the names in `PARAMETERS`; `floor` in nats/token."""
    initial_loss: float
    """Loss before training, in nats/token."""
    weight_decay: float
    uncertainty: Mapping[str, float]
    """Standard error of each parameter's logarithm, from the fit's Jacobian and the residuals' size."""
    correlation: tuple[tuple[float, ...], ...]
    """Correlation matrix of the logarithms, in the order of `PARAMETERS`."""

    def physics(self, n_runs: int) -> Physics:
        """Return the same physics for `n_runs` runs."""
        values = {name: np.full(n_runs, self.values[name]) for name in NAMES}
        initial, decay = np.full(n_runs, self.initial_loss), np.full(n_runs, self.weight_decay)
        return Physics(values=values, initial_loss=initial, weight_decay=decay)

    def predict(self, run: CalibrationRun) -> Floats:
        """Return the expected training loss of each interval, in nats/token, of shape (n_intervals,)."""
        losses, _ = _simulate(self.physics(1), _RunInputs.of([run]))
        mean: Floats = (losses[0, :-1] + losses[0, 1:]) / 2
        return mean[: len(run.telemetry)]

    def predict_final(self, run: CalibrationRun) -> float:
        """Return the expected loss after the last interval, in nats/token."""
        losses, _ = _simulate(self.physics(1), _RunInputs.of([run]))
        return float(losses[0, len(run.telemetry)])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the physics that `to_json` gave. Raises `ValueError` for another set of parameters."""
        if odd := set(content["values"]) ^ set(NAMES):
            raise ValueError(f"physics parameters missing or unknown: {', '.join(sorted(odd))}; calibrate anew")
        return super().from_json(content)


def fit_physics(runs: Sequence[CalibrationRun], *, starts: int = 2, seed: int = 0) -> FittedPhysics:
    """Fit the physics to the validation losses and relative updates of runs of one model on one text.

    Args:
        runs: At least six runs; those that diverged or were pruned are not used.
        starts: Number of starting points of the search, the first at the typical values.
        seed: Seed of the other starting points.

    Raises:
        ValueError: there are too few runs.
    """
    usable = [run for run in runs if not run.diverged and run.telemetry[-1].sparsity == 0]
    if len(usable) < 6:
        raise ValueError(f"runs must hold at least 6 that neither diverged nor were pruned, got {len(usable)}")
    problem = _Problem(usable)
    random = np.random.default_rng(seed)
    best: OptimizeResult | None = None
    for start in range(starts):
        shift = random.normal(0, 0.5, len(NAMES)) if start else 0.0
        begin = np.clip(problem.typical + shift, problem.low + 1e-3, problem.high - 1e-3)
        bounds = (problem.low, problem.high)
        found = least_squares(problem.residuals, begin, loss="soft_l1", max_nfev=60, bounds=bounds)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return problem.fitted(best)


class _Problem:
    """The residuals of a fit."""

    def __init__(self, runs: Sequence[CalibrationRun]) -> None:
        self.runs = _RunInputs.of(runs)
        self.validation = _validation(runs, self.runs.steps.shape[1])
        self.seen = np.isfinite(self.validation)
        self.initial_loss = float(np.nanmean(self.validation[:, 0]))
        self.least_loss = float(np.nanmin(self.validation))
        self.seen[:, 0] = False  # the initial loss is not predicted
        self.weights = np.where(_last(self.seen), FINAL_WEIGHT, 1.0) * _importance(self.validation, self.seen)
        self.updates = _relative_updates(runs, self.runs)
        self.low = np.log([p.low for p in PARAMETERS.values()])
        self.high = np.log([p.high for p in PARAMETERS.values()])
        self.typical = np.log([p.typical for p in PARAMETERS.values()])
        self.prior_scale = np.array([1e-2 if name in NOT_FITTED else PRIOR_SCALE for name in NAMES])
        self.weight_decay = runs[0].config.weight_decay

    def physics(self, x: Floats) -> Physics:
        n_runs = len(self.runs.steps)
        values = {name: np.full(n_runs, value) for name, value in self.values(x).items()}
        initial, decay = np.full(n_runs, self.initial_loss), np.full(n_runs, self.weight_decay)
        return Physics(values=values, initial_loss=initial, weight_decay=decay)

    def values(self, x: Floats) -> dict[str, float]:
        values = dict(zip(NAMES, np.exp(x).tolist(), strict=True))
        return values | {"floor": values["floor"] * self.least_loss}

    def residuals(self, x: Floats) -> Floats:
        losses, updates = _simulate(self.physics(x), self.runs)
        off = ((losses - self.validation) * self.weights)[self.seen] / LOSS_SCALE
        off_updates = (updates - self.updates)[:, 5::4] / UPDATE_SCALE
        prior = (x - self.typical) / self.prior_scale
        return np.concatenate([off, off_updates[np.isfinite(off_updates)], prior])

    def fitted(self, result: OptimizeResult) -> FittedPhysics:
        covariance = np.linalg.pinv(result.jac.T @ result.jac) * max(2 * result.cost / len(result.fun), 1.0)
        errors = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(errors, errors)
        return FittedPhysics(
            values=self.values(result.x),
            initial_loss=self.initial_loss,
            weight_decay=self.weight_decay,
            uncertainty=dict(zip(NAMES, errors.tolist(), strict=True)),
            correlation=tuple(tuple(row) for row in correlation.round(3).tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class _RunInputs:
    """Steps, learning rates and batches of runs by interval; shorter runs are padded with intervals of no step."""

    steps: Floats
    """Optimiser steps; all arrays have shape (n_runs, n_intervals)."""
    learning_rate: Floats
    """Mean learning rate over the interval."""
    last_rate: Floats
    """Learning rate of the last step."""
    batch: Floats

    @classmethod
    def of(cls, runs: Sequence[CalibrationRun]) -> _RunInputs:
        shape = (len(runs), max(len(run.telemetry) for run in runs))
        steps, rate, last, batch = np.zeros(shape), np.zeros(shape), np.ones(shape), np.ones(shape)
        for row, run in enumerate(runs):
            used = slice(0, len(run.telemetry))
            steps[row, used] = [each.steps for each in run.telemetry]
            rate[row, used] = mean_rates(run.config, run.telemetry)
            last[row, used] = [each.learning_rate for each in run.telemetry]
            batch[row, used] = [each.batch_size for each in run.telemetry]
        return cls(steps=steps, learning_rate=rate, last_rate=last, batch=batch)


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


def _simulate(physics: Physics, runs: _RunInputs) -> tuple[Floats, Floats]:
    """Return losses before and after each interval, (n_runs, n_intervals + 1), and logarithms of relative updates."""
    n_runs, n_intervals = runs.steps.shape
    state = PhysicsState.fresh(n_runs)
    losses = np.empty((n_runs, n_intervals + 1))
    losses[:, 0] = physics.initial_loss
    updates = np.empty((n_runs, n_intervals))
    for t in range(n_intervals):
        moments = advance(physics, state, runs.steps[:, t], runs.learning_rate[:, t], runs.batch[:, t])
        losses[:, t + 1] = loss(physics, state)
        size = physics.values["update"] * np.sqrt(moments.momentum_power / state.growth)
        updates[:, t] = np.log(np.maximum(size * runs.last_rate[:, t] / RATE_UNIT, 1e-12))
    return losses, updates


def _validation(runs: Sequence[CalibrationRun], n_intervals: int) -> Floats:
    table = np.full((len(runs), n_intervals + 1), np.nan)
    for row, run in enumerate(runs):
        for decision, value in run.validation:
            table[row, decision] = value
    return table


def _relative_updates(runs: Sequence[CalibrationRun], arrays: _RunInputs) -> Floats:
    table = np.full(arrays.steps.shape, np.nan)
    for row, run in enumerate(runs):
        known = [each.relative_update if each.relative_update else np.nan for each in run.telemetry]
        table[row, : len(known)] = np.log(known)
    return table


def _importance(validation: Floats, seen: np.ndarray) -> Floats:
    """Return weights of shape (n_runs, 1): good settings count more, as a policy must distinguish them."""
    final = np.array([row[known][-1] if known.any() else np.inf for row, known in zip(validation, seen, strict=True)])
    weights: Floats = 1.0 + GOOD_WEIGHT * np.exp(-(final - final.min()) / GOOD_WITHIN)
    return weights[:, None]


def _last(seen: np.ndarray) -> np.ndarray:
    """Return a mask of the same shape with only the last True of each row."""
    last = np.zeros_like(seen)
    for row, values in enumerate(seen):
        if values.any():
            last[row, np.flatnonzero(values)[-1]] = True
    return last
