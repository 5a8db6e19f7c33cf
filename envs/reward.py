"""Compute the reward: quality, energy and time of an interval relative to the case's reference run.

Everything here works on arrays with one row per run; a single run is one row. From the inside out:

* `budget_for_loss`: the budget at which a curve of losses over budgets reaches a loss. It is used wherever trainpilot
  converts a loss to compute.
* `compute_equivalent` and `worth`: the quality of a loss relative to a reference. Both are in shares of the budget, and
  hold for budgets in tokens, seconds and joules alike: the reference ran under budgets of the same currency.
* `ReferenceBatch.reward`: the reward vector of an interval; `RewardMeter` computes it for a single run.
* `Scalariser`: converts the reward vector to a scalar by one of `UTILITIES`; `ScalarReward` is the Gymnasium wrapper
  that applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, SupportsFloat, TypedDict

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from trainpilot.llm_runtime.budget import Currency
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints
from trainpilot.llm_runtime.telemetry import Telemetry

OBJECTIVES = ("quality", "energy", "time")
MAX_QUALITY = 3.0
"""Largest compute-equivalent; losses that would need more are too far from the reference runs for extrapolation."""
DIVERGED_QUALITY = -1.0
"""Quality of a diverged run: worse than a run that never started."""
DIVERGED_LOSS_INCREASE = 10.0
"""Loss increase reported for a run without a finite loss, in nats/token."""
BELIEVED = (0.0, MAX_QUALITY)
"""Limits of the compute-equivalent in a reward. It is extrapolated without a lower bound above 0 for bad losses."""
FLAT = 1e-9
"""Losses whose logarithms differ by less are considered equal."""


def budget_for_loss(loss: ArrayLike, budgets: ArrayLike, losses: ArrayLike, *, limits: tuple[float, float]) -> Floats:
    """Return the budget at which a curve reaches a loss.

    Between the points of the curve, the logarithm of the budget is linear in the logarithm of the loss. Beyond them the
    first and the last decreasing piece are extrapolated up to `limits`; limits equal to the ends of the curve clamp the
    result to the end values. Pieces on which the loss does not decrease are ignored: the curve jumps there. If the
    curve decreases nowhere, the result is its smallest budget for losses at least as good as its own, and the lower
    limit for worse ones.

    Args:
        loss: Losses in nats/token, of any shape.
        budgets: Budgets of the curve, ascending along the last axis, of shape (n_points,) or (..., n_points).
        losses: Losses at these budgets, not ascending along the last axis, of shape (..., n_points); the other axes are
            those of `loss`, or broadcast with them.
        limits: Smallest and largest budget returned.

    Returns:
        Budgets of the broadcast shape; 0 for a loss that is not finite or not above 0.
    """
    with np.errstate(all="ignore"):
        points, budgets = _by_point(np.log(losses)), _by_point(np.log(budgets))
        return _budget_for_loss(np.asarray(loss, dtype=np.float64), budgets, points, limits)


def _budget_for_loss(loss: Floats, y: list[Floats], points: list[Floats], limits: tuple[float, float]) -> Floats:
    """Return `budget_for_loss` of logarithms of budgets `y` and losses `points`, each a list by point of the curve."""
    x = np.log(loss)
    found: Floats = np.full(np.broadcast_shapes(x.shape, points[0].shape), np.nan)
    for i in range(len(points) - 1):
        fall = points[i] - points[i + 1]
        piece = y[i] + (y[i + 1] - y[i]) / fall * (points[i] - x)
        is_in_reach = (x < points[i] - 1e-12) | np.isnan(found)
        found = np.where((fall > FLAT) & is_in_reach, piece, found)
    flat = np.where(x <= points[0], y[0], -np.inf)
    share = np.exp(np.where(np.isnan(found), flat, found))
    clipped = np.minimum(np.maximum(share, limits[0]), limits[1])
    budget: Floats = np.where(np.isfinite(loss) & (loss > 0), clipped, 0.0)
    return budget[()]


def _by_point(values: Floats) -> list[Floats]:
    """Return the values at each point of the curves, contiguous in memory."""
    return list(np.ascontiguousarray(np.moveaxis(values, -1, 0)))


def compute_equivalent(loss: ArrayLike, budgets: Sequence[float], losses: ArrayLike) -> Floats:
    """Return the share of the full budget at which the reference reaches `loss`.

    The points (budget, final loss) of `budget_for_loss` come from reference runs of several budgets, each with its
    complete schedule. A point that is no better than one of a smaller budget, or no worse than that of the full run, is
    dropped as noise. The point of the full run is always kept: its own loss has compute-equivalent 1.

    Args:
        loss: Losses in nats/token, of any shape.
        budgets: Shares of the full budget, ascending to 1, at least two.
        losses: Final losses of the reference at each budget, in nats/token, of shape (..., budgets).

    Returns:
        Shares in [0, MAX_QUALITY]; 0 for a loss that is not finite.
    """
    return _on_curve(loss, _curve(budgets, losses))


def _curve(budgets: Sequence[float], losses: ArrayLike) -> tuple[list[Floats], list[Floats]]:
    """Return the logarithms of budgets and losses in order, each a list by point of the curve."""
    with np.errstate(all="ignore"):
        points, y = _by_point(np.log(losses)), _by_point(np.log(budgets))
        _put_in_order(points, y)
    return y, points


def _on_curve(loss: ArrayLike, curve: tuple[list[Floats], list[Floats]]) -> Floats:
    """Return the `compute_equivalent` of losses on a curve that is in order."""
    with np.errstate(all="ignore"):
        return _budget_for_loss(np.asarray(loss, dtype=np.float64), *curve, BELIEVED)


def _put_in_order(points: list[Floats], y: list[Floats]) -> None:
    """Replace every point that is out of order by the next one that is in order, so that no piece begins there.

    Args:
        points: Logarithms of losses, a list by point of the curve; changed.
        y: Logarithms of budgets; changed.
    """
    lowest = np.full(points[0].shape, np.inf)
    kept = []
    for loss in points[:-1]:
        kept.append((loss > points[-1] + FLAT) & (loss < lowest - FLAT))
        lowest = np.where(kept[-1], loss, lowest)
    for i in reversed(range(len(kept))):
        if not np.all(kept[i]):
            points[i], y[i] = np.where(kept[i], points[i], points[i + 1]), np.where(kept[i], y[i], y[i + 1])


def worth(share: ArrayLike) -> Floats:
    """Return the quality of compute-equivalents: the share itself up to 1, and 1 + log(share) above.

    At 1 both pieces have slope 1, so that 1 % of quality corresponds to 1 % of energy. The logarithm limits the quality
    relative to a badly tuned base schedule, against which any waste of time and energy would otherwise be worthwhile.
    """
    share = np.asarray(share, dtype=np.float64)
    quality: Floats = np.where(share <= 1, share, 1 + np.log(np.maximum(share, 1.0)))
    return quality[()]


@dataclass(frozen=True, kw_only=True)
class ReferenceBatch:
    """References of many runs, as arrays with one row per run."""

    budgets: tuple[float, ...]
    """Shares of the full budget, ascending to 1, the same for all runs."""
    losses: Floats
    """Final validation loss of the base schedule at each of these budgets, shape (n_runs, budgets), in nats/token."""
    time_s: Floats
    """Seconds of the full run, without evaluation."""
    energy_j: Floats
    """Joules of the full run; NaN where unknown."""

    def quality(self, loss: Floats, diverged: Bools) -> Floats:
        """Return the quality of each run from its loss in nats/token; `DIVERGED_QUALITY` for diverged runs."""
        return np.where(diverged, DIVERGED_QUALITY, worth(_on_curve(loss, self._points)))

    @cached_property
    def _points(self) -> tuple[list[Floats], list[Floats]]:
        return _curve(self.budgets, self.losses)

    def reward(self, quality: Floats, before: Floats, *, time_s: Floats, energy_j: Floats) -> Floats:
        """Return the reward vectors of one interval of each run: quality, energy and time, shape (n_runs, 3).

        Quality is a potential: its reward is the change, so that the rewards of an episode sum to the quality of the
        final loss.

        Args:
            quality: Quality after the interval.
            before: Quality before the interval; 0 before the first.
            time_s: Seconds of the interval.
            energy_j: Joules of the interval; NaN if unknown, which gives a reward of 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            energy = energy_j / self.energy_j
        return np.stack([quality - before, np.where(np.isfinite(energy), -energy, 0.0), -time_s / self.time_s], axis=1)


@dataclass(frozen=True, kw_only=True)
class Reference(JsonRecord):
    """Losses and costs of the base schedule on one case."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("currency",)

    currency: Currency = "tokens"
    """What the budgets are counted in: the run's own currency."""
    budgets: tuple[float, ...]
    """Shares of the full budget, ascending to 1."""
    losses: tuple[float, ...]
    """Final validation loss at each of these budgets, in nats/token."""
    initial_loss: float
    """Validation loss before training, in nats/token."""
    time_s: float
    """Seconds of the full run, evaluation apart."""
    energy_j: float | None
    """Joules of the full run, or `None`."""
    energy_source: str | None
    """Source of the joules: `measured_counter`, `measured_power` or `estimated`."""
    telemetry: tuple[Telemetry, ...]
    """Intervals of the full run."""

    def quality(self, loss: float) -> float:
        """Return the compute-equivalent of `loss`: the share of the budget that the reference needs for it."""
        return float(compute_equivalent(loss, self.budgets, self.losses))

    def batch(self) -> ReferenceBatch:
        """Return the reference as a batch of one row."""
        return ReferenceBatch(
            budgets=self.budgets,
            losses=np.array([self.losses]),
            time_s=np.array([self.time_s]),
            energy_j=np.array([_nan_if_unknown(self.energy_j)]),
        )


def _nan_if_unknown(value: float | None) -> float:
    return math.nan if value is None else value


@dataclass(frozen=True)
class RewardTerms(JsonRecord):
    """Reward of one interval. Summed over an episode (gamma = 1) they give the outcome of the run."""

    quality: float
    """Change of the quality: the reference's share of budget for the loss, logarithmic above 1."""
    energy: float
    """Joules of the interval over the reference run's joules, negative; 0 while unknown."""
    time: float
    """Seconds of the interval over the reference run's seconds, negative."""

    def vector(self) -> np.ndarray:
        """Return (quality, energy, time), float32 of shape (3,)."""
        return np.array([self.quality, self.energy, self.time], dtype=np.float32)


class RewardMeter:
    """Computes the reward of a single run, by interval: `ReferenceBatch.reward` with one row."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._one_row = reference.batch()
        self._quality: Floats = np.zeros(1)

    def weigh(self, telemetry: Telemetry, loss: float) -> RewardTerms:
        """Return the terms of an interval that reached `loss` (validation at the end of a run, training before)."""
        diverged = np.array([telemetry.diverged or not math.isfinite(loss)])
        before, self._quality = self._quality, self._one_row.quality(np.array([loss]), diverged)
        energy_j = np.array([_nan_if_unknown(telemetry.energy_j)])
        time_s = np.array([telemetry.time_s])
        reward = self._one_row.reward(self._quality, before, time_s=time_s, energy_j=energy_j)
        return RewardTerms(*reward[0].tolist())


Weights = Floats
"""Weights of quality, energy and time, float64, which sum to 1; shape (3,), or (n_runs, 3) for many runs."""


class RewardInfo(TypedDict):
    """Entries of an environment's `info` that `Scalariser` needs besides the reward vector.

    Gymnasium passes only `info` from an environment to its wrappers: the environments of trainpilot write these two
    entries at every step, and `Scalariser` reads them.
    """

    preference: Weights
    """Weights in force during the interval."""
    loss_increase: float | Floats
    """Loss minus the reference's final loss, in nats/token; `DIVERGED_LOSS_INCREASE` for a loss that is not finite."""


@dataclass(frozen=True)
class Outcome:
    """Quality and costs of a run so far, relative to its reference; for many runs, arrays of shape (n_runs,)."""

    quality: float | Floats = 0.0
    """Quality of the loss; 1 equals the reference."""
    energy: float | Floats = 0.0
    """Joules divided by the reference's, negative."""
    time: float | Floats = 0.0
    """Seconds divided by the reference's, negative."""
    loss_increase: float | Floats = 0.0
    """Loss minus the reference's final loss, in nats/token."""

    def vector(self) -> Floats:
        """Return (quality, energy, time) along the last axis."""
        return np.stack([self.quality, self.energy, self.time], axis=-1)


MAX_LOSS_INCREASE = 2.0
"""Cap on the loss increase in nats/token, so that a diverged run does not dominate averages."""

Utility = Callable[[Outcome, Weights], Floats]
"""Returns a scalar per run from outcome and weights."""


def linear(outcome: Outcome, weights: Weights) -> Floats:
    """Return the weighted sum, w'f."""
    return np.asarray((weights * outcome.vector()).sum(axis=-1))[()]


LEAST_SHARE = 0.01
"""Smallest compute-equivalent that the logarithmic utility tells from smaller ones."""


def logarithmic(outcome: Outcome, weights: Weights) -> Floats:
    """Return w_q log c - w_e E - w_t T: the logarithm of the compute-equivalent c less the weighted costs.

    Of runs that gain as they use, c = g E = g T with any g, the best uses the share w_q / (1 - w_q) of the reference's
    costs, at most all: it moves gradually with the weights. The weighted sum of c itself jumps there from the shortest
    run to the longest as w_q crosses 1/2, and so does the product c^w_q E^-w_e T^-w_t. Diverged runs are the worst.
    """
    quality = np.asarray(outcome.quality)
    log_share = np.where(quality > 1, quality - 1, np.log(np.maximum(quality, LEAST_SHARE)))  # the inverse of `worth`
    log_share = np.where(quality < 0, np.log(LEAST_SHARE) + quality, log_share)
    return linear(Outcome(log_share, outcome.energy, outcome.time), weights)


def tchebycheff(outcome: Outcome, weights: Weights, rho: float = 0.05) -> Floats:
    """Return the augmented Tchebycheff utility, -(max_i w_i (z_i - f_i) + rho sum_i w_i (z_i - f_i)).

    The ideal point z is a run as good as the reference with half its joules and seconds. It reaches the parts of the
    Pareto front that a weighted sum cannot (Steuer and Choo 1983).
    """
    shortfall = weights * (np.array([1.0, -0.5, -0.5]) - outcome.vector())
    utility: Floats = -(shortfall.max(axis=-1) + rho * shortfall.sum(axis=-1))
    return utility


def constrained(
    outcome: Outcome, weights: Weights, max_loss_increase: float = 0.01, max_slowdown: float = 0.05
) -> Floats:
    """Return the saving of energy and time, minus ten times the excess over a limit on loss and a limit on time."""
    worse = np.maximum(outcome.loss_increase - max_loss_increase, 0.0)
    slower = np.maximum(-np.asarray(outcome.time) - 1.0 - max_slowdown, 0.0)
    utility: Floats = _weighted_cost(outcome, weights) - 10.0 * (worse + slower)
    return utility


def product(outcome: Outcome, weights: Weights) -> Floats:
    """Return -P^1.5 (a T + b E): perplexity, time and energy as ratios to the reference (Wallace et al. 2025).

    a and b are the weights of time and energy, scaled to sum to 1; the sign is turned so that more is better.
    """
    perplexity = np.exp(1.5 * np.minimum(outcome.loss_increase, MAX_LOSS_INCREASE))
    utility: Floats = perplexity * _weighted_cost(outcome, weights)
    return utility


def _weighted_cost(outcome: Outcome, weights: Weights) -> Floats:
    """Return the weighted mean of energy and time (negative), with their weights scaled to sum to 1."""
    cost_weights = weights[..., 1:] / np.maximum(weights[..., 1:].sum(axis=-1, keepdims=True), 1e-9)
    cost: Floats = (cost_weights * outcome.vector()[..., 1:]).sum(axis=-1)
    return cost


UTILITIES: dict[str, Utility] = {
    "linear": linear,
    "logarithmic": logarithmic,
    "tchebycheff": tchebycheff,
    "constrained": constrained,
    "product": product,
}


class Scalariser:
    """Converts the reward vectors of many runs to scalars: the change of a utility of each run so far.

    The scalar rewards of an episode sum (gamma = 1) to the utility of its outcome.

    Args:
        utility: One of `UTILITIES`.
        n_runs: Number of runs.

    Raises:
        ValueError: an unknown utility.
    """

    def __init__(self, utility: str, n_runs: int = 1) -> None:
        if utility not in UTILITIES:
            raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, got {utility!r}")
        self._utility = UTILITIES[utility]
        self._sums: Floats = np.zeros((n_runs, len(OBJECTIVES)))
        self.values: Floats = np.zeros(n_runs)
        """Utility of each run so far; 0 before its first interval."""

    def begin(self, rows: Ints | slice = slice(None)) -> None:
        """Begin new runs in these rows, in all by default."""
        self._sums[rows] = 0.0
        self.values[rows] = 0.0

    def rewards(self, vectors: Floats, info: RewardInfo) -> Floats:
        """Return one reward for each run from the reward vectors of an interval, shape (n_runs, 3)."""
        self._sums = self._sums + vectors
        quality, energy, time = self._sums.T
        outcome = Outcome(quality, energy, time, np.asarray(info["loss_increase"]))
        before, self.values = self.values, self._utility(outcome, info["preference"])
        return self.values - before


class ScalarisedReward:
    """The scalar rewards of a single run: `Scalariser` with one row.

    Args:
        utility: One of `UTILITIES`.
    """

    def __init__(self, utility: str) -> None:
        self._scalariser = Scalariser(utility)

    def begin(self) -> None:
        """Begin a run with an empty outcome."""
        self._scalariser.begin()

    def of(self, vector: np.ndarray, info: dict[str, Any]) -> float:
        """Return the scalar of a reward vector; `info` gets `vector_reward` and `reward_weights` as in MO-Gymnasium."""
        weights = np.asarray(info["preference"])
        weighing = RewardInfo(preference=weights, loss_increase=info["loss_increase"])
        info |= {"vector_reward": vector, "reward_weights": weights}
        return float(self._scalariser.rewards(np.asarray(vector)[None], weighing)[0])


class ScalarReward(
    gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray], gymnasium.utils.RecordConstructorArgs
):
    """Gymnasium wrapper that converts the reward vector of a single run to a scalar (`Scalariser`).

    `info["vector_reward"]` holds the vector and `info["reward_weights"]` the weights, as in MO-Gymnasium.

    Args:
        env: Its `info` must hold the entries of `RewardInfo`.
        utility: One of `UTILITIES`.
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, np.ndarray], utility: str = "linear") -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, utility=utility)
        super().__init__(env)
        self._scalar = ScalarisedReward(utility)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with an empty outcome."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._scalar.begin()
        return observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment and convert its reward vector to a scalar."""
        observation, vector, terminated, truncated, info = self.env.step(action)
        reward = self._scalar.of(np.asarray(vector), info)
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed, for MaskablePPO."""
        masks: np.ndarray = self.env.get_wrapper_attr("action_masks")()
        return masks
