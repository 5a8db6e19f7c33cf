"""Steer many simulated runs at once: their decisions, and what every interval is worth, as arrays.

What `reward` does for one run; the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from trainpilot.envs.decision import DecisionStates
from trainpilot.envs.reference import BUDGET_SHARES
from trainpilot.envs.reward import DIVERGED_QUALITY, MAX_QUALITY
from trainpilot.llm_runtime.schedules import validation_due
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, PlantBatch, TelemetryBatch

DIVERGED_LOSS_INCREASE = 10.0
"""Loss increase that is told of a run without a finite loss, in nats/token."""


class ReferencedPlants(PlantBatch, Protocol):
    """Plants that know what the base schedule reaches on each of them; `begin` renews it with the run."""

    @property
    def reference_losses(self) -> Floats:
        """Final validation loss of the base schedule at each of `BUDGET_SHARES`, shape (n_runs, 3)."""

    @property
    def reference_energy_j(self) -> Floats:
        """Joules of the base schedule at the full budget; NaN where unknown."""

    @property
    def reference_time_s(self) -> Floats:
        """Seconds of the base schedule at the full budget."""

    def evaluate(self, rows: Ints | None = None) -> Floats:
        """Measure the validation loss of these rows (of all by default) and return it, in nats/token.

        It enters the telemetry of these runs from the next interval on, and of no others.
        """


@runtime_checkable
class KnowsItsLoss(Protocol):
    """Plants that can tell the training loss without its noise, which spares an agent the noise in its reward."""

    @property
    def expected_loss(self) -> Floats:
        """Expected training loss after the last interval, in nats/token."""


@dataclass(frozen=True, kw_only=True)
class IntervalBatch:
    """What one interval of each run brought."""

    telemetry: TelemetryBatch
    reward: Floats
    """Quality, energy and time, shape (n_runs, 3)."""
    loss: Floats
    """Loss that counts now: validation at the end of a run, training before, in nats/token."""
    loss_increase: Floats
    """Loss over the reference's final loss, in nats/token."""
    diverged: Bools
    terminated: Bools
    """Diverged, or a cool-down is complete."""
    truncated: Bools
    """The budget is used up."""


class SteeredRuns:
    """Plants, the state of their decisions, and the sums over their episodes so far.

    Args:
        plants: What is steered. All of its runs are begun anew.
        preference: Weights of quality, energy and time, which sum to 1, shape (n_runs, 3).
    """

    def __init__(self, plants: ReferencedPlants, preference: Floats) -> None:
        n_runs = plants.n_runs
        self.plants = plants
        plants.begin(np.arange(n_runs))
        self.states = DecisionStates(plants.limits(), preference)
        self.outcome: Floats = np.zeros((n_runs, 3))
        """Sum of the rewards of each run so far."""
        self.energy_j: Floats = np.zeros(n_runs)
        self.time_s: Floats = np.zeros(n_runs)
        self.intervals: Ints = np.zeros(n_runs, dtype=np.int64)

    def begin(self, rows: Ints, preference: Floats) -> None:
        """Begin new runs in these rows, with `preference` of shape (rows, 3)."""
        self.plants.begin(rows)
        self.states.begin(rows, self.plants.limits(), preference)
        for total in (self.outcome, self.energy_j, self.time_s, self.intervals):
            total[rows] = 0

    def advance(self, actions: Ints) -> IntervalBatch:
        """Bring the allowed part of the actions into force, train one interval, and weigh what came out."""
        telemetry = self.plants.advance(self.states.decide(actions))
        loss = self._current_loss(telemetry)
        self.states.observe(telemetry)
        diverged = telemetry.diverged | ~np.isfinite(loss)
        reward = self._weigh(telemetry, loss, diverged)
        self._add_up(telemetry, reward)
        terminated = diverged | (telemetry.finished & telemetry.finishing)
        increase = np.where(np.isfinite(loss), loss - self.plants.reference_losses[:, -1], DIVERGED_LOSS_INCREASE)
        return IntervalBatch(
            telemetry=telemetry,
            reward=reward,
            loss=loss,
            loss_increase=increase,
            diverged=diverged,
            terminated=terminated,
            truncated=telemetry.finished & ~terminated,
        )

    def _current_loss(self, telemetry: TelemetryBatch) -> Floats:
        """Return the loss that counts now; look at the validation loss now and then on the way."""
        ended = telemetry.finished & ~telemetry.diverged
        looks = validation_due(telemetry.decision + 1) & ~telemetry.diverged
        rows = np.flatnonzero(ended | looks)
        known = self.plants.expected_loss if isinstance(self.plants, KnowsItsLoss) else telemetry.train_loss
        loss = np.where(telemetry.diverged, np.nan, known)
        if rows.size:
            validation_loss = self.plants.evaluate(rows)
            loss[rows] = np.where(ended[rows], validation_loss, loss[rows])
        return loss

    def _weigh(self, telemetry: TelemetryBatch, loss: Floats, diverged: Bools) -> Floats:
        share = compute_equivalents(loss, BUDGET_SHARES, self.plants.reference_losses)
        quality = np.where(diverged, DIVERGED_QUALITY, worths(share))
        energy = telemetry.energy_j / self.plants.reference_energy_j
        known = np.isfinite(energy)
        time = telemetry.time_s / self.plants.reference_time_s
        return np.stack([quality - self.outcome[:, 0], np.where(known, -energy, 0.0), -time], axis=1)

    def _add_up(self, telemetry: TelemetryBatch, reward: Floats) -> None:
        self.outcome = self.outcome + reward
        self.energy_j = self.energy_j + telemetry.energy_j
        self.time_s = self.time_s + telemetry.time_s
        self.intervals = self.intervals + 1


def compute_equivalents(loss: Floats, budgets: Sequence[float], losses: Floats) -> Floats:
    """Return `reward.compute_equivalent` of every run's loss against its own reference.

    Args:
        loss: Losses reached, in nats/token, shape (n_runs,).
        budgets: Shares of the full budget, rising, at least two.
        losses: Final loss of the reference at each budget, in nats/token, shape (n_runs, budgets).
    """
    with np.errstate(all="ignore"):
        x, y, points = np.log(loss), np.log(np.asarray(budgets)), np.log(losses)
        kept = _points_in_order(points)
        end_x, end_y, log_share = points[:, -1], np.full(len(x), y[-1]), np.full(len(x), np.nan)
        for i in reversed(range(len(budgets) - 1)):  # the piece behind the last point that is worse than the loss
            slope = (end_y - y[i]) / (end_x - points[:, i])
            beyond = np.isnan(log_share) | (end_x <= x)
            log_share = np.where(kept[:, i] & beyond, y[i] + slope * (x - points[:, i]), log_share)
            end_x, end_y = np.where(kept[:, i], points[:, i], end_x), np.where(kept[:, i], y[i], end_y)
        share = np.where(kept.any(axis=1), np.exp(np.minimum(log_share, 50.0)), loss <= losses[:, -1])
    return np.where(np.isfinite(loss) & (loss > 0), np.minimum(share, MAX_QUALITY), 0.0)


def _points_in_order(points: Floats) -> Bools:
    """Return which points of falling curves, shape (n_runs, budgets - 1), are worse than the last and in order."""
    kept = points[:, :-1] > points[:, -1:] + 1e-9
    lowest = np.full(len(points), np.inf)
    for i in range(kept.shape[1]):
        kept[:, i] &= points[:, i] < lowest - 1e-9
        lowest = np.where(kept[:, i], points[:, i], lowest)
    return np.asarray(kept)


def worths(shares: Floats) -> Floats:
    """Return `reward.worth` of every compute-equivalent."""
    return np.where(shares <= 1, shares, 1 + np.log(np.maximum(shares, 1.0)))
