"""Score a policy on simulated runs that it has not met: how much of the tuned static's budget its losses are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import N_CHOICES
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import BUDGET_SHARES
from trainpilot.envs.runs import IntervalBatch, SteeredRuns, compute_equivalents
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start

QUALITY_ALONE = Preference(quality=1.0, energy=0.0, time=0.0)
START_GROUPS = {
    "far_below": (0.0, 0.18),
    "below": (0.18, 0.56),
    "near": (0.56, 1.8),
    "above": (1.8, 5.6),
    "far_above": (5.6, math.inf),
}
"""Starting learning rates over the tuned static's, by name."""

Act = Callable[[np.ndarray, Bools], Ints]
"""Turns observations (n_runs, inputs) and masks (n_runs, sum of choices) into actions (n_runs, fields)."""


@dataclass(frozen=True, kw_only=True)
class SimulatorScores:
    """What a policy reached on simulated runs. Medians over the runs unless said otherwise."""

    n_runs: int
    multiplier: float
    """Share of the budget that the tuned static needs for the loss reached; a run that diverged counts 0."""
    multiplier_p10: float
    """10th percentile over the runs."""
    by_start: Mapping[str, float | None]
    """`multiplier` of the runs of each of `START_GROUPS`; `None` where there is none."""
    time_over_reference: float
    """Seconds over the tuned static's."""
    energy_over_reference: float | None
    """Joules over the tuned static's; `None` where unknown."""
    diverged_share: float
    """Share of the runs."""
    learning_rate_over_best: tuple[float, ...]
    """At each decision: peak of the schedule times the policy's factor, over the tuned static's peak, both at the
    starting batch; of the runs that had not ended."""
    batch_over_start: tuple[float, ...]

    @property
    def score(self) -> float:
        """One number to choose by: the mean of median and 10th percentile of the multiplier."""
        return (self.multiplier + self.multiplier_p10) / 2

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def act_of(bundle: PolicyBundle) -> Act:
    """Return the most likely allowed choices of a policy, for many runs at once."""
    borders = np.cumsum(N_CHOICES)[:-1]

    def act(observations: np.ndarray, masks: Bools) -> Ints:
        logits = np.where(masks, bundle.logits(observations), -np.inf)
        return np.stack([part.argmax(axis=1) for part in np.split(logits, borders, axis=1)], axis=1)

    return act


def evaluate_in_simulator(
    policy: PolicyBundle | Act,
    pool: Pool,
    *,
    preference: Preference = QUALITY_ALONE,
    seed: int = 0,
    n_runs: int = 512,
    start: Start | None = None,
) -> SimulatorScores:
    """Steer simulated runs to their ends, and score them.

    Args:
        policy: A bundle, or anything that chooses for many runs at once.
        pool: What the runs are drawn from; for a fair score, one that no training has drawn from.
        preference: What the policy is told to care for.
        seed: Decides which runs are drawn, their starting learning rates and all their noise.
        n_runs: How many.
        start: How runs begin.

    Raises:
        ValueError: `n_runs` is not at least 1.
    """
    if n_runs < 1:
        raise ValueError(f"n_runs must be at least 1, got {n_runs}")
    plants = SimulatedRuns(n_runs, seed, pool, start)
    act = act_of(policy) if isinstance(policy, PolicyBundle) else policy
    runs = SteeredRuns(plants, np.tile(preference.weights(), (n_runs, 1)))
    outcomes = _Outcomes(plants)
    while not outcomes.ended.all():
        interval = runs.advance(act(runs.states.observation(), runs.states.action_masks()))
        done = outcomes.take_in(runs, interval)
        runs.begin(done, runs.states.preference[done])  # keeps stepping; a second run is not looked at
    return outcomes.scores()


class _Outcomes:
    """What came out of the first run of each row."""

    def __init__(self, plants: SimulatedRuns) -> None:
        n_runs = plants.n_runs
        self.start_over_best: Floats = plants.start_learning_rate / plants.best_learning_rate
        self.start_batch = plants.instances.start_batch.copy()
        self.reference_losses = plants.reference_losses.copy()
        self.reference_time_s = plants.reference_time_s.copy()
        self.reference_energy_j = plants.reference_energy_j.copy()
        self.ended: Bools = np.zeros(n_runs, dtype=np.bool_)
        self.loss: Floats = np.full(n_runs, np.nan)
        self.time_s: Floats = np.zeros(n_runs)
        self.energy_j: Floats = np.zeros(n_runs)
        self.diverged: Bools = np.zeros(n_runs, dtype=np.bool_)
        self.rates: list[float] = []
        self.batches: list[float] = []

    def take_in(self, runs: SteeredRuns, interval: IntervalBatch) -> Ints:
        """Take in an interval, and return the rows whose run is over, be it the first or a later one."""
        going, controls = ~self.ended, runs.states.controls
        rate = controls.learning_rate_scale * self.start_over_best
        self.rates.append(float(np.median(rate[going])))
        self.batches.append(float(np.median((controls.batch_size / self.start_batch)[going])))
        done = interval.terminated | interval.truncated
        first = done & going
        self.loss[first] = interval.loss[first]
        self.time_s[first] = runs.time_s[first]
        self.energy_j[first] = runs.energy_j[first]
        self.diverged[first] = interval.diverged[first]
        self.ended |= done
        return np.flatnonzero(done)

    def scores(self) -> SimulatorScores:
        loss = np.where(self.diverged, np.nan, self.loss)
        multiplier = compute_equivalents(loss, BUDGET_SHARES, self.reference_losses)
        energy = float(np.median(self.energy_j / self.reference_energy_j))
        return SimulatorScores(
            n_runs=len(loss),
            multiplier=float(np.median(multiplier)),
            multiplier_p10=float(np.percentile(multiplier, 10)),
            by_start={name: self._group(multiplier, *ends) for name, ends in START_GROUPS.items()},
            time_over_reference=float(np.median(self.time_s / self.reference_time_s)),
            energy_over_reference=energy if math.isfinite(energy) else None,
            diverged_share=float(self.diverged.mean()),
            learning_rate_over_best=tuple(self.rates),
            batch_over_start=tuple(self.batches),
        )

    def _group(self, multiplier: Floats, low: float, high: float) -> float | None:
        inside = (self.start_over_best >= low) & (self.start_over_best < high)
        return float(np.median(multiplier[inside])) if inside.any() else None
