"""Lightning Trainers for tests, a logger that keeps what it is given, and a policy that needs no memory."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers.logger import Logger
from steering_loops import SCRIPT

from trainpilot.agents.integrations.lightning import LightningSteering
from trainpilot.envs.action import Action
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.telemetry import Telemetry


class Kept(Logger):
    """Keeps what is logged, by step."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, name: str) -> list[float]:
        """Return the last value of every step."""
        return list({step: metrics[name] for step, metrics in self.rows if name in metrics}.values())


class ByDecision:
    """Plays the script by the number of intervals recorded, so that it needs no memory of its own."""

    def __init__(self) -> None:
        self.callback: LightningSteering | None = None

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        steering = self.callback.steering if self.callback else None
        return SCRIPT[min(len(steering.records) if steering else 0, len(SCRIPT) - 1)]


def steer(settings: Any, **options: Any) -> LightningSteering:
    return LightningSteering(settings, meter=NoMeter("a test"), **options)


def trainer(*callbacks: Any, **options: Any) -> Any:
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "logger": False,
    }
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **usual | quiet | options)


def told(callback: Any) -> list[Telemetry]:
    return [record.telemetry for record in callback.steering.records]
