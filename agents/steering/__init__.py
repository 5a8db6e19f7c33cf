"""Attach a controller to a training loop that you own, within bounds that you set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.agents.steering.contract import QualityContract
    from trainpilot.agents.steering.guarded_controller import GuardedController, GuardedDecision
    from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
    from trainpilot.agents.steering.settings import SteeringSettings
    from trainpilot.agents.steering.steering import Steering, Step

__all__ = [
    "GuardedController",
    "GuardedDecision",
    "GuardrailSettings",
    "Guardrails",
    "QualityContract",
    "Steering",
    "SteeringSettings",
    "Step",
]

_NAMES = {
    "contract": ["QualityContract"],
    "guarded_controller": ["GuardedController", "GuardedDecision"],
    "guardrails": ["GuardrailSettings", "Guardrails"],
    "settings": ["SteeringSettings"],
    "steering": ["Steering", "Step"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
