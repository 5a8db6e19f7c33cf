"""Steer a run by a known rule instead of a policy: the baselines that a policy is compared with.

Each rule has the one method of a `Controller`. The replay of a fixed schedule stands in `open_loop`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import geometric_mean
from typing import Protocol

import numpy as np

from trainpilot.agents.controller import Controller, Policy
from trainpilot.envs.action import ACTION_FIELDS, Action
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig
from trainpilot.llm_runtime.telemetry import Telemetry

_BORDERS = np.cumsum([len(field.choices) for field in ACTION_FIELDS])[:-1]


class Steerer(Protocol):
    """Whatever sets the controls of a run: a `Controller`, or one of the rules."""

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls of the next interval, or `None` to end the run now.

        Args:
            telemetry: The last interval's, `None` before the first.
        """


class KeepBase:
    """Leave the base schedule alone.

    Args:
        limits: What the run can do.
    """

    def __init__(self, limits: ControlLimits) -> None:
        self.start = limits.start

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls."""
        return self.start


class ReduceOnPlateau:
    """Cut the learning rate where the validation loss stops falling; end the run where cuts no longer help.

    Meant for a constant base schedule, which it multiplies. Cuts come as in torch's `ReduceLROnPlateau`: after more
    than `patience` readings in a row that are not below `best * (1 - threshold)`. The threshold is torch's; its
    patience of 10 epochs would outlast a run of some 25 readings, so that here every failure counts.

    A reading is new when it differs from the last one: the telemetry repeats it until somebody looks again, and two
    looks with training between them do not agree to the last digit.

    Args:
        limits: What the run can do.
        factor: What a cut multiplies the learning-rate scale by.
        patience: Readings without improvement that are let pass before a cut.
        stop_patience: Readings in a row without improvement, cuts or not, after which the run ends.
        threshold: Smallest improvement that counts, relative to the best loss.
        smallest_scale: The run ends when the learning-rate scale has fallen below this.
    """

    def __init__(
        self,
        limits: ControlLimits,
        *,
        factor: float = 0.5,
        patience: int = 0,
        stop_patience: int = 5,
        threshold: float = 1e-4,
        smallest_scale: float = 1 / 64,
    ) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor must be in (0, 1), or no cut would lower the learning rate; got {factor}")
        if not 0 <= patience < stop_patience:
            raise ValueError(f"patience must be in [0, stop_patience {stop_patience}), got {patience}")
        self.start = limits.start
        self.factor, self.threshold, self.smallest_scale = factor, threshold, smallest_scale
        self.patience, self.stop_patience = patience, stop_patience
        self.scale = limits.start.learning_rate_scale
        self._last: float | None = None
        self._best = math.inf
        self._since_best = 0
        self._since_best_or_cut = 0

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls at the present scale, or `None` when the run has stopped improving."""
        loss = telemetry.validation_loss if telemetry is not None else None
        if loss is not None and loss != self._last:
            self._take_in(loss)
        if self.scale < self.smallest_scale or self._since_best >= self.stop_patience:
            return None
        return replace(self.start, learning_rate_scale=self.scale)

    def _take_in(self, loss: float) -> None:
        self._last = loss
        if loss < self._best * (1 - self.threshold):
            self._best = loss
            self._since_best = self._since_best_or_cut = 0
            return
        self._since_best += 1
        self._since_best_or_cut += 1
        if self._since_best_or_cut > self.patience:
            self.scale *= self.factor
            self._since_best_or_cut = 0


class NoiseScaleBatch:
    """Let the batch follow the gradient noise scale tr(Sigma)/|G|^2, where steps and tokens are traded evenly.

    Rule: McCandlish et al. 2018, "An empirical model of large-batch training", arXiv 1812.06162. The batch doubles,
    once per decision at most, while the doubled one is not above the geometric mean of the last readings. It never
    falls: the noise scale grows as the loss falls, so that a lower reading is noise of the estimate, and a batch that
    followed it would swing. The learning rate moves with the batch as is neutral for Adam (x sqrt 2), which the run
    does by itself: the learning-rate scale stays 1.

    Args:
        limits: What the run can do.
        window: Intervals that the mean is taken over; the batch keeps until so many have been read.
    """

    def __init__(self, limits: ControlLimits, *, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 interval, got {window}")
        self.limits = limits
        self.batch_size = limits.start.batch_size
        self._readings: deque[float] = deque(maxlen=window)

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls with the present batch."""
        if telemetry is not None and telemetry.noise_scale is not None:
            self._readings.append(max(telemetry.noise_scale, 1.0))  # no batch is below one sequence
        doubled = 2 * self.batch_size
        if doubled <= min(self._noise_scale(), self.limits.max_batch_size):
            self.batch_size = doubled
        return replace(self.limits.start, batch_size=self.batch_size)

    def _noise_scale(self) -> float:
        """Return the smoothed noise scale, in sequences; 0 until there are enough readings."""
        full = len(self._readings) == self._readings.maxlen
        return geometric_mean(self._readings) if full else 0.0


class Seesaw:
    """Grow the batch where a cosine would cut the learning rate: fewer steps for the same tokens.

    Rule: Meterez et al. 2025, "Seesaw: Accelerating training by balancing learning rate and batch size scheduling",
    arXiv 2510.14717. At the k-th point where the cosine (to 10 %) has fallen to alpha^-k, the batch grows by alpha and
    the learning rate falls by sqrt(alpha) only. The base schedule is constant with warm-up.

    In this package a batch change alone moves the learning rate by sqrt(B / B_start), so that

        learning rate after k cuts = scale * sqrt(alpha^k) = alpha^(-k/2)    =>    scale = alpha^-k

    Where the largest batch is reached after m cuts, the further ones are the cosine's own, by alpha each:

        scale * sqrt(alpha^m) = alpha^(-m/2) * alpha^-(k - m)                =>    scale = alpha^-k, once more.

    Args:
        limits: What the run can do.
        config: The run, for its budget and warm-up.
        alpha: Factor of one cut, a whole number.
    """

    def __init__(self, limits: ControlLimits, config: RunConfig, *, alpha: int = 2) -> None:
        if config.schedule != "constant":
            raise ValueError(f"schedule must be constant for Seesaw, which brings its own cuts, got {config.schedule}")
        if alpha < 2 or alpha != int(alpha):
            raise ValueError(f"alpha must be a whole number of at least 2, as it multiplies the batch; got {alpha}")
        self.limits = limits
        self.alpha = int(alpha)
        self.cosine = replace(config.base_schedule(), name="cosine")

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls after as many cuts as the cosine has made by now."""
        cuts = self.cuts(telemetry.tokens if telemetry is not None else 0)
        start = self.limits.start
        sizes = [start.batch_size * self.alpha**k for k in range(cuts + 1)]
        batch_size = max(size for size in sizes if size <= max(self.limits.max_batch_size, start.batch_size))
        scale = start.learning_rate_scale * float(self.alpha) ** -cuts
        return replace(start, learning_rate_scale=scale, batch_size=batch_size)

    def cuts(self, tokens: int) -> int:
        """Return how often the cosine has fallen by a further factor alpha after `tokens`; warm-up is no fall."""
        factor = self.cosine.factor(max(tokens, self.cosine.warmup_tokens), step_tokens=0)
        return math.floor(-math.log(factor, self.alpha) + 1e-9)


class GradualPruning:
    """Prune along the cubic schedule of Zhu and Gupta 2017 between a quarter and three quarters of the budget.

    These two points were near the best of 80 schedules in Jin et al. 2025, "The journey matters: average parameter
    count over pre-training unifies sparse and dense scaling laws", arXiv 2501.12486.

    Args:
        limits: What the run can do.
        final_sparsity: Sparsity at the end, in [0, 1).
        start: Share of the budget at which pruning begins.
        end: Share of the budget at which it is complete.
    """

    def __init__(
        self, limits: ControlLimits, *, final_sparsity: float = 0.5, start: float = 0.25, end: float = 0.75
    ) -> None:
        if limits.pruning == "none":
            raise ValueError("pruning must be magnitude, evolution or width for gradual pruning, got none")
        if not 0 <= final_sparsity < 1:
            raise ValueError(f"final_sparsity must be in [0, 1), got {final_sparsity}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start < end <= 1, got {start} and {end}")
        self.limits = limits
        self.final_sparsity, self.begin_share, self.end_share = final_sparsity, start, end

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls with the sparsity to be reached at the next interval's end."""
        from trainpilot.llm_runtime.schedules import cubic_sparsity  # loads torch

        interval = telemetry.decision + 1 if telemetry is not None else 0
        share = (interval + 1) / self.limits.decisions
        progress = (share - self.begin_share) / (self.end_share - self.begin_share)
        return replace(self.limits.start, sparsity=cubic_sparsity(0.0, self.final_sparsity, progress))


class RandomPolicy:
    """Take a random allowed choice of every action, under the same limits as a policy that knows nothing.

    From a fifth of the budget on, when it is allowed, the cool-down begins with probability 1/2 at every decision.

    Args:
        limits: What the run can do.
        seed: The same seed gives the same choices under the same limits.
    """

    def __init__(self, limits: ControlLimits, seed: int) -> None:
        self.controller = Controller(uniform_policy(seed), limits, Preference())

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls that follow from a random action."""
        return self.controller.decide(telemetry)


def uniform_policy(seed: int) -> Policy:
    """Return a policy that takes every allowed choice of a field with the same probability, each field on its own."""
    random = np.random.default_rng(seed)

    def choose(observation: np.ndarray, masks: np.ndarray) -> Action:
        return tuple(int(random.choice(np.flatnonzero(allowed))) for allowed in np.split(masks, _BORDERS))

    return choose
