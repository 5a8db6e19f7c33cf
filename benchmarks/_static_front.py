"""Find what static settings reach on the plane of loss against cost: one for all by NSGA-II, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _static_grid import BASES, POWERS, RATES, nearest_power, needed, sweep

from trainpilot.envs.reference import BUDGET_SHARES
from trainpilot.envs.runs import worths
from trainpilot.experiments.analysis.pareto import on_front
from trainpilot.llm_runtime.simulator.instances import Instances
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.references import DECISIONS, References, ScheduleTable, static_losses

POPULATION, GENERATIONS = 24, 12
LOW = np.array([np.log2(RATES[0]), POWERS[0] - 0.5, 0.0, -3.0, 0.0])
HIGH = np.array([np.log2(RATES[-1]), POWERS[-1] + 0.499, len(BASES) - 0.001, 0.0, 1.999])
"""Of a setting as NSGA-II sees it: log2 of the learning rate at the starting batch, doublings of that batch, base
schedule, log2 of the share of the budget, and whether the fastest precision is taken."""

_MEANS = np.stack([ScheduleTable.of(name, warmup, DECISIONS).mean for name, warmup in BASES])


@dataclass(frozen=True, kw_only=True)
class RunsAndReferences:
    """Runs to try static settings on, with what they are measured with."""

    instances: Instances
    references: References

    def take(self, rows: Ints) -> RunsAndReferences:
        """Return some of them."""
        return RunsAndReferences(instances=self.instances.take(rows), references=self.references.take(rows))

    def __len__(self) -> int:
        return len(self.instances)

    def quality(self, loss: Floats) -> Floats:
        """Return the share of the budget that the tuned static needs for a loss, shape (..., n_runs)."""
        return needed(loss, BUDGET_SHARES, np.minimum.accumulate(self.references.losses, axis=1))

    def cost(self, name: str, batch: Floats, fast: Floats, share: Floats | float) -> Floats:
        """Return the `energy` or `time` of static runs over the reference's."""
        hardware = self.instances.hardware
        fastest = np.where(hardware.masked, 0.0, hardware.speed).argmax(axis=1)
        precision = np.where(fast >= 1, fastest, 0)
        time_s: Floats = hardware.step_s(batch, precision, np.zeros(len(self))) * self.instances.sequences / batch
        time_s = time_s * share
        if name == "time":
            return time_s / self.references.time_s
        return time_s * hardware.power_w(batch) / self.references.energy_j


def try_settings(settings: Floats, runs: RunsAndReferences, cost: str) -> tuple[Floats, Floats]:
    """Return quality and cost of every setting on every run, each of shape (n_settings, n_runs)."""
    n = len(runs)
    each = runs.take(np.tile(np.arange(n), len(settings)))
    rate, power, base, share, fast = (np.repeat(column, n) for column in settings.T)
    batch = each.instances.start_batch * 2.0 ** nearest_power(each.instances, np.round(power).astype(np.int64))
    at_batch = 2.0**rate * np.sqrt(batch / each.instances.start_batch)
    mean = _MEANS[base.astype(np.int64)].T  # (decisions, rows): every row has a schedule of its own
    table = ScheduleTable(mean=mean, last=mean, start=mean)
    loss = static_losses(each.instances, at_batch, batch, table, 2.0**share)  # type: ignore[arg-type]
    told = each.quality(loss), each.cost(cost, batch, np.floor(fast), 2.0**share)
    return told[0].reshape(-1, n), told[1].reshape(-1, n)


def nsga2_settings(runs: RunsAndReferences, cost: str, n_simulated: int, seed: int = 0) -> Floats:
    """Return the settings on the front that NSGA-II finds with `n_simulated` runs in all.

    Every setting is tried on the same few runs, and judged by its medians there.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize

    n_tried = max(1, min(len(runs), n_simulated // (POPULATION * GENERATIONS)))
    tried = runs.take(np.random.default_rng(seed).choice(len(runs), n_tried, replace=False))

    class Settings(Problem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=len(LOW), n_obj=2, xl=LOW, xu=HIGH)

        def _evaluate(self, x: Floats, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = np.array(medians(*try_settings(x, tried, cost)))

    found = minimize(Settings(), NSGA2(pop_size=POPULATION), ("n_gen", GENERATIONS), seed=seed)
    settings: Floats = np.atleast_2d(found.X)
    return settings


def medians(quality: Floats, cost: Floats) -> list[tuple[float, float]]:
    """Return the objectives of each row, less is better: compute that the median loss is worth, and median cost."""
    worth = np.maximum(np.median(quality, axis=1), 1e-3)
    return [(1 / float(q), float(c)) for q, c in zip(worth, np.median(cost, axis=1), strict=True)]


def tuned_for_each(runs: RunsAndReferences, cost: str, weights: Sequence[float]) -> tuple[Floats, Floats]:
    """Return quality and cost of the static setting that is best on each run under each weight on the cost.

    The learning rate, the batch and the budget are chosen with the loss of every one of them known, 648 runs or fewer
    for each run; the fastest precision is taken.
    """
    shares = np.array(BUDGET_SHARES)
    losses = np.stack([sweep(runs.instances, share, [("wsd", 0.1)])[0] for share in shares])
    quality = runs.quality(losses)  # (shares, rates, powers, n)
    costs = np.empty(quality.shape)
    for k, power in enumerate(POWERS):
        batch = runs.instances.start_batch * 2.0 ** nearest_power(runs.instances, np.full(len(runs), power))
        costs[:, :, k] = shares[:, None, None] * runs.cost(cost, batch, np.ones(len(runs)), 1.0)
    worth, columns = worths(quality), np.arange(len(runs))
    flat_quality, flat_costs = quality.reshape(-1, len(runs)), costs.reshape(-1, len(runs))
    best = [((1 - w) * worth - w * costs).reshape(-1, len(runs)).argmax(axis=0) for w in weights]
    return (
        np.stack([flat_quality[each, columns] for each in best]),
        np.stack([flat_costs[each, columns] for each in best]),
    )


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other dominates."""
    return [index for index, kept in enumerate(on_front(points)) if kept]
