"""Compare all schedules and tuning-free optimisers with the tuned static baseline on the test cases.

    python benchmarks/baselines.py [--out runs/baselines] [--jobs 0]

This takes about an hour and a half on two cores. If it is interrupted, the same command resumes it; after it has
finished, the same command only recomputes the figures. The full report is OUT/report.html.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _common import write_result

DIGITS = 5
LEFT_OUT = ("points", "cases")
"""Parts of the figures that are not written: the charts' points, and the cases, which are written in short form."""
PER_CASE = ("case", "method", "n_runs", "n_diverged", "n_failed", "validation_loss", "test_loss", "time_s", "energy_j")


def main() -> None:
    """Run `trainpilot compare --cases test` and write `results/baselines.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    command = ["compare", "--cases", "test", "--jobs", str(options.jobs), "--out", str(options.out)]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", *command], check=True)
    comparison = json.loads((options.out / "comparison.json").read_text(encoding="utf-8"))
    figures = json.loads((options.out / "figures.json").read_text(encoding="utf-8"))
    result = {
        "compare": {"seeds": comparison["seeds"], **_how(comparison["provenance"])},
        "cases": [_case(case) for case in comparison["cases"]],
        "tuned": {case: [_tuned(found) for found in all_] for case, all_ in comparison["baselines"].items()},
        "decay_at_equal_rates": _pairs(options.out / "runs.csv"),
        "per_case": [_on_case(found) for found in _rounded(figures["cases"])],
        **{name: value for name, value in _rounded(figures).items() if name not in LEFT_OUT},
    }
    print(write_result("baselines", result, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _how(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: provenance[name] for name in ("jobs", "threads", "tuning_seeds")}


def _case(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a case, with the model's architecture instead of a path on this machine."""
    config = {name: value for name, value in case["config"].items() if name not in ("model", "seed", "device")}
    return {"name": case["name"], "architecture": case["architecture"], **config}


def _tuned(found: Mapping[str, Any]) -> dict[str, Any]:
    config = found["config"]
    return {
        **{name: found[name] for name in ("axis", "method", "n_trials", "on_edge")},
        **{name: config[name] for name in ("base_learning_rate", "batch_size", "schedule", "precision")},
        "warmup_share": round(config["warmup_tokens"] / config["tokens"], 3),
    }


def _pairs(path: Path) -> list[dict[str, Any]]:
    """Return pairs of trials of the search that differ only in the schedule: linear to zero, and constant."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["role"] == "sweep" and row["final_validation_loss"]:
                same = ("case", "seed", "base_learning_rate", "batch_size", "warmup_tokens")
                losses = found.setdefault(tuple(row[name] for name in same), {})
                losses[row["schedule"]] = _rounded(float(row["final_validation_loss"]))
    return [
        {"case": key[0], "seed": int(key[1]), "base_learning_rate": float(key[2]), "batch_size": int(key[3]), **both}
        for key, losses in sorted(found.items(), key=lambda item: (item[0][0], item[0][1], float(item[0][2])))
        if len(both := {name: losses[name] for name in ("linear", "constant") if name in losses}) == 2
    ]


def _on_case(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's losses, modelled costs and multipliers on one case."""
    against = {baseline: found["multipliers"][baseline] for baseline in ("untuned", "tuned")}
    return {**{name: found[name] for name in PER_CASE}, "multipliers": against}


def _rounded(value: Any) -> Any:
    """Round every number to a few digits, and write an estimate as one line: `1.03 [0.98, 1.07]`."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping) and {"value", "low", "high", "censored"} <= value.keys():
        number, low, high = (_rounded(value[name]) for name in ("value", "low", "high"))
        interval = "" if low is None else f" [{low}, {'inf' if high is None else high}]"
        return None if number is None else f"{value['censored']}{number}{interval}"
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
