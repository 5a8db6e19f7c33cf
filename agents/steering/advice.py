"""A controller that only advises: it records what the policy would do, and leaves the run to its base schedule.

`AdvisingController` asks the policy as `GuardedController` does, under the same masks and guardrails, and carries out
none of it: the controls in force stay those of the start, and nothing is copied or taken back. The policy is told the
truth, that its last action was "keep" and that the starting controls are in force, so each piece of advice is what it
would do if it took over at this decision.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from trainpilot.agents.steering.guarded_controller import GuardedController
from trainpilot.envs.action import ACTION_FIELDS, KEEP, Action
from trainpilot.envs.decision import Advice, Decision
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.telemetry import Telemetry


class AdvisingController(GuardedController):
    """A guarded controller whose decisions are recorded and not carried out."""

    _remarks: tuple[str, ...] = ()
    """What a controller that steers would have done after the last interval besides an action."""

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a snapshot: never."""
        return False

    def snapshotted_here(self) -> bool:
        """Return whether the owner is to copy the run: never."""
        return False

    def _judge(self, telemetry: Telemetry) -> tuple[bool, list[str]]:
        """Note what contract and guardrails find wrong with the interval. No run is taken back or left to itself."""
        broken = self.watch.observe(telemetry) if self.watch is not None else None
        found = [self.guardrails.judge(telemetry).reason, f"quality contract broken: {broken}" if broken else None]
        self._remarks = tuple(f"not taken back, as the policy only advises: {reason}" for reason in found if reason)
        return False, []

    def _bounded(self) -> Decision:
        decision = super()._bounded()
        return replace(decision, refusals=[*self._remarks, *decision.refusals])

    def _corrected(self, decision: Decision) -> tuple[Decision, Controls | None]:
        """Return the decision: the losses are those of the base schedule, and say nothing about the advice."""
        return decision, None

    def _kept_up(self, decision: Decision, held: Controls | None) -> tuple[Decision, Controls | None]:
        """Return the decision: a run under its base schedule withholds nothing."""
        return decision, held

    def _wants_snapshot(self, action: Action) -> bool:
        return False

    def _carry_out(self, decision: Decision, held: Controls | None = None) -> None:
        """Make "keep" under the starting controls the present decision, and the allowed action its advice."""
        state = self.controller.state
        advice = Advice(action=decision.allowed, controls=state.after(decision.allowed))
        super()._carry_out(replace(decision, allowed=KEEP, advice=advice), state.limits.start)

    def summary(self) -> dict[str, Any]:
        """Return what the guardrails refused and what the policy advised, as plain JSON values."""
        return super().summary() | {"advice": self._advised()}

    def _advised(self) -> dict[str, int]:
        """Return how often each change was advised."""
        actions = [record.advice.action for record in self.records if record.advice is not None]
        changes = [
            f"{each.name} {each.choices[choice]}"
            for action in actions
            for each, choice in zip(ACTION_FIELDS, action, strict=True)
            if choice != each.keep
        ]
        return dict(Counter(changes).most_common())
