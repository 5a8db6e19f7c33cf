"""What the programs of a comparison share: seeds, cost tables, and the rows and baselines that they note down."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from trainpilot.experiments.compare.comparison import Case, TunedBaseline
from trainpilot.experiments.compare.records import Role, Row, RunResult, RunSpec, cost_key
from trainpilot.experiments.compare.settings import Setting
from trainpilot.experiments.compare.store import run_key
from trainpilot.experiments.compare.tuning import N_CONFIRMED, Trial, Trials, final_loss
from trainpilot.experiments.measuring.cost import modelled_cost
from trainpilot.llm_runtime.config import Precision
from trainpilot.llm_runtime.cost_table import CostTable


class Bench:
    """The common ground of one comparison.

    Args:
        seeds: Judged seeds, paired over methods.
        tuning_seeds: Seeds of the searches, none of the judged ones: what a search found by luck does not count.
        tables: Cost tables by `cost_key`.
        precisions: Precisions worth trying, by case.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        tuning_seeds: Sequence[int],
        tables: Mapping[str, CostTable],
        precisions: Mapping[str, Sequence[Precision]],
        warn: Callable[[str], None],
    ) -> None:
        if both := set(tuning_seeds) & set(seeds):
            raise ValueError(f"seeds must leave the tuning seeds out, got {min(both)} in both; take fewer seeds")
        self.seeds, self.tuning_seeds = tuple(seeds), tuple(tuning_seeds)
        self.tables = tables
        self.warn = warn
        self._precisions = precisions
        self._rows: dict[Row, None] = {}
        self.baselines: dict[str, list[TunedBaseline]] = {}

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row noted so far, in the order of case, method, role, budget and seed."""
        return tuple(
            sorted(self._rows, key=lambda row: (row.case, row.method, row.role, row.budget, row.seed, row.key))
        )

    def precisions(self, case: Case) -> Sequence[Precision]:
        """Return the precisions that a search on this case tries: the case's own, and those that pay here."""
        return self._precisions[case.name]

    def row(
        self,
        case: Case,
        method: str,
        spec: RunSpec,
        *,
        role: Role = "method",
        budget: float = 1.0,
        counted: float | None = None,
    ) -> None:
        """Note that a run stands for a method on a case."""
        row = Row(
            case=case.name,
            method=method,
            role=role,
            seed=spec.config.seed,
            budget=budget,
            counted_budget=budget if counted is None else counted,
            key=run_key(spec),
        )
        self._rows[row] = None

    def baseline(self, case: Case, baseline: TunedBaseline) -> None:
        """Note a tuned setting."""
        self.baselines.setdefault(case.name, []).append(baseline)

    def cost_of(self, result: RunResult) -> float:
        """Return the modelled joules of a run, seconds where joules are unknown.

        Raises:
            ValueError: there is no cost table for its model.
        """
        key = cost_key(result.spec.config)
        if key not in self.tables:
            raise ValueError(f"there is no cost table for {key}")
        cost = modelled_cost(result, self.tables[key])
        return cost.time_s if cost.energy_j is None else cost.energy_j

    def cheapest(
        self,
        trials: Trials,
        curve: Sequence[tuple[float, float]],
        axis: str,
        among: Collection[Setting] | None = None,
    ) -> list[Trial]:
        """Return the trials that would reach one loss for the least modelled `axis`, the best first.

        A trial whose loss the tuned baseline reaches at a share n of the budget needs about 1/n of its own cost to
        reach what the baseline does at its whole budget.

        Args:
            trials: Runs of the whole budget.
            curve: (budget share, loss) of the tuned baseline, rising in budget, over the same seeds.
            axis: `time_s` or `energy_j`.
            among: Confirmed settings, judged by their mean loss; by default all that were tried, by one seed's.
        """
        scored: list[tuple[float, int, Trial]] = []
        for setting, trial in trials.tried.items():
            if among is None or setting in among:
                loss = final_loss(trial.result) if among is None else trials.mean_loss(setting)
                if (score := self._score(trial, loss, curve, axis)) is not None:
                    scored.append((score, len(scored), trial))
        return [trial for _, _, trial in sorted(scored)[:N_CONFIRMED]]

    def _score(self, trial: Trial, loss: float, curve: Sequence[tuple[float, float]], axis: str) -> float | None:
        table = self.tables.get(cost_key(trial.spec.config))
        if not math.isfinite(loss) or table is None:
            return None
        cost: float | None = getattr(modelled_cost(trial.result, table), axis)
        return None if cost is None else cost / share_needed(loss, curve)


def share_needed(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the budget share at which a curve reaches `loss`: log-log interpolation, end values outside."""
    points = [(math.log(loss_), math.log(share)) for share, loss_ in curve if math.isfinite(loss_)]
    points.sort()
    falling = [points[0]]
    for point in points[1:]:
        if point[1] < falling[-1][1]:
            falling.append(point)
    losses, shares = zip(*falling, strict=True)
    return float(np.exp(np.interp(math.log(loss), losses, shares)))
