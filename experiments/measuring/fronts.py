"""Compare sets of points on the plane of loss against cost: who is dominated, and how good a set is as a whole.

Both objectives are ratios to the tuned static of the same case, and less is better: the compute that the loss is worth
(the tuned static's whole budget over the budget at which it reaches the loss), and the cost. So one percent of either
is the same size on every case, and (1, 1) is the tuned static itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE_POINT = (4.0, 4.0)
"""The worst that still counts: a loss worth a quarter of the compute, four times the cost. (1, 1) alone dominates 9."""
N_WEIGHTS = 100

Objectives = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SetQuality:
    """How good a set of points is."""

    hypervolume: float
    """Area between the set and `REFERENCE_POINT`; more is better."""
    igd_plus: float
    """Mean distance by which the set falls short of the best points that all families have; less is better."""
    expected_utility: float
    """Share of compute and cost saved against the tuned static, mean over all weightings of the two."""


def on_front(points: Sequence[Objectives]) -> list[bool]:
    """Return which points no other point dominates: at least as good in both and better in one. Equals all stay."""
    if not points:
        return []
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    best = NonDominatedSorting().do(np.asarray(points, dtype=float), only_non_dominated_front=True)
    chosen = set(map(int, best))
    return [index in chosen for index in range(len(points))]


def set_quality(points: Sequence[Objectives], best: Sequence[Objectives]) -> SetQuality:
    """Return how good a set is.

    Args:
        points: The set; without any it counts as a single point at `REFERENCE_POINT`.
        best: Points that nothing known dominates, for the distance.
    """
    found = list(points) or [REFERENCE_POINT]
    return SetQuality(
        hypervolume=hypervolume(found),
        igd_plus=igd_plus(found, list(best) or found),
        expected_utility=expected_utility(found),
    )


def hypervolume(points: Sequence[Objectives], reference: Objectives = REFERENCE_POINT) -> float:
    """Return the area that the points dominate, bounded by `reference` (Zitzler and Thiele 1999)."""
    from pymoo.indicators.hv import HV

    return float(HV(ref_point=np.asarray(reference))(np.asarray(points, dtype=float)))


def igd_plus(points: Sequence[Objectives], best: Sequence[Objectives]) -> float:
    """Return the modified inverted generational distance (Ishibuchi et al. 2015).

    The mean, over `best`, of the distance to the nearest point, in which an objective counts only where it is worse.
    """
    from pymoo.indicators.igd_plus import IGDPlus

    return float(IGDPlus(np.asarray(best, dtype=float))(np.asarray(points, dtype=float)))


def expected_utility(points: Sequence[Objectives]) -> float:
    """Return the mean, over evenly spread weights, of the best weighted sum of what is saved (1 minus an objective).

    As Zintgraf et al. 2015: the user who picks the best point for a weighting of his own, drawn at random.
    """
    weights = (np.arange(N_WEIGHTS) + 0.5) / N_WEIGHTS
    saved = 1.0 - np.asarray(points, dtype=float)  # (points, objectives)
    utilities = np.outer(weights, saved[:, 0]) + np.outer(1.0 - weights, saved[:, 1])
    return float(utilities.max(axis=1).mean())
