"""Say what every plant offers: a live run, or a simulator that stands in for it."""

from __future__ import annotations

from typing import Any, Protocol

from trainpilot.llm_runtime.controls import ControlLimits, Controls
from trainpilot.llm_runtime.telemetry import Telemetry

Snapshot = dict[str, Any]
"""Everything that decides how a run goes on: tensors, numbers, text and containers of these."""


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
