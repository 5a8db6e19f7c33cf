"""Compute the modelled cost of runs (time and energy on an idle machine) from a cost table.

The modelled cost is the number of steps, forward passes and switches of a run times their costs in the table. `Runs`
looks up the runs of a comparison's rows, each with its modelled cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from trainpilot.experiments.analysis.figures import AXES, PARTS
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import (
    TUNED,
    Comparison,
    IntervalResult,
    MethodNote,
    Role,
    Row,
    RunResult,
    cost_key,
)
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.timing import Cost


@dataclass(frozen=True, kw_only=True)
class ModelledCost:
    """Modelled seconds and joules of a run, without the evaluation before its first step."""

    time_s: float
    energy_j: float | None
    """`None` where the table has no joules."""
    time_parts_s: Mapping[str, float]
    """Seconds of each of `PARTS`."""
    energy_parts_j: Mapping[str, float] | None
    """Joules of each of `PARTS`."""


Tables = Mapping[str, CostTable]
"""Cost tables by `cost_key`."""


def modelled_cost(result: RunResult, table: CostTable, others: Tables = MappingProxyType({})) -> ModelledCost:
    """Return the modelled cost of a run, in total and by parts.

    Args:
        result: The run.
        table: Of the model that the run begins with.
        others: Among them those of the models that it goes on with, or learns from.

    Raises:
        ValueError: a table is missing, is for another sequence length, or lacks something that the run used.
    """
    intervals = _by_interval(result, table, others)
    parts = {name: _sum((costs[name] for costs in intervals), table) for name in PARTS}
    total = _sum(parts.values(), table)
    joules = {name: cost.energy_j for name, cost in parts.items() if cost.energy_j is not None}
    return ModelledCost(
        time_s=total.time_s,
        energy_j=total.energy_j,
        time_parts_s={name: cost.time_s for name, cost in parts.items()},
        energy_parts_j=joules if len(joules) == len(parts) else None,
    )


def cumulative(result: RunResult, table: CostTable, others: Tables = MappingProxyType({})) -> tuple[Cost, ...]:
    """Return the cumulative cost at the end of each interval, including the evaluation there.

    Args:
        result: The run.
        table: Of the model that the run begins with.
        others: As for `modelled_cost`.

    Raises:
        ValueError: as `modelled_cost`.
    """
    return tuple(accumulate(_sum(costs.values(), table) for costs in _by_interval(result, table, others)))


def _by_interval(result: RunResult, table: CostTable, others: Tables) -> list[dict[str, Cost]]:
    """Return the cost of each interval by `PARTS`."""
    first, *later = result.spec.phases()
    found = _of_phase(result.intervals[: first.decisions] if later else result.intervals, first.config, table)
    whole, begin = table, first.decisions
    for phase in later:
        small = _other(phase.config, others)
        costs = _of_phase(result.intervals[begin:], phase.config, small)
        if phase.teacher is not None:
            teacher = _other(phase.teacher, others)
            for cost, interval in zip(costs, result.intervals[begin:], strict=True):
                cost["training"] += _teaching(interval, teacher)
        if costs and phase.ranked_sequences:
            costs[0]["switching"] += whole.evaluation(phase.ranked_sequences, phase.config.batch_size)
        found += costs
    return found


def _other(config: RunConfig, tables: Tables) -> CostTable:
    if (key := cost_key(config)) not in tables:
        raise ValueError(f"there is no cost table for {key}")
    return tables[key]


def _teaching(interval: IntervalResult, teacher: CostTable) -> Cost:
    """Return the cost of the teacher's forward passes, one for each step."""
    return teacher.evaluation(max(round(interval.batch_size), 1), interval.batch_size) * interval.steps


def _of_phase(intervals: Sequence[IntervalResult], config: RunConfig, table: CostTable) -> list[dict[str, Cost]]:
    """Return the cost by `PARTS` of each of the intervals in which one model is trained."""
    if config.sequence_length != table.sequence_length:
        raise ValueError(
            f"table must be for sequences of {config.sequence_length} tokens, as the run's, got "
            f"{table.sequence_length}; measure one with the run's config"
        )
    found = []
    batch_size, precision, sparsity = float(config.batch_size), str(config.precision), 0.0
    for index, interval in enumerate(intervals, start=1):
        held = _held_batch(interval, batch_size, last=index == len(intervals))
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
    """Return the costs of steps, probe and evaluation. Removed channels make a pass cheaper, masks a step dearer."""
    removed = interval.sparsity if config.pruning == "width" else 0.0
    # Magnitude masks cost nothing while they are empty; evolution masks are updated from the start.
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
    """Return the batch size that was set; in the last interval the mean may be lower, as the last step may be short."""
    sequences = round(interval.batch_size * interval.steps)
    cut_short = last and math.ceil(sequences / before) == interval.steps
    return before if cut_short else interval.batch_size


def _sum(costs: Iterable[Cost], table: CostTable) -> Cost:
    """Add up costs; without joules in the table, the joules of the sum are `None`, even of an empty one."""
    return sum(costs, Cost(time_s=0.0, energy_j=None if table.energy_source is None else 0.0))


Amounts = Mapping[str, float | None]
"""By axis of `AXES`; `None` where it is unknown."""


@dataclass(frozen=True)
class Run:
    """A row with its run and the run's modelled cost."""

    row: Row
    result: RunResult
    cost: ModelledCost | None
    """`None` without a table for the run."""
    table: CostTable | None
    """Of the model that it began with."""
    tables: Tables = field(default_factory=dict)
    """All tables, for runs that end with another model."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.row.seed

    @property
    def loss(self) -> float | None:
        """Final validation loss in nats/token; `None` if the run diverged or failed."""
        return self.result.final_validation_loss

    @cached_property
    def spent(self) -> Amounts:
        """Costs of the run: tokens, modelled seconds, modelled joules."""
        cost = self.cost
        return {
            "tokens": float(self.result.tokens),
            "time_s": cost.time_s if cost else None,
            "energy_j": cost.energy_j if cost else None,
        }

    @cached_property
    def counted(self) -> Amounts:
        """Costs that are counted for the run; they differ from `spent` only in planted checks."""
        factor = self.row.counted_budget / self.row.budget
        return {axis: None if spent is None else spent * factor for axis, spent in self.spent.items()}


class Runs:
    """All runs of a comparison, by case, method and role. Rows without a result are skipped and counted.

    Args:
        comparison: Rows that assign runs to cases and methods.
        results: Runs by key.
        tables: Cost tables by `cost_key`.
    """

    def __init__(
        self, comparison: Comparison, results: Mapping[str, RunResult], tables: Mapping[str, CostTable]
    ) -> None:
        self.comparison = comparison
        self.unknown_costs: dict[str, int] = {}
        """Runs without a modelled cost, counted by reason."""
        self._tables = tables
        self._costs: dict[str, ModelledCost | None] = {}
        self._places: dict[tuple[str, str, Role], list[Run]] = {}
        known = [row for row in comparison.rows if row.key in results]
        self.n_missing = len(comparison.rows) - len(known)
        for row in sorted(known, key=lambda row: (row.budget, row.seed, row.key)):
            self._places.setdefault((row.case, row.method, row.role), []).append(self._run(row, results[row.key]))

    def of(self, case: str, method: str, role: Role = "method") -> list[Run]:
        """Return a method's runs on a case, by budget and seed."""
        return self._places.get((case, method, role), [])

    def on_case(self, case: str) -> list[Run]:
        """Return every run of a case, by method, role, budget and seed."""
        return [run for place in sorted(self._places) if place[0] == case for run in self._places[place]]

    def judged(self) -> list[Run]:
        """Return the runs of all methods."""
        return [run for (_, _, role), runs in self._places.items() if role == "method" for run in runs]

    @cached_property
    def notes(self) -> dict[str, MethodNote]:
        """Methods by name, in the comparison's order; a method without a note of its own gets one here."""
        notes = {note.name: note for note in self.comparison.methods}
        for row in self.comparison.rows:
            if row.role == "method" and row.method not in notes:
                notes[row.method] = _note_for(row.method, notes)
        return notes

    def note(self, method: str) -> MethodNote:
        """Return the note of a method, or of a search that has no judged runs."""
        return self.notes.get(method) or _note_for(method, self.notes)

    def search_cost(self, case: str, method: str = TUNED) -> Amounts:
        """Return the costs of a method's search on a case; unknown if no search was recorded."""
        trials = [run.spent for run in self.of(case, method, "sweep")]
        return {axis: sum_known(trial[axis] for trial in trials) if trials else None for axis in AXES}

    def own_search(self, case: str, method: str) -> Amounts:
        """Return the costs of finding a method's setting: 0 for methods that need no search.

        Methods that use the result of the tuned static's search (the best per schedule, the checks, and compressed ones
        where there was a search) are charged with that search.
        """
        uses_search = ("tuned", "check", "compressed") if self.of(case, TUNED, "sweep") else ("tuned", "check")
        if self.note(method).kind not in uses_search:
            return dict.fromkeys(AXES, 0.0)
        for search in (method, method.rpartition("-")[0]):
            if self.of(case, search, "sweep"):
                return self.search_cost(case, search)
        return self.search_cost(case)

    def _run(self, row: Row, result: RunResult) -> Run:
        table = self._tables.get(cost_key(result.spec.config))
        if result.key not in self._costs:
            self._costs[result.key] = self._cost(result, table)
        return Run(row, result, self._costs[result.key], table, self._tables)

    def _cost(self, result: RunResult, table: CostTable | None) -> ModelledCost | None:
        reason = f"there is no cost table for {cost_key(result.spec.config)}"
        if table is not None:
            try:
                return modelled_cost(result, table, self._tables)
            except ValueError as error:
                reason = str(error)
        self.unknown_costs[reason] = self.unknown_costs.get(reason, 0) + 1
        return None


def _note_for(name: str, notes: Mapping[str, MethodNote]) -> MethodNote:
    """Return a note for `nsga2-3`, say: in the family of `nsga2`, and of its kind."""
    base = notes.get(name.rpartition("-")[0])
    family, kind = (base.family, base.kind) if base else (name, "tuned" if name.startswith("tuned") else "untuned")
    return MethodNote(name=name, title=name, description="", family=family, kind=kind)
