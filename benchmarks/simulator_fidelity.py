"""Measure how well the simulator's physics predicts losses that it was not fitted to: published curves and live runs.

python benchmarks/simulator_fidelity.py --curves FOLDER [--calibrations FOLDER]

FOLDER, or the environment variable TRAINPILOT_CURVES, holds csv_25 and csv_100 (or loss_curves_25m and
loss_curves_100m): CSV files of step, lr and loss. They lie in loss_curve_repo of the public repository
https://github.com/thu-yao-01-luo/MultiPowerLaw (MIT licence, Luo et al. 2025).

The live runs are those of `trainpilot calibrate` for three models on two texts; missing ones are run first. If the
command is interrupted, the same command resumes it. Losses agree between machines up to rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result
from numpy.typing import NDArray
from rich.console import Console
from second_physics.law import PublishedPhysics, fit_published

from trainpilot.experiments.calibrate.calibration import FILE_NAME, Calibration, load_calibrations
from trainpilot.experiments.calibrate.command import calibrate
from trainpilot.experiments.options import CalibrateOptions

MODELS = ("llama-nano", "gpt2-nano", "phi-nano")
TEXTS = {
    "scripts": ("stdlib:*.py",),
    "packages": ("stdlib:ctypes,re,collections,zoneinfo,tomllib,sqlite3",),
}
SEED = 7
ERROR_TARGET = 0.03
"""Largest acceptable mean absolute error of held-out final losses, in nats/token."""
RANK_TARGET = 0.9
"""Smallest acceptable rank correlation over the grid of learning rates and batches, on every model and text."""


def live(root: Path) -> dict[str, Any]:
    """Return and print the held-out errors of the calibrations in `root`; missing calibrations are made first."""
    cases = {f"{model}-{name}": (model, text) for model, (name, text) in product(MODELS, TEXTS.items())}
    found = {name: case(calibration(root / name, *made_of)) for name, made_of in cases.items()}
    for name, entry in found.items():
        print(
            f"{name}: held-out final losses off by {entry['held_out']['final_loss']:.4f} nats, "
            f"rank correlation {entry['grid_rank_correlation']:.3f}"
        )
    return {"unit": "nats/token", "cases": found, **summary(found)}


def calibration(folder: Path, model: str, text: tuple[str, ...]) -> Calibration:
    """Return the calibration of a folder; missing runs are made first (about five minutes on two cores)."""
    options = CalibrateOptions(out=folder, model=model, text=text, seed=SEED)
    if not (folder / FILE_NAME).is_file():
        calibrate(options, Console())
    [made] = load_calibrations(folder)
    if (made.config, made.effort) != (options.run_config(), options.effort):
        raise SystemExit(f"--calibrations must hold calibrations of this design, got {folder} of another; remove it")
    return made


def case(made: Calibration) -> dict[str, Any]:
    """Return the held-out errors of one calibration."""
    return {
        "n_fitted": made.fitted.n_runs,
        "n_held_out": made.held_out.n_runs,
        "held_out": {
            "final_loss": made.held_out.final_loss,
            "final_loss_worst": made.held_out.final_loss_worst,
            "final_loss_range": made.held_out.final_loss_range,
            "diverged": made.held_out.n_diverged,
        },
        "fitted_final_loss": made.fitted.final_loss,
        "grid_rank_correlation": made.grid_rank_correlation,
        "command": made.command,
        "date": made.date,
    }


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all cases, weighted by the number of runs, and whether the targets are reached."""
    seen = [
        (entry["held_out"]["final_loss"], entry["n_held_out"] - entry["held_out"]["diverged"])
        for entry in cases.values()
    ]
    error = float(np.average([off for off, _ in seen], weights=[count for _, count in seen]))
    least = min(entry["grid_rank_correlation"] for entry in cases.values())
    print(f"all: {error:.4f} nats (target {ERROR_TARGET}), least rank correlation {least:.3f} (target {RANK_TARGET})")
    return {
        "n_fitted": sum(entry["n_fitted"] for entry in cases.values()),
        "n_held_out": sum(entry["n_held_out"] for entry in cases.values()),
        "held_out_final_loss": error,
        "least_grid_rank_correlation": least,
        "targets": {
            "held_out_final_loss": {"at_most": ERROR_TARGET, "reached": error <= ERROR_TARGET},
            "least_grid_rank_correlation": {"at_least": RANK_TARGET, "reached": least >= RANK_TARGET},
        },
    }


FOLDERS = {"25M": ("csv_25", "loss_curves_25m"), "100M": ("csv_100", "loss_curves_100m")}
"""Possible folder names of each model."""
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
UNSEEN = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
SOURCE = "https://github.com/thu-yao-01-luo/MultiPowerLaw"

Curve = NDArray[np.float64]
"""Steps, learning rates and losses, of shape (3, n_points)."""


def published(root: Path) -> dict[str, Any]:
    """Return and print the errors on each model's other schedules after a fit to three curves."""
    models = {size: fit_folder(folder_of(root, size)) for size in FOLDERS}
    for size, model in models.items():
        print(
            f"{size}: mean absolute error {model['unseen_mean_absolute_error']:.4f} nats on unseen schedules, "
            f"{model['fitted_mean_absolute_error']:.4f} on the fitted ones, fitted in {model['fit_s']:.1f} s"
        )
    return {"source": SOURCE, "unit": "nats/token", "models": models}


def folder_of(root: Path, size: str) -> Path:
    """Return the folder with the curves of one model."""
    found = [root / name for name in FOLDERS[size] if (root / name).is_dir()]
    if not found:
        raise SystemExit(f"--curves must name a folder that holds {' or '.join(FOLDERS[size])}, got {root}; {_HINT}")
    return found[0]


def fit_folder(folder: Path) -> dict[str, Any]:
    """Fit the physics to three curves of one model and predict all its curves; errors in nats/token."""
    curves = {name: read_curve(folder / f"{name}.csv") for name in (*FITTED, *UNSEEN)}
    start = time.perf_counter()
    steps, rates, losses = zip(*(curves[name] for name in FITTED), strict=True)
    physics = fit_published(steps, rates, losses)
    fit_s = time.perf_counter() - start
    errors = {name: error(physics, curve) for name, curve in curves.items()}
    return {
        "physics": {key: value for key, value in asdict(physics).items() if key != "covariance"},
        "relative_standard_errors": physics.standard_errors,
        "fit_s": fit_s,
        "fitted": {name: errors[name] for name in FITTED},
        "unseen": {name: errors[name] for name in UNSEEN},
        "fitted_mean_absolute_error": mean_error(errors, FITTED),
        "unseen_mean_absolute_error": mean_error(errors, UNSEEN),
    }


def error(physics: PublishedPhysics, curve: Curve) -> dict[str, float]:
    """Return the mean absolute error over the curve and the signed error at its end (positive: predicted too high)."""
    step, lr, loss = curve
    misses = physics.predict(lr, step) - loss
    return {"mean_absolute_error": float(np.abs(misses).mean()), "final_error": float(misses[-1])}


def mean_error(errors: dict[str, dict[str, float]], names: tuple[str, ...]) -> float:
    """Return the unweighted mean over curves."""
    return float(np.mean([errors[name]["mean_absolute_error"] for name in names]))


def read_curve(path: Path) -> Curve:
    """Read a CSV file with the columns step, lr and loss and one header line."""
    if not path.is_file():
        raise SystemExit(f"--curves must hold {path.parent.name}/{path.name}, found none; {_HINT}")
    curve: Curve = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float64).T
    return curve


_HINT = f"get the curves from {SOURCE} (MIT licence)"


def main() -> None:
    """Fit, predict, and write `results/simulator_fidelity.json`."""
    calibrations = Path("runs/calibrations")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default=os.environ.get("TRAINPILOT_CURVES"), help="folder of the published curves")
    parser.add_argument("--calibrations", type=Path, default=calibrations, help="where MODEL-TEXT/calibration.json lie")
    options = parser.parse_args()
    if options.curves is None:
        raise SystemExit(f"--curves must name the folder of the published curves, got none; {_HINT}")
    # The path of the curves on this machine does not belong in the result.
    sys.argv = ["FOLDER" if argument == options.curves else argument for argument in sys.argv]
    result = {"published": published(Path(options.curves)), "live": live(options.calibrations)}
    print(write_result("simulator_fidelity", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
