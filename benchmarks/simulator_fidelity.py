"""Measure how well the simulator's physics predicts what it has not seen: published loss curves, and live runs.

python benchmarks/simulator_fidelity.py --curves FOLDER [--calibrations FOLDER]

FOLDER, or the environment variable TRAINPILOT_CURVES, holds csv_25 and csv_100 (or loss_curves_25m and
loss_curves_100m): CSV files of step, lr and loss. They lie in loss_curve_repo of the public repository
https://github.com/thu-yao-01-luo/MultiPowerLaw (MIT licence, Luo et al. 2025).

The live runs are those of `trainpilot calibrate` for three models on two texts; what is missing of them is run first.
Killed, the same command goes on where it was. Their losses are the same on every machine but for rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result
from _live_fidelity import live
from numpy.typing import NDArray

from trainpilot.llm_runtime.simulator.published import PublishedPhysics, fit_published

FOLDERS = {"25M": ("csv_25", "loss_curves_25m"), "100M": ("csv_100", "loss_curves_100m")}
"""What the folder of each model may be called."""
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
UNSEEN = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
SOURCE = "https://github.com/thu-yao-01-luo/MultiPowerLaw"

Curve = NDArray[np.float64]
"""Steps, learning rates and losses, of shape (3, n_points)."""


def published(root: Path) -> dict[str, Any]:
    """Return what the fit to each model's three curves gives on its other schedules, and print it."""
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
    """Fit the three curves of one model and predict all; errors in nats/token."""
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
    """Return the mean absolute error over the curve and the signed error at its end; positive is too high."""
    step, lr, loss = curve
    misses = physics.predict(lr, step) - loss
    return {"mean_absolute_error": float(np.abs(misses).mean()), "final_error": float(misses[-1])}


def mean_error(errors: dict[str, dict[str, float]], names: tuple[str, ...]) -> float:
    """Return the mean over curves, each counting the same."""
    return float(np.mean([errors[name]["mean_absolute_error"] for name in names]))


def read_curve(path: Path) -> Curve:
    """Read a CSV file of step, lr and loss with one line of names."""
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
    # Where the curves lie on this machine does not belong into the result.
    sys.argv = ["FOLDER" if argument == options.curves else argument for argument in sys.argv]
    result = {"published": published(Path(options.curves)), "live": live(options.calibrations)}
    print(write_result("simulator_fidelity", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
