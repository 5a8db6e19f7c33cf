"""Fit the power-law noisy quadratic to published loss curves, and predict the loss under schedules it has not seen.

Six numbers, each positive, reproduce the loss of one model on one corpus at one batch size under any schedule of
moderate learning rates. The modes are those of `modes`; a step at learning rate l brings noise (l / l_ref)^2 and a path
of top_rate l / l_ref. Letting the rates depend on a free power of the learning rate fits the seen curves of the 25M
and 100M models better and the unseen ones no better, so there is no seventh number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult, least_squares

from trainpilot.llm_runtime.simulator.physics import mode_rates, mode_weights, step_modes

Floats = NDArray[np.float64]
Column = ArrayLike | Sequence[ArrayLike]

PARAMETERS = ("signal_exponent", "noise_exponent", "top_rate", "floor", "signal_scale", "noise_scale")
"""What is fitted, in the order of the covariance."""
MIN_POINTS = 20
ROBUST_ABOVE = 0.005
"""Residuals beyond this many nats count linearly, not squared: at first the loss falls too fast for any power law."""
WARMUP_STRETCHES = 16
"""Stretches of constant learning rate that stand for a linear warm-up."""
MAX_KNOTS = 400
"""A curve with more points is stepped from knot to knot, with straight lines between."""

_STARTS = ((0.5, 0.5, 0.03), (0.4, 0.3, 0.1), (0.5, 0.8, 0.01))  # both exponents and the top rate
_BOUNDS = {
    "signal_exponent": (0.02, 4.0), "noise_exponent": (0.01, 4.0), "top_rate": (1e-5, 10.0), "floor": (1e-4, np.inf),
    "signal_scale": (1e-4, 1e4), "noise_scale": (1e-6, 1e3),
}  # fmt: skip
_RATES = mode_rates()


@dataclass(frozen=True, kw_only=True)
class PublishedPhysics:
    """The fitted numbers, how sure they are, and the curve they predict."""

    signal_exponent: float
    """s: the signal fades as (learning-rate sum)^-s."""
    noise_exponent: float
    """kappa: the memory of noise fades as (learning-rate sum)^-(1 + kappa)."""
    top_rate: float
    """Relaxation rate of the fastest mode at the reference learning rate, per step."""
    floor: float
    """Loss of an infinite run without noise, in nats/token."""
    signal_scale: float
    """Loss above the floor at the start, extrapolated, in nats/token."""
    noise_scale: float
    """Weight of the noise at the reference learning rate, in nats/token."""
    reference_learning_rate: float
    """The largest of the fitted curves."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the logarithms of PARAMETERS, widened for residuals that are correlated along a curve."""
    mean_absolute_error: float
    """Over the fitted points, in nats/token."""

    @property
    def standard_errors(self) -> dict[str, float]:
        """Relative standard error of each parameter, that is, of its logarithm."""
        return dict(zip(PARAMETERS, np.sqrt(np.diag(np.array(self.covariance))).tolist(), strict=True))

    def predict(self, lr: ArrayLike, step: ArrayLike | None = None, *, warmup_steps: float | None = None) -> Floats:
        """Return the loss at every given point, in nats/token.

        Args:
            lr: Learning rate of every step from 0; or at the given steps, straight lines between.
            step: Steps that `lr` belongs to, rising.
            warmup_steps: Linear warm-up before the first point; by default all steps before it.

        Raises:
            ValueError: Lengths differ, or a value is not finite or out of order.
        """
        rates = np.asarray(lr, dtype=np.float64)
        steps = np.arange(len(rates), dtype=np.float64) if step is None else np.asarray(step, dtype=np.float64)
        _check(steps, rates, least=1)
        path = _Path.of(steps, rates, self.reference_learning_rate, warmup_steps)
        signal, noise = path.states(self.top_rate)
        values = np.log([getattr(self, name) for name in PARAMETERS])
        return path.at_points(_loss(values, signal, noise))


@dataclass(frozen=True)
class _Path:
    """A schedule in stretches of constant learning rate, relative to the reference."""

    n_steps: Floats
    mean: Floats
    mean_square: Floats
    first_knot: int
    """Stretches before the first point."""
    knots: Floats
    steps: Floats

    @classmethod
    def of(cls, step: Floats, lr: Floats, reference: float, warmup_steps: float | None) -> _Path:
        lr = lr / reference
        lengths, means, squares = _lead_in(step[0], lr[0], step[0] if warmup_steps is None else warmup_steps)
        knots = _knots(lr)
        n = np.diff(step)
        path = np.concatenate([[0.0], np.cumsum(n * (lr[1:] + lr[:-1]) / 2)])
        square = np.concatenate([[0.0], np.cumsum(n * (lr[1:] ** 2 + lr[1:] * lr[:-1] + lr[:-1] ** 2) / 3)])
        spans = np.diff(step[knots])
        return cls(
            n_steps=np.concatenate([lengths, spans]),
            mean=np.concatenate([means, np.diff(path[knots]) / spans]),
            mean_square=np.concatenate([squares, np.diff(square[knots]) / spans]),
            first_knot=len(lengths),
            knots=step[knots],
            steps=step,
        )

    def states(self, top_rate: float) -> tuple[Floats, Floats]:
        """Return what is left of the signal and the noise that counts, at every knot, of shape (n_knots, n_modes)."""
        signal, noise = np.ones_like(_RATES), np.zeros_like(_RATES)
        signals, noises = [signal.copy()], [noise.copy()]
        for n, mean, square in zip(self.n_steps, self.mean, self.mean_square, strict=True):
            step_modes(signal, noise, _RATES, top_rate * mean * n, square * n)
            signals.append(signal.copy())
            noises.append(noise.copy())
        seen = slice(self.first_knot, None)
        return np.array(signals)[seen], np.array(noises)[seen] * (2 * _RATES * top_rate)

    def at_points(self, values: Floats) -> Floats:
        """Return values at the knots as values at every point."""
        return values if len(self.knots) == len(self.steps) else np.interp(self.steps, self.knots, values)


def fit_published(
    step: Column,
    lr: Column,
    loss: Column,
    *,
    warmup_steps: float | None = None,
) -> PublishedPhysics:
    """Fit curves of one model under different schedules; one may do, but a decay is needed to see the noise.

    Robust least squares in the logarithms of the parameters, from several starts.

    Args:
        step: Steps of the points, rising; one array, or one for each curve.
        lr: Learning rate at these points.
        loss: Loss there, in nats/token.
        warmup_steps: Linear warm-up before the first point; by default all steps before it.

    Raises:
        ValueError: Lengths differ, a value is not finite or out of order, or a curve has too few points.
    """
    curves = _curves(step, lr, loss)
    reference = max(float(rates.max()) for _, rates, _ in curves)
    if reference <= 0:
        raise ValueError("lr must be above 0 somewhere, got 0 at every point")
    paths = [_Path.of(steps, rates, reference, warmup_steps) for steps, rates, _ in curves]
    fit = _Fit(paths, [losses for _, _, losses in curves])
    best = min((fit.run(start) for start in _STARTS), key=lambda result: float(result.cost))
    return PublishedPhysics(
        **dict(zip(PARAMETERS, np.exp(best.x).tolist(), strict=True)),
        reference_learning_rate=reference,
        covariance=tuple(tuple(row) for row in fit.covariance(best).tolist()),
        mean_absolute_error=float(np.abs(best.fun).mean()),
    )


class _Fit:
    """The residuals of all curves together. Of the parameters only the top rate asks for new states."""

    def __init__(self, paths: list[_Path], losses: list[Floats]) -> None:
        self.paths = paths
        self.losses = losses
        self._states: dict[float, list[tuple[Floats, Floats]]] = {}

    def states(self, top_rate: float) -> list[tuple[Floats, Floats]]:
        if top_rate not in self._states:
            if len(self._states) >= 4:
                self._states.clear()
            self._states[top_rate] = [path.states(top_rate) for path in self.paths]
        return self._states[top_rate]

    def residuals(self, values: Floats) -> Floats:
        states = self.states(float(np.exp(values[2])))
        predicted = [p.at_points(_loss(values, *state)) for p, state in zip(self.paths, states, strict=True)]
        return np.concatenate(predicted) - np.concatenate(self.losses)

    def run(self, start: tuple[float, float, float]) -> OptimizeResult:
        low, high = np.log(np.array([_BOUNDS[name] for name in PARAMETERS])).T
        high[3] = np.log(min(float(losses.min()) for losses in self.losses))
        first = np.clip(np.log([*start, *self._linear(start)]), low + 1e-3, high - 1e-3)
        return least_squares(
            self.residuals, first, bounds=(low, high), loss="soft_l1", f_scale=ROBUST_ABOVE, x_scale="jac", max_nfev=200
        )

    def _linear(self, start: tuple[float, float, float]) -> Floats:
        """Return floor, signal and noise scale that fit best, the other three given."""
        rows = [
            np.stack([p.at_points(s @ mode_weights(_RATES, start[0])), p.at_points(q @ mode_weights(_RATES, start[1]))])
            for p, (s, q) in zip(self.paths, self.states(start[2]), strict=True)
        ]
        columns = np.concatenate(rows, axis=1).T
        design = np.column_stack([np.ones(len(columns)), columns])
        scales: Floats = np.linalg.lstsq(design, np.concatenate(self.losses), rcond=None)[0]
        return np.maximum(scales, 1e-3)

    def covariance(self, result: OptimizeResult) -> Floats:
        """Return the covariance of the logarithms; residuals that follow each other count as fewer points."""
        values, vectors = np.linalg.eigh(result.jac.T @ result.jac)
        inverse = vectors / np.maximum(values, 1e-12 * values.max()) @ vectors.T
        variance = 2 * float(result.cost) / max(len(result.fun) - len(PARAMETERS), 1)
        borders = np.cumsum([len(losses) for losses in self.losses])[:-1]
        parts = np.split(result.fun, borders)
        follow = sum(float(part[1:] @ part[:-1]) for part in parts) / max(float(result.fun @ result.fun), 1e-300)
        follow = min(max(follow, 0.0), 0.99)
        covariance: Floats = inverse * variance * (1 + follow) / (1 - follow)
        return covariance


def _loss(values: Floats, signal: Floats, noise: Floats) -> Floats:
    s, kappa, _, floor, signal_scale, noise_scale = np.exp(values)
    loss: Floats = floor + signal_scale * signal @ mode_weights(_RATES, s)
    loss += noise_scale * noise @ mode_weights(_RATES, kappa)
    return loss


def _lead_in(first_step: float, lr: float, warmup_steps: float) -> tuple[Floats, Floats, Floats]:
    """Return lengths, mean rates and mean squares of the stretches before the first point."""
    if not 0 <= warmup_steps <= first_step:
        raise ValueError(f"warmup_steps must be in [0, first step = {first_step:g}], got {warmup_steps:g}")
    edges = np.linspace(0.0, 1.0, WARMUP_STRETCHES + 1)
    low, high = edges[:-1] * lr, edges[1:] * lr
    lengths = np.full(WARMUP_STRETCHES, warmup_steps / WARMUP_STRETCHES)
    means, squares = (low + high) / 2, (low**2 + low * high + high**2) / 3
    rest = first_step - warmup_steps
    return np.append(lengths, rest), np.append(means, lr), np.append(squares, lr**2)


def _knots(lr: Floats) -> NDArray[np.int64]:
    """Return the points to step to: all, or a choice dense at the start and at jumps of the learning rate."""
    n = len(lr)
    if n <= MAX_KNOTS:
        return np.arange(n)
    jumps = np.flatnonzero(np.abs(np.diff(lr)) > 0.05 * lr.max())
    even = np.linspace(0, n - 1, MAX_KNOTS).astype(np.int64)
    early = (np.geomspace(1, n, MAX_KNOTS // 2) - 1).astype(np.int64)
    return np.unique(np.concatenate([even, early, jumps, jumps + 1]))


def _curves(step: Column, lr: Column, loss: Column) -> list[tuple[Floats, Floats, Floats]]:
    columns = [_one_or_several(column) for column in (step, lr, loss)]
    counts = [len(column) for column in columns]
    if len(set(counts)) != 1:
        raise ValueError(f"step, lr and loss must hold equally many curves, got {counts}; give one array per curve")
    for steps, rates, losses in zip(*columns, strict=True):
        _check(steps, rates, losses, least=MIN_POINTS)
    return list(zip(*columns, strict=True))


def _one_or_several(column: Column) -> list[Floats]:
    several = isinstance(column, Sequence) and len(column) > 0 and np.ndim(column[0]) > 0
    return [np.asarray(each, dtype=np.float64) for each in (column if several else [column])]  # type: ignore[union-attr]


def _check(step: Floats, lr: Floats, loss: Floats | None = None, *, least: int) -> None:
    given = {"step": step, "lr": lr} | ({} if loss is None else {"loss": loss})
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{', '.join(given)} must have one value for each point, got lengths {lengths}")
    if len(step) < least:
        raise ValueError(f"step must have at least {least} points, got {len(step)}")
    for name, values in given.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}; leave such points out")
    if step[0] < 0 or (np.diff(step) <= 0).any():
        raise ValueError("step must rise from 0 or more, point by point; sort the points and drop repeated ones")
    if (lr < 0).any():
        raise ValueError(f"lr must be at least 0, got {lr.min():g}")
    if loss is not None and (loss <= 0).any():
        raise ValueError(f"loss must be above 0 nats/token, got {loss.min():g}")
