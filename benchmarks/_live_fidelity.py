"""How well the physics that comes with trainpilot predicts live runs that it was not fitted to."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

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
"""Mean absolute error of held-out final losses, in nats/token: at most."""
RANK_TARGET = 0.9
"""Rank correlation over the grid of learning rates and batches: at least, on every model and text."""


def live(root: Path) -> dict[str, Any]:
    """Return the held-out errors of the calibrations in `root`, made here where they are missing, and print them."""
    cases = {f"{model}-{name}": (model, text) for model, (name, text) in product(MODELS, TEXTS.items())}
    found = {name: case(calibration(root / name, *made_of)) for name, made_of in cases.items()}
    for name, entry in found.items():
        print(
            f"{name}: held-out final losses off by {entry['held_out']['final_loss']:.4f} nats, "
            f"rank correlation {entry['grid_rank_correlation']:.3f}"
        )
    return {"unit": "nats/token", "cases": found, **summary(found)}


def calibration(folder: Path, model: str, text: tuple[str, ...]) -> Calibration:
    """Return the calibration of a folder; what of it is missing is run first, about five minutes on two cores."""
    options = CalibrateOptions(out=folder, model=model, text=text, seed=SEED)
    if not (folder / FILE_NAME).is_file():
        calibrate(options, Console())
    [made] = load_calibrations(folder)
    if (made.config, made.effort) != (options.run_config(), options.effort):
        raise SystemExit(f"--calibrations must hold calibrations of this design, got {folder} of another; remove it")
    return made


def case(made: Calibration) -> dict[str, Any]:
    """Return what one calibration says of itself."""
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
    """Return the figures over all cases, each run counting the same, and whether the targets are reached."""
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
