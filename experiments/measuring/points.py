"""Place methods and trials on each case's plane of loss against cost, and compare families of methods there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from trainpilot.experiments.compare.comparison import TUNED
from trainpilot.experiments.measuring.baselines import CaseBaselines
from trainpilot.experiments.measuring.figures import FamilyFront, FrontPoint
from trainpilot.experiments.measuring.fronts import REFERENCE_POINT, Objectives, SetQuality, on_front, set_quality
from trainpilot.experiments.measuring.runs import Run, Runs
from trainpilot.experiments.measuring.statistics import exactly, over_cases


@dataclass(frozen=True)
class _Place:
    loss: float
    time_s: float
    energy_j: float | None


def case_points(runs: Runs, case: str) -> list[FrontPoint]:
    """Return a point for each method, each budget of a baseline's curve and each trial of a search.

    What has no loss (half its seeds failed) or no modelled cost has no point, and planted checks have none.
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
    """Return how good each family's points are, median over cases.

    Judged methods alone: a search's own trials are picked by the very losses that they would be measured with.
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
    """Return the points of each family, as ratios to the tuned static's: compute that the loss is worth, and cost.

    What is worse than `REFERENCE_POINT` counts as just as bad: no point is worse than none.
    """
    tuned = next((point for point in points if point.method == TUNED), None)
    baseline = baselines.tuned.get("tokens")
    if tuned is None or baseline is None:
        return {}
    by_energy = all(point.energy_j is not None for point in points)
    unit = _cost(tuned.time_s, tuned.energy_j, by_energy)
    sets: dict[str, list[Objectives]] = {}
    for point in points:
        # Outside the curve the bound stands for the budget: it is either far off, or a gain that is not claimed.
        needed = baseline.curve.needed(point.validation_loss)
        share = (needed.high if math.isfinite(needed.high) else needed.low) / baseline.curve.whole[0]
        cost = _cost(point.time_s, point.energy_j, by_energy) / unit
        place = (min(1 / share, REFERENCE_POINT[0]), min(cost, REFERENCE_POINT[1]))
        sets.setdefault(point.family, []).append(place)
    return sets
