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
        falls = (tokens / tokens[0]) ** -EXPONENTS[:, None]
        lines, covariances, squares = _fit_lines(falls, losses, errors)
        excess = max(float(squares.min()) / max(len(losses) - 3, 1), 1.0)
        weights = np.exp(-(squares - squares.min()) / (2 * excess))
        return cls(
            first_tokens=float(tokens[0]),
            exponents=EXPONENTS,
            weights=weights / weights.sum(),
            floors=lines[:, 0],
            amplitudes=lines[:, 1],
            covariances=excess * covariances,
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


def _fit_lines(falls: Floats, losses: Floats, errors: Floats) -> tuple[Floats, Floats, Floats]:
    """Return floor and amplitude, both >= 0, their covariance, and the sum of squared errors for each row of `falls`.

    Args:
        falls: What the amplitude is multiplied by, shape (n_rows, n_losses).
        losses: Shape (n_losses,).
        errors: Standard errors of the losses, shape (n_losses,).
    """
    design = np.stack([np.ones_like(falls), falls], axis=2) / errors[:, None]
    target = losses / errors
    inverses = np.linalg.pinv(np.einsum("knp,knq->kpq", design, design))
    projected = np.einsum("knp,n->kp", design, target)
    lines = np.einsum("kpq,kq->kp", inverses, projected)
    (below,) = np.nonzero(lines.min(axis=1) < 0)
    if len(below):  # then the other one alone; all that it can do is stated by the larger sum of squares
        kept = 1 - lines[below].argmin(axis=1)
        lengths = np.square(design[below, :, kept]).sum(axis=1)
        lines[below], inverses[below] = 0.0, 0.0
        lines[below, kept] = projected[below, kept] / lengths
        inverses[below, kept, kept] = 1 / lengths
    return lines, inverses, np.square(np.einsum("knp,kp->kn", design, lines) - target).sum(axis=1)
