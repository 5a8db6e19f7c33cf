"""Turn the three objectives of a run into one number: pure functions, and the wrapper that applies one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

Weights = np.ndarray
"""(quality, energy, time), float64 of shape (3,), which sum to 1."""


@dataclass(frozen=True)
class Outcome:
    """A run so far, in units of its reference run."""

    quality: float = 0.0
    """Compute-equivalent of the loss: 1 is as good as the reference."""
    energy: float = 0.0
    """Joules over the reference's, negative."""
    time: float = 0.0
    """Seconds over the reference's, negative."""
    loss_increase: float = 0.0
    """Loss above the reference's final loss, in nats/token."""

    def vector(self) -> np.ndarray:
        """Return (quality, energy, time)."""
        return np.array([self.quality, self.energy, self.time])


MAX_LOSS_INCREASE = 2.0
"""Nats/token; what is worse counts as this bad, so that a diverged run does not drown every other."""

Utility = Callable[[Outcome, Weights], float]


def linear(outcome: Outcome, weights: Weights) -> float:
    """Return the weighted sum, w'f."""
    return float(weights @ outcome.vector())


def tchebycheff(outcome: Outcome, weights: Weights, rho: float = 0.05) -> float:
    """Return the augmented Tchebycheff utility, -(max_i w_i (z_i - f_i) + rho sum_i w_i (z_i - f_i)).

    The ideal point z is a run as good as the reference with half its joules and seconds. It reaches the parts of the
    Pareto front that a weighted sum cannot (Steuer and Choo 1983).
    """
    shortfall = weights * (np.array([1.0, -0.5, -0.5]) - outcome.vector())
    return -float(shortfall.max() + rho * shortfall.sum())


def constrained(
    outcome: Outcome, weights: Weights, max_loss_increase: float = 0.01, max_slowdown: float = 0.05
) -> float:
    """Return the saving of energy and time, less ten times what breaks "at most x nats worse, y slower"."""
    broken = max(outcome.loss_increase - max_loss_increase, 0.0) + max(-outcome.time - 1.0 - max_slowdown, 0.0)
    cost_weights = weights[1:] / max(weights[1:].sum(), 1e-9)
    return float(cost_weights @ outcome.vector()[1:]) - 10.0 * broken


def product(outcome: Outcome, weights: Weights) -> float:
    """Return -P^1.5 (a T + b E): perplexity, time and energy as ratios to the reference (Wallace et al. 2025).

    a and b are the weights of time and energy, scaled to sum to 1; the sign is turned so that more is better.
    """
    cost_weights = weights[1:] / max(weights[1:].sum(), 1e-9)
    cost = -float(cost_weights @ outcome.vector()[1:])
    return -float(np.exp(1.5 * min(outcome.loss_increase, MAX_LOSS_INCREASE))) * cost


UTILITIES: dict[str, Utility] = {
    "linear": linear,
    "tchebycheff": tchebycheff,
    "constrained": constrained,
    "product": product,
}


class ScalarReward(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Give an agent one number per interval: the change of a utility of the run so far.

    The rewards of an episode sum (gamma = 1) to the utility of its outcome, whichever utility is chosen. The vector
    stays in `info["vector_reward"]`, the weights in `info["reward_weights"]`, as MO-Gymnasium has it.
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, np.ndarray], utility: str = "linear") -> None:
        super().__init__(env)
        if utility not in UTILITIES:
            raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, got {utility!r}")
        self._utility = UTILITIES[utility]
        self._outcome = Outcome()
        self._value = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with an empty outcome."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._outcome = Outcome()
        self._value = 0.0
        return observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment and weigh its reward vector."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        weights = np.asarray(info["preference"])
        quality, energy, time = self._outcome.vector() + np.asarray(reward)
        self._outcome = Outcome(quality, energy, time, info["loss_increase"])
        before, self._value = self._value, self._utility(self._outcome, weights)
        info |= {"vector_reward": reward, "reward_weights": weights}
        return observation, self._value - before, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed, for MaskablePPO."""
        masks: np.ndarray = self.env.get_wrapper_attr("action_masks")()
        return masks
