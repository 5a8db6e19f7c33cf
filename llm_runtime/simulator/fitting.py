"""Fit the simulator's physics to evidence of any kind, by nonlinear least squares in the logarithms.

One fit takes whole curves, final losses, or both, of one model or of several. The parameters of several models hang
together: each is a power of the number of weights times a small deviation of its own, so that what one model's evidence
leaves open (final losses of one schedule do not determine the noise) comes from the others'. This module does not
import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun, Evidence, of_live_runs
from trainpilot.llm_runtime.simulator.physics import (
    ADDED,
    LATE,
    NAMES,
    NOT_FITTED,
    PARAMETERS,
    RATE_UNIT,
    Physics,
    PhysicsState,
    advance,
    loss,
)
from trainpilot.llm_runtime.simulator.records import Floats, Ints

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

UPDATE_SCALE = 0.5
"""Scale of the residuals of the logarithm of a relative update."""
ROBUST_ABOVE = 1.0
"""Residuals beyond this many tolerances count linearly, not squared."""
FAILED = 100.0
"""Residual, in tolerances, of a predicted loss that is not finite."""


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
    n_parameters: int | None = None
    """Weights of the model; `None` if not noted."""

    def physics(self, n_runs: int) -> Physics:
        """Return the same physics for `n_runs` runs."""
        values = {name: np.full(n_runs, self.values[name]) for name in NAMES}
        initial, decay = np.full(n_runs, self.initial_loss), np.full(n_runs, self.weight_decay)
        return Physics(values=values, initial_loss=initial, weight_decay=decay)

    def losses(self, evidence: Evidence) -> Floats:
        """Return the expected loss before the first interval of each run and after each, in nats/token.

        The shape is that of `evidence.losses`; the runs' models are ignored, all follow this physics.
        """
        return _simulate(self.physics(len(evidence)), evidence)[0]

    def predict(self, run: CalibrationRun) -> Floats:
        """Return the expected training loss of each interval, in nats/token, of shape (n_intervals,)."""
        losses = self.losses(of_live_runs([run]))
        mean: Floats = (losses[0, :-1] + losses[0, 1:]) / 2
        return mean[: len(run.telemetry)]

    def predict_final(self, run: CalibrationRun) -> float:
        """Return the expected loss after the last interval, in nats/token."""
        return float(self.losses(of_live_runs([run]))[0, len(run.telemetry)])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the physics that `to_json` gave; parameters added since then get values without effect.

        Raises:
            ValueError: parameters are missing or unknown.
        """
        values = {**ADDED, **content["values"]}
        if odd := set(values) ^ set(NAMES):
            raise ValueError(f"physics parameters missing or unknown: {', '.join(sorted(odd))}; calibrate anew")
        uncertainty = dict.fromkeys(ADDED, 0.0) | dict(content["uncertainty"])
        return super().from_json({**content, "values": values, "uncertainty": uncertainty})


@dataclass(frozen=True, kw_only=True)
class SizeLaw(JsonRecord):
    """Physics of models of any size on texts of one kind: each parameter is a power of the number of weights."""

    reference: FittedPhysics
    """Physics at `reference.n_parameters` weights."""
    exponents: Mapping[str, float]
    """Exponent of the number of weights, by the names in `PARAMETERS`."""
    fitted_sizes: tuple[int, ...]
    """Weights of the models that the law was fitted to, ascending; other sizes are interpolated or extrapolated."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the law that `to_json` gave; parameters added since then get values without effect."""
        reference = {**content["reference"], "values": {**ADDED, **content["reference"]["values"]}}
        exponents = {**dict.fromkeys(ADDED, 0.0), **content["exponents"]}
        return super().from_json({**content, "reference": reference, "exponents": exponents})

    def at(self, n_parameters: int) -> FittedPhysics:
        """Return the physics of a model of `n_parameters` weights."""
        assert self.reference.n_parameters is not None
        ratio = n_parameters / self.reference.n_parameters
        values = {name: value * ratio ** self.exponents[name] for name, value in self.reference.values.items()}
        return replace(self.reference, values=values, n_parameters=n_parameters)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Result of a fit."""

    physics: tuple[FittedPhysics, ...]
    """Of each model, in their order."""
    law: SizeLaw | None
    """How the parameters depend on the size; `None` if there is one model only."""

    def losses(self, evidence: Evidence) -> Floats:
        """Return the expected losses of runs of the fitted models, in nats/token, as the shape of `evidence.losses`."""
        models: Ints = evidence.model
        values = {name: np.array([each.values[name] for each in self.physics])[models] for name in NAMES}
        initial = np.array([each.initial_loss for each in self.physics])[models]
        decay = np.array([each.weight_decay for each in self.physics])[models]
        return _simulate(Physics(values=values, initial_loss=initial, weight_decay=decay), evidence)[0]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model whose runs share their physics."""

    n_parameters: int
    """Weights."""
    initial_loss: float
    """Loss before training, in nats/token."""
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Expectation of a fit before it sees evidence; widths are standard deviations of natural logarithms."""

    centre: Mapping[str, float]
    """Expected values at the mean size of the models; `floor` as a share of the lowest loss."""
    width: Mapping[str, float]
    """How far a parameter may be from its centre."""
    exponent: Mapping[str, float] = field(default_factory=dict)
    """Expected exponent of the number of weights; 0 if not given."""
    exponent_width: Mapping[str, float] = field(default_factory=dict)
    """How far an exponent may be from that; by default `EXPONENT_WIDTH`."""
    deviation: Mapping[str, float] = field(default_factory=dict)
    """How far one model may be from the law of all; by default `DEVIATION`."""


EXPONENT_WIDTH = 0.05
"""Width of exponents of the size: narrow, as models of different sizes are often trained on different texts."""
DEVIATION = 0.3
NEARLY_FIXED = 1e-2
"""Width of parameters that evidence does not determine."""

_TYPICAL = {name: parameter.typical for name, parameter in PARAMETERS.items()}
LIVE_PRIOR = Prior(
    centre=_TYPICAL,
    width=dict.fromkeys(NAMES, 2.0) | dict.fromkeys(NOT_FITTED, NEARLY_FIXED),
)
"""For live runs of one small model: wide, so that it only matters for what the runs leave open."""

_ANNEALING = (
    "noise", "noise_power", "noise_growth", "settling", "slow_noise", "slow_spectrum",
    "growth", "shrinking", "growth_power",
)  # fmt: skip
"""Parameters of noise and annealing, which only curves under different schedules determine."""

SCALE_PRIOR = Prior(
    centre=_TYPICAL
    | {name: ADDED[name] for name in LATE}
    | {"gradient_noise": 30.0, "floor": 0.9, "noise": 3.0, "settling": 0.1},
    width=dict.fromkeys(NAMES, 1.5)
    | dict.fromkeys(_ANNEALING, 1.0)
    | {"spectrum": 0.5, "gradient_power": 0.5, "gradient_noise": 2.5, "floor": 0.3}
    | dict.fromkeys((*NOT_FITTED, *LATE, "update"), NEARLY_FIXED),
    exponent={"floor": -0.07, "rate": 0.7, "update": 0.7, "stall_rate": -0.7},
    exponent_width={"floor": 0.015},
    deviation={"floor": 0.05, "spectrum": 0.08}
    | dict.fromkeys(_ANNEALING, 0.2)
    | dict.fromkeys((*NOT_FITTED, *LATE, "update"), NEARLY_FIXED),
)
"""For models of 10 M parameters and more. The best learning rate falls as about the 0.7th power of the weights (Li et
al. 2025, arXiv 2503.04715), which `rate` and `stall_rate` express; the floor falls slowly (Hoffmann et al. 2022).
Models left out of a fit are predicted far better with exponents that stay close to these."""


def around(law: SizeLaw, n_parameters: int, floor_share: float) -> Prior:
    """Return a prior around a law, for evidence that determines only a part of the physics.

    Args:
        law: Law of similar models.
        n_parameters: Mean size of the models, in weights.
        floor_share: Expected floor over the lowest loss; losses on other texts differ, their shares hardly.
    """
    widths = {name: min(SCALE_PRIOR.width[name], 0.7) for name in NAMES} | dict.fromkeys(_ANNEALING, 0.1)
    return Prior(
        centre={**law.at(n_parameters).values, "floor": floor_share},
        width=widths | {"floor": 0.05, "gradient_noise": 1.5},
        exponent=law.exponents,
        exponent_width=dict.fromkeys(NAMES, 0.05) | {"floor": 0.02},
        deviation={**SCALE_PRIOR.deviation, **dict.fromkeys(_ANNEALING, 0.05)},
    )


def fit(
    evidence: Evidence,
    models: Sequence[Model],
    prior: Prior = SCALE_PRIOR,
    *,
    starts: int = 1,
    seed: int = 0,
    max_steps: int = 60,
    on_step: Callable[[], None] | None = None,
) -> Fit:
    """Fit the physics of all models to their evidence.

    Args:
        evidence: Runs; their `model` is an index of `models`.
        models: Models, each with at least one run.
        prior: Expectation before the evidence.
        starts: Number of starting points of the search, the first at the prior's centre.
        seed: Seed of the other starting points.
        max_steps: Steps of the search from each starting point.
        on_step: Called after each step of the search, for progress bars.

    Raises:
        ValueError: a model has no run with a measured loss.
    """
    known = np.isfinite(evidence.losses[:, 1:]).any(axis=1) & ~evidence.bound
    for index, model in enumerate(models):
        if not (known & (evidence.model == index)).any():
            raise ValueError(f"evidence must hold a measured loss of each model, got none of {model.n_parameters:,}")
    from scipy.optimize import least_squares  # what was fitted is read without scipy

    problem = _Problem(evidence, models, prior, on_step)
    random = np.random.default_rng(seed)
    best: OptimizeResult | None = None
    for start in range(starts):
        begin = problem.begin + (random.normal(0, 0.5, len(problem.begin)) * (problem.width > 0.1) if start else 0.0)
        found = least_squares(
            problem.residuals,
            np.clip(begin, problem.low + 1e-3, problem.high - 1e-3),
            jac=problem.jacobian,
            bounds=(problem.low, problem.high),
            x_scale=problem.width,
            loss="soft_l1",
            f_scale=ROBUST_ABOVE,
            max_nfev=max_steps,
        )
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return problem.fitted(best)


def fit_physics(runs: Sequence[CalibrationRun], *, starts: int = 2, seed: int = 0) -> FittedPhysics:
    """Fit the physics to the validation losses and relative updates of live runs of one model on one text.

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
    evidence = of_live_runs(usable)
    model = Model(
        n_parameters=usable[0].n_parameters,
        initial_loss=float(np.nanmean(evidence.losses[:, 0])),
        weight_decay=usable[0].config.weight_decay,
    )
    return fit(evidence, [model], LIVE_PRIOR, starts=starts, seed=seed).physics[0]


class _Problem:
    """The residuals of a fit, and their derivatives.

    The unknowns are, in this order: the logarithms of the parameters at the mean size, over `origin`; with several
    models also the exponents of the size, and each model's deviations. A model's logarithms are therefore
    origin + x[parameter] + x[exponent] log(n / n_mean) + x[deviation].
    """

    def __init__(
        self, evidence: Evidence, models: Sequence[Model], prior: Prior, on_step: Callable[[], None] | None
    ) -> None:
        self.evidence, self.models, self.on_step = evidence, models, on_step
        sizes = np.log([model.n_parameters for model in models])
        self.mean_size = float(sizes.mean())
        self.sizes = sizes - self.mean_size
        self.initial = np.array([model.initial_loss for model in models])
        self.decay = np.array([model.weight_decay for model in models])
        self.seen = np.isfinite(evidence.losses)
        self.seen[:, 0] = False  # the initial loss is not predicted
        self.bound = np.broadcast_to(evidence.bound[:, None], self.seen.shape)[self.seen]
        updates = np.isfinite(evidence.log_updates)
        self.updates_seen = np.zeros_like(updates)
        self.updates_seen[:, 5::4] = updates[:, 5::4]
        owners = [np.broadcast_to(evidence.model[:, None], seen.shape)[seen] for seen in (self.seen, self.updates_seen)]
        self.owner = np.concatenate(owners)
        self._prepare(prior)

    def _prepare(self, prior: Prior) -> None:
        measured = self.evidence.losses[~self.evidence.bound][:, 1:]
        least = float(np.nanmin(measured))
        centre = np.log([prior.centre[name] for name in NAMES])
        low, high = (np.log([getattr(p, side) for p in PARAMETERS.values()]) for side in ("low", "high"))
        floor = NAMES.index("floor")
        for values in (centre, low, high):
            values[floor] += math.log(least)
        best = self.evidence.best_of_cell()[~self.evidence.bound]
        high[floor] += math.log(float(best[np.isfinite(best)].max()) / least)
        width = np.array([prior.width[name] for name in NAMES])
        pinned = np.array([name in LATE for name in NAMES]) & (width <= NEARLY_FIXED)
        self.origin = np.where(pinned, centre, 0.0)  # a number of -690 would upset the search's first steps
        centre, low, high = (each - self.origin for each in (centre, low, high))
        parts = [(centre, width, low, high)]
        if len(self.models) > 1:
            many = len(self.models)
            exponent = np.array([prior.exponent.get(name, 0.0) for name in NAMES])
            spread = np.array([prior.exponent_width.get(name, EXPONENT_WIDTH) for name in NAMES])
            deviation = np.tile([prior.deviation.get(name, DEVIATION) for name in NAMES], many)
            free = np.full(len(NAMES), 10.0)
            parts.append((exponent, spread, -free, free))
            parts.append((np.zeros(len(deviation)), deviation, -np.tile(free, many), np.tile(free, many)))
        self.begin, self.width, self.low, self.high = (np.concatenate(each) for each in zip(*parts, strict=True))
        self.begin = np.clip(self.begin, self.low, self.high)
        self.centre = self.begin.copy()

    def logarithms(self, x: Floats) -> Floats:
        """Return the logarithms of each model's parameters, of shape (n_models, n_parameters)."""
        n = len(NAMES)
        middle = self.origin + x[:n]
        if len(self.models) == 1:
            return middle[None]
        deviations = x[2 * n :].reshape(len(self.models), n)
        logarithms: Floats = middle + x[n : 2 * n] * self.sizes[:, None] + deviations
        return logarithms

    def residuals(self, x: Floats) -> Floats:
        return np.concatenate([self._data(self.logarithms(x)), (x - self.centre) / self.width])

    def jacobian(self, x: Floats) -> Floats:
        """Return the derivatives: one simulation for each parameter serves its exponent and deviations too."""
        logarithms = self.logarithms(x)
        at = self._data(logarithms)
        n, many = len(NAMES), len(self.models)
        slopes = np.zeros((len(at), len(x)))
        for index in range(n):
            if self.width[index] <= NEARLY_FIXED:
                continue
            moved = logarithms.copy()
            moved[:, index] += _STEP
            slope = (self._data(moved) - at) / _STEP
            slopes[:, index] = slope
            if many > 1:
                slopes[:, n + index] = slope * self.sizes[self.owner]
                slopes[np.arange(len(at)), 2 * n + self.owner * n + index] = slope
        if self.on_step is not None:
            self.on_step()
        prior: Floats = np.diag(1.0 / self.width)
        return np.concatenate([slopes, prior])

    def _data(self, logarithms: Floats) -> Floats:
        evidence = self.evidence
        with np.errstate(all="ignore"):
            losses, updates = _simulate(self._physics(logarithms, evidence.model), evidence)
            off = ((losses - evidence.losses) / evidence.tolerance)[self.seen]
            off = np.where(self.bound, np.minimum(off, 0.0), off)
            off_updates = (updates - evidence.log_updates)[self.updates_seen] / UPDATE_SCALE
        data: Floats = np.concatenate([off, off_updates])
        return np.nan_to_num(data, nan=FAILED, posinf=FAILED, neginf=-FAILED)

    def _physics(self, logarithms: Floats, models: Ints) -> Physics:
        values = dict(zip(NAMES, np.exp(logarithms[models]).T.copy(), strict=True))
        return Physics(values=values, initial_loss=self.initial[models], weight_decay=self.decay[models])

    def fitted(self, result: OptimizeResult) -> Fit:
        covariance = np.linalg.pinv(result.jac.T @ result.jac) * max(2 * result.cost / len(result.fun), 1.0)
        n, x = len(NAMES), result.x
        values = np.exp(self.logarithms(x))
        if len(self.models) == 1:
            return Fit(physics=(self._record(values[0], covariance, self.models[0]),), law=None)
        physics = []
        for index, (model, size) in enumerate(zip(self.models, self.sizes, strict=True)):
            turn = np.zeros((n, len(x)))
            turn[:, :n], turn[:, n : 2 * n] = np.eye(n), size * np.eye(n)
            turn[:, (2 + index) * n : (3 + index) * n] = np.eye(n)
            physics.append(self._record(values[index], turn @ covariance @ turn.T, model))
        middle = Model(
            n_parameters=round(math.exp(self.mean_size)),
            initial_loss=float(self.initial.mean()),
            weight_decay=float(self.decay.mean()),
        )
        law = SizeLaw(
            reference=self._record(np.exp(self.origin + x[:n]), covariance[:n, :n], middle),
            exponents=dict(zip(NAMES, x[n : 2 * n].tolist(), strict=True)),
            fitted_sizes=tuple(sorted({model.n_parameters for model in self.models})),
        )
        return Fit(physics=tuple(physics), law=law)

    def _record(self, values: Floats, covariance: Floats, model: Model) -> FittedPhysics:
        errors = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(errors, errors)
        return FittedPhysics(
            values=dict(zip(NAMES, values.tolist(), strict=True)),
            initial_loss=model.initial_loss,
            weight_decay=model.weight_decay,
            uncertainty=dict(zip(NAMES, errors.tolist(), strict=True)),
            correlation=tuple(tuple(row) for row in correlation.round(3).tolist()),
            n_parameters=model.n_parameters,
        )


_STEP = 1e-4
"""Step of the numerical derivatives, in the logarithm."""


BLOCK = 256
"""Runs that are simulated together: as many as a processor's cache holds."""


def _simulate(physics: Physics, evidence: Evidence) -> tuple[Floats, Floats]:
    """Return losses before and after each interval, (n_runs, n_intervals + 1), and logarithms of relative updates.

    Both are NaN after a run's end.
    """
    n_runs, n_intervals = evidence.steps.shape
    losses, updates = np.full((n_runs, n_intervals + 1), np.nan), np.full((n_runs, n_intervals), np.nan)
    lengths = np.where(evidence.steps > 0, np.arange(1, n_intervals + 1), 0).max(axis=1, initial=0)
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.arange(BLOCK, n_runs, BLOCK)):
        block, used = evidence.take(rows), int(lengths[rows].max(initial=0))
        losses[rows, : used + 1], updates[rows, :used] = _simulate_block(physics.take(rows), block, used)
    return losses, updates


def _simulate_block(physics: Physics, evidence: Evidence, n_intervals: int) -> tuple[Floats, Floats]:
    n_runs = len(evidence)
    state = PhysicsState.fresh(n_runs)
    losses, updates = np.empty((n_runs, n_intervals + 1)), np.empty((n_runs, n_intervals))
    losses[:, 0] = physics.initial_loss
    for t in range(n_intervals):
        moments = advance(physics, state, evidence.steps[:, t], evidence.learning_rate[:, t], evidence.batch[:, t])
        losses[:, t + 1] = loss(physics, state)
        size = physics.values["update"] * np.sqrt(moments.momentum_power / state.growth)
        updates[:, t] = np.log(np.maximum(size * evidence.last_rate[:, t] / RATE_UNIT, 1e-12))
    return losses, updates
