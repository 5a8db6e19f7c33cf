"""Decide the controls of the next interval from the telemetry so far. Needs numpy, never SB3.

Record one decision of a steered run: what was seen, asked, allowed and measured. One line of `telemetry.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import ACTION_FIELDS, KEEP, Action, Reasons
from trainpilot.envs.decision import Decision, DecisionState, Preference
from trainpilot.envs.reward import RewardTerms
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class DecisionRecord(JsonRecord):
    """One decision and the interval that followed it."""

    telemetry: Telemetry
    """What was measured."""
    requested: Action
    """What the policy asked for."""
    allowed: Action
    """What the safety layer let through."""
    refusals: tuple[str, ...]
    """Why the rest was not."""
    masked: Mapping[str, str]
    """Choices that were masked, `field choice`, each with its reason."""
    observation: Mapping[str, float]
    """The newest observation that the policy saw, by field name, scaled to [-1, 1]."""
    reward: RewardTerms | None
    """Reward terms, where a reference run is known."""

    @classmethod
    def of(
        cls,
        telemetry: Telemetry,
        decision: Decision,
        reasons: Reasons,
        observation: Mapping[str, float],
        reward: RewardTerms | None,
    ) -> DecisionRecord:
        """Put the record together."""
        masked = {
            f"{field.name} {choice}": reason
            for field, why in zip(ACTION_FIELDS, reasons, strict=True)
            for choice, reason in zip(field.choices, why, strict=True)
            if reason is not None
        }
        return cls(
            telemetry=telemetry,
            requested=decision.requested,
            allowed=decision.allowed,
            refusals=tuple(decision.refusals),
            masked=masked,
            observation=dict(observation),
            reward=reward,
        )


Policy = Callable[[np.ndarray, np.ndarray], Action]
"""Takes the observation and the masks, returns an action."""


def keep(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Never change anything: the base schedule."""
    return KEEP


class Controller:
    """A policy, and what it knows about the run that it steers.

    Args:
        policy: `keep`, `PolicyBundle.act`, or any function of observation and masks.
        limits: What the run can do.
        preference: Weights on quality, energy and time.
    """

    def __init__(self, policy: Policy, limits: ControlLimits, preference: Preference) -> None:
        self.policy = policy
        self.state = DecisionState(limits, preference)
        self.decision: Decision | None = None

    @classmethod
    def of_bundle(cls, bundle: PolicyBundle, limits: ControlLimits, preference: Preference) -> Controller:
        """Return a controller that takes a bundle's most likely action."""
        return cls(bundle.act, limits, preference)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls of the next interval; `telemetry` is the last interval's, `None` before the first."""
        self.see(telemetry)
        self.decision = self.state.decide(self.wish())
        return self.decision.controls

    def see(self, telemetry: Telemetry | None) -> None:
        """Take in the last interval, and keep for the record what the next decision sees."""
        if telemetry is not None:
            self.state.observe(telemetry)
        self._observation = self.state.fields()
        self._reasons = self.state.mask_reasons()

    def wish(self) -> Action:
        """Return what the policy asks for now."""
        return self.policy(self.state.observation().copy(), self.state.action_masks().copy())

    def record(self, telemetry: Telemetry, reward: RewardTerms | None = None) -> DecisionRecord:
        """Return the record of the last decision and the interval that followed it."""
        if self.decision is None:
            raise ValueError("record needs a decision; call decide first")
        return DecisionRecord.of(telemetry, self.decision, self._reasons, self._observation, reward)

    def repeat(self, record: DecisionRecord) -> None:
        """Decide what was decided then, held controls included."""
        self.state.decide(record.allowed)
        self.state.hold(record.telemetry.requested)
