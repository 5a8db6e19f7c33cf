"""Read published training runs as evidence for the simulator's physics, from a folder with others' data.

The folder holds, as their authors published them,

* `loss_curves_25m`, `loss_curves_100m`: curves under nine schedules (Luo et al. 2025,
  https://github.com/thu-yao-01-luo/MultiPowerLaw, MIT licence; there named csv_25 and csv_100);
* `lr_scheduling`: curves of 33 to 360 M parameters over learning rate, cool-down and horizon (Schaipp et al. 2025,
  https://github.com/fabian-sp/lr-scheduling, MIT licence), as runs.csv and curves.csv.gz;
* `published_sweeps/steplaw_dense_*.csv`: final losses over learning rate, batch and budget (Li et al. 2025, "Step Law",
  https://github.com/step-law/steplaw, arXiv 2503.04715; no licence stated: not redistributed here).
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.simulator.evidence import Evidence, LossCurve, of_curves
from trainpilot.llm_runtime.simulator.sweeps import FinalLoss

Floats = NDArray[np.float64]

STEP_LAW_WARMUP, STEP_LAW_END = 2_000, 1e-5
"""Warm-up steps and final learning rate of Step Law's runs, whose schedule is a cosine."""
CURVE_FOLDERS = {"25M": ("loss_curves_25m", "csv_25"), "100M": ("loss_curves_100m", "csv_100")}
CURVE_PARAMETERS = {"25M": 25_000_000, "100M": 100_000_000}
FITTED_CURVES = ("cosine_24000", "constant_24000", "wsdcon_9")
UNSEEN_CURVES = (
    "constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18",
)  # fmt: skip
CURVE_WARMUP = 2_160
CURVE_BATCH = 128.0
"""Nominal batch of curves whose batch was not varied."""


def step_law(root: Path) -> list[FinalLoss]:
    """Return the final losses of Step Law's dense models."""
    [path] = sorted((root / "published_sweeps").glob("steplaw_dense_*.csv"))[:1]
    with path.open(encoding="utf-8", newline="") as file:
        return [
            FinalLoss(
                n_parameters=int(row["parameters"]),
                steps=int(row["steps"]),
                learning_rate=float(row["learning_rate"]),
                batch=float(row["batch_sequences"]),
                final_loss=float(row["final_loss"]),
                schedule="cosine",
                warmup_steps=STEP_LAW_WARMUP,
                end_learning_rate=STEP_LAW_END,
            )
            for row in csv.DictReader(file)
        ]


def multi_power_curve(root: Path, size: str, name: str) -> LossCurve:
    """Return one of the curves of the 25 M or 100 M model."""
    [folder] = [root / each for each in CURVE_FOLDERS[size] if (root / each).is_dir()][:1]
    step, rate, loss = np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1, dtype=np.float64).T
    return LossCurve(step=step, learning_rate=rate, loss=loss, batch=CURVE_BATCH, warmup_steps=CURVE_WARMUP)


@dataclass(frozen=True, kw_only=True)
class ScheduleRun:
    """One run of the study of schedules: what was varied, its curve and its final loss."""

    n_parameters: int
    dataset: str
    peak: float
    schedule: str
    """`cos` or `wsd`."""
    decay_share: float
    """Share of the steps in which `wsd` decays; 0 is a constant rate."""
    end: str
    """End of a cosine, as the authors noted it."""
    horizon: int
    """Steps of the run."""
    curve: LossCurve
    final_loss: float


EVALUATION_GAP = 0.0355
"""Final validation losses of that study are this much above those along the curves, which use fewer texts."""


EARLY = 0.15
"""Share of a run whose losses are left out: at first they fall faster than by any power law."""


def schedule_runs(root: Path) -> list[ScheduleRun]:
    """Return the runs of the study of schedules; those that diverged, and two-stage schedules, are left out."""
    folder = root / "lr_scheduling"
    points: dict[int, list[dict[str, str]]] = defaultdict(list)
    with gzip.open(folder / "curves.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points[int(row["run"])].append(row)
    with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        ScheduleRun(
            n_parameters=int(row["params"]),
            dataset=row["dataset"],
            peak=float(row["lr"]),
            schedule=row["scheduler"],
            decay_share=float(row["decay_frac"] or 0),
            end=row["cos_final_lr"],
            horizon=int(row["iterations"]),
            curve=_schedule_curve(row, points[int(row["run"])]),
            final_loss=float(row["final_val_loss"]),
        )
        for row in rows
        if row["scheduler"] in ("cos", "wsd") and float(row["final_val_loss"]) < 5
    ]


def _schedule_curve(row: dict[str, str], points: Sequence[dict[str, str]]) -> LossCurve:
    """Return the curve: noted learning rates, validation losses, and the final loss at the horizon.

    A cool-down is noted from the step at which it branches off a run at a constant rate.
    """
    peak, warm, horizon = float(row["lr"]), int(row["warmup"]), int(row["iterations"])
    noted = np.array([(float(p["step"]), float(p["lr"])) for p in points if p["lr"]])
    if row["scheduler"] == "wsd" and float(row["decay_frac"] or 0) == 0:
        noted[noted[:, 0] >= warm, 1] = peak  # a constant rate, noted as 0 at the last step
    losses = np.array([(float(p["step"]), float(p["val_loss"])) for p in points if p["val_loss"]])
    lead = [(warm, peak), (noted[0, 0] - 50, peak)] if noted[0, 0] > 3 * warm else []
    noted = np.concatenate([np.array(lead).reshape(-1, 2), noted[noted[:, 0] >= warm], [(horizon, noted[-1, 1])]])
    noted = noted[np.unique(noted[:, 0], return_index=True)[1]]
    usable = losses[(losses[:, 0] > EARLY * horizon) & (losses[:, 0] < horizon - 300) & (losses[:, 1] < 5)]
    step = np.unique(np.concatenate([noted[:, 0], usable[:, 0]]))
    loss = np.full(len(step), np.nan)
    loss[np.searchsorted(step, usable[:, 0])] = usable[:, 1] + EVALUATION_GAP
    loss[-1] = float(row["final_val_loss"])
    rate = np.interp(step, noted[:, 0], noted[:, 1])
    return LossCurve(step=step, learning_rate=rate, loss=loss, batch=float(row["batch_seqs"]), warmup_steps=float(warm))


def of_schedule_runs(runs: Sequence[ScheduleRun], model: int = 0) -> Evidence:
    """Return these runs of one model as evidence; their final losses are to be met more exactly than their curves."""
    evidence = of_curves([run.curve for run in runs], model)
    last = (evidence.steps > 0).sum(axis=1)
    evidence.tolerance[np.arange(len(evidence)), last] = FINAL_TOLERANCE
    return evidence


FINAL_TOLERANCE = 0.004
"""Tolerance of a final loss of that study, in nats/token; seeds differ by 0.0014 to 0.0019."""
