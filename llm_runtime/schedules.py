"""Give the base schedules: the learning rate's factor as a function of the tokens trained on.

Where a steered run stands in its budget: the interval's end, the run's end, and the base schedule's factor.

Say when the curvature is probed and on how much, for live and simulated runs alike. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBE_PASSES = 3
"""Forward passes of a curvature probe."""


ScheduleName = Literal["linear", "cosine", "wsd", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)

BUDGET_SHARES = (0.25, 0.5, 1.0)
"""Reference runs under the base schedule end at these shares of the budget; their final losses make the curve that
turns a loss into compute."""
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


@dataclass(kw_only=True)
class Course:
    """A budget of sequences, cut into intervals, under a base schedule that a cool-down may replace."""

    schedule: Schedule
    """The base schedule, in tokens."""
    budget: int
    """Sequences of the whole run."""
    sequence_length: int
    """Tokens of a sequence."""
    decisions: int
    """Intervals."""
    grain: int = 1
    """Intervals and run end only after a multiple of so many sequences."""
    sequences: int = 0
    """Trained on so far."""
    decision: int = 0
    """Intervals that are over."""
    cooldown: Cooldown | None = None

    @property
    def tokens(self) -> int:
        """Tokens trained on, by the nominal length of a sequence."""
        return self.sequences * self.sequence_length

    @property
    def end(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down."""
        if self.cooldown is None:
            return self._whole(self.budget)
        return self._whole(-(-self.cooldown.end_tokens // self.sequence_length))

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.sequences >= self.end

    @property
    def target(self) -> int:
        """Sequences at which the interval ends."""
        return self._whole(min(round((self.decision + 1) * self.budget / self.decisions), self.end))

    def _whole(self, sequences: int) -> int:
        return min(-(-sequences // self.grain) * self.grain, self.budget)

    def factor(self, batch_size: int) -> float:
        """Return the schedule's factor on the learning rate, for a step of so many sequences."""
        if self.cooldown is not None:
            return self.cooldown.factor(self.tokens)
        return self.schedule.factor(self.tokens, batch_size * self.sequence_length)

    def cool_down(self, batch_size: int) -> None:
        """Begin the cool-down, unless it has begun."""
        if self.cooldown is None:
            self.cooldown = Cooldown.begin(self.schedule, self.tokens, batch_size * self.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, as plain JSON values."""
        cooldown = asdict(self.cooldown) if self.cooldown is not None else None
        return {"sequences": self.sequences, "decision": self.decision, "cooldown": cooldown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was called."""
        self.sequences, self.decision = state["sequences"], state["decision"]
        self.cooldown = Cooldown(**state["cooldown"]) if state["cooldown"] is not None else None


PROBE_SHARE = 0.005
"""A probe looks at this share of an interval's sequences, at least one."""
EVERY_INTERVAL_UNTIL = 0.2
"""Share of the budget up to which every interval ends with a probe: there the learning rate is found."""
PROBE_EVERY = 4
"""Later, one interval in so many. On short runs a probe costs as much as several steps."""


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
    """Return how many sequences a probe looks at after an interval of `taken` sequences."""
    return np.maximum(1.0, np.round(PROBE_SHARE * np.asarray(taken, dtype=np.float64)))
