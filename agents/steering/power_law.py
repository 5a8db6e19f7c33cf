"""Extrapolate the losses of a run by a power law in its tokens, with a standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

EXPONENTS = np.geomspace(0.05, 1.0, 200)
"""Exponents of the power law that are weighed; published ones lie between 0.05 and 0.6."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Extrapolates losses floor + A tokens^-s: a mean over exponents s, each weighted by how well it fits."""

    first_tokens: float
    exponents: Floats
    weights: Floats
    """Weights of the exponents; they sum to 1."""
    floors: Floats
    amplitudes: Floats
    covariances: Floats
    """Covariances of floor and amplitude, shape (n_exponents, 2, 2)."""
    excess: float
    """Variance of the losses over the variance that their standard errors predict; at least 1."""

    @classmethod
    def fit(cls, tokens: Floats, losses: Floats, errors: Floats) -> PowerLaw:
        """Fit losses that have standard errors; losses that scatter more widen the band."""
        fits = [_fit_line((tokens / tokens[0]) ** -s, losses, errors) for s in EXPONENTS]
        squares = np.array([each[2] for each in fits])
        excess = max(float(squares.min()) / max(len(losses) - 3, 1), 1.0)
        weights = np.exp(-(squares - squares.min()) / (2 * excess))
        lines = np.array([each[0] for each in fits])
        return cls(
            first_tokens=float(tokens[0]),
            exponents=EXPONENTS,
            weights=weights / weights.sum(),
            floors=lines[:, 0],
            amplitudes=lines[:, 1],
            covariances=excess * np.array([each[1] for each in fits]),
            excess=excess,
        )

    def at(self, tokens: float) -> tuple[float, float]:
        """Return the forecast of the loss at a number of tokens, and its standard error."""
        falls = (tokens / self.first_tokens) ** -self.exponents
        means = self.floors + self.amplitudes * falls
        slopes = np.stack([np.ones_like(falls), falls], axis=1)
        variances = np.einsum("ki,kij,kj->k", slopes, self.covariances, slopes)
        mean = float(self.weights @ means)
        return mean, math.sqrt(max(float(self.weights @ (variances + (means - mean) ** 2)), 0.0))


def _fit_line(falls: Floats, losses: Floats, errors: Floats) -> tuple[Floats, Floats, float]:
    """Return floor and amplitude, both >= 0, their covariance, and the sum of squared errors."""
    design = np.stack([np.ones_like(falls), falls], axis=1) / errors[:, None]
    target = losses / errors
    inverse = np.linalg.pinv(design.T @ design)
    line = inverse @ design.T @ target
    if line.min() < 0:  # then the other one alone; all that it can do is stated by the larger sum of squares
        kept = 1 - int(line.argmin())
        column = design[:, kept]
        line = np.zeros(2)
        line[kept] = column @ target / (column @ column)
        inverse = np.zeros((2, 2))
        inverse[kept, kept] = 1 / (column @ column)
    return line, inverse, float(np.sum((design @ line - target) ** 2))
