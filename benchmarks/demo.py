"""Run the demo, or take up a finished one, and keep what its runs measured, beside a small sweep.

    python benchmarks/demo.py [--out runs/demo] [--name demo]

The sweep is what the steered run must be seen against: the same run under its base schedule at other learning rates
and warm-ups.
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

from trainpilot.agents.bundle import PolicyBundle

SWEEP = ((1e-3, 12_000), (3e-3, 12_000), (1e-2, 12_000), (1e-3, 120_000), (3e-3, 120_000))
"""Peak learning rates and warm-up tokens (2 % and 20 % of the budget) of the base schedule, beside the demo's own."""


def main() -> None:
    """Run `trainpilot demo` and write `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--name", default="demo")
    options = parser.parse_args()
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "demo", "--out", str(options.out)]
    subprocess.run(command, check=True)
    runs = {name: _summary(options.out / name) for name in ("base", "steered")}
    config = json.loads((options.out / "base" / "config.json").read_text(encoding="utf-8"))
    sweep = [_at(rate, warmup, config, options.out / f"rate-{rate:g}-{warmup}") for rate, warmup in SWEEP]
    provenance = PolicyBundle.load(options.out / "agent" / "policy.safetensors").provenance
    cost = {"policy_training_cost": provenance["training_cost"]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_result(options.name, {**cost, "runs": runs, "base_schedule_elsewhere": sweep}, device))


def _at(rate: float, warmup_tokens: int, config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return losses and time of the demo's run under its base schedule at another learning rate and warm-up."""
    names = ("model", "tokens", "batch_size", "sequence_length", "decisions", "seed")
    arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(config[name]))]
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "replay", "--policy", "none", "--out", str(out)]
    chosen = ["--base-learning-rate", str(rate), "--warmup-tokens", str(warmup_tokens)]
    subprocess.run([*command, *arguments, *chosen], check=True)
    kept = ("final_validation_loss", "final_test_loss", "time_s", "energy_j", "energy_source", "diverged")
    figures = {name: value for name, value in _summary(out).items() if name in kept}
    return {"base_learning_rate": rate, "warmup_tokens": warmup_tokens, **figures}


def _summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
