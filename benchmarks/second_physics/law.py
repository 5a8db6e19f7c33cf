"""Predict losses by the Multi-Power Law, a physics that policies are tested on but never trained on.

For tests of policies the law is extended to learning rates that are too large (`LawBatch.progress`).

The law and its fits are those of Luo et al., ICLR 2025, "A Multi-Power Law for Loss Curve Prediction Across Learning
Rate Schedules" (code: github.com/thu-yao-01-luo/MultiPowerLaw). With l_k the learning rate after the k-th change (the
first leads up from 0), S the path, that is, the sum of the learning rates of all steps, and S_k its part since the k-th
change,

    L = L0 + A S^-alpha + B sum_k (l_k - l_(k-1)) G(l_k^-gamma S_k),    G(x) = 1 - (1 + C x)^-beta
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
