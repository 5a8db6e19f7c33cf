"""Find out what a run had used when its validation loss first reached a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from trainpilot.experiments.compare.comparison import UNTUNED, Case
from trainpilot.experiments.measuring.cost import cumulative
from trainpilot.experiments.measuring.figures import AXES, TargetFigures
from trainpilot.experiments.measuring.runs import Amounts, Run, Runs
from trainpilot.experiments.measuring.statistics import Bounded, above, exactly, over_seeds


@dataclass(frozen=True)
class Reading:
    """A look at the validation loss."""

    loss: float
    """In nats/token."""
    used: Amounts
    """By then, modelled."""


def target_loss(case: Case, runs: Runs) -> float | None:
    """Return the case's own target, or the untuned default's median final loss, in nats/token."""
    if case.target_loss is not None:
        return case.target_loss
    losses = [math.inf if run.loss is None else run.loss for run in runs.of(case.name, UNTUNED)]
    return found if losses and math.isfinite(found := median(losses)) else None


def target_figures(runs: Sequence[Run], target: float | None) -> TargetFigures:
    """Return what a method needed to reach `target`, over its seeds."""
    needed = [used_to_reach(run, target) for run in runs] if target is not None else []
    return TargetFigures(
        n_reached=sum(found["tokens"] is not None and math.isfinite(found["tokens"].high) for found in needed),
        n_runs=len(runs),
        tokens=over_seeds([value for found in needed if (value := found["tokens"])]),
        time_s=over_seeds([value for found in needed if (value := found["time_s"])]),
        energy_j=over_seeds([value for found in needed if (value := found["energy_j"])]),
    )


def used_to_reach(run: Run, target: float) -> dict[str, Bounded | None]:
    """Return what the run had used when it first reached `target`, by axis; more than all it used if it never did.

    Between two looks at the validation loss everything is taken to change linearly.
    """
    readings = _readings(run)
    index = next((index for index, reading in enumerate(readings) if reading.loss <= target), None)
    if index is None:
        return {axis: None if (spent := run.spent[axis]) is None else above(spent) for axis in AXES}
    before, after = readings[max(index - 1, 0)], readings[index]
    share = (before.loss - target) / (before.loss - after.loss) if index else 0.0
    return {axis: _between(before.used[axis], after.used[axis], share) for axis in AXES}


def _between(before: float | None, after: float | None, share: float) -> Bounded | None:
    return None if before is None or after is None else exactly(before + (after - before) * share)


def _readings(run: Run) -> list[Reading]:
    """Return the looks at the validation loss, the one before the first step included."""
    result = run.result
    costs = cumulative(result, run.table) if run.cost is not None and run.table is not None else None
    readings = []
    if result.initial_validation_loss is not None:
        start = {axis: None if spent is None else 0.0 for axis, spent in run.spent.items()}
        readings.append(Reading(result.initial_validation_loss, start))
    for index, interval in enumerate(result.intervals):
        if interval.validation_loss is not None:
            used = {
                "tokens": float(interval.tokens),
                "time_s": costs[index].time_s if costs else None,
                "energy_j": costs[index].energy_j if costs else None,
            }
            readings.append(Reading(interval.validation_loss, used))
    return readings
