"""Weigh the loss of each method's model against what making and using it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from trainpilot.experiments.analysis.figures import USE_AXES, UsePoint
from trainpilot.experiments.analysis.modelled_cost import Run, Runs
from trainpilot.experiments.analysis.pareto import on_front
from trainpilot.experiments.costs.use import UseCost, use_key, used_model

Uses = Mapping[str, UseCost]
"""Costs of use by `use_key`."""


def use_points(runs: Runs, case: str, uses: Uses) -> list[UsePoint]:
    """Return a point for each judged method of a case that has a median loss and a model whose use was measured.

    Planted checks have none.

    Args:
        runs: The runs of the comparison.
        case: Name of the case.
        uses: Costs of use.
    """
    found = []
    for method in runs.notes:
        judged = runs.of(case, method)
        use = _use(judged, uses)
        loss = median([math.inf if run.loss is None else run.loss for run in judged]) if judged else math.inf
        if use is not None and math.isfinite(loss) and runs.note(method).kind != "check":
            found.append(_point(case, method, loss, judged, use))
    fronts = {axis: _front(found, axis) for axis in USE_AXES}
    return [
        replace(point, on_front=tuple(axis for axis, best in fronts.items() if point.method in best)) for point in found
    ]


def _use(judged: Sequence[Run], uses: Uses) -> UseCost | None:
    """Return the cost that all of a method's runs have in use; `None` where they differ, or it is unknown."""
    keys = {None if (used := used_model(run.result)) is None else use_key(*used) for run in judged if run.loss}
    [key] = keys if len(keys) == 1 else [None]
    return None if key is None else uses.get(key)


def _point(case: str, method: str, loss: float, judged: Sequence[Run], use: UseCost) -> UsePoint:
    return UsePoint(
        case=case,
        method=method,
        validation_loss=loss,
        n_parameters=use.n_parameters,
        weight_bytes=use.weight_bytes,
        bits_per_weight=use.bits_per_weight,
        training_time_s=_median(run.spent["time_s"] for run in judged),
        training_j=_median(run.spent["energy_j"] for run in judged),
        latency_s=use.latency_s,
        use_j=use.energy_j,
        energy_source=use.energy_source,
        on_front=(),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _front(points: Sequence[UsePoint], axis: str) -> set[str]:
    """Return the methods that are not dominated in loss and on an axis; those without a value have no place on it."""
    known = [point for point in points if getattr(point, axis) is not None]
    best = on_front([(point.validation_loss, float(getattr(point, axis))) for point in known])
    return {point.method for point, kept in zip(known, best, strict=True) if kept}
