"""Keep what a decision needs: telemetry so far, controls in force, what is masked. Shared by env and controller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainpilot.envs.action import ACTION_FIELDS, KEEP, Action, Choices, decode
from trainpilot.envs.observation import OBSERVATION_FIELDS, RunView, encode
from trainpilot.envs.preference import Preference
from trainpilot.envs.safety import Reasons, Situation, allow, mask_reasons
from trainpilot.llm_runtime.controls import Controls
from trainpilot.llm_runtime.plant import ControlLimits
from trainpilot.llm_runtime.telemetry import Telemetry

N_STACK = 6
"""Observations seen at once, the newest last."""


@dataclass(frozen=True)
class Decision:
    """What was asked for, and what the safety layer let through."""

    requested: Action
    allowed: Action
    controls: Controls
    refusals: list[str]
    """Reasons for the choices that were not let through."""


class DecisionState:
    """The run as its controller sees it. Holds no torch and no policy."""

    def __init__(self, limits: ControlLimits, preference: Preference) -> None:
        self.limits = limits
        self.preference = preference
        self.controls = limits.start
        self.telemetry: list[Telemetry] = []
        self.precision_switches = 0
        self.last_action: Action = KEEP
        first = self._encode()
        self._stack = np.tile(first, (N_STACK, 1))  # (N_STACK, n_fields)

    def observe(self, telemetry: Telemetry) -> None:
        """Take in the interval that has just ended."""
        self.telemetry.append(telemetry)
        self._stack = np.vstack([self._stack[1:], self._encode()])

    def observation(self) -> np.ndarray:
        """Return the stacked observation, float32 of shape (N_STACK * n_fields,), in [-1, 1], newest last."""
        return self._stack.reshape(-1).astype(np.float32)

    def fields(self) -> dict[str, float]:
        """Return the newest observation by field name, scaled."""
        return dict(zip((field.name for field in OBSERVATION_FIELDS), self._stack[-1].tolist(), strict=True))

    def mask_reasons(self) -> Reasons:
        """Return why each choice is masked now."""
        used = self.telemetry[-1].budget_used if self.telemetry else 0.0
        situation = Situation(
            limits=self.limits,
            controls=self.controls,
            budget_used=used,
            precision_switches=self.precision_switches,
        )
        return mask_reasons(situation)

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed, bool of shape (sum of choices,), field after field."""
        return np.array([reason is None for why in self.mask_reasons() for reason in why])

    def decide(self, action: Choices) -> Decision:
        """Bring the allowed part of `action` into force. Raises `ValueError` for a choice that does not exist."""
        requested = tuple(int(choice) for choice in action)
        allowed, refusals = allow(requested, self.mask_reasons())
        controls = decode(allowed, self.controls)
        self.precision_switches += controls.precision != self.controls.precision
        self.controls, self.last_action = controls, allowed
        return Decision(requested, allowed, controls, refusals)

    def _encode(self) -> np.ndarray:
        shares = [
            choice / (len(field.choices) - 1) for field, choice in zip(ACTION_FIELDS, self.last_action, strict=True)
        ]
        weights = self.preference.weights()
        return encode(
            RunView(
                telemetry=self.telemetry,
                limits=self.limits,
                controls=self.controls,
                precision_switches=self.precision_switches,
                last_action=dict(zip((field.name for field in ACTION_FIELDS), shares, strict=True)),
                preference=dict(zip(("quality", "energy", "time"), weights.tolist(), strict=True)),
            )
        )
