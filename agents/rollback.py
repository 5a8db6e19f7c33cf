"""Apply a guarded controller to a plant: take the snapshots that it asks for, and restore them when it rolls back."""

from __future__ import annotations

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.agents.steering.guarded_controller import GuardedController
from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.telemetry import Plant, Snapshot, Telemetry


def guarded_controller(
    bundle: PolicyBundle, limits: ControlLimits, preference: Preference, settings: GuardrailSettings | None = None
) -> GuardedController:
    """Return a bundle's policy within guardrails, by default the usual ones."""
    return GuardedController(Controller.of_bundle(bundle, limits, preference), Guardrails(settings))


class RollbackController:
    """A guarded controller that copies and restores its plant itself, so that its decisions are controls alone.

    Args:
        guarded: Decides, and asks for snapshots and rollbacks.
        plant: The run that it controls.
    """

    def __init__(self, guarded: GuardedController, plant: Plant) -> None:
        self.guarded = guarded
        self.plant = plant
        self.snapshot: Snapshot | None = None
        """The copy of the run that a rollback restores."""

    @property
    def can_roll_back(self) -> bool:
        """Whether a run that diverged now can be restored."""
        return self.guarded.can_roll_back

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls of the next interval, after a rollback where one is due.

        Args:
            telemetry: The last interval's, `None` before the first.
        """
        decision = self.guarded.decide(telemetry)
        if decision.roll_back and self.snapshot is not None:
            self.plant.restore(self.snapshot)
            return self.guarded.rolled_back()
        if decision.snapshot:
            self.snapshot = self.plant.snapshot()
            self.guarded.snapshotted()
        return decision.controls
