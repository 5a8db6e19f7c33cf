"""Record one decision of a steered run: what was seen, asked, allowed and measured. One line of `telemetry.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainpilot.envs.action import ACTION_FIELDS, Action, Reasons
from trainpilot.envs.decision import Decision
from trainpilot.envs.reward import RewardTerms
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"telemetry": self.telemetry.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DecisionRecord:
        """Rebuild from `to_json`. Raises `ValueError` where the telemetry's fields do not fit."""
        return cls(
            telemetry=Telemetry.from_json(record["telemetry"]),
            requested=tuple(record["requested"]),
            allowed=tuple(record["allowed"]),
            refusals=tuple(record["refusals"]),
            masked=record["masked"],
            observation=record["observation"],
            reward=RewardTerms(**record["reward"]) if record["reward"] is not None else None,
        )
