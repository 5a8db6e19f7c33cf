"""Who decides: policies and their bundles, controllers, heuristics, PPO, and the steering of other training loops.

The public names below are imported at their first use; everything else is internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, shipped_policies
    from trainpilot.agents.controller import Controller, DecisionRecord, Policy
    from trainpilot.agents.logging.trackers import (
        AimTracker,
        CometTracker,
        FolderTracker,
        MlflowTracker,
        TrackioTracker,
        WandbTracker,
    )
    from trainpilot.agents.steering.contract import QualityContract
    from trainpilot.agents.steering.guarded_controller import GuardedController, GuardedDecision
    from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
    from trainpilot.agents.steering.loader_batches import LoaderBatches, batches
    from trainpilot.agents.steering.settings import SteeringSettings
    from trainpilot.agents.steering.steering import Steering, Step
    from trainpilot.agents.steering.torch_schedules import schedule_of

__all__ = [
    "AimTracker",
    "BaseSchedule",
    "CometTracker",
    "Controller",
    "DecisionRecord",
    "FolderTracker",
    "GuardedController",
    "GuardedDecision",
    "GuardrailSettings",
    "Guardrails",
    "LoaderBatches",
    "MlflowTracker",
    "Policy",
    "PolicyBundle",
    "QualityContract",
    "Steering",
    "SteeringSettings",
    "Step",
    "TrackioTracker",
    "WandbTracker",
    "batches",
    "schedule_of",
    "shipped_policies",
]

_NAMES = {
    "bundle": ["BaseSchedule", "PolicyBundle", "shipped_policies"],
    "controller": ["Controller", "DecisionRecord", "Policy"],
    "logging.trackers": [
        "AimTracker",
        "CometTracker",
        "FolderTracker",
        "MlflowTracker",
        "TrackioTracker",
        "WandbTracker",
    ],
    "steering.contract": ["QualityContract"],
    "steering.guarded_controller": ["GuardedController", "GuardedDecision"],
    "steering.guardrails": ["GuardrailSettings", "Guardrails"],
    "steering.loader_batches": ["LoaderBatches", "batches"],
    "steering.settings": ["SteeringSettings"],
    "steering.steering": ["Steering", "Step"],
    "steering.torch_schedules": ["schedule_of"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
