"""A stand-in for the fit of the simulator's physics: a bowl in log learning rate, and what it was asked to fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.simulator import fitting
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun


@dataclass(frozen=True, kw_only=True)
class FittedPhysics:
    """Predicts `floor` plus the squared decades between a run's peak learning rate and `best`."""

    best: float = 1e-2
    floor: float = 2.0
    uncertainty: Mapping[str, float] = field(default_factory=lambda: {"floor": math.log(1.5), "rate": 9.0})

    @property
    def values(self) -> dict[str, float]:
        """What is printed."""
        return {"floor": self.floor, "rate": 0.05}

    def predict(self, run: CalibrationRun) -> NDArray[np.float64]:
        """Return the final loss plus 1 at every interval."""
        return np.full(len(run.telemetry), self.predict_final(run) + 1)

    def predict_final(self, run: CalibrationRun) -> float:
        """Return the loss at the end."""
        return self.floor + math.log10(run.config.base_learning_rate / self.best) ** 2

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"best": self.best, "floor": self.floor, "uncertainty": dict(self.uncertainty)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FittedPhysics:
        """Rebuild from `to_json`."""
        return cls(best=record["best"], floor=record["floor"], uncertainty=record["uncertainty"])


class FakeFitting(ModuleType):
    """Stands in for the module that fits; remembers the runs that it was given."""

    def __init__(self) -> None:
        super().__init__("fitting")
        real = {name: value for name, value in vars(fitting).items() if name != "fit_physics"}
        self.__dict__.update(real)  # pydantic looks up the types of a record in its module
        self.FittedPhysics = FittedPhysics
        self.given: list[CalibrationRun] = []

    def fit_physics(self, runs: Sequence[CalibrationRun]) -> FittedPhysics:
        """Return the bowl."""
        self.given = list(runs)
        return FittedPhysics()
