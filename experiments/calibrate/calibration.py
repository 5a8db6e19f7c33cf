"""Hold a finished calibration: fitted physics, cost table, and how good the fit is. One file per model and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from trainpilot.experiments.calibrate.errors import BestRate, FitError, Physics
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.cost_table import CostTable
from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.simulator.fitting import CalibrationRun

FILE_NAME = "calibration.json"
SHIPPED = "shipped"


@dataclass(frozen=True, kw_only=True)
class CalibrationCost:
    """What a calibration took."""

    n_runs: int
    run_time_s: float
    """Seconds of all runs, one after the other."""
    fit_time_s: float
    energy_j: float | None
    """Joules of the runs; `None` where one of them was not measured."""
    energy_source: EnergySource | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Physics and costs of one model on one text and one device, ready for a simulator."""

    config: RunConfig
    """The run that all settings are variations of."""
    effort: str
    n_parameters: int
    physics: Physics
    """A `FittedPhysics`."""
    cost_table: CostTable
    held_out: FitError
    """On runs that the fit has not seen."""
    fitted: FitError
    """On the other runs. A fit leaves out those of them that were pruned or diverged."""
    grid_rank_correlation: float | None
    """Spearman's, of predicted and measured final losses over the grid of learning rates and batches."""
    best_rates: tuple[BestRate, ...]
    cost: CalibrationCost
    device: str
    versions: Mapping[str, str]
    command: str
    date: str

    def save(self, path: Path) -> None:
        """Write the file whole."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = ("config", "held_out", "fitted", "cost")
        record: dict[str, Any] = {name: asdict(getattr(self, name)) for name in parts}
        record["best_rates"] = [asdict(each) for each in self.best_rates]
        record |= {name: getattr(self, name).to_json() for name in ("physics", "cost_table")}
        plain = ("effort", "n_parameters", "grid_rank_correlation", "device", "command", "date")
        return {**record, **{name: getattr(self, name) for name in plain}, "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Calibration:
        """Rebuild from `to_json`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        from trainpilot.llm_runtime.simulator.fitting import FittedPhysics

        changed: dict[str, Any] = {
            "config": RunConfig(**{**record["config"], "text": tuple(record["config"]["text"])}),
            "physics": FittedPhysics.from_json(record["physics"]),
            "cost_table": CostTable.from_json(record["cost_table"]),
            "held_out": FitError(**record["held_out"]),
            "fitted": FitError(**record["fitted"]),
            "best_rates": tuple(BestRate(**each) for each in record["best_rates"]),
            "cost": CalibrationCost(**record["cost"]),
        }
        return cls(**{**record, **changed})


def fit(runs: Sequence[CalibrationRun]) -> Physics:
    """Fit the physics to the runs whose role is `fit`."""
    from trainpilot.llm_runtime.simulator.fitting import fit_physics

    return fit_physics([run for run in runs if run.role == "fit"])


def load_calibrations(sources: str | Path | Sequence[str | Path] = SHIPPED) -> tuple[Calibration, ...]:
    """Return the calibrations in `sources`: `shipped` for those that come with trainpilot, files, or their folders.

    Raises:
        ValueError: there is no calibration in one of them.
    """
    chosen = [sources] if isinstance(sources, str | Path) else sources
    return tuple(_read(file) for source in chosen for file in _files(source))


def _files(source: str | Path) -> list[Traversable]:
    if str(source) == SHIPPED:
        inside = files("trainpilot.llm_runtime.simulator.shipped").iterdir()
        return sorted((file for file in inside if file.name.endswith(".json")), key=lambda file: file.name)
    path = Path(source)
    return [path / FILE_NAME if path.is_dir() else path]


def _read(file: Traversable) -> Calibration:
    rule = "calibrations must be 'shipped', or files or folders that trainpilot calibrate wrote"
    try:
        return Calibration.from_json(json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        raise ValueError(f"{rule}, got {file}, which is not there or cannot be read") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{rule}, got {file}: {type(error).__name__}: {' '.join(str(error).split())}") from error
