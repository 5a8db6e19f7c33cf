"""What every single-run environment does: spaces, masks, one step, and what it tells about it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np

from trainpilot.envs.decision_state import Decision, DecisionState
from trainpilot.envs.preference import Preference
from trainpilot.envs.reward import Reference, RewardMeter, RewardTerms, current_loss
from trainpilot.envs.spaces import action_space, observation_space, reward_space
from trainpilot.llm_runtime.telemetry import Plant, Telemetry


class TrainingEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One training run, steered interval by interval. `reset` of a sub-class makes the plant and calls `_begin`."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, Gymnasium's own form

    def __init__(self) -> None:
        self.action_space = action_space()
        self.observation_space = observation_space()
        self.reward_space = reward_space()
        self.reward_dim = 3
        self.plant: Plant | None = None

    def _begin(self, plant: Plant, reference: Reference, preference: Preference) -> np.ndarray:
        """Take up a new run, and return its first observation."""
        self.plant, self.reference = plant, reference
        self.state = DecisionState(plant.limits(), preference)
        self._meter = RewardMeter(reference)
        return self.state.observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Bring the action's controls into force, train one interval, and weigh what came out."""
        if self.plant is None:
            raise ValueError("step needs a run; call reset first")
        decision = self.state.decide(action)
        telemetry = self.plant.advance(decision.controls, 1 / self.state.limits.decisions)
        loss = current_loss(self.plant, telemetry)
        self.state.observe(telemetry)
        terms = self._meter.weigh(telemetry, loss)
        info = self._info(decision, telemetry, terms, loss)
        terminated = info["diverged"] or (telemetry.finished and telemetry.finishing)
        truncated = telemetry.finished and not terminated
        return self.state.observation(), terms.vector(), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed now, bool of shape (sum of choices,), for MaskablePPO."""
        return self.state.action_masks()

    def _info(self, decision: Decision, telemetry: Telemetry, terms: RewardTerms, loss: float) -> dict[str, Any]:
        effective = {
            "learning_rate": telemetry.learning_rate,
            "batch_size": telemetry.batch_size,
            "precision": telemetry.precision,
            "sparsity": telemetry.sparsity,
            "finishing": telemetry.finishing,
        }
        return {
            "requested": asdict(decision.controls),
            "effective": effective,
            "refusals": decision.refusals,
            "reward_terms": asdict(terms),
            "preference": self.state.preference.weights(),
            "loss": loss,
            "loss_increase": loss - self.reference.losses[-1] if math.isfinite(loss) else 10.0,
            "time_s": telemetry.time_s,
            "energy_j": telemetry.energy_j,
            "energy_source": telemetry.energy_source,
            "diverged": telemetry.diverged or not math.isfinite(loss),
        }
