"""Step many steered runs at once, from a policy's actions to telemetry and rewards: arrays with one row per run.

A single run is stepped by `environments.TrainingEnv`, with the same decisions (`decision`) and rewards (`reward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from trainpilot.envs.decision import DecisionStates
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reward import DIVERGED_LOSS_INCREASE, ReferenceBatch
from trainpilot.llm_runtime.drive import evaluation_due
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, PlantBatch, TelemetryBatch


class ReferencedPlants(PlantBatch, Protocol):
    """A batch of plants with the reference of each run; `begin` replaces a run together with its reference."""

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


def reference_batch(plants: ReferencedPlants) -> ReferenceBatch:
    """Return the references of the current runs of some plants."""
    return ReferenceBatch(
        budgets=BUDGET_SHARES,
        losses=plants.reference_losses,
        time_s=plants.reference_time_s,
        energy_j=plants.reference_energy_j,
    )


@runtime_checkable
class KnowsItsLoss(Protocol):
    """Plants that provide the training loss without noise, which makes the reward less noisy."""

    @property
    def expected_loss(self) -> Floats:
        """Expected training loss after the last interval, in nats/token."""


@dataclass(frozen=True, kw_only=True)
class IntervalBatch:
    """Result of one interval of each run."""

    telemetry: TelemetryBatch
    reward: Floats
    """Quality, energy and time, shape (n_runs, 3)."""
    loss: Floats
    """Loss that determines the quality: validation loss at the end of a run, else training loss, in nats/token."""
    loss_increase: Floats
    """Loss minus the reference's final loss, in nats/token."""
    diverged: Bools
    terminated: Bools
    """Whether the run diverged or completed a cool-down."""
    truncated: Bools
    """Whether the budget is used up."""


class SteeredRuns:
    """Steps many runs under a policy's actions, with their decision states and the sums of their rewards.

    Args:
        plants: Plants to steer. All runs are restarted.
        preference: Weights of quality, energy and time, which sum to 1, shape (n_runs, 3).
        fields: Observation fields that the policy sees, in its order.
        start_scale: Learning-rate scale in force before the first decision.
        finish: Whether a cool-down may be begun before the budget's end.
    """

    def __init__(
        self,
        plants: ReferencedPlants,
        preference: Floats,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        *,
        finish: bool = True,
    ) -> None:
        n_runs = plants.n_runs
        self.plants = plants
        plants.begin(np.arange(n_runs))
        self.states = DecisionStates(plants.limits(), preference, fields, start_scale, finish=finish)
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
        """Apply the allowed part of the actions, train every run for one interval, and compute its reward.

        Raises:
            ValueError: a choice does not exist. The state is unchanged then.
        """
        telemetry = self.plants.advance(self.states.decide(actions))
        loss = self._evaluate_if_due(telemetry)
        self.states.observe(telemetry)
        diverged = telemetry.diverged | ~np.isfinite(loss)
        references = reference_batch(self.plants)
        reward = references.reward(
            references.quality(loss, diverged),
            self.outcome[:, 0],
            time_s=telemetry.time_s,
            energy_j=telemetry.energy_j,
        )
        self._add_up(telemetry, reward)
        terminated = diverged | (telemetry.finished & telemetry.finishing)
        return IntervalBatch(
            telemetry=telemetry,
            reward=reward,
            loss=loss,
            loss_increase=np.where(np.isfinite(loss), loss - references.losses[:, -1], DIVERGED_LOSS_INCREASE),
            diverged=diverged,
            terminated=terminated,
            truncated=telemetry.finished & ~terminated,
        )

    def _evaluate_if_due(self, telemetry: TelemetryBatch) -> Floats:
        """Evaluate runs that are due, and return the losses that determine the quality, like `DrivenInterval.loss`."""
        known = self.plants.expected_loss if isinstance(self.plants, KnowsItsLoss) else telemetry.train_loss
        loss = np.where(telemetry.diverged, np.nan, known)
        rows = np.flatnonzero(evaluation_due(telemetry))
        if rows.size:
            validation_loss = self.plants.evaluate(rows)
            loss[rows] = np.where(telemetry.finished[rows], validation_loss, loss[rows])
        return loss

    def _add_up(self, telemetry: TelemetryBatch, reward: Floats) -> None:
        self.outcome = self.outcome + reward
        self.energy_j = self.energy_j + telemetry.energy_j
        self.time_s = self.time_s + telemetry.time_s
        self.intervals = self.intervals + 1
