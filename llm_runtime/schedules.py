"""Compute the schedules of a training run: learning rate, cool-down, pruning, probes and validations.

Live runs, steered loops and the simulator follow the same rules, and they are written here once. Schedules count
tokens; under a budget in seconds or joules they count `PARTS` of it instead.

* `learning_rate`: base rate x scale x schedule factor x neutral factor of the batch.
* `Schedule`, `OwnSchedule`, `Cooldown`: the schedule factor as a function of the tokens trained on.
* `mask_updates_due`, `cubic_sparsity`: in which steps pruning raises the sparsity along an interval.
* `probe_due`, `sequences_probed`, `validation_due`: when a run is probed and validated, and on how much.

Loads numpy, but not torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

ScheduleName = Literal["linear", "cosine", "wsd", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)

Floats = NDArray[np.float64]

BUDGET_SHARES = (0.25, 0.5, 1.0)
"""Reference runs under the base schedule end at these shares of the budget; their final losses make the curve that
turns a loss into compute."""
COOLDOWN_SHARE = 0.2
"""A cool-down lasts this share of the tokens trained on before it (10-20 %: Haegele et al. 2024)."""


@overload
def neutral_factor(batch_size: float, start_batch_size: float) -> float: ...
@overload
def neutral_factor(batch_size: Floats, start_batch_size: ArrayLike) -> Floats: ...
def neutral_factor(batch_size: Any, start_batch_size: Any) -> Any:
    """Return the factor on the learning rate that makes a batch change neutral for Adam: sqrt(B / B_start).

    Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms".

    Args:
        batch_size: Sequences per optimizer step; numbers or arrays.
        start_batch_size: Sequences per optimizer step at the beginning of the run.
    """
    ratio = batch_size / start_batch_size
    return math.sqrt(ratio) if isinstance(ratio, float) else np.sqrt(ratio)


@overload
def learning_rate(base: float, scale: float, factor: float, batch_size: float, start_batch_size: float) -> float: ...
@overload
def learning_rate(
    base: ArrayLike, scale: ArrayLike, factor: ArrayLike, batch_size: Floats, start_batch_size: ArrayLike
) -> Floats: ...
def learning_rate(base: Any, scale: Any, factor: Any, batch_size: Any, start_batch_size: Any) -> Any:
    """Return the learning rate of an optimizer step: base x scale x schedule factor x neutral factor of the batch.

    Takes numbers or arrays; `batch_size` decides which of the two comes back.

    Args:
        base: Peak of the base schedule at the starting batch size.
        scale: The learning-rate control, `Controls.learning_rate_scale`.
        factor: Factor of the base schedule or of the cool-down, in [0, 1]; 1 for the peak itself.
        batch_size: Sequences per optimizer step.
        start_batch_size: Sequences per optimizer step at the beginning of the run.
    """
    return base * scale * factor * neutral_factor(batch_size, start_batch_size)


PARTS = 1_000_000_000
"""A budget in seconds or joules is counted in so many parts, which take the place of tokens in its schedule."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up, then the named decay over the rest of the budget."""

    name: ScheduleName
    """Which decay."""
    budget_tokens: int
    """Tokens of the whole run."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up."""

    def factor(self, tokens: int, step_tokens: int) -> float:
        """Return the factor in [0, 1] for a step of `step_tokens` that begins after `tokens`.

        Warm-up counts the step itself, so that the first step is not lost; the decay does not, so that the last is not.
        """
        if tokens + step_tokens < self.warmup_tokens:
            return (tokens + step_tokens) / self.warmup_tokens
        span = max(self.budget_tokens - self.warmup_tokens, 1)
        progress = min(max((tokens - self.warmup_tokens) / span, 0.0), 1.0)
        return _DECAYS[self.name](progress)

    def described(self) -> dict[str, Any]:
        """Return the schedule as plain JSON values, by which a run that goes on recognises it."""
        return asdict(self)


FactorOf = Callable[[float], float]
"""A base schedule of the user's own: from the share of the budget that is used, in [0, 1], to a factor >= 0."""


@dataclass(frozen=True, kw_only=True)
class OwnSchedule:
    """A base schedule that is any function of the share of the budget; warm-up, if there is one, is part of it."""

    factor_of: FactorOf
    """The function."""
    budget_tokens: int
    """Tokens of the whole run."""

    def factor(self, tokens: int, step_tokens: int) -> float:
        """Return the factor for a step of any length that begins after `tokens`.

        Raises:
            ValueError: the function returned something else than a finite number of at least 0.
        """
        share = min(tokens / self.budget_tokens, 1.0)
        value = float(self.factor_of(share))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"base_schedule must return a finite factor >= 0 for every share of the budget, got {value} at "
                f"{share:.4g}; let it return 1 at the optimizer's learning rate"
            )
        return value

    def described(self) -> dict[str, Any]:
        """Return the schedule as plain JSON values, by which a run that goes on recognises it: some of its factors."""
        factors = [round(self.factor(round(tenth * self.budget_tokens / 10), 1), 9) for tenth in range(11)]
        return {"factors": factors, "budget_tokens": self.budget_tokens}


@dataclass(frozen=True, kw_only=True)
class Cooldown:
    """A linear fall to zero that replaces the base schedule once it has begun."""

    start_tokens: int
    """Tokens trained on when it began."""
    end_tokens: int
    """Tokens at which the factor reaches zero and the run ends."""
    start_factor: float
    """The base schedule's factor when it began."""

    @classmethod
    def begin(cls, schedule: Schedule | OwnSchedule, tokens: int, step_tokens: int) -> Cooldown:
        """Return the cool-down that begins after `tokens`; it never outlasts the budget."""
        end = min(tokens + max(round(COOLDOWN_SHARE * tokens), step_tokens), schedule.budget_tokens)
        return cls(start_tokens=tokens, end_tokens=end, start_factor=schedule.factor(tokens, step_tokens))

    def factor(self, tokens: int) -> float:
        """Return the factor for a step that begins after `tokens`."""
        span = max(self.end_tokens - self.start_tokens, 1)
        return self.start_factor * min(max((self.end_tokens - tokens) / span, 0.0), 1.0)


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd(progress: float) -> float:
    return min(1.0, (1.0 - progress) / 0.2)


def _constant(progress: float) -> float:
    return 1.0


_DECAYS = {"linear": _linear, "cosine": _cosine, "wsd": _wsd, "constant": _constant}


def cubic_sparsity(start: float, end: float, progress: float) -> float:
    """Return the sparsity of a gradual schedule: steep at first, flat at its end.

        s = end + (start - end) * (1 - progress)^3

    Formula: Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    Args:
        start: Sparsity before the schedule, in [0, 1).
        end: Sparsity after the schedule, in [0, 1).
        progress: Share of the schedule gone by; held at 0 before it and at 1 after it.
    """
    left = 1 - min(max(progress, 0.0), 1.0)
    return end + (start - end) * left**3


MASK_UPDATES = 5
"""Pruning raises the masks this many times along an interval, at equal distances."""


def mask_updates_due(progress: float) -> int:
    """Return how many of an interval's mask updates are due at `progress`, a share of the interval in [0, 1].

    The first is due before the first step; all are due at the end.
    """
    return min(int(progress * MASK_UPDATES) + 1, MASK_UPDATES)


PROBE_PASSES = 3
"""Forward passes of a curvature probe."""
PROBE_SHARE = 0.005
"""A probe takes this share of an interval's sequences, at least one."""
EVERY_INTERVAL_UNTIL = 0.2
"""Share of the budget up to which every interval ends with a probe: there the learning rate is found."""
PROBE_EVERY = 4
"""Later, one interval in this many ends with a probe. On short runs a probe costs as much as several steps."""


def probe_due(decision: ArrayLike, budget_used: ArrayLike) -> NDArray[np.bool_]:
    """Return whether an interval ends with a probe.

    Args:
        decision: Number of the interval, from 0.
        budget_used: Share of the budget used when it began.
    """
    early = np.asarray(budget_used) < EVERY_INTERVAL_UNTIL
    due: NDArray[np.bool_] = early | (np.asarray(decision) % PROBE_EVERY == 0)
    return due


def sequences_probed(taken: ArrayLike) -> NDArray[np.float64]:
    """Return how many sequences a probe takes after an interval of `taken` sequences."""
    return np.maximum(1.0, np.round(PROBE_SHARE * np.asarray(taken, dtype=np.float64)))


EVALUATE_EVERY = 10
"""The validation loss is measured once in this many decisions, and at the end of the run."""


def validation_due(decisions: ArrayLike, every: int = EVALUATE_EVERY) -> NDArray[np.bool_]:
    """Return whether the validation loss is to be measured now that `decisions` intervals have ended."""
    due: NDArray[np.bool_] = np.asarray(decisions) % every == 0
    return due
