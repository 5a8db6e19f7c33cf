"""Say beforehand how much a comparison will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainpilot.experiments.compare.baseline import CURVE_BUDGETS, UNTUNED_CURVE_BUDGETS
from trainpilot.experiments.compare.comparison import UNTUNED, Case
from trainpilot.experiments.compare.methods import CHECKS, OPTIONAL_RUNS, PER_SCHEDULE, rests_on_search
from trainpilot.experiments.compare.policies import starts_from_tuned
from trainpilot.experiments.compare.records import cost_key
from trainpilot.experiments.compare.settings import TUNED_SCHEDULES, grid
from trainpilot.llm_runtime.cost_table import CostTable

REFINEMENT_RUNS = 30
"""Runs that refining a grid's best point takes, about."""
SCHEDULE_RUNS = 11
"""Runs that refining one schedule's learning rate and confirming its best settings takes, about."""
SEARCHED_BATCH = 0.25
"""Share of the case's batch that a search's runs have, about: at equal tokens small batches win on small models."""
SET_UP_S = 0.5
"""Seconds of making the model and looking at its losses, about."""
RETUNE_RUNS = 10
"""Runs that tuning again at another budget takes, about."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much there is to do, about: what a search needs turns out on the way."""

    n_runs: int
    """Runs, counting a run of half the budget as half."""
    time_s: float
    """Wall-clock seconds with the given number of processes."""


def make_plan(
    cases: Sequence[Case], names: Sequence[str], n_seeds: int, tables: Mapping[str, CostTable], jobs: int
) -> Plan:
    """Return what comparing `names` on `cases` will take, if nothing has been run before."""
    runs, seconds = 0.0, 0.0
    for case in cases:
        equivalents = runs_on_a_case(case, names, n_seeds)
        runs += equivalents
        seconds += equivalents * seconds_of_a_run(case, tables, searched=rests_on_search(names))
    return Plan(n_runs=round(runs), time_s=seconds / jobs)


def runs_on_a_case(case: Case, names: Sequence[str], n_seeds: int) -> float:
    """Return the runs of one case, in runs of the whole budget."""
    searched = [name for name in names if rests_on_search([name])]
    optional = [name for name in names if name in OPTIONAL_RUNS]
    runs: float = n_seeds * (len(names) - len(searched) - len(optional))
    if UNTUNED in names:
        runs += sum(UNTUNED_CURVE_BUDGETS)
    if searched:
        per_curve = sum(CURVE_BUDGETS) * (RETUNE_RUNS + n_seeds)
        runs += len(grid(case.config, [case.config.precision])) + REFINEMENT_RUNS + n_seeds + per_curve
        runs += SCHEDULE_RUNS * len(TUNED_SCHEDULES) + sum(n_seeds for name in searched if name in PER_SCHEDULE)
        runs += sum(1.1 * n_seeds for name in searched if name in CHECKS)
        runs += sum(n_seeds for name in searched if starts_from_tuned(name))
    return runs + sum(OPTIONAL_RUNS[name] + n_seeds for name in optional)


def seconds_of_a_run(case: Case, tables: Mapping[str, CostTable], *, searched: bool = False) -> float:
    """Return the modelled seconds of the case's own setting, or of what a search mostly runs: smaller batches."""
    config = case.config
    batch_size = max(1, round(config.batch_size * SEARCHED_BATCH)) if searched else config.batch_size
    step = tables[cost_key(config)].step(batch_size, config.precision)
    return SET_UP_S + step.time_s * config.n_sequences() / batch_size
