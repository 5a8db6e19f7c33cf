"""Work out what a run would have cost on a quiet machine: what it did, times the cost table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from trainpilot.experiments.compare.records import IntervalResult, RunResult
from trainpilot.experiments.measuring.figures import PARTS
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.cost_table import CostTable
from trainpilot.llm_runtime.timing import Cost


@dataclass(frozen=True, kw_only=True)
class ModelledCost:
    """Modelled seconds and joules of a run. The evaluation before its first step is no part of it."""

    time_s: float
    energy_j: float | None
    """`None` where the table has no joules."""
    time_parts_s: Mapping[str, float]
    """Seconds of each of `PARTS`."""
    energy_parts_j: Mapping[str, float] | None
    """Joules of each of `PARTS`."""


def modelled_cost(result: RunResult, table: CostTable) -> ModelledCost:
    """Return what the run costs by `table`, in total and by parts.

    Raises:
        ValueError: the table is for another sequence length, or lacks something that the run used.
    """
    intervals = _by_interval(result, table)
    parts = {name: _sum((costs[name] for costs in intervals), table) for name in PARTS}
    total = _sum(parts.values(), table)
    joules = {name: cost.energy_j for name, cost in parts.items() if cost.energy_j is not None}
    return ModelledCost(
        time_s=total.time_s,
        energy_j=total.energy_j,
        time_parts_s={name: cost.time_s for name, cost in parts.items()},
        energy_parts_j=joules if len(joules) == len(parts) else None,
    )


def cumulative(result: RunResult, table: CostTable) -> tuple[Cost, ...]:
    """Return what the run has cost by the end of each interval, the evaluation there included.

    Raises:
        ValueError: as `modelled_cost`.
    """
    return tuple(accumulate(_sum(costs.values(), table) for costs in _by_interval(result, table)))


def _by_interval(result: RunResult, table: CostTable) -> list[dict[str, Cost]]:
    """Return the cost of each interval by `PARTS`."""
    config = result.spec.config
    if config.sequence_length != table.sequence_length:
        raise ValueError(
            f"table must be for sequences of {config.sequence_length} tokens, as the run's, got "
            f"{table.sequence_length}; measure one with the run's config"
        )
    found = []
    batch_size, precision, sparsity = float(config.batch_size), str(config.precision), 0.0
    for index, interval in enumerate(result.intervals, start=1):
        held = _held_batch(interval, batch_size, last=index == len(result.intervals))
        changed = {
            "batch": held != batch_size,
            "precision": interval.precision != precision,
            config.pruning: interval.sparsity > sparsity + 1e-9,
        }
        switching = _sum((table.switch(name) for name, did in changed.items() if did), table)
        found.append({**_passes(interval, held, config, table), "switching": switching})
        batch_size, precision, sparsity = held, interval.precision, interval.sparsity
    return found


def _passes(interval: IntervalResult, held: float, config: RunConfig, table: CostTable) -> dict[str, Cost]:
    """Return the costs of steps, probe and evaluation; only width makes a pass cheaper, masks make a step dearer."""
    removed = interval.sparsity if config.pruning == "width" else 0.0
    # Masks by magnitude cost nothing before they hold a weight; those by evolution follow the weights from the start.
    idle = config.pruning == "magnitude" and not interval.sparsity
    step = table.step(
        interval.batch_size,
        interval.precision,
        removed=removed,
        optimizer=config.optimizer,
        pruning="none" if idle else config.pruning,
    )
    nothing = _sum((), table)
    probed, looked = interval.probe_sequences, interval.evaluation_sequences
    return {
        "training": step * interval.steps,
        "probe": table.probe(probed, held, removed=removed) if probed else nothing,
        "evaluation": table.evaluation(looked, held, removed=removed) if looked else nothing,
    }


def _held_batch(interval: IntervalResult, before: float, *, last: bool) -> float:
    """Return the batch that was set: a run's end may cut its last step short, which lowers the mean."""
    sequences = round(interval.batch_size * interval.steps)
    cut_short = last and math.ceil(sequences / before) == interval.steps
    return before if cut_short else interval.batch_size


def _sum(costs: Iterable[Cost], table: CostTable) -> Cost:
    """Add up; without joules in the table, the sum of nothing has none either."""
    return sum(costs, Cost(time_s=0.0, energy_j=None if table.energy_source is None else 0.0))
