"""Run `trainpilot demo`, or read a finished one, and write the results of its runs.

    python benchmarks/demo.py [--out runs/demo] [--name demo] [--policy default]

The steered run is to be compared with the sweep.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _common import write_result

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.experiments.demo import SWEEP_RATES, best_of, cost_of

KEPT = ("final_validation_loss", "final_test_loss", "tokens", "time_s", "energy_j", "energy_source", "diverged")


def main() -> None:
    """Run `trainpilot demo` and write `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--name", default="demo")
    parser.add_argument("--policy", default="default")
    options = parser.parse_args()
    chosen = ["--out", str(options.out), "--policy", options.policy]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", "demo", *chosen], check=True)
    provenance = PolicyBundle.load(policy_path(options.policy)).provenance
    sweep = [_swept(rate, options.out / f"sweep-{rate:g}") for rate in SWEEP_RATES]
    result = {
        "policy_training_cost": provenance.get("training_cost"),
        "runs": {name: _summary(options.out / name) for name in ("base", "steered")},
        "sweep": sweep,
        "sweep_best_learning_rate": best_of(sweep)["base_learning_rate"],
        "sweep_cost": cost_of(sweep),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_result(options.name, result, device))


def _swept(rate: float, folder: Path) -> dict[str, Any]:
    summary = _summary(folder)
    return {"base_learning_rate": rate, **{name: summary[name] for name in KEPT}}


def _summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
