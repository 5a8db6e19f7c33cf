"""Compare methods on the plane of loss against cost: which points are dominated, and how good a set of points is.

Both objectives are ratios to the tuned static of the same case, and less is better: the compute that the loss is worth
(the tuned static's whole budget over the budget at which it reaches the loss), and the cost. So one percent of either
is the same size on every case, and (1, 1) is the tuned static itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from trainpilot.experiments.analysis.figures import FamilyFront, FrontPoint
from trainpilot.experiments.analysis.modelled_cost import Run, Runs
from trainpilot.experiments.analysis.multiplier import CaseBaselines
from trainpilot.experiments.analysis.statistics import exactly, over_cases
from trainpilot.experiments.results import TUNED

REFERENCE_POINT = (4.0, 4.0)
"""Worst point that counts: a loss that needs a quarter of the compute, at four times the cost. (1, 1) dominates 9."""
N_WEIGHTS = 100

Objectives = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SetQuality:
    """Quality measures of a set of points."""

    hypervolume: float
    """Area between the set and `REFERENCE_POINT`; more is better."""
    igd_plus: float
    """Mean distance by which the set falls short of the best points that all families have; less is better."""
    expected_utility: float
    """Share of compute and cost saved against the tuned static, mean over all weightings of the two."""


def on_front(points: Sequence[Objectives]) -> list[bool]:
    """Return which points are not dominated by another one. Equal points do not dominate each other."""
    if not points:
        return []
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    best = NonDominatedSorting().do(np.asarray(points, dtype=float), only_non_dominated_front=True)
    chosen = set(map(int, best))
    return [index in chosen for index in range(len(points))]


def set_quality(points: Sequence[Objectives], best: Sequence[Objectives]) -> SetQuality:
    """Return the quality measures of a set.

    Args:
        points: The set; an empty one counts as a single point at `REFERENCE_POINT`.
        best: Non-dominated points of all families, for the distance.
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

    As in Zintgraf et al. 2015: the expected utility of a user who picks the best point for random weights.
    """
    weights = (np.arange(N_WEIGHTS) + 0.5) / N_WEIGHTS
    saved = 1.0 - np.asarray(points, dtype=float)  # (points, objectives)
    utilities = np.outer(weights, saved[:, 0]) + np.outer(1.0 - weights, saved[:, 1])
    return float(utilities.max(axis=1).mean())


@dataclass(frozen=True)
class _Place:
    loss: float
    time_s: float
    energy_j: float | None


def case_points(runs: Runs, case: str) -> list[FrontPoint]:
    """Return a point for each method, each budget of a baseline's curve and each trial of a search.

    There is no point for planted checks, without a median loss (half the seeds failed), or without a modelled cost.
    """
    groups: dict[tuple[str, str, float, str], list[Run]] = {}
    for run in runs.on_case(case):
        row = run.row
        if runs.note(row.method).kind != "check":
            trial = row.key if row.role == "sweep" else ""
            groups.setdefault((row.role, row.method, row.budget, trial), []).append(run)
    placed = {key: place for key, group in groups.items() if (place := _place(group))}
    by_energy = all(place.energy_j is not None for place in placed.values())
    plane = [(place.loss, _cost(place.time_s, place.energy_j, by_energy)) for place in placed.values()]
    return [
        FrontPoint(
            case=case,
            method=method,
            family=runs.note(method).family,
            role=role,
            validation_loss=place.loss,
            time_s=place.time_s,
            energy_j=place.energy_j,
            on_front=best,
        )
        for ((role, method, _, _), place), best in zip(placed.items(), on_front(plane), strict=True)
    ]


def _place(group: Sequence[Run]) -> _Place | None:
    loss = median([math.inf if run.loss is None else run.loss for run in group])
    costs = [run.cost for run in group if run.loss is not None and run.cost is not None]
    if not math.isfinite(loss) or not costs:
        return None
    joules = [cost.energy_j for cost in costs if cost.energy_j is not None]
    return _Place(loss, median([cost.time_s for cost in costs]), median(joules) if len(joules) == len(costs) else None)


def _cost(time_s: float, energy_j: float | None, by_energy: bool) -> float:
    return energy_j if by_energy and energy_j is not None else time_s


def family_fronts(
    runs: Runs, points: Sequence[FrontPoint], baselines: Mapping[str, CaseBaselines]
) -> list[FamilyFront]:
    """Return the quality measures of each family's points, as medians over cases.

    Only judged methods count: the trials of a search were selected by the same losses.
    """
    qualities: dict[str, list[SetQuality]] = {}
    counts: dict[str, int] = {}
    for case, of_case in baselines.items():
        sets = _objectives([point for point in points if point.case == case and point.role == "method"], of_case)
        known = [point for found in sets.values() for point in found]
        best = [point for point, kept in zip(known, on_front(known), strict=True) if kept]
        for family in _families(runs, case) if known else ():
            found = sets.get(family, [])
            qualities.setdefault(family, []).append(set_quality(found, best))
            counts[family] = counts.get(family, 0) + len(found)
    return [_front(family, found, counts[family]) for family, found in qualities.items()]


def _front(family: str, qualities: Sequence[SetQuality], n_points: int) -> FamilyFront:
    return FamilyFront(
        family=family,
        hypervolume=over_cases([[exactly(quality.hypervolume)] for quality in qualities]),
        igd_plus=over_cases([[exactly(quality.igd_plus)] for quality in qualities]),
        expected_utility=over_cases([[exactly(quality.expected_utility)] for quality in qualities]),
        n_points=n_points,
    )


def _families(runs: Runs, case: str) -> list[str]:
    """Return the families with judged runs on a case, in the order of the methods."""
    judged = [note for name, note in runs.notes.items() if note.kind != "check" and runs.of(case, name)]
    return list(dict.fromkeys(note.family for note in judged))


def _objectives(points: Sequence[FrontPoint], baselines: CaseBaselines) -> dict[str, list[Objectives]]:
    """Return the objectives of each family's points relative to the tuned static.

    Objectives are clipped at `REFERENCE_POINT`, so that a bad point is never worse than none.
    """
    tuned = next((point for point in points if point.method == TUNED), None)
    baseline = baselines.tuned.get("tokens")
    if tuned is None or baseline is None:
        return {}
    by_energy = all(point.energy_j is not None for point in points)
    unit = _cost(tuned.time_s, tuned.energy_j, by_energy)
    sets: dict[str, list[Objectives]] = {}
    for point in points:
        # Outside the curve its bound is used as the budget, so that no gain beyond the curve is claimed.
        needed = baseline.curve.needed(point.validation_loss)
        share = (needed.high if math.isfinite(needed.high) else needed.low) / baseline.curve.whole[0]
        cost = _cost(point.time_s, point.energy_j, by_energy) / unit
        place = (min(1 / share, REFERENCE_POINT[0]), min(cost, REFERENCE_POINT[1]))
        sets.setdefault(point.family, []).append(place)
    return sets
