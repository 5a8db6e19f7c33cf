"""Say what every plant offers: a live run, or a simulator that stands in for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trainpilot.llm_runtime.controls import Controls, Precision, Pruning
from trainpilot.llm_runtime.telemetry import Telemetry

Snapshot = dict[str, Any]
"""Everything that decides how a run goes on: tensors, numbers, text and containers of these."""


@dataclass(frozen=True, kw_only=True)
class ControlLimits:
    """What a plant can do, and why it cannot do the rest."""

    start: Controls
    """Controls of the untouched base schedule."""
    min_batch_size: int
    """Smallest batch worth offering, in sequences."""
    max_batch_size: int
    """Largest batch that leaves enough steps in an interval, in sequences."""
    masked_precisions: Mapping[Precision, str]
    """Precisions not offered, each with the reason."""
    pruning: Pruning
    """What the pruning control does here."""
    decisions: int
    """Decisions in the whole run."""


class Plant(Protocol):
    """The thing being steered. The environment cannot tell which kind it holds."""

    def limits(self) -> ControlLimits:
        """Return what may be asked of this plant."""

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train on `share` of the budget under `controls`, and return what was measured."""

    def evaluate(self) -> float:
        """Return the validation loss, in nats/token."""

    def snapshot(self) -> Snapshot:
        """Return a copy of the state."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned."""
