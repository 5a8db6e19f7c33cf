"""Measure policies and static schedules on simulated runs: shared code of the benchmarks in the simulator.

* `steer` runs many simulated trainings under a policy, a fixed schedule or constant controls.
* `estimate` and `summary` compute medians and percentiles with bootstrap intervals.
* `StaticGrid` finds the best static schedule of every simulated instance on a fine grid, at several budgets.
* `nsga2_settings` and `tuned_for_each` find the static settings on the front of quality against cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.heuristics import ControlledRun, SchedulePoint, average_schedule
from trainpilot.envs.action import (
    BATCH_FACTORS,
    FINISH_FROM,
    LEARNING_RATE_FACTORS,
    MAX_SPARSITY,
)
from trainpilot.envs.decision import DecisionStates, Preference
from trainpilot.envs.reward import budget_for_loss, worth
from trainpilot.envs.runs import ReferencedPlants
from trainpilot.experiments.analysis.pareto import on_front
from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, PRECISIONS
from trainpilot.llm_runtime.schedules import (
    BUDGET_SHARES,
    SCHEDULES,
    ScheduleName,
    learning_rate,
    neutral_factor,
    validation_due,
)
from trainpilot.llm_runtime.simulator.instances import Instances
from trainpilot.llm_runtime.simulator.physics import advance, loss
from trainpilot.llm_runtime.simulator.records import ControlBatch, Floats, Ints, LimitBatch, Rows, TelemetryBatch
from trainpilot.llm_runtime.simulator.references import DECISIONS, References, ScheduleTable, overfit, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

TEST_INSTANCES, TEST_SEED = 512, 20_240
"""Number and seed of the test instances. Recipes use other seeds, so no policy is trained or selected on them."""
STARTS = (1 / 30, 0.18, 0.56, 1.8, 5.6, 10.0)
"""Borders of the groups of starting learning rates, relative to the tuned one."""
N_RESAMPLES = 1_000
COVERED = 0.95
DIGITS = 4

Statistic = Callable[[Floats], float]


def unseen_pool(n_instances: int = TEST_INSTANCES) -> Pool:
    """Return the test instances."""
    return Pool.draw(n_instances, TEST_SEED, shipped_physics())


class BatchSteerer(Protocol):
    """Sets the controls of many runs."""

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Add the interval that has just ended to the history."""


class ByPolicy:
    """The most likely allowed actions of a policy, as its controller takes them."""

    def __init__(self, bundle: PolicyBundle, preference: Preference, limits: LimitBatch) -> None:
        self.act = bundle.choose
        weights = np.tile(preference.weights(), (len(limits.decisions), 1))
        self.states = DecisionStates(limits, weights, bundle.fields, bundle.start_scale)

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""
        return self.states.decide(self.act(self.states.observation(), self.states.action_masks()))

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Add the interval that has just ended to the history."""
        self.states.observe(telemetry)


class Blind:
    """Replays a fixed list of controls; after its end, the last ones stay in force."""

    def __init__(self, controls: Sequence[ControlBatch]) -> None:
        self.controls = controls
        self.decision = 0

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""
        return self.controls[min(self.decision, len(self.controls) - 1)]

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Count the interval."""
        self.decision += 1


class ModelPredictive:
    """Plans with the true physics of its runs, which must have budgets in tokens: an upper row, not a method.

    Before each interval it tries every change of learning rate and batch that a policy may make, follows each to the
    end of the budget without further changes, and takes the one with the lowest loss (model predictive control).
    """

    def __init__(self, runs: SimulatedRuns, limits: LimitBatch) -> None:
        self.runs, self.limits, self.controls = runs, limits, limits.start
        self.decision = 0

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""
        low, high = LEARNING_RATE_SCALE_RANGE
        least, rate, batch = np.full(self.runs.n_runs, np.inf), np.zeros(0), np.zeros(0)
        now = self.controls
        scale, size = now.learning_rate_scale, now.batch_size
        for batch_factor in BATCH_FACTORS:
            batch = np.clip(now.batch_size * batch_factor, self.limits.min_batch_size, self.limits.max_batch_size)
            for factor in LEARNING_RATE_FACTORS:
                rate = np.clip(now.learning_rate_scale * factor, low, high)
                found = self._followed(rate, batch)
                scale, size = np.where(found < least, rate, scale), np.where(found < least, batch, size)
                least = np.minimum(found, least)
        self.controls = replace(now, learning_rate_scale=scale, batch_size=size.astype(np.int64))
        return self.controls

    def _followed(self, scale: Floats, batch: Floats) -> Floats:
        """Return the losses at the end of the budget at a constant learning-rate scale and batch."""
        runs, instances = self.runs, self.runs.instances
        state, steps = runs.state.copy(), instances.sequences / runs.start.decisions / batch
        for factor in runs.table.mean[self.decision :]:
            rate = learning_rate(runs.start_rate, scale, float(factor), batch, instances.start_batch)
            advance(instances.physics, state, steps, rate, batch)
        return np.nan_to_num(loss(instances.physics, state), nan=np.inf)

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Count the interval."""
        self.decision += 1


def by_policy(bundle: PolicyBundle, preference: Preference) -> Callable[[LimitBatch], BatchSteerer]:
    """Return a factory of steerers that follow a policy."""
    return lambda limits: ByPolicy(bundle, preference, limits)


def held(scale: Floats | float = 1.0, batch_factor: float = 1.0) -> Callable[[LimitBatch], BatchSteerer]:
    """Return a factory of steerers that hold a constant learning-rate scale and batch, and change nothing else."""

    def make(limits: LimitBatch) -> BatchSteerer:
        start = limits.start
        scales = np.broadcast_to(scale, len(start.batch_size)).astype(np.float64)
        batch = _nearest_batch(limits, batch_factor)
        return Blind([replace(start, learning_rate_scale=scales, batch_size=batch)])

    return make


def blindly(schedule: Sequence[SchedulePoint]) -> Callable[[LimitBatch], BatchSteerer]:
    """Return a factory of steerers that replay one schedule on all runs, like `OpenLoop` on a single run."""

    def make(limits: LimitBatch) -> BatchSteerer:
        begun = (schedule[: i + 1] for i in range(len(schedule)))
        return Blind([_replayed(points, limits) for points in begun])

    return make


def _replayed(begun: Sequence[SchedulePoint], limits: LimitBatch) -> ControlBatch:
    point, n = begun[-1], len(limits.decisions)
    wanted = limits.start.precision
    if point.precision is not None:
        index = PRECISIONS.index(point.precision)
        wanted = np.where(limits.masked_precisions[:, index], wanted, index)
    sparsity = min(max(each.sparsity for each in begun), MAX_SPARSITY)
    return ControlBatch(
        learning_rate_scale=np.full(n, np.clip(point.learning_rate_scale, *LEARNING_RATE_SCALE_RANGE)),
        batch_size=_nearest_batch(limits, point.batch_factor),
        precision=wanted,
        sparsity=np.where(limits.prunes, sparsity, 0.0),
        finish=np.full(n, point.share >= FINISH_FROM and any(each.finish for each in begun)),
    )


def _nearest_batch(limits: LimitBatch, factor: float) -> Ints:
    """Return the starting batch times the power of two nearest to the factor; the smaller one in case of a tie."""
    start = limits.start.batch_size
    least = np.ceil(np.log2(limits.min_batch_size / start))
    most = np.floor(np.log2(limits.max_batch_size / start))
    batch: Ints = (start * 2.0 ** np.clip(np.ceil(round(np.log2(factor), 9) - 0.5), least, most)).astype(np.int64)
    return batch


@dataclass(kw_only=True)
class BatchOutcome:
    """Final loss and costs of many runs; arrays of shape (n_runs,)."""

    loss: Floats
    """Expected validation loss at the end, in nats/token; infinite where a run diverged."""
    used: Floats
    """Share of the budget that was used."""
    energy: Floats
    """Energy relative to the reference run."""
    time: Floats
    """Time relative to the reference run."""
    intervals: Ints
    """Number of intervals until the end."""
    controls: list[ControlBatch] = field(default_factory=list)
    """Controls of every decision; entries after the end of a run have no meaning."""

    @property
    def diverged(self) -> float:
        """Share of the runs that diverged."""
        return float(np.isinf(self.loss).mean())

    def average(self, limits: LimitBatch) -> tuple[SchedulePoint, ...]:
        """Return the schedule of average controls over the runs."""
        start = limits.start.batch_size
        runs = [
            ControlledRun(start_batch_size=int(start[row]), controls=[each.row(row) for each in self.controls[:length]])
            for row, length in enumerate(self.intervals)
        ]
        return average_schedule(runs, DECISIONS)


def steer(plants: ReferencedPlants, make: Callable[[LimitBatch], BatchSteerer]) -> BatchOutcome:
    """Run fresh plants to their end under a steerer, and evaluate them as often as the environment does."""
    n, steerer = plants.n_runs, make(plants.limits())
    zeros = np.zeros(n)
    outcome = BatchOutcome(
        loss=np.full(n, np.inf), used=zeros, energy=zeros, time=zeros, intervals=np.zeros(n, dtype=np.int64)
    )
    running = np.ones(n, dtype=np.bool_)
    for decision in range(DECISIONS):
        outcome.controls.append(steerer.decide())
        telemetry = plants.advance(outcome.controls[-1])
        outcome.used = np.where(running, telemetry.budget_used, outcome.used)
        outcome.energy = outcome.energy + np.where(running, telemetry.energy_j / plants.reference_energy_j, 0.0)
        outcome.time = outcome.time + np.where(running, telemetry.time_s / plants.reference_time_s, 0.0)
        outcome.intervals = outcome.intervals + running
        ended = np.flatnonzero(running & (telemetry.finished | telemetry.diverged))
        outcome.loss[ended] = np.where(telemetry.diverged[ended], np.inf, expected_loss(plants, ended))
        running[ended] = False
        if validation_due(decision + 1) and running.any():
            plants.evaluate(np.flatnonzero(running & ~telemetry.diverged))
        steerer.observe(telemetry)
    assert not running.any()
    return outcome


def expected_loss(plants: ReferencedPlants, rows: Ints) -> Floats:
    """Return the validation loss of these rows without measurement noise, as for the baselines."""
    if not isinstance(plants, SimulatedRuns):
        return plants.evaluate(rows)
    loss: Floats = (
        plants.expected_loss + plants.instances.sensors.validation_gap + overfit(plants.instances, plants.used)
    )
    return loss[rows]


# Figures ----------------------------------------------------------------------------------------------------------


def tenth(values: Floats) -> float:
    """Return the 10th percentile."""
    return float(np.percentile(values, 10))


def middle(values: Floats) -> float:
    """Return the median."""
    return float(np.median(values))


def estimate(values: Floats, group: Ints, statistic: Statistic = middle) -> dict[str, Any]:
    """Return a statistic over runs with a bootstrap interval that resamples groups of runs."""
    return interval(lambda rows: statistic(values[rows]), group)


def interval(statistic: Callable[[Ints], float], group: Ints) -> dict[str, Any]:
    """Return a statistic of all rows with a bootstrap interval; groups of rows are drawn with replacement."""
    found = [statistic(rows) for rows in resamples(group)]
    ends = np.quantile(found, ((1 - COVERED) / 2, (1 + COVERED) / 2))
    value = statistic(np.arange(len(group)))
    return {"value": rounded(value), "low": rounded(ends[0]), "high": rounded(ends[1])}


def resamples(group: Ints) -> list[Ints]:
    """Return the rows of each bootstrap resample; a group that is drawn twice contributes its rows twice."""
    random = np.random.default_rng(0)
    names, of_row = np.unique(group, return_inverse=True)
    rows = np.arange(len(group))
    drawn = (random.integers(len(names), size=len(names)) for _ in range(N_RESAMPLES))
    return [np.repeat(rows, np.bincount(each, minlength=len(names))[of_row]) for each in drawn]


def start_groups(start: Floats) -> dict[str, Ints]:
    """Return the rows of each group of starting rates by the borders of the group, without empty groups."""
    place = np.clip(np.searchsorted(STARTS, start, side="right"), 1, len(STARTS) - 1)
    groups = {f"{low:.2g}-{high:.2g}": place == i for i, (low, high) in enumerate(pairwise(STARTS), start=1)}
    return {name: np.flatnonzero(inside) for name, inside in groups.items() if inside.any()}


def summary(multiplier: Floats, instance: Ints, start: Floats) -> dict[str, Any]:
    """Return median and 10th percentile of a method's multipliers, over all runs and by starting learning rate."""
    return {
        "median": estimate(multiplier, instance),
        "p10": estimate(multiplier, instance, tenth),
        "starts": {
            name: {
                "n_runs": len(rows),
                "median": estimate(multiplier[rows], instance[rows]),
                "p10": rounded(tenth(multiplier[rows])),
            }
            for name, rows in start_groups(start).items()
        },
    }


def rounded(value: float) -> float:
    """Round a number to a few significant digits."""
    return float(f"{value:.{DIGITS}g}")


def line(name: str, figures: Mapping[str, Any]) -> str:
    """Format a method's figures as one line of text."""
    one = figures["median"]
    starts = "  ".join(f"{found['median']['value']:.2f}" for found in figures["starts"].values())
    interval = f"[{one['low']:.3f}, {one['high']:.3f}]"
    return f"{name:28} {one['value']:.3f} {interval}  p10 {figures['p10']['value']:.3f}  | {starts}"


RATES: Floats = 1e-3 * 2.0 ** (np.arange(-8, 16) / 2)
"""Learning rates at the instance's starting batch, 6e-5 to 0.18 by sqrt 2; at other batches by the neutral rule."""
POWERS = np.arange(-4, 5)
"""Doublings of the starting batch. Where an instance does not allow one, the nearest allowed batch is used."""
WARMUPS = (0.02, 0.1, 0.4, 0.6, 0.8)
BASES: tuple[tuple[ScheduleName, float], ...] = tuple((name, warmup) for name in SCHEDULES for warmup in WARMUPS)
"""Schedules with the share of the budget that is warm-up."""
SHARES = (0.25, 0.5, 1.0, 2.0)
"""Budgets at which the best static schedule is searched, relative to the run's own."""
WHOLE = SHARES.index(1.0)
BEYOND = 2.0
"""A curve is extrapolated up to this factor outside its budgets; budgets further out are reported as that limit."""


@dataclass(frozen=True, kw_only=True)
class StaticGrid:
    """Losses of static schedules on each instance."""

    losses: Floats
    """Loss of every setting at the whole budget, shape (bases, rates, powers, n_instances), in nats/token."""
    best: Floats
    """Lowest loss within each budget of `SHARES`, shape (n_instances, budgets); it does not rise with the budget."""

    @classmethod
    def search(cls, instances: Instances) -> StaticGrid:
        """Run every setting at every budget. This takes about four minutes for 512 instances."""
        losses = [sweep(instances, share) for share in SHARES]
        best = np.stack([found.min(axis=(0, 1, 2)) for found in losses], axis=1)
        return cls(losses=losses[WHOLE], best=np.minimum.accumulate(best, axis=1))

    def of_base(self, base: tuple[ScheduleName, float]) -> Floats:
        """Return the lowest loss of each instance under one base schedule."""
        found: Floats = self.losses[BASES.index(base)].min(axis=(0, 1))
        return found

    def best_single(self) -> tuple[dict[str, Any], Floats]:
        """Return the setting with the highest median multiplier over the instances, and the losses under it."""
        worth = needed(self.losses, SHARES, self.best)
        base, rate, power = np.unravel_index(np.median(worth, axis=-1).argmax(), worth.shape[:-1])
        setting = {
            "schedule": BASES[base][0],
            "warmup_share": BASES[base][1],
            "learning_rate": round(float(RATES[rate] * 2.0 ** (POWERS[power] / 2)), 7),
            "batch_over_start": float(2.0 ** POWERS[power]),
        }
        return setting, self.losses[base, rate, power]

    def describe(self) -> dict[str, Any]:
        """Return the grid, how often each setting was best, and how often the best one was on the grid's edge."""
        n = self.losses.shape[-1]
        at = np.unravel_index(self.losses.reshape(-1, n).argmin(axis=0), self.losses.shape[:-1])
        bases = Counter(f"{BASES[i][0]}, warm-up {BASES[i][1]:.0%}" for i in at[0])
        return {
            "learning_rates_at_starting_batch": [float(f"{rate:.4g}") for rate in RATES],
            "batches_over_start": [float(2.0**power) for power in POWERS],
            "bases": [list(base) for base in BASES],
            "budgets": list(SHARES),
            "runs_per_instance": len(SHARES) * int(np.prod(self.losses.shape[:-1])),
            "best_base": {name: round(count / n, 4) for name, count in bases.most_common()},
            "learning_rate_on_edge": float(np.isin(at[1], (0, len(RATES) - 1)).mean()),
            "warmup_on_edge": round(float(np.mean([BASES[i][1] in (WARMUPS[0], WARMUPS[-1]) for i in at[0]])), 4),
        }


def sweep(instances: Instances, share: float, bases: Sequence[tuple[ScheduleName, float]] = BASES) -> Floats:
    """Return the loss of every setting at a share of the budget, shape (bases, rates, powers, n_instances)."""
    powers = nearest_power(instances, POWERS[:, None])
    rows, columns = np.nonzero(powers == POWERS[:, None])  # a batch that is replaced by its neighbour is not run twice
    each = instances.take(columns)
    batch = each.start_batch * 2.0 ** POWERS[rows]
    losses = np.empty((len(bases), len(RATES), len(POWERS), len(instances)))
    for i, (name, warmup) in enumerate(bases):
        table = ScheduleTable.of(name, warmup, DECISIONS)
        for j, at_start in enumerate(RATES):
            rate = at_start * neutral_factor(batch, each.start_batch)
            losses[i, j, rows, columns] = static_losses(each, rate, batch, table, share)
    taken = np.searchsorted(POWERS, powers)
    return losses[:, :, taken, np.arange(len(instances))]


def nearest_power(instances: Instances, power: Ints) -> Ints:
    """Return, for each instance, the allowed number of doublings of the starting batch nearest to `power`."""
    low, high = instances.batch_limits(DECISIONS)
    start = instances.start_batch
    least, most = np.ceil(np.log2(low / start)), np.floor(np.log2(high / start))
    return np.clip(power, least, most).astype(np.int64)


def needed(loss: Floats, shares: Sequence[float], curve: Floats) -> Floats:
    """Return the budget at which a curve reaches a loss, interpolated in log-log; 0 for a loss that is not finite.

    Args:
        loss: Final losses, shape (..., n_runs).
        shares: Budgets of the curve, ascending.
        curve: Losses at these budgets, shape (n_runs, budgets), not ascending.

    Returns:
        Shares of the whole budget, within `BEYOND` of the first and the last of `shares`.
    """
    return budget_for_loss(loss, shares, curve, limits=(shares[0] / BEYOND, shares[-1] * BEYOND))


POPULATION, GENERATIONS = 24, 12
LOW = np.array([np.log2(RATES[0]), POWERS[0] - 0.5, 0.0, -3.0, 0.0])
HIGH = np.array([np.log2(RATES[-1]), POWERS[-1] + 0.499, len(BASES) - 0.001, 0.0, 1.999])
"""Bounds of NSGA-II's variables: log2 of the learning rate at the starting batch, doublings of that batch, index
of the base schedule, log2 of the share of the budget, and whether the fastest precision is used (1 and above)."""

_MEANS = np.stack([ScheduleTable.of(name, warmup, DECISIONS).mean for name, warmup in BASES])


@dataclass(frozen=True, kw_only=True)
class RunsAndReferences(Rows):
    """Runs to try static settings on, with the references for quality and cost."""

    instances: Instances
    references: References

    def __len__(self) -> int:
        return len(self.instances)

    def quality(self, loss: Floats) -> Floats:
        """Return the share of the budget that the tuned static setting needs for a loss, shape (..., n_runs)."""
        return needed(loss, BUDGET_SHARES, np.minimum.accumulate(self.references.losses, axis=1))

    def cost(self, name: str, batch: Floats, fast: Floats, share: Floats | float) -> Floats:
        """Return the `energy` or `time` of static runs relative to the reference run."""
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
    at_batch = 2.0**rate * neutral_factor(batch, each.instances.start_batch)
    mean = _MEANS[base.astype(np.int64)].T  # (decisions, rows): every row has a schedule of its own
    table = ScheduleTable(mean=mean, last=mean, start=mean)
    loss = static_losses(each.instances, at_batch, batch, table, 2.0**share)  # type: ignore[arg-type]
    quality, costs = each.quality(loss), each.cost(cost, batch, np.floor(fast), 2.0**share)
    return quality.reshape(-1, n), costs.reshape(-1, n)


def nsga2_settings(runs: RunsAndReferences, cost: str, n_simulated: int, seed: int = 0) -> Floats:
    """Return the non-dominated settings that NSGA-II finds with a total of `n_simulated` simulated runs.

    Every setting is evaluated by its medians over the same few runs.
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
    """Return the objectives of each row, to be minimised: one over the median quality, and the median cost."""
    worth = np.maximum(np.median(quality, axis=1), 1e-3)
    return [(1 / float(q), float(c)) for q, c in zip(worth, np.median(cost, axis=1), strict=True)]


def tuned_for_each(runs: RunsAndReferences, cost: str, weights: Sequence[float]) -> tuple[Floats, Floats]:
    """Return quality and cost of the best static setting of each run under each weight on the cost.

    Learning rate, batch and budget are chosen by the known losses of up to 648 settings per run; the fastest precision
    is used.
    """
    shares = np.array(BUDGET_SHARES)
    losses = np.stack([sweep(runs.instances, share, [("wsd", 0.1)])[0] for share in shares])
    quality = runs.quality(losses)  # (shares, rates, powers, n)
    costs = np.empty(quality.shape)
    for k, power in enumerate(POWERS):
        batch = runs.instances.start_batch * 2.0 ** nearest_power(runs.instances, np.full(len(runs), power))
        costs[:, :, k] = shares[:, None, None] * runs.cost(cost, batch, np.ones(len(runs)), 1.0)
    value, columns = worth(quality), np.arange(len(runs))
    flat_quality, flat_costs = quality.reshape(-1, len(runs)), costs.reshape(-1, len(runs))
    best = [((1 - w) * value - w * costs).reshape(-1, len(runs)).argmax(axis=0) for w in weights]
    return (
        np.stack([flat_quality[each, columns] for each in best]),
        np.stack([flat_costs[each, columns] for each in best]),
    )


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the non-dominated points."""
    return [index for index, kept in enumerate(on_front(points)) if kept]
