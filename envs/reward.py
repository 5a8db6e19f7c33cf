"""Turn what an interval brought into a reward vector: quality, energy and time, each in units of the reference run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OBJECTIVES = ("quality", "energy", "time")
MAX_QUALITY = 3.0
"""Compute-equivalents above this are not believed: they extrapolate too far beyond the reference runs."""
DIVERGED_QUALITY = -1.0
"""Quality of a diverged run: worse than a run that never started."""


@dataclass(frozen=True)
class RewardTerms:
    """Reward of one interval. Summed over an episode (gamma = 1) they give the outcome of the run."""

    quality: float
    """Change of the compute-equivalent: the share of the budget that the reference needs for the loss reached."""
    energy: float
    """Joules of the interval over the reference run's joules, negative; 0 while unknown."""
    time: float
    """Seconds of the interval over the reference run's seconds, negative."""

    def vector(self) -> np.ndarray:
        """Return (quality, energy, time), float32 of shape (3,)."""
        return np.array([self.quality, self.energy, self.time], dtype=np.float32)


def compute_equivalent(loss: float, budgets: Sequence[float], losses: Sequence[float]) -> float:
    """Return the share of the full budget at which the reference reaches `loss`.

    Reference runs of several budgets, each with its whole schedule, give points (budget, final loss). Between them
    the logarithm of the budget is linear in the logarithm of the loss; beyond them the end pieces go on.

    Args:
        loss: Loss reached, in nats/token.
        budgets: Shares of the full budget, rising, at least two.
        losses: Final loss of the reference at each budget, in nats/token.

    Returns:
        A share in [0, MAX_QUALITY]; 0 for a loss that is not finite.
    """
    if not math.isfinite(loss) or loss <= 0:
        return 0.0
    x, y = np.log(np.asarray(losses)), np.log(np.asarray(budgets))
    falling = np.minimum.accumulate(x)  # a longer reference run that ended worse counts as no better
    points = [i for i in range(len(x)) if i == 0 or falling[i] < falling[i - 1] - 1e-9]
    if len(points) < 2:
        return float(loss <= losses[0])
    x, y = falling[points], y[points]
    piece = int(np.clip(np.searchsorted(-x, -math.log(loss)) - 1, 0, len(x) - 2))
    slope = (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece])
    share = math.exp(min(y[piece] + slope * (math.log(loss) - x[piece]), 50.0))
    return min(share, MAX_QUALITY)
