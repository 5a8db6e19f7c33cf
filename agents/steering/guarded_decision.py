"""What a guarded controller answers, and what it keeps to go back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainpilot.llm_runtime.config import Controls


@dataclass(frozen=True)
class GuardedDecision:
    """What the run's owner is to do now, in this order: roll back, take a snapshot, bring the controls into force."""

    controls: Controls
    """What holds during the next interval; after a rollback, what `rolled_back` returns."""
    roll_back: bool
    """Restore the last snapshot, then call `rolled_back`."""
    snapshot: bool
    """Copy the run before the controls come into force, then call `snapshotted`."""
    fallen_back: bool
    """The run goes on under its base schedule, whatever the policy says."""
    reasons: tuple[str, ...]
    """Why something was refused or taken back."""


@dataclass(frozen=True)
class Kept:
    """Where a guarded controller stood when the run's owner took a snapshot."""

    seen: tuple[int, ...]
    guardrails: dict[str, Any]
    contract: dict[str, Any] | None
