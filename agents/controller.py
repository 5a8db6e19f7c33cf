"""Decide the controls of the next interval with a policy, and record each decision with the interval that followed.

A `Controller` needs numpy alone: no torch, no Stable-Baselines3. A `DecisionRecord` is one line of `telemetry.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import ACTION_FIELDS, KEEP, Action, Reasons, check_action
from trainpilot.envs.decision import Advice, Decision, DecisionState, Preference
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reward import RewardTerms
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class DecisionRecord(JsonRecord):
    """One decision and the interval that followed it."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("advice",)

    telemetry: Telemetry
    """Measurements of the interval."""
    requested: Action
    """The policy's action."""
    allowed: Action
    """The action after masks and guardrails; every refused choice is "keep". Where the policy only advises, all are."""
    refusals: tuple[str, ...]
    """Why choices were refused."""
    masked: Mapping[str, str]
    """The reason of each masked choice, by `field choice`."""
    observation: Mapping[str, float]
    """The policy's newest observation, by field name, scaled to [-1, 1]."""
    reward: RewardTerms | None
    """Reward of the interval; `None` without a reference run."""
    advice: Advice | None = None
    """What the policy would have done here; `None` unless it only advises."""

    def __post_init__(self) -> None:
        check_action(self.requested)
        check_action(self.allowed)

    @classmethod
    def of(
        cls,
        telemetry: Telemetry,
        decision: Decision,
        reasons: Reasons,
        observation: Mapping[str, float],
        reward: RewardTerms | None,
    ) -> DecisionRecord:
        """Return the record of a decision, with the reasons of the masks and the observation that it was made on."""
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
            advice=decision.advice,
        )


Policy = Callable[[np.ndarray, np.ndarray], Action]
"""Takes the observation and the masks, returns an action."""


def seen_by(policy: Policy) -> tuple[ObservationField, ...]:
    """Return the observation fields that a policy sees, in its order.

    They are its attribute `fields`, or that of the object whose method it is, such as a bundle.
    Without one it sees all.
    """
    owner = policy if hasattr(policy, "fields") else getattr(policy, "__self__", None)
    fields: tuple[ObservationField, ...] = getattr(owner, "fields", OBSERVATION_FIELDS)
    return fields


def start_scale_of(policy: Policy) -> float:
    """Return the learning-rate scale that a policy's runs begin with, before its first decision.

    It is the attribute `start_scale` of the policy, or of the object whose method it is. Without one it is 1.
    """
    owner = policy if hasattr(policy, "start_scale") else getattr(policy, "__self__", None)
    return float(getattr(owner, "start_scale", 1.0))


def keep(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Return the action that changes nothing, so that the run follows its base schedule."""
    return KEEP


class Controller:
    """A policy, and the state of the run that its observations and masks are computed from.

    Args:
        policy: `keep`, `PolicyBundle.act`, or any function of observation and masks.
        limits: Range of each control in this run.
        preference: Weights on quality, energy and time. For quality alone the policy is blind to clocks and meters.
        begun_at: Share of the budget that was used before the first decision. A run that is under way goes on at the
            learning rate that it has, and not at the one that the policy's runs begin with.
    """

    def __init__(self, policy: Policy, limits: ControlLimits, preference: Preference, *, begun_at: float = 0.0) -> None:
        self.policy = policy
        scale = 1.0 if begun_at else start_scale_of(policy)
        self.state = DecisionState(limits, preference, seen_by(policy), scale, begun_at=begun_at)
        self.decision: Decision | None = None

    @classmethod
    def of_bundle(cls, bundle: PolicyBundle, limits: ControlLimits, preference: Preference) -> Controller:
        """Return a controller that takes a bundle's most likely action."""
        return cls(bundle.act, limits, preference)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls of the next interval; `telemetry` is the last interval's, `None` before the first."""
        self.observe(telemetry)
        self.decision = self.state.decide(self.requested_action())
        return self.decision.controls

    def observe(self, telemetry: Telemetry | None) -> None:
        """Add the last interval to the state, and note observation and masks of the next decision for its record."""
        if telemetry is not None:
            self.state.observe(telemetry)
        self._observation = self.state.fields()
        self._reasons = self.state.mask_reasons()

    def requested_action(self) -> Action:
        """Return the policy's action for the present observation, which may hold choices that are not allowed."""
        return self.policy(self.state.observation().copy(), self.state.action_masks().copy())

    def record(self, telemetry: Telemetry, reward: RewardTerms | None = None) -> DecisionRecord:
        """Return the record of the last decision and the interval that followed it.

        Raises:
            ValueError: nothing has been decided yet.
        """
        if self.decision is None:
            raise ValueError("record needs a decision; call decide first")
        return DecisionRecord.of(telemetry, self.decision, self._reasons, self._observation, reward)

    def repeated(self, records: Sequence[DecisionRecord], limits: ControlLimits | None = None) -> Controller:
        """Return a controller of the same run and policy that has made the decisions of records.

        Args:
            records: The decisions and the intervals that followed them; the policy is not asked.
            limits: Range of each control; by default as here.

        Raises:
            ValueError: they cannot be records of one run.
        """
        again = copy(self)
        again.state, again.decision = self.state.anew(limits=limits), None
        again.state.repeat([(record.allowed, record.telemetry) for record in records])
        again.observe(None)
        return again

    def repeat(self, record: DecisionRecord) -> None:
        """Bring the decision of a record into force again, without asking the policy."""
        self.state.apply(record.allowed)
        self.state.hold(record.telemetry.requested)
