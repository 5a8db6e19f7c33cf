"""Where a steered run stands in its budget: the interval's end, the run's end, and the base schedule's factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainpilot.llm_runtime.schedules import Cooldown, Schedule


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
