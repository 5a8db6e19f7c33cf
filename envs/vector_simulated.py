"""Thousands of simulated runs as one Gymnasium vector environment: every step is a few operations on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from trainpilot.envs.preference import Preference
from trainpilot.envs.spaces import action_space, observation_space, reward_space
from trainpilot.envs.steered_runs import IntervalBatch, ReferencedPlants, SteeredRuns
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints

Observations = NDArray[np.float32]


class VectorSimulatedTraining(VectorEnv[Observations, Ints, Floats]):
    """Simulated language-model training runs, steered side by side.

    Spaces, reward and the end of an episode are those of `trainpilot/LiveTraining-v0`; rewards are float64 of shape
    (n_runs, 3). A run that ends is begun anew in the same step: the observation returned is then that of the new run,
    the last one of the old run stands in `infos["final_obs"]`.

    `infos` has arrays with one row per run: of the interval just trained `loss`, `loss_increase`, `time_s`,
    `energy_j` (NaN where unknown), `diverged` and the `preference` in force; where a run ended, with the mask
    `_final_obs` and `_final_info`, `final_obs` and in `final_info` its sums `reward_terms`, `energy_j`, `time_s`
    and `length`.

    Args:
        plants: What is steered. `reset` begins all of its runs anew; its own seed decides what they are.
        preference: Fixed preference; `None` draws one per episode.
        least_quality: Least weight of quality in a preference that is drawn.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, plants: ReferencedPlants, preference: Preference | None = None, least_quality: float = 0.5
    ) -> None:
        if not 0 <= least_quality <= 1:
            raise ValueError(f"least_quality must be in [0, 1], got {least_quality}")
        self.plants = plants
        self.preference = preference
        self.least_quality = least_quality
        self.num_envs = plants.n_runs
        self.single_observation_space = observation_space()
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.reward_space = batch_space(reward_space(), self.num_envs)
        self.reward_dim = 3
        self.runs: SteeredRuns | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Begin every run; `seed` decides the preferences."""
        super().reset(seed=seed)
        self.runs = SteeredRuns(self.plants, self._weights(self.num_envs))
        return self.runs.states.observation(), {"preference": self.runs.states.preference}

    def step(self, actions: Ints) -> tuple[Observations, Floats, Bools, Bools, dict[str, Any]]:  # type: ignore[override]
        """Train every run for one interval under its action; begin those anew that have ended."""
        if self.runs is None:
            raise ValueError("step needs runs; call reset first")
        interval = self.runs.advance(np.asarray(actions, dtype=np.int64))
        infos = self._infos(self.runs, interval)
        ended = interval.terminated | interval.truncated
        if ended.any():
            infos |= _final(self.runs, ended)
            rows = np.flatnonzero(ended)
            self.runs.begin(rows, self._weights(rows.size))
        return self.runs.states.observation(), interval.reward, interval.terminated, interval.truncated, infos

    def action_masks(self) -> Bools:
        """Return which choices are allowed now, shape (n_runs, sum of choices), for MaskablePPO."""
        if self.runs is None:
            raise ValueError("action_masks needs runs; call reset first")
        return self.runs.states.action_masks()

    def _weights(self, n_runs: int) -> Floats:
        if self.preference is not None:
            return np.tile(self.preference.weights(), (n_runs, 1))
        return draw_weights(self.np_random, n_runs, self.least_quality)

    @staticmethod
    def _infos(runs: SteeredRuns, interval: IntervalBatch) -> dict[str, Any]:
        return {
            "preference": runs.states.preference,
            "loss": interval.loss,
            "loss_increase": interval.loss_increase,
            "time_s": interval.telemetry.time_s,
            "energy_j": interval.telemetry.energy_j,
            "diverged": interval.diverged,
        }


def _final(runs: SteeredRuns, ended: Bools) -> dict[str, Any]:
    sums = {
        "reward_terms": runs.outcome.copy(),
        "energy_j": runs.energy_j.copy(),
        "time_s": runs.time_s.copy(),
        "length": runs.intervals.copy(),
    }
    observations = runs.states.observation()
    return {"final_obs": observations, "_final_obs": ended, "final_info": sums, "_final_info": ended}


def draw_weights(random: np.random.Generator, n_runs: int, least_quality: float = 0.5) -> Floats:
    """Draw preferences as `Preference.draw` does: quality weighs at least so much, the rest is shared at random."""
    quality = random.uniform(least_quality, 1.0, n_runs)
    energy = random.uniform(0.0, 1.0 - quality)
    return np.stack([quality, energy, 1.0 - quality - energy], axis=1)
