"""Predict losses by the Multi-Power Law, and fit the simulator's physics to published loss curves.

For tests of policies the law is extended to learning rates that are too large (`LawBatch.progress`).

The law and its fits are those of Luo et al., ICLR 2025, "A Multi-Power Law for Loss Curve Prediction Across Learning
Rate Schedules" (code: github.com/thu-yao-01-luo/MultiPowerLaw). With l_k the learning rate after the k-th change (the
first leads up from 0), S the path, that is, the sum of the learning rates of all steps, and S_k its part since the k-th
change,

    L = L0 + A S^-alpha + B sum_k (l_k - l_(k-1)) G(l_k^-gamma S_k),    G(x) = 1 - (1 + C x)^-beta

`fit_published` fits the power-law noisy quadratic, the physics of the simulator, to published loss curves, and
`PublishedPhysics` predicts the loss under other schedules. Six positive numbers reproduce the loss of one model on one
corpus at one batch size under any schedule of moderate learning rates. The modes are those of `physics`; a step at
learning rate l brings noise (l / l_ref)^2 and a path of top_rate l / l_ref. Letting the rates depend on a free power of
the learning rate improves the fit to the training curves of the 25M and 100M models but not the prediction of the
held-out ones, so there is no seventh number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeResult, least_squares

from trainpilot.llm_runtime.simulator.physics import mode_rates, mode_weights, step_modes
from trainpilot.llm_runtime.simulator.records import Rows

Floats = NDArray[np.float64]

PUBLISHED_LEARNING_RATE = 3e-4
"""Peak learning rate of the published fits."""
LEAST_RATE, LEAST_PATH = 1e-12, 1e-9
"""Used in place of a learning rate and a path of zero."""
LEAST_EXCESS = 1e-3
"""The loss stays this far above the floor, in nats/token."""


@dataclass(kw_only=True)
class LawBatch(Rows):
    """The law's constants for many runs, each of shape (n_runs,); the learning rates are the published ones."""

    floor: Floats
    """L0: loss of an infinite run at a vanishing learning rate, in nats/token."""
    scale: Floats
    """A."""
    exponent: Floats
    """alpha."""
    noise_scale: Floats
    """B: loss through noise per learning rate, in nats/token."""
    memory_rate: Floats
    """C."""
    memory_exponent: Floats
    """beta."""
    rate_exponent: Floats
    """gamma."""
    initial_loss: Floats
    """Loss before training, an upper bound on all losses, in nats/token."""
    edge: Floats
    """Learning rate at which the progress of a step is greatest."""

    def loss(self, path: Floats, rate: Floats, change: Floats, since: Floats) -> Floats:
        """Return the loss, in nats/token.

        Args:
            path: S, of shape (n_runs,).
            rate: l_k, of shape (n_runs, changes).
            change: l_k - l_(k-1), of the same shape; 0 for future changes.
            since: S_k, of the same shape.
        """
        memory = self.memory_rate[:, None] * np.maximum(rate, LEAST_RATE) ** -self.rate_exponent[:, None] * since
        relaxed = 1.0 - (1.0 + np.maximum(memory, 0.0)) ** -self.memory_exponent[:, None]
        signal = self.scale * np.maximum(path, LEAST_PATH) ** -self.exponent
        return self._capped(signal + self.noise_scale * (change * relaxed).sum(axis=1))

    def progress(self, rate: Floats) -> Floats:
        """Return the path of a step: l / (1 + (l / edge)^2).

        In the published law no step is too large. In this extension steps beyond the edge make less progress (those at
        ten times the edge as much as those at a tenth), while their noise increases: the loss rises.

        Args:
            rate: Learning rates, of shape (n_runs,) or (n_runs, intervals).
        """
        edge = self.edge if rate.ndim == 1 else self.edge[:, None]
        return rate / (1.0 + (rate / edge) ** 2)

    def base_loss(self, peak: Floats, factors: Floats, n_steps: Floats) -> Floats:
        """Return the final loss of a schedule.

        Args:
            peak: Learning rate that the factors multiply, of shape (n_runs,).
            factors: Schedule factor in each interval (all of equal length), of shape (n_runs, intervals).
            n_steps: Steps of the whole run in the law's unit, of shape (n_runs,).
        """
        rate = peak[:, None] * factors
        paths = np.cumsum(self.progress(rate), axis=1) * (n_steps / factors.shape[1])[:, None]
        before = np.concatenate([np.zeros((len(peak), 1)), paths[:, :-1]], axis=1)
        return self.loss(paths[:, -1], rate, np.diff(rate, axis=1, prepend=0.0), paths[:, -1:] - before)

    def _capped(self, excess: Floats) -> Floats:
        """Return the floor plus `excess`, smoothly limited to the initial loss; unchanged far below it."""
        ratio = np.maximum(excess, LEAST_EXCESS) / (self.initial_loss - self.floor)
        with np.errstate(over="ignore"):
            below = (1.0 + ratio**-8.0) ** -0.125  # r (1 + r^8)^(-1/8), written so that a huge r gives 1
        return self.floor + (self.initial_loss - self.floor) * below


PUBLISHED_FITS: dict[str, tuple[float, ...]] = {
    "25M": (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "100M": (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    "400M": (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
"""L0, A, alpha, B, C, beta and gamma of three sizes, from the public repository."""

LAW_NAMES = ("floor", "scale", "exponent", "noise_scale", "memory_rate", "memory_exponent", "rate_exponent")


def wsd_mean_factor(start: Floats, end: Floats, step: Floats, budget: Floats, warmup: Floats) -> Floats:
    """Return the mean of the schedule `wsd` over the steps of a stretch; exact unless the stretch contains a kink.

    Args:
        start: Begin of the stretch, in the same unit as the others (tokens or sequences).
        end: End of the stretch.
        step: Length of a step.
        budget: Length of the run.
        warmup: Length of the warm-up, above 0.
    """
    span = np.maximum(end - start, 1e-9)
    decay = warmup + 0.8 * (budget - warmup)
    # The warm-up counts the step itself, the decay does not: half a step on, half a step back from its middle.
    risen = _ramp(end + step / 2, warmup) - _ramp(start + step / 2, warmup)
    fallen = np.maximum(end - step / 2 - decay, 0.0) ** 2 - np.maximum(start - step / 2 - decay, 0.0) ** 2
    mean: Floats = (risen - fallen / (2 * (budget - decay))) / span
    return np.clip(mean, 0.0, 1.0)


def _ramp(position: Floats, warmup: Floats) -> Floats:
    """Return the integral of min(position / warmup, 1)."""
    inside = np.minimum(position, warmup)
    return inside**2 / (2 * warmup) + (position - inside)


Column = ArrayLike | Sequence[ArrayLike]

PARAMETERS = ("signal_exponent", "noise_exponent", "top_rate", "floor", "signal_scale", "noise_scale")
"""Fitted parameters, in the order of the covariance."""
MIN_POINTS = 20
ROBUST_ABOVE = 0.005
"""Residuals above this (in nats) count linearly, not squared, as the initial fall is too fast for a power law."""
WARMUP_STRETCHES = 16
"""Number of stretches of constant learning rate that approximate a linear warm-up."""
MAX_KNOTS = 400
"""A curve with more points is computed at this many knots and interpolated linearly."""

_STARTS = ((0.5, 0.5, 0.03), (0.4, 0.3, 0.1), (0.5, 0.8, 0.01))  # both exponents and the top rate
_BOUNDS = {
    "signal_exponent": (0.02, 4.0), "noise_exponent": (0.01, 4.0), "top_rate": (1e-5, 10.0), "floor": (1e-4, np.inf),
    "signal_scale": (1e-4, 1e4), "noise_scale": (1e-6, 1e3),
}  # fmt: skip
_RATES = mode_rates()


@dataclass(frozen=True, kw_only=True)
class PublishedPhysics:
    """Fitted parameters with their covariance, and the loss curves that they predict."""

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
    """Largest learning rate of the fitted curves."""
    covariance: tuple[tuple[float, ...], ...]
    """Covariance of the logarithms of PARAMETERS, widened for residuals that are correlated along a curve."""
    mean_absolute_error: float
    """Over the fitted points, in nats/token."""

    @property
    def standard_errors(self) -> dict[str, float]:
        """Relative standard error of each parameter, that is, of its logarithm."""
        return dict(zip(PARAMETERS, np.sqrt(np.diag(np.array(self.covariance))).tolist(), strict=True))

    def predict(self, lr: ArrayLike, step: ArrayLike | None = None, *, warmup_steps: float | None = None) -> Floats:
        """Return the loss at every given point, in nats/token.

        Args:
            lr: Learning rate of every step from 0, or at the given steps (interpolated linearly).
            step: Steps of the values of `lr`, ascending.
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
        """Return the remaining signal and the effective noise at every knot, each of shape (n_knots, n_modes)."""
        signal, noise = np.ones_like(_RATES), np.zeros_like(_RATES)
        signals, noises = [signal.copy()], [noise.copy()]
        for n, mean, square in zip(self.n_steps, self.mean, self.mean_square, strict=True):
            step_modes(signal, noise, _RATES, top_rate * mean * n, square * n)
            signals.append(signal.copy())
            noises.append(noise.copy())
        seen = slice(self.first_knot, None)
        return np.array(signals)[seen], np.array(noises)[seen] * (2 * _RATES * top_rate)

    def at_points(self, values: Floats) -> Floats:
        """Interpolate values at the knots to every point."""
        return values if len(self.knots) == len(self.steps) else np.interp(self.steps, self.knots, values)


def fit_published(
    step: Column,
    lr: Column,
    loss: Column,
    *,
    warmup_steps: float | None = None,
) -> PublishedPhysics:
    """Fit curves of one model under one or several schedules; at least one must decay, to determine the noise.

    The fit is robust least squares in the logarithms of the parameters, from several starts.

    Args:
        step: Steps of the points, ascending; one array, or one for each curve.
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
    """Residuals of all curves. Of the parameters, only the top rate requires new states."""

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
        """Return the best-fitting floor, signal scale and noise scale for given other parameters."""
        rows = [
            np.stack([p.at_points(s @ mode_weights(_RATES, start[0])), p.at_points(q @ mode_weights(_RATES, start[1]))])
            for p, (s, q) in zip(self.paths, self.states(start[2]), strict=True)
        ]
        columns = np.concatenate(rows, axis=1).T
        design = np.column_stack([np.ones(len(columns)), columns])
        scales: Floats = np.linalg.lstsq(design, np.concatenate(self.losses), rcond=None)[0]
        return np.maximum(scales, 1e-3)

    def covariance(self, result: OptimizeResult) -> Floats:
        """Return the covariance of the logarithms; correlated residuals count as fewer points."""
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
    """Return the indices of the knots: all points, or more at the start and at jumps of the learning rate."""
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
