"""A training run with its controls and its measurements: models, data, energy, telemetry. Knows no RL.

The public names below are imported at their first use; everything else is internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig
    from trainpilot.llm_runtime.distillation import distillation_loss
    from trainpilot.llm_runtime.energy import EnergyMeter, EnergyReading, select_meter
    from trainpilot.llm_runtime.layers import body_parameters
    from trainpilot.llm_runtime.live_run import LiveRun
    from trainpilot.llm_runtime.models import load_model
    from trainpilot.llm_runtime.scaling_laws import Advice, step_law
    from trainpilot.llm_runtime.schedules import Schedule
    from trainpilot.llm_runtime.telemetry import Plant, Telemetry

__all__ = [
    "Advice",
    "ControlLimits",
    "Controls",
    "EnergyMeter",
    "EnergyReading",
    "LiveRun",
    "Plant",
    "RunConfig",
    "Schedule",
    "Telemetry",
    "body_parameters",
    "distillation_loss",
    "load_model",
    "select_meter",
    "step_law",
]

_NAMES = {
    "config": ["ControlLimits", "Controls", "RunConfig"],
    "distillation": ["distillation_loss"],
    "energy": ["EnergyMeter", "EnergyReading", "select_meter"],
    "layers": ["body_parameters"],
    "live_run": ["LiveRun"],
    "models": ["load_model"],
    "scaling_laws": ["Advice", "step_law"],
    "schedules": ["Schedule"],
    "telemetry": ["Plant", "Telemetry"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
