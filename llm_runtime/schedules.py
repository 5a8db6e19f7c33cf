"""Give the base schedules: the learning rate's factor as a function of the tokens trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

PROBE_PASSES = 3
"""Forward passes of a curvature probe."""


ScheduleName = Literal["linear", "cosine", "wsd", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)

COOLDOWN_SHARE = 0.2
"""A cool-down lasts this share of the tokens trained on before it (10-20 %: Haegele et al. 2024)."""


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
    def begin(cls, schedule: Schedule, tokens: int, step_tokens: int) -> Cooldown:
        """Return the cool-down that begins after `tokens`; it never outlasts the budget."""
        end = min(tokens + max(round(COOLDOWN_SHARE * tokens), step_tokens), schedule.budget_tokens)
        return cls(start_tokens=tokens, end_tokens=end, start_factor=schedule.factor(tokens, step_tokens))

    def factor(self, tokens: int) -> float:
        """Return the factor for a step that begins after `tokens`."""
        span = max(self.end_tokens - self.start_tokens, 1)
        return self.start_factor * min(max((self.end_tokens - tokens) / span, 0.0), 1.0)


def neutral_factor(batch_size: int, start_batch_size: int) -> float:
    """Return the factor on the learning rate that makes a batch change neutral for Adam: sqrt(B / B_start).

    Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms".
    """
    return math.sqrt(batch_size / start_batch_size)


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
