"""Measure how well the simulator's physics predicts losses that it was not fitted to.

    python benchmarks/simulator_fidelity.py --published FOLDER [--parts curves horizons sweep live longer] [--ship]

FOLDER, or the environment variable TRAINPILOT_PUBLISHED, holds runs that others published; `_published.py` says which,
and where they are from. The parts are

* `curves`: fit three loss curves of one model, predict its curves under six other schedules;
* `horizons`: fit runs of two lengths over learning rate and cool-down, predict the other lengths;
* `sweep`: fit final losses over learning rate, batch, budget and size together with those runs; then leave out the
  largest budget, a batch, a learning rate, and the largest model, and predict them;
* `live`: fit live runs of three small models on two texts, predict held-out ones. These are the runs of `trainpilot
  calibrate`; missing ones are made first, and if the command is interrupted, the same command resumes them.

* `longer`: the same with runs of eight times the budget (`calibrate --effort long`), of four pairs of a model and a
  text; and what the shorter runs alone predict for the longer ones.

Parts that are not asked for are kept from the last result, each with its date and versions. All fits take about half an
hour on one core. `--ship` fits all published runs together and writes the physics that trainpilot ships.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, write_result
from _published import (
    CURVE_FOLDERS,
    CURVE_PARAMETERS,
    FITTED_CURVES,
    UNSEEN_CURVES,
    ScheduleRun,
    multi_power_curve,
    of_schedule_runs,
    schedule_runs,
    step_law,
)
from _simulated import rounded
from rich.console import Console

from trainpilot.experiments.calibrate.calibration import (
    FILE_NAME,
    CalibratedPhysics,
    Calibration,
    fit_error,
    load_calibrations,
)
from trainpilot.experiments.calibrate.command import calibrate
from trainpilot.experiments.calibrate.design import design
from trainpilot.experiments.calibrate.runs import RunFile
from trainpilot.experiments.fit_sweep import predict, usable
from trainpilot.experiments.options import CalibrateOptions, Effort
from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun, Evidence, Role, of_curves
from trainpilot.llm_runtime.simulator.fitting import Fit, Model, fit, fit_physics
from trainpilot.llm_runtime.simulator.sweeps import (
    NEAR,
    FinalLoss,
    borrowed_schedules,
    bounds_outside,
    by_cell,
    of_final_losses,
)

MODELS = ("llama-nano", "gpt2-nano", "phi-nano")
LONGER = (
    ("gpt2-nano", "packages"), ("llama-nano", "packages"), ("llama-nano", "scripts"), ("phi-nano", "scripts"),
)  # fmt: skip
"""Models and texts of the calibrations with longer runs."""
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


def longer(root: Path) -> dict[str, Any]:
    """Return and print how well calibrations with longer runs predict runs that were held out, short and long."""
    found = {}
    for model, text in LONGER:
        folder = root / f"{model}-{text}"
        made = calibration(folder, model, TEXTS[text], "long")
        found[folder.name] = _by_budget(made, folder / "runs")
        print(folder.name, json.dumps(found[folder.name]))
    return {"unit": "nats/token", "cases": found}


def _by_budget(made: Calibration, folder: Path) -> dict[str, Any]:
    """Return the mean errors of final losses by budget; the runs of the calibration lie in `folder`."""
    files = [RunFile.read(folder / f"{setting.name}.json") for setting in design(made.config, "long")]
    runs = [file.run for file in files if file is not None]
    short = [run for run in runs if run.config.tokens == made.config.tokens]
    longer = [run for run in runs if run.config.tokens > made.config.tokens]
    from_short = fit_physics([run for run in short if run.role == "fit"])

    def error(physics: CalibratedPhysics, runs: Sequence[CalibrationRun], role: Role | None = None) -> float | None:
        found = fit_error(physics, [run for run in runs if role in (None, run.role)]).final_loss
        return None if found is None else rounded(found)

    return {
        "held_out": error(made.physics, short, "held-out"),
        "longer": {
            "budget": longer[0].config.tokens / made.config.tokens,
            "n": len(longer),
            "fitted": error(made.physics, longer, "fit"),
            "held_out": error(made.physics, longer, "held-out"),
            "from_the_shorter_runs_alone": error(from_short, longer),
            "from_the_shipped_calibration": error(_shipped(made).physics, longer),
        },
    }


def _shipped(made: Calibration) -> Calibration:
    """Return the shipped calibration, without longer runs, of the same model and text."""
    config = made.config
    return next(
        each for each in load_calibrations() if (each.config.model, each.config.text) == (config.model, config.text)
    )


def calibration(folder: Path, model: str, text: tuple[str, ...], effort: Effort = "standard") -> Calibration:
    """Return the calibration of a folder; missing runs are made first (five to ten minutes on two cores)."""
    options = CalibrateOptions(out=folder, model=model, text=text, seed=SEED, effort=effort)
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


CURVE_LOSS, SWEEP_LOSS, SCHEDULE_LOSS = 11.0, 11.0, 10.9
"""Losses before training, in nats/token: logarithms of the vocabularies."""


def curves(root: Path) -> dict[str, Any]:
    """Return and print the errors on each model's other schedules after a fit to three curves."""
    models = {}
    for size in CURVE_FOLDERS:
        begin = time.perf_counter()
        model = Model(n_parameters=CURVE_PARAMETERS[size], initial_loss=CURVE_LOSS)
        fitted = fit(of_curves([multi_power_curve(root, size, name) for name in FITTED_CURVES]), [model])
        fit_s = time.perf_counter() - begin
        errors = {name: _curve_error(fitted, root, size, name) for name in (*FITTED_CURVES, *UNSEEN_CURVES)}
        means = {
            kind: float(np.mean([errors[name]["mean_absolute_error"] for name in names]))
            for kind, names in (("fitted", FITTED_CURVES), ("unseen", UNSEEN_CURVES))
        }
        print(f"{size}: {means['unseen']:.4f} nats on unseen schedules, {means['fitted']:.4f} on the fitted ones")
        models[size] = {
            "physics": dict(fitted.physics[0].values),
            "fit_s": fit_s,
            "errors": errors,
            "fitted_mean_absolute_error": means["fitted"],
            "unseen_mean_absolute_error": means["unseen"],
        }
    return {"source": "https://github.com/thu-yao-01-luo/MultiPowerLaw", "unit": "nats/token", "models": models}


def _curve_error(fitted: Fit, root: Path, size: str, name: str) -> dict[str, float]:
    """Return the mean absolute error along the curve and the signed error at its end (positive: too high)."""
    evidence = of_curves([multi_power_curve(root, size, name)])
    predicted = fitted.losses(evidence)
    off = (predicted - evidence.losses)[0, 1:]
    end = float((evidence.at_end(predicted) - evidence.final)[0])
    return {"mean_absolute_error": float(np.nanmean(np.abs(off))), "final_error": end}


HORIZON_MODEL, HORIZON_TEXT = 123_587_328, "slimpajama"
FITTED_HORIZONS = (25_000, 50_000)


def horizons(root: Path) -> dict[str, Any]:
    """Return and print the errors at each length of run after a fit to the runs of two lengths."""
    runs = _horizon_runs(root)
    fitted = fit(
        of_schedule_runs([run for run in runs if run.horizon in FITTED_HORIZONS]),
        [Model(n_parameters=HORIZON_MODEL, initial_loss=SCHEDULE_LOSS)],
    )
    found = {}
    for horizon in sorted({run.horizon for run in runs}):
        evidence = of_schedule_runs([run for run in runs if run.horizon == horizon])
        predicted = fitted.losses(evidence)
        off = evidence.at_end(predicted) - evidence.final
        found[str(horizon)] = {
            "fitted": horizon in FITTED_HORIZONS,
            "n_runs": len(evidence),
            "final_error": float(np.abs(off).mean()),
            "bias": float(off.mean()),
            "curve_error": float(np.nanmean(np.abs(predicted - evidence.losses)[:, 1:])),
        }
        print(
            f"{horizon} steps ({len(evidence)} runs): final losses off by {found[str(horizon)]['final_error']:.4f} nats"
        )
    return {
        "source": "https://github.com/fabian-sp/lr-scheduling",
        "unit": "nats/token",
        "horizons": found,
        "wsd_over_cosine": _wsd_over_cosine(fitted, runs),
    }


def _wsd_over_cosine(fitted: Fit, runs: Sequence[ScheduleRun]) -> list[dict[str, float]]:
    """Return the difference of WSD (a fifth of cool-down) and cosine (to zero), measured and predicted."""
    found = []
    for peak, horizon in sorted({(run.peak, run.horizon) for run in runs}):
        at = [run for run in runs if (run.peak, run.horizon) == (peak, horizon)]
        wsd = [run for run in at if run.schedule == "wsd" and run.decay_share == 0.2]
        cosine = [run for run in at if run.schedule == "cos" and run.curve.learning_rate[-1] < 0.01 * peak]
        if not wsd or not cosine:
            continue
        losses = [of_schedule_runs(each) for each in (wsd, cosine)]
        predicted = [float(each.at_end(fitted.losses(each)).mean()) for each in losses]
        measured = [float(each.final.mean()) for each in losses]
        found.append(
            {
                "peak": peak,
                "horizon": horizon,
                "measured": measured[0] - measured[1],
                "predicted": predicted[0] - predicted[1],
            }
        )
    return found


def _horizon_runs(root: Path) -> list[ScheduleRun]:
    return [run for run in schedule_runs(root) if run.n_parameters == HORIZON_MODEL and run.dataset == HORIZON_TEXT]


HELD_BATCH, HELD_RATE = 192, 1.95e-3


def sweep(root: Path) -> dict[str, Any]:
    """Return and print the errors of a fit to a sweep, and of predictions of what was left out of a fit."""
    runs, curves_ = usable(step_law(root)), _horizon_runs(root)
    largest = {n: max(run.steps * run.batch for run in runs if run.n_parameters == n) for n in _sizes(runs)}
    left_out: dict[str, Callable[[FinalLoss], bool]] = {
        "largest_budget": lambda run: run.steps * run.batch > 0.97 * largest[run.n_parameters],
        "one_batch": lambda run: run.batch == HELD_BATCH,
        "one_rate": lambda run: abs(run.learning_rate / HELD_RATE - 1) < 0.01,
        "largest_model": lambda run: run.n_parameters == max(largest),
    }
    whole = _fit_sweep(runs, curves_)
    found: dict[str, Any] = {
        "source": "https://github.com/step-law/steplaw (arXiv 2503.04715)",
        "unit": "nats/token",
        "n_runs": len(runs),
        "fitted": _cells(whole, runs),
        "schedules": _schedules(whole, runs),
        "left_out": {},
    }
    summary = found["fitted"]
    print(f"sweep: {summary['near_error']:.4f} nats near the optimum, regret {summary['regret']:.4f}, "
          f"promise outside {summary['promise']:.4f}")  # fmt: skip
    for name, chosen in left_out.items():
        partial = _fit_sweep([run for run in runs if not chosen(run)], curves_)
        found["left_out"][name] = _left_out(partial, runs, [run for run in runs if chosen(run)])
        print(f"left out {name}: {found['left_out'][name]['near_error']:.4f} nats near the optimum")
    return found


def _sizes(runs: Sequence[FinalLoss]) -> list[int]:
    return sorted({run.n_parameters for run in runs})


def _fit_sweep(runs: Sequence[FinalLoss], curves_: Sequence[ScheduleRun]) -> Fit:
    """Fit the sweep together with whole curves under many schedules, which determine noise and annealing."""
    sizes = _sizes(runs)
    models = [Model(n_parameters=n, initial_loss=SWEEP_LOSS) for n in sizes]
    parts = [
        of_final_losses(runs, sizes),
        borrowed_schedules(runs, sizes),
        bounds_outside(runs, sizes),
        of_schedule_runs(curves_, len(models)),
    ]
    return fit(Evidence.joined(parts), [*models, Model(n_parameters=HORIZON_MODEL, initial_loss=SCHEDULE_LOSS)])


def _cells(fitted: Fit, runs: Sequence[FinalLoss]) -> dict[str, Any]:
    """Return the errors near the optimum of each cell, and the regret of the setting that is predicted to be best."""
    cells_ = []
    for cell in by_cell(runs):
        measured, predicted = np.array([run.final_loss for run in cell]), predict(fitted, cell)
        near = measured < measured.min() + NEAR
        cells_.append(
            {
                "n_parameters": cell[0].n_parameters,
                "tokens": round(cell[0].steps * cell[0].batch * 2048, -8),
                "near_error": float(np.abs(predicted - measured)[near].mean()),
                "regret": float(measured[predicted.argmin()] - measured.min()),
            }
        )
    bounds = bounds_outside(runs, _sizes(runs))
    best = np.array([min(run.final_loss for run in cell) for cell in by_cell(runs)])
    outside = best[bounds.cell] - bounds.at_end(fitted.losses(bounds))
    means = {name: float(np.mean([each[name] for each in cells_])) for name in ("near_error", "regret")}
    return {**means, "promise": float(outside.max()), "cells": cells_}


def _schedules(fitted: Fit, runs: Sequence[FinalLoss]) -> dict[str, float]:
    """Return the mean error against what published curves say about other schedules at each cell's best setting."""
    borrowed = borrowed_schedules(runs, _sizes(runs))
    off = borrowed.at_end(fitted.losses(borrowed)) - borrowed.final
    exact = borrowed.tolerance[:, 0] < 0.02
    return {"wsd_linear_cosine": float(np.abs(off[exact]).mean()), "constant": float(np.abs(off[~exact]).mean())}


def _left_out(fitted: Fit, runs: Sequence[FinalLoss], out: Sequence[FinalLoss]) -> dict[str, float]:
    chosen = set(map(id, out))
    near, errors = [], []
    for cell in by_cell(runs):
        best = min(run.final_loss for run in cell)
        inside = [run for run in cell if id(run) in chosen]
        if inside:
            errors.append(predict(fitted, inside) - [run.final_loss for run in inside])
            near.append(np.array([run.final_loss < best + NEAR for run in inside]))
    off, close = np.concatenate(errors), np.concatenate(near)
    return {
        "n_runs": len(off),
        "n_near": int(close.sum()),
        "near_error": float(np.abs(off[close]).mean()),
        "near_bias": float(off[close].mean()),
    }


SHIPPED = Path(__file__).parent.parent / "llm_runtime" / "simulator" / "shipped" / "published" / "physics.json"
SOURCES = {
    "step-law": "Li et al. 2025, Step Law, https://github.com/step-law/steplaw, arXiv 2503.04715",
    "schedules": "Schaipp et al. 2025, https://github.com/fabian-sp/lr-scheduling (MIT licence)",
    "curves": "Luo et al. 2025, https://github.com/thu-yao-01-luo/MultiPowerLaw (MIT licence)",
}


def ship(root: Path) -> None:
    """Fit all published runs together and write the fitted numbers with their sources."""
    runs, studied = usable(step_law(root)), [run for run in schedule_runs(root) if run.dataset == HORIZON_TEXT]
    sizes = _sizes(runs)
    models = [(f"step-law-{n / 1e6:.0f}M", Model(n_parameters=n, initial_loss=SWEEP_LOSS)) for n in sizes]
    parts = [of_final_losses(runs, sizes), borrowed_schedules(runs, sizes), bounds_outside(runs, sizes)]
    for n in sorted({run.n_parameters for run in studied}):
        parts.append(of_schedule_runs([run for run in studied if run.n_parameters == n], len(models)))
        models.append((f"schedules-{n / 1e6:.0f}M", Model(n_parameters=n, initial_loss=SCHEDULE_LOSS)))
    for size, n in CURVE_PARAMETERS.items():
        names = (*FITTED_CURVES, *UNSEEN_CURVES)
        parts.append(of_curves([multi_power_curve(root, size, name) for name in names], len(models)))
        models.append((f"curves-{size}", Model(n_parameters=n, initial_loss=CURVE_LOSS)))
    fitted = fit(Evidence.joined(parts), [model for _, model in models], max_steps=150)
    assert fitted.law is not None
    named = zip((name for name, _ in models), fitted.physics, strict=True)
    record = {
        "sources": SOURCES,
        "models": {name: physics.to_json() for name, physics in named},
        "law": fitted.law.to_json(),
    }
    write_json(SHIPPED, record)
    print(f"physics: {SHIPPED}")


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"curves": curves, "horizons": horizons, "sweep": sweep}
OWN: dict[str, Callable[[Path], dict[str, Any]]] = {"live": live, "longer": longer}


def main() -> None:
    """Fit, predict, and write `results/simulator_fidelity.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", default=os.environ.get("TRAINPILOT_PUBLISHED"), help="folder of published runs")
    parser.add_argument("--parts", nargs="+", default=[*PARTS, *OWN], choices=[*PARTS, *OWN])
    parser.add_argument(
        "--calibrations", type=Path, default=Path("runs/calibrations"), help="where MODEL-TEXT/calibration.json lie"
    )
    parser.add_argument("--ship", action="store_true", help="write the physics that trainpilot ships, and nothing else")
    options = parser.parse_args()
    if options.published is None:
        raise SystemExit("--published must name the folder of published runs, got none; see benchmarks/_published.py")
    # The path of the data on this machine does not belong in the result.
    sys.argv = ["FOLDER" if argument == options.published else argument for argument in sys.argv]
    if options.ship:
        ship(Path(options.published))
        return
    kept = RESULTS / "simulator_fidelity.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    result = {name: known[name] for name in (*PARTS, *OWN) if name in known}
    for name in options.parts:
        made = OWN[name](options.calibrations) if name in OWN else PARTS[name](Path(options.published))
        result[name] = {"date": datetime.now(UTC).date().isoformat(), "versions": versions(), **made}
        print(write_result("simulator_fidelity", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
