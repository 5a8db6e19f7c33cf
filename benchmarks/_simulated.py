"""Steer simulated runs by a policy, or blindly, and say what they were worth, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.heuristics import SchedulePoint, SteeredRun, average_schedule
from trainpilot.agents.simulator_training import act_of
from trainpilot.envs.action import FINISH_FROM, LEARNING_RATE_SCALE_RANGE, MAX_SPARSITY
from trainpilot.envs.decision import DecisionStates, Preference
from trainpilot.envs.reward import EVALUATE_EVERY
from trainpilot.envs.runs import ReferencedPlants
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.simulator.records import ControlBatch, Floats, Ints, LimitBatch, TelemetryBatch
from trainpilot.llm_runtime.simulator.references import DECISIONS, overfit
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

TEST_INSTANCES, TEST_SEED = 512, 20_240
"""Instances that nothing is trained or chosen on: recipes draw theirs with other seeds."""
STARTS = (1 / 30, 0.18, 0.56, 1.8, 5.6, 10.0)
"""Borders of the groups of starting learning rates, over the tuned one."""
N_RESAMPLES = 1_000
COVERED = 0.95
DIGITS = 4

Statistic = Callable[[Floats], float]


def unseen_pool(n_instances: int = TEST_INSTANCES) -> Pool:
    """Return the instances that policies are tested on."""
    return Pool.draw(n_instances, TEST_SEED, shipped_physics())


class Steerer(Protocol):
    """What sets the controls of many runs."""

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Take in the interval that has just ended."""


class ByPolicy:
    """The most likely allowed actions of a policy, as its controller takes them."""

    def __init__(self, bundle: PolicyBundle, preference: Preference, limits: LimitBatch) -> None:
        self.act = act_of(bundle)
        self.states = DecisionStates(limits, np.tile(preference.weights(), (len(limits.decisions), 1)))

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""
        return self.states.decide(self.act(self.states.observation(), self.states.action_masks()))

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Take in the interval that has just ended."""
        self.states.observe(telemetry)


class Blind:
    """Controls that were fixed before the runs began; the last ones go on."""

    def __init__(self, controls: Sequence[ControlBatch]) -> None:
        self.controls = controls
        self.decision = 0

    def decide(self) -> ControlBatch:
        """Return the controls of the next interval."""
        return self.controls[min(self.decision, len(self.controls) - 1)]

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Count the interval."""
        self.decision += 1


def by_policy(bundle: PolicyBundle, preference: Preference) -> Callable[[LimitBatch], Steerer]:
    """Return what makes a policy steer runs of any limits."""
    return lambda limits: ByPolicy(bundle, preference, limits)


def held(scale: Floats | float = 1.0, batch_factor: float = 1.0) -> Callable[[LimitBatch], Steerer]:
    """Return what holds a factor on the base schedule and a batch from start to end, and all else as it began."""

    def make(limits: LimitBatch) -> Steerer:
        start = limits.start
        scales = np.broadcast_to(scale, len(start.batch_size)).astype(np.float64)
        batch = _nearest_batch(limits, batch_factor)
        return Blind([replace(start, learning_rate_scale=scales, batch_size=batch)])

    return make


def blindly(schedule: Sequence[SchedulePoint]) -> Callable[[LimitBatch], Steerer]:
    """Return what replays one schedule on all runs, as `OpenLoop` does on one with as many decisions."""

    def make(limits: LimitBatch) -> Steerer:
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
    """Return the starting batch times a power of two near the factor, of two equally near the smaller."""
    start = limits.start.batch_size
    least = np.ceil(np.log2(limits.min_batch_size / start))
    most = np.floor(np.log2(limits.max_batch_size / start))
    batch: Ints = (start * 2.0 ** np.clip(np.ceil(round(np.log2(factor), 9) - 0.5), least, most)).astype(np.int64)
    return batch


@dataclass(kw_only=True)
class Outcome:
    """How runs ended; arrays of shape (n_runs,)."""

    loss: Floats
    """Expected validation loss at the end, in nats/token; infinite where a run diverged."""
    used: Floats
    """Share of the budget that was used."""
    energy: Floats
    """Joules over the reference's."""
    time: Floats
    """Seconds over the reference's."""
    intervals: Ints
    """Intervals until the end."""
    controls: list[ControlBatch] = field(default_factory=list)
    """Of every decision; what stands after a run's end does not count."""

    @property
    def diverged(self) -> float:
        """Share of the runs that diverged."""
        return float(np.isinf(self.loss).mean())

    def average(self, limits: LimitBatch) -> tuple[SchedulePoint, ...]:
        """Return what the runs did on average."""
        start = limits.start.batch_size
        runs = [
            SteeredRun(start_batch_size=int(start[row]), controls=[each.row(row) for each in self.controls[:length]])
            for row, length in enumerate(self.intervals)
        ]
        return average_schedule(runs, DECISIONS)


def steer(plants: ReferencedPlants, make: Callable[[LimitBatch], Steerer]) -> Outcome:
    """Steer fresh plants to their end; they are looked at now and then, as the environment does."""
    n, steerer = plants.n_runs, make(plants.limits())
    zeros = np.zeros(n)
    told = Outcome(loss=np.full(n, np.inf), used=zeros, energy=zeros, time=zeros, intervals=np.zeros(n, dtype=np.int64))
    running = np.ones(n, dtype=np.bool_)
    for decision in range(DECISIONS):
        told.controls.append(steerer.decide())
        telemetry = plants.advance(told.controls[-1])
        told.used = np.where(running, telemetry.budget_used, told.used)
        told.energy = told.energy + np.where(running, telemetry.energy_j / plants.reference_energy_j, 0.0)
        told.time = told.time + np.where(running, telemetry.time_s / plants.reference_time_s, 0.0)
        told.intervals = told.intervals + running
        ended = np.flatnonzero(running & (telemetry.finished | telemetry.diverged))
        told.loss[ended] = np.where(telemetry.diverged[ended], np.inf, expected_loss(plants, ended))
        running[ended] = False
        if (decision + 1) % EVALUATE_EVERY == 0 and running.any():
            plants.evaluate(np.flatnonzero(running & ~telemetry.diverged))
        steerer.observe(telemetry)
    assert not running.any()
    return told


def expected_loss(plants: ReferencedPlants, rows: Ints) -> Floats:
    """Return the validation loss of these rows without the noise of measuring it: baselines are known without it."""
    if not isinstance(plants, SimulatedRuns):
        return plants.evaluate(rows)
    loss: Floats = (
        plants.expected_loss + plants.instances.meters.validation_gap + overfit(plants.instances, plants.used)
    )
    return loss[rows]


# Figures ----------------------------------------------------------------------------------------------------------


def tenth(values: Floats) -> float:
    """Return the 10th percentile: what one run in ten falls short of."""
    return float(np.percentile(values, 10))


def middle(values: Floats) -> float:
    """Return the median."""
    return float(np.median(values))


def estimate(values: Floats, group: Ints, statistic: Statistic = middle) -> dict[str, Any]:
    """Return a statistic over runs with an interval; runs of one group belong together."""
    return interval(lambda rows: statistic(values[rows]), group)


def interval(statistic: Callable[[Ints], float], group: Ints) -> dict[str, Any]:
    """Return what a statistic gives for all rows, with an interval: groups of rows are drawn with replacement."""
    found = [statistic(rows) for rows in resamples(group)]
    ends = np.quantile(found, ((1 - COVERED) / 2, (1 + COVERED) / 2))
    value = statistic(np.arange(len(group)))
    return {"value": rounded(value), "low": rounded(ends[0]), "high": rounded(ends[1])}


def resamples(group: Ints) -> list[Ints]:
    """Return the rows of each resample: a group that is drawn twice brings all its rows twice."""
    random = np.random.default_rng(0)
    names, of_row = np.unique(group, return_inverse=True)
    rows = np.arange(len(group))
    drawn = (random.integers(len(names), size=len(names)) for _ in range(N_RESAMPLES))
    return [np.repeat(rows, np.bincount(each, minlength=len(names))[of_row]) for each in drawn]


def start_groups(start: Floats) -> dict[str, Ints]:
    """Return the rows of each group of starting rates, by its borders; groups without rows are left out."""
    place = np.clip(np.searchsorted(STARTS, start, side="right"), 1, len(STARTS) - 1)
    groups = {f"{low:.2g}-{high:.2g}": place == i for i, (low, high) in enumerate(pairwise(STARTS), start=1)}
    return {name: np.flatnonzero(inside) for name, inside in groups.items() if inside.any()}


def summary(multiplier: Floats, instance: Ints, start: Floats) -> dict[str, Any]:
    """Return median and 10th percentile of a method's multipliers, over all runs and by where they started."""
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
    """Return the number with a few digits."""
    return float(f"{value:.{DIGITS}g}")


def line(name: str, told: Mapping[str, Any]) -> str:
    """Return a method's figures in one line of text."""
    one = told["median"]
    starts = "  ".join(f"{found['median']['value']:.2f}" for found in told["starts"].values())
    interval = f"[{one['low']:.3f}, {one['high']:.3f}]"
    return f"{name:28} {one['value']:.3f} {interval}  p10 {told['p10']['value']:.3f}  | {starts}"
