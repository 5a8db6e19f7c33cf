"""Hold one live run that the physics of a simulated run is fitted to, or tested on. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.telemetry import Telemetry

Role = Literal["fit", "held-out"]


@dataclass(frozen=True, kw_only=True)
class CalibrationRun:
    """Everything that was measured on one run, interval by interval."""

    config: RunConfig
    """What was trained, and how it started."""
    telemetry: tuple[Telemetry, ...]
    """One for each interval; the last one says `diverged` if the run ended so. Holds the controls too."""
    validation: tuple[tuple[int, float], ...]
    """Decisions taken so far, from 0, with the validation loss in nats/token; NaN where it was not finite."""
    wide_probe: tuple[tuple[float, float] | None, ...]
    """Linear and quadratic part of a curvature probe on more sequences than the telemetry's, after each interval."""
    n_parameters: int
    """Weights of the model at the start."""
    role: Role
    """Whether a fit may see this run, or only its test."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if len(self.wide_probe) != len(self.telemetry):
            raise ValueError(
                f"wide_probe must have one entry for each of the {len(self.telemetry)} intervals in telemetry, "
                f"got {len(self.wide_probe)}; use None where there was no probe"
            )

    @property
    def diverged(self) -> bool:
        """Whether the training loss ended as not finite."""
        return bool(self.telemetry) and self.telemetry[-1].diverged

    @property
    def final_loss(self) -> float:
        """Validation loss at the end, in nats/token; NaN for a run that diverged."""
        return math.nan if self.diverged or not self.validation else self.validation[-1][1]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes `None`."""
        return {
            "config": asdict(self.config),
            "telemetry": [each.to_json() for each in self.telemetry],
            "validation": [[decision, _or_none(loss)] for decision, loss in self.validation],
            "wide_probe": [_pair_or_none(each) for each in self.wide_probe],
            "n_parameters": self.n_parameters,
            "role": self.role,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CalibrationRun:
        """Rebuild from `to_json`. Raises `ValueError` naming fields that are missing or unknown."""
        if odd := {field.name for field in fields(cls)} ^ set(record):
            raise ValueError(f"calibration run fields missing or unknown: {', '.join(sorted(odd))}")
        return cls(
            config=RunConfig(**{**record["config"], "text": tuple(record["config"]["text"])}),
            telemetry=tuple(Telemetry.from_json(each) for each in record["telemetry"]),
            validation=tuple((int(at), math.nan if loss is None else float(loss)) for at, loss in record["validation"]),
            wide_probe=tuple(None if each is None else (each[0], each[1]) for each in record["wide_probe"]),
            n_parameters=record["n_parameters"],
            role=record["role"],
        )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pair_or_none(pair: tuple[float, float] | None) -> list[float] | None:
    return list(pair) if pair is not None and all(math.isfinite(each) for each in pair) else None
