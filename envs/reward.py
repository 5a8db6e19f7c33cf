"""Turn what an interval brought into a reward vector: quality, energy and time, each in units of the reference run.

Turn the three objectives of a run into one number: pure functions, and the wrapper that applies one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import gymnasium
import numpy as np

from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class Reference(JsonRecord):
    """What the base schedule reaches on one case, and what it costs."""

    budgets: tuple[float, ...]
    """Shares of the full budget, rising to 1."""
    losses: tuple[float, ...]
    """Final validation loss at each of these budgets, in nats/token."""
    initial_loss: float
    """Validation loss before training, in nats/token."""
    time_s: float
    """Seconds of the full run, evaluation apart."""
    energy_j: float | None
    """Joules of the full run, or `None`."""
    energy_source: str | None
    """Where the joules come from."""
    telemetry: tuple[Telemetry, ...]
    """Intervals of the full run."""

    def quality(self, loss: float) -> float:
        """Return the compute-equivalent of `loss`: the share of the budget that the reference needs for it."""
        return compute_equivalent(loss, self.budgets, self.losses)


OBJECTIVES = ("quality", "energy", "time")
MAX_QUALITY = 3.0
"""Compute-equivalents above this are not believed: they extrapolate too far beyond the reference runs."""
DIVERGED_QUALITY = -1.0
"""Quality of a diverged run: worse than a run that never started."""


@dataclass(frozen=True)
class RewardTerms(JsonRecord):
    """Reward of one interval. Summed over an episode (gamma = 1) they give the outcome of the run."""

    quality: float
    """Change of what the loss is worth: the reference's share of budget for it, logarithmic above 1."""
    energy: float
    """Joules of the interval over the reference run's joules, negative; 0 while unknown."""
    time: float
    """Seconds of the interval over the reference run's seconds, negative."""

    def vector(self) -> np.ndarray:
        """Return (quality, energy, time), float32 of shape (3,)."""
        return np.array([self.quality, self.energy, self.time], dtype=np.float32)


def compute_equivalent(loss: float, budgets: Sequence[float], losses: Sequence[float]) -> float:
    """Return the share of the full budget at which the reference reaches `loss`.

    Reference runs of several budgets, each with its whole schedule, give points (budget, final loss). Between them
    the logarithm of the budget is linear in the logarithm of the loss; beyond them the end pieces go on. Points out of
    order are chance and left out, never the full run's: its own loss is always worth 1.

    Args:
        loss: Loss reached, in nats/token.
        budgets: Shares of the full budget, rising, at least two.
        losses: Final loss of the reference at each budget, in nats/token.

    Returns:
        A share in [0, MAX_QUALITY]; 0 for a loss that is not finite.
    """
    if not math.isfinite(loss) or loss <= 0:
        return 0.0
    x, y = np.log(np.asarray(losses)), np.log(np.asarray(budgets))
    points: list[int] = []
    for i in range(len(x) - 1):
        worse_than_the_full_run = x[i] > x[-1] + 1e-9
        if worse_than_the_full_run and (not points or x[i] < x[points[-1]] - 1e-9):
            points.append(i)
    if not points:
        return float(loss <= losses[-1])
    x, y = x[[*points, -1]], y[[*points, -1]]
    piece = int(np.clip(np.searchsorted(-x, -math.log(loss)) - 1, 0, len(x) - 2))
    slope = (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece])
    share = math.exp(min(y[piece] + slope * (math.log(loss) - x[piece]), 50.0))
    return min(share, MAX_QUALITY)


def worth(share: float) -> float:
    """Return what a compute-equivalent is worth as quality: itself up to 1, and 1 + log(share) above.

    Around 1 both pieces have slope 1, so that 1 % of quality still is the size of 1 % of energy. Above it, a base
    schedule that was badly tuned would otherwise make any waste of time and energy look like a bargain.
    """
    return share if share <= 1 else 1 + math.log(share)


class RewardMeter:
    """Weigh interval after interval against a reference run.

    Quality is a potential: each interval brings the change of what the loss's compute-equivalent is worth, so that an
    episode sums to the worth of its last loss, whatever happened on the way.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._quality = 0.0

    def weigh(self, telemetry: Telemetry, loss: float) -> RewardTerms:
        """Return the terms of an interval that reached `loss` (validation at the end of a run, training before)."""
        diverged = telemetry.diverged or not math.isfinite(loss)
        quality = DIVERGED_QUALITY if diverged else worth(self.reference.quality(loss))
        before, self._quality = self._quality, quality
        energy = 0.0
        if telemetry.energy_j is not None and self.reference.energy_j:
            energy = -telemetry.energy_j / self.reference.energy_j
        return RewardTerms(quality - before, energy, -telemetry.time_s / self.reference.time_s)


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
